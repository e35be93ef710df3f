"""A CLIP or SigLIP model as the teacher of a recipe and of `nkd-hf distill`: live, stored, planned and refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_text_models import save_image_text_model
from safetensors.torch import load_file
from tiny import digit_folder, timm_cnn

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    cli,
    distill,
    load_image_processor,
    load_teacher,
    parse_args,
)
from nkd_hf.data import load_image_dataset
from nkd_hf.data.student_datasets import make_evaluation_images
from nkd_hf.models.saving import save_student
from nkd_hf.recipe.fingerprint import check_fingerprint
from nkd_hf.recipe.run_folder import read_history
from nkd_hf.teacher_logits.info import StoreInfo

pytestmark = pytest.mark.usefixtures("no_curves")
NAMES = ["one", "three", "two", "zero"]
PROMPTS = ["a photo of the digit {}.", "{}"]
MODEL = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return digit_folder(tmp_path_factory.mktemp("images"), ["zero", "one", "two", "three"], train=8, validation=4)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    folders = {kind: str(tmp_path_factory.mktemp("teacher") / kind) for kind in ("clip", "siglip")}
    for kind, folder in folders.items():
        save_image_text_model(kind, folder)
    return folders


@pytest.fixture(scope="module")
def quick(images) -> dict:
    return {
        "dataset_name": images, "student": "resnet18", "student_args": MODEL, "image_size": 32, "num_train_epochs": 2,
        "dataloader_num_workers": 0, "dataloader_persistent_workers": False, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip


def top1(images: str, folder: str) -> float:
    """Top-1 of a zero-shot teacher with its own preprocessing."""
    teacher = load_teacher(folder, prompts=PROMPTS, class_names=NAMES)
    split = load_image_dataset(DataArguments(images), 42)["validation"]
    rows = [*make_evaluation_images(split, DataArguments(images), load_image_processor(teacher.model), 42)]
    answers = teacher(torch.stack([row["pixel_values"] for row in rows])).argmax(-1)
    return float(np.mean(answers.numpy() == [row["labels"] for row in rows]))


def test_distill_under_a_zero_shot_teacher(tmp_path, quick, teachers, images, capsys):
    folder, out = teachers["siglip"], tmp_path / "out"
    results = distill(
        **quick, teacher=folder, teacher_prompts=PROMPTS, compare_with_baseline=True, output_dir=out
    )  # fmt: skip
    said = capsys.readouterr().out
    assert f"{folder}: 10 thousand parameters, 32 x 32 pixels, pretrained, used zero-shot by 2 prompts" in said
    # Its accuracy comes first, and it is not trained.
    assert (
        0
        < said.index("The teacher's top-1: ")
        < said.index("Training the baseline")
        < said.index("Training the student")
    )
    assert "Training the teacher" not in said
    assert not (out / "teacher").exists()

    expected = top1(images, folder)
    assert results["teacher"] == pytest.approx(expected, abs=1e-4)
    assert results["models"]["teacher"]["top1"] == pytest.approx(expected, abs=1e-4)
    assert results["models"]["teacher"]["latency_ms"]["p50"] > 0
    assert results["settings"]["teacher_prompts"] == PROMPTS
    assert yaml.safe_load((out / "run.yaml").read_text())["teacher_prompts"] == PROMPTS
    assert "distilled from `siglip` (10 k parameters)" in (out / "student" / "README.md").read_text()
    assert str(tmp_path) not in (out / "report.html").read_text()


def make_recipe(folder: Path, values: dict, *args: str) -> Recipe:
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"report_to": "none", **values}))
    return Recipe(*parse_args(types, args=["--config", str(config), "--output_dir", str(folder / "run"), *args]))


# --- stored ---


@pytest.fixture(scope="module")
def store(tmp_path_factory, quick, teachers) -> Path:
    folder = tmp_path_factory.mktemp("store")
    values = {**quick, "per_device_train_batch_size": 8, "mixup_alpha": 0.8, "report_to": "none"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    options = ["--output", str(folder / "logits"), "--epochs", "2", "--batch_size", "8", "--shard_size", "16"]
    teacher = ["--teacher", teachers["clip"], "--teacher_prompts", *PROMPTS]
    for _ in range(2):  # the second one finds all of it written
        cli.main(["teacher-logits", *options, "--config", str(folder / "config.yaml"), *teacher])
    return folder / "logits"


def test_training_from_a_store_is_live_training_bit_for_bit(tmp_path_factory, quick, store, teachers):
    def train(**given) -> tuple[list[dict], dict]:
        values = {
            **quick, "per_device_train_batch_size": 8, "logging_steps": 1, "mix_pairs": True, "mixup_alpha": 0.8,
            "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05, **given,
        }  # fmt: skip
        folder = tmp_path_factory.mktemp("run")
        recipe = make_recipe(folder, values)
        recipe.train_teacher()
        recipe.train_student()
        log = read_history(folder / "run" / "student")
        losses = [{name: value for name, value in entry.items() if "loss" in name or "nkd" in name} for entry in log]
        return losses, load_file(folder / "run" / "student" / "model.safetensors")

    named = {"teacher": teachers["clip"], "teacher_prompts": PROMPTS}
    live_log, live_weights = train(**named)
    for given in ({}, named):
        log, weights = train(teacher_logits=str(store), **given)
        assert len(log) > 8
        assert log == live_log
        assert all(torch.equal(value, live_weights[name]) for name, value in weights.items())


def test_a_store_is_of_its_prompts(store, teachers):
    info = StoreInfo.read(store)
    assert info.fingerprint["teacher_prompts"] == PROMPTS
    assert (info.teacher.name, info.teacher.architecture) == ("clip", "CLIPModel")
    id2label = dict(enumerate(NAMES))

    def check(info: StoreInfo = info, **given):
        recipe = RecipeArguments(student="resnet18", teacher_logits=str(store), **given)
        check_fingerprint(store, info, recipe, {"seed": 42}, id2label=id2label)

    check()
    check(teacher=teachers["clip"], teacher_prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"teacher_prompts: store \['a photo of the digit {}.', '{}'\], run \['{}'\]"):
        check(teacher=teachers["clip"], teacher_prompts="{}")
    on_hub = dataclasses.replace(
        info, fingerprint=info.fingerprint | {"teacher": "them/clip", "teacher_revision": None}
    )
    check(on_hub, teacher="them/clip", teacher_prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"teacher_prompts: store \['a photo of the digit {}.', '{}'\], run None"):
        check(on_hub, teacher="them/clip")
    with pytest.raises(ValueError, match="teacher_sha256"):
        check(teacher=teachers["siglip"], teacher_prompts=PROMPTS)


def test_a_store_of_other_prompts_is_not_continued(store, quick, teachers, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**quick, "mixup_alpha": 0.8, "report_to": "none"}))
    options = [
        "--output",
        str(store),
        "--epochs",
        "2",
        "--shard_size",
        "16",
        "--config",
        str(tmp_path / "config.yaml"),
    ]
    teacher = ["--teacher", teachers["clip"], "--teacher_prompts", "the digit {}"]
    with pytest.raises(SystemExit, match=r"another store \(teacher_prompts: store \[.*\], run \['the digit {}'\]\)"):
        cli.main(["teacher-logits", *options, *teacher])


# --- planned ---


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_plan_of_a_zero_shot_teacher(kind, quick, teachers, tmp_path, capsys):
    values = {**quick, "num_processes": 1, "num_train_images": 64, "num_classes": 4, "report_to": "none"}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({name: value for name, value in values.items() if name != "dataset_name"})
    )
    options = ["--teacher", teachers[kind], "--teacher_prompts", *PROMPTS, "--finetune_teacher", "auto", "--json"]
    cli.main(["plan", "--config", str(tmp_path / "config.yaml"), *options])
    plan = json.loads(capsys.readouterr().out)
    model = load_teacher(teachers[kind], prompts=PROMPTS, class_names=NAMES).model
    assert plan["teacher"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert plan["teacher"]["image_size"] == [32, 32]
    assert plan["teacher"]["gmacs"] > 0
    assert plan["runs"] == ["student"]
    assert not [note for note in plan["notes"] if "teacher" in note]


# --- refused ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "me/a", "teacher_prompts": "a photo"}, r"teacher_prompts must be texts with one {} each.*got \['a photo'\]"),
        ({"teacher": "me/a", "teacher_prompts": ["{}", "{} {}"]}, "teacher_prompts must be texts with one {} each"),
        ({"teacher": "me/a", "teacher_prompts": []}, "teacher_prompts must be texts with one {} each"),
        ({"teacher": "resnet34", "teacher_prompts": "{}"}, "are for one CLIP or SigLIP model, got teacher='resnet34'"),
        ({"teacher": ["me/a", "me/b"], "teacher_prompts": "{}"}, "are for one CLIP or SigLIP model"),
        ({"teacher_logits": "store", "teacher_prompts": "{}"}, "are for one CLIP or SigLIP model, got teacher=None"),
        ({"teacher": "me/a", "teacher_prompts": "{}", "distillation_loss": "nkd+mgd"}, r"nkd\+mgd reads layers of the teacher"),
        ({"teacher": "me/a", "teacher_prompts": "{}", "finetune_teacher": "always"}, "finetune_teacher must be auto or never"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_a_zero_shot_teacher(given, message):
    with pytest.raises(ValueError, match=message) as error:
        RecipeArguments(student="resnet18", **given)
    assert "\n" not in str(error.value)


def test_prompts_and_models_that_do_not_fit_each_other_are_refused_before_training(tmp_path, quick, teachers):
    cnn = str(tmp_path / "cnn")
    save_student(timm_cnn(), cnn)
    for number, (given, message) in enumerate([
        ({"teacher": teachers["clip"]}, "it classifies by texts, so it needs prompts.*Set teacher_prompts"),
        ({"teacher": cnn, "teacher_prompts": PROMPTS}, "prompts are for a CLIP or SigLIP model"),
    ]):  # fmt: skip
        out = tmp_path / str(number)
        with pytest.raises(ValueError, match=message) as error:
            distill(**quick, **given, output_dir=out)
        assert "\n" not in str(error.value)
        assert not (out / "student").exists()
        assert not (out / "teacher").exists()


def test_prompts_on_the_command_line_and_in_yaml(tmp_path, quick, teachers):
    one = make_recipe(tmp_path, {**quick, "teacher": teachers["clip"], "teacher_prompts": PROMPTS[0]})
    assert one.args.teacher_prompts == PROMPTS[:1]
    (tmp_path / "second").mkdir()
    several = make_recipe(
        tmp_path / "second", {**quick, "teacher": teachers["clip"]}, "--teacher_prompts", *PROMPTS, "--seed", "1"
    )
    assert several.args.teacher_prompts == PROMPTS
