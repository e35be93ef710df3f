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
    create_student,
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
from nkd_hf.recipe.teacher_accuracy import say_teacher_accuracy
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


@pytest.mark.runs
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


def test_a_zero_shot_teacher_that_guesses_is_no_teacher_to_be_trained(teachers, tmp_path, caplog):
    training = DistillationTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    teacher = load_teacher(teachers["clip"], prompts=PROMPTS, class_names=NAMES)
    say_teacher_accuracy({"teacher": {"accuracy": 0.1}}, teacher, timm_cnn(), training)
    assert "a student learns nothing good from it. Set other teacher_prompts, or name another teacher." in caplog.text


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    """A teacher of the same classes in another order, and two more."""
    folder = str(tmp_path_factory.mktemp("teacher") / "cnn")
    torch.manual_seed(3)
    model = create_student("resnet18", id2label=["dog", *NAMES[::-1], "cat"], image_size=32, model_args=MODEL)
    model.timm_model.fc.weight.data.mul_(30)
    save_student(model, folder)
    return folder


def test_distill_under_a_zero_shot_teacher_among_several(tmp_path, quick, teachers, classifier, images, capsys):
    pair, out = [classifier, teachers["clip"]], tmp_path / "out"
    results = distill(**quick, teacher=pair, teacher_prompts=PROMPTS, teacher_weights=[1.0, 3.0], output_dir=out)
    said = capsys.readouterr().out
    assert (
        f"{pair[0]}: 15 thousand parameters, 32 x 32 pixels, pretrained, used 4 of its 6 classes by name, weight"
        in said
    )
    assert f"{pair[1]}: 8 thousand parameters, 32 x 32 pixels, pretrained, used zero-shot by 2 prompts, weight" in said
    assert "Training the teacher" not in said

    members = [load_teacher(classifier), load_teacher(teachers["clip"], prompts=PROMPTS, class_names=NAMES)]
    members[0].selects_classes = True
    mean, split = 0, load_image_dataset(DataArguments(images), 42)["validation"]
    for member, weight in zip(members, (0.25, 0.75), strict=True):
        rows = [*make_evaluation_images(split, DataArguments(images), load_image_processor(member.model), 42)]
        member.align(member.preprocessing, dict(enumerate(NAMES)))
        mean = mean + weight * member(torch.stack([row["pixel_values"] for row in rows])).softmax(-1)
    expected = float(np.mean(mean.argmax(-1).numpy() == [row["labels"] for row in rows]))
    assert results["teacher"] == pytest.approx(expected, abs=1e-4)
    assert results["models"]["teacher"]["top1"] == pytest.approx(expected, abs=1e-4)
    assert (results["settings"]["teacher"], results["settings"]["teacher_prompts"]) == (pair, PROMPTS)
    card = (out / "student" / "README.md").read_text()
    assert "an ensemble of `cnn` (15 k parameters, weight 0.25) and `clip` (8 k parameters, weight 0.75)" in card
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


@pytest.fixture(scope="module")
def train(tmp_path_factory, quick):
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

    return train


@pytest.mark.runs
def test_training_from_a_store_is_live_training_bit_for_bit(train, store, teachers):
    named = {"teacher": teachers["clip"], "teacher_prompts": PROMPTS}
    live_log, live_weights = train(**named)
    for given in ({}, named):
        log, weights = train(teacher_logits=str(store), **given)
        assert len(log) > 8
        assert log == live_log
        assert all(torch.equal(value, live_weights[name]) for name, value in weights.items())


def test_the_store_of_a_zero_shot_teacher_among_several(tmp_path, quick, train, teachers, classifier):
    values = {**quick, "per_device_train_batch_size": 8, "mixup_alpha": 0.8, "report_to": "none"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | {"finetune_teacher": "auto"}))
    options = ["--output", str(tmp_path / "logits"), "--epochs", "2", "--batch_size", "8", "--shard_size", "16"]
    pair = ["--teacher", teachers["clip"], classifier, "--teacher_prompts", *PROMPTS]
    cli.main(["teacher-logits", *options, "--config", str(tmp_path / "config.yaml"), *pair])
    info = StoreInfo.read(tmp_path / "logits")
    assert info.fingerprint["teacher_prompts"] == PROMPTS
    assert [member.architecture for member in info.teacher] == ["CLIPModel", "resnet18"]
    named = {"teacher": [classifier, teachers["clip"]], "teacher_prompts": PROMPTS, "finetune_teacher": "auto"}
    live_log, live_weights = train(**named)
    for given in ({}, named):
        log, weights = train(teacher_logits=str(tmp_path / "logits"), **given)
        assert log == live_log
        assert all(torch.equal(value, live_weights[name]) for name, value in weights.items())
    with pytest.raises(ValueError, match=r"teacher_prompts: store \[.*, '{}'\], run \['{}'\]"):
        train(teacher_logits=str(tmp_path / "logits"), **named | {"teacher_prompts": "{}"})


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


def test_the_plan_of_a_zero_shot_teacher_among_several(quick, teachers, classifier, tmp_path, capsys):
    values = {**quick, "num_processes": 1, "num_train_images": 64, "num_classes": 4, "report_to": "none"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))

    def plan(*names: str) -> dict:
        options = ["--teacher", *names, "--teacher_prompts", *PROMPTS, "--json"]
        cli.main(["plan", "--config", str(tmp_path / "config.yaml"), *options])
        return json.loads(capsys.readouterr().out)

    planned = plan(classifier, teachers["clip"])
    opened = load_teacher([classifier, teachers["clip"]], prompts=PROMPTS, class_names=NAMES)
    members = planned["teacher"]["members"]
    assert [each["num_classes"] for each in members] == [6, 4]
    for each, member in zip(members, opened.members, strict=True):
        assert each["parameters"] == sum(parameter.numel() for parameter in member.model.parameters())
    assert not [note for note in planned["notes"] if "prompts" in note]
    assert any("no teacher is one" in note for note in plan(classifier, classifier)["notes"])


@pytest.mark.parametrize("finetune", [[], ["--finetune_teacher", "auto"]])
def test_the_plan_says_that_a_zero_shot_teacher_needs_prompts(finetune, quick, teachers, tmp_path, capsys):
    values = {**quick, "num_processes": 1, "num_train_images": 64, "num_classes": 4, "report_to": "none"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    cli.main(["plan", "--config", str(tmp_path / "config.yaml"), "--teacher", teachers["clip"], *finetune, "--json"])
    plan = json.loads(capsys.readouterr().out)
    expected = f"the teacher {teachers['clip']} classifies by texts: the run stops. Set teacher_prompts"
    assert [note for note in plan["notes"] if "teacher" in note] == [expected]
    assert plan["runs"] == ["student"]


# --- refused ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "me/a", "teacher_prompts": "a photo"}, r"teacher_prompts must be texts with one {} each.*got \['a photo'\]"),
        ({"teacher": "me/a", "teacher_prompts": ["{}", "{} {}"]}, "teacher_prompts must be texts with one {} each"),
        ({"teacher": "me/a", "teacher_prompts": []}, "teacher_prompts must be texts with one {} each"),
        ({"teacher": "resnet34", "teacher_prompts": "{}"}, "are for a CLIP or SigLIP model, got teacher='resnet34'"),
        ({"teacher": ["me/a", "resnet34"], "teacher_prompts": "{}"}, "each of several teachers must be trained already"),
        ({"teacher_logits": "store", "teacher_prompts": "{}"}, "are for a CLIP or SigLIP model, got teacher=None"),
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
        ({"teacher": [cnn, cnn], "teacher_prompts": PROMPTS}, "prompts are for a CLIP or SigLIP model.*teacher_prompts"),
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
