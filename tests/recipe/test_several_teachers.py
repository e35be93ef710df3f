"""Several teachers as one in a recipe and in `nkd-hf distill`: live, stored, planned and refused."""

import contextlib
import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from command_runs import run
from processes import in_processes
from safetensors.torch import load_file
from tiny import digit_folder

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
from nkd_hf.hub.teacher_logits import store_card
from nkd_hf.models.saving import save_student
from nkd_hf.recipe import distill as distill_module
from nkd_hf.recipe.fingerprint import check_fingerprint
from nkd_hf.recipe.run_folder import read_history, unlock_folder
from nkd_hf.teacher_logits.compression import sparse_logits
from nkd_hf.teacher_logits.info import StoreInfo
from nkd_hf.teacher_logits.store import TeacherLogits

pytestmark = pytest.mark.usefixtures("no_curves")
NAMES = ["one", "three", "two", "zero"]
MODEL = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
# Two teachers of other sizes and pixels, whose classes have other orders, and one of them has more.
TEACHERS = {
    "a": {"id2label": ["zero", "two", "three", "one"], "image_size": 40},
    "b": {"id2label": ["dog", *NAMES, "cat"], "image_size": 32, "image_mean": [0.1, 0.2, 0.3], "crop_pct": 0.5},
    "pets": {"id2label": ["dog", "cat"], "image_size": 32},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return digit_folder(tmp_path_factory.mktemp("images"), ["zero", "one", "two", "three"], train=8, validation=4)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, images) -> dict[str, str]:
    """Untrained teachers, whose answers differ from image to image."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed, (name, settings) in enumerate(TEACHERS.items()):
        torch.manual_seed(seed)
        model = create_student("resnet18", model_args=MODEL, **settings).eval()
        with torch.no_grad():
            logits = model(torch.stack([row["pixel_values"] for row in held_out(images, model)])).logits
            head, scale = model.timm_model.fc, 3 / logits.std(0)
            head.weight *= scale[:, None]
            head.bias.sub_(logits.mean(0)).mul_(scale)
        save_student(model, str(folder / name))
    return {name: str(folder / name) for name in TEACHERS}


def held_out(images: str, model: torch.nn.Module) -> list[dict]:
    """The images of the evaluation, as a model wants them."""
    split = load_image_dataset(DataArguments(images), 42)["validation"]
    return [*make_evaluation_images(split, DataArguments(images), load_image_processor(model), 42)]


@pytest.fixture(scope="module")
def quick(images) -> dict:
    return {
        "dataset_name": images, "student": "resnet18", "student_args": MODEL, "image_size": 32, "num_train_epochs": 2,
        "dataloader_num_workers": 0, "dataloader_persistent_workers": False, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip


def top1_of_mean(images: str, members: list[str], weights: list[float]) -> float:
    """Top-1 of the weighted mean of the probabilities, each teacher with its own preprocessing."""
    total = 0
    for name, weight in zip(members, weights, strict=True):
        member = load_teacher(name)
        member.selects_classes = True
        member.align(member.preprocessing, dict(enumerate(NAMES)))
        rows = held_out(images, member.model)
        total = total + weight * torch.stack([member(row["pixel_values"][None])[0].softmax(-1) for row in rows])
    return float(np.mean(total.argmax(-1).numpy() == [row["labels"] for row in rows]))


@pytest.mark.runs
def test_a_run_under_two_teachers_from_its_plan_to_its_report(tmp_path, quick, teachers, images, monkeypatch, capsys):
    pair = [teachers["a"], teachers["b"]]
    arguments = {**quick, "teacher": pair, "teacher_weights": [3.0, 1.0], "output_dir": tmp_path / "out"}

    def stop(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "deploy", stop)
        with pytest.raises(OSError, match="No space"):
            distill(**arguments)
    said = capsys.readouterr().out
    assert "the mean of 2 teachers' probabilities" in said
    assert re.search(
        rf"teacher 1 +{pair[0]}: 15 thousand .*40 x 40 pixels, pretrained, used as it is, weight 0.75", said
    )
    assert "pretrained, used 4 of its 6 classes by name, weight 0.25" in said
    assert f"The teacher {pair[0]}, {pair[1]}: 30 thousand parameters, pretrained" in said
    # The same command goes on, and so does the record of the run as its configuration.
    record = tmp_path / "out" / "run.yaml"
    settings = yaml.safe_load(record.read_text())
    assert (settings["teacher"], settings["teacher_weights"]) == (pair, [3.0, 1.0])
    (tmp_path / "run.yaml").write_text(record.read_text())
    weights = (tmp_path / "out" / "student" / "model.safetensors").stat().st_mtime_ns
    code, printed, error = run(
        capsys, "distill", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out")
    )
    assert code == 0, error
    assert "is trained already" in printed
    assert (tmp_path / "out" / "student" / "model.safetensors").stat().st_mtime_ns == weights
    assert f"teacher ({pair[0]}, {pair[1]})" in printed

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    top1 = top1_of_mean(images, pair, [0.75, 0.25])
    assert results["teacher"] == pytest.approx(top1, abs=1e-4)
    figures = results["models"]["teacher"]
    assert figures["top1"] == pytest.approx(top1, abs=1e-4)
    assert figures["parameters"] == sum(load_teacher(name).model.num_parameters() for name in pair)
    assert figures["latency_ms"]["p50"] > 0
    assert (results["settings"]["teacher"], results["settings"]["teacher_weights"]) == (pair, [3.0, 1.0])
    card = (tmp_path / "out" / "student" / "README.md").read_text()
    assert (
        "distilled from an ensemble of `a` (15 k parameters, weight 0.75) and `b` (15 k parameters, weight 0.25)"
        in card
    )
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()


def test_the_mean_is_measured_on_the_students_pixels_too(tmp_path, quick, teachers):
    """Of a teacher whose pixels are the student's, and one whose are not, each sees its own."""
    values = {**quick, "teacher": [teachers["a"], teachers["b"]], "finetune_teacher": "auto", "teacher_dtype": "bf16"}
    recipe = make_recipe(tmp_path, values)
    recipe.measure_teacher()
    assert {*recipe.accuracies} == {"teacher", "teacher_on_student_pixels"}
    assert [member.has_own_dtype for member in recipe.teacher.members] == [False, False]  # its copies have


@pytest.mark.runs
def test_two_processes_measure_the_mean_as_one_does(tmp_path, quick, teachers):
    """Thirteen images in batches of four, from a loader for each teacher: each image counts once."""
    pair = {"teacher": [teachers["a"], teachers["b"]], "teacher_weights": [1.0, 3.0]}
    values = {**quick, **pair, "finetune_teacher": "auto", "max_eval_samples": 13}

    def measure(batch_size: int) -> dict:
        recipe = make_recipe(tmp_path, {**values, "per_device_eval_batch_size": batch_size})
        recipe.measure_teacher()
        unlock_folder(recipe.folder)
        return recipe.accuracies

    def work() -> None:
        accuracies = measure(4)
        if PartialState().is_main_process:
            (tmp_path / "measured.json").write_text(json.dumps(accuracies))

    assert in_processes(2, work, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()[-3000:]
    alone = measure(13)
    assert json.loads((tmp_path / "measured.json").read_text()) == alone
    assert len({values["accuracy"] for values in alone.values()}) == 2


def make_recipe(folder: Path, values: dict) -> Recipe:
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"report_to": "none", **values}))
    return Recipe(*parse_args(types, args=["--config", str(config), "--output_dir", str(folder / "run")]))


# --- stored ---


@pytest.fixture(scope="module")
def train(tmp_path_factory, quick):
    """Trains once for equal arguments, and returns the log and the weights of the student."""

    @functools.cache
    def train(**given):
        values = {
            **quick, "per_device_train_batch_size": 8, "logging_steps": 1, "mix_pairs": True, "mixup_alpha": 0.8,
            "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
        }  # fmt: skip
        folder = tmp_path_factory.mktemp("run")
        recipe = make_recipe(folder, values)
        recipe.train_student()
        log = [
            {name: value for name, value in entry.items() if "loss" in name or "nkd" in name}
            for entry in read_history(folder / "run" / "student")
        ]
        return recipe, log, load_file(folder / "run" / "student" / "model.safetensors")

    return train


@pytest.fixture(scope="module")
def store(tmp_path_factory, quick, teachers) -> Path:
    folder = tmp_path_factory.mktemp("store")
    values = {
        **quick, "per_device_train_batch_size": 8, "mixup_alpha": 0.8, "report_to": "none",
        "finetune_teacher": "auto",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    options = ["--output", str(folder / "logits"), "--epochs", "2", "--batch_size", "8", "--shard_size", "16"]
    pair = ["--teacher", teachers["a"], teachers["b"], "--teacher_weights", "3", "1"]
    for _ in range(2):  # the second one finds all of it written
        cli.main(["teacher-logits", *options, "--config", str(folder / "config.yaml"), *pair])
    options[1] = str(folder / "top2")
    more = ["--distillation_loss", "kd+nkd", "--top_k", "2"]
    cli.main(["teacher-logits", *options, "--config", str(folder / "config.yaml"), *pair, *more])
    return folder / "logits"


@pytest.mark.runs
def test_training_from_a_store_is_live_training_bit_for_bit(train, store, teachers):
    pair = (teachers["a"], teachers["b"])
    live, live_log, live_weights = train(teacher=pair, teacher_weights=(3.0, 1.0), finetune_teacher="auto")
    for named in ({}, {"teacher": pair[::-1], "teacher_weights": (0.25, 0.75)}):
        stored, log, weights = train(teacher_logits=str(store), **named)
        assert len(log) > 8
        assert log == live_log
        assert all(torch.equal(value, live_weights[name]) for name, value in weights.items())
        assert stored.results["teacher"] == pytest.approx(live.results["teacher"])
        assert stored.teacher is None
    card = (stored.folder / "student" / "README.md").read_text()
    assert (
        "distilled from an ensemble of `a` (15 k parameters, weight 0.75) and `b` (15 k parameters, weight 0.25)"
        in card
    )


def test_a_store_of_the_largest_logits_is_of_the_mean(train, store, teachers):
    """Its rows are those of the logits of the mean, and several losses train from it."""
    largest, full = TeacherLogits(store.parent / "top2"), TeacherLogits(store)
    assert largest.info.fingerprint == full.info.fingerprint
    assert largest.info.teacher == full.info.teacher
    for epoch in range(2):
        positions = range(full.info.num_samples)
        rows = full.read(epoch, positions)
        expected = sparse_logits(rows["logits"], rows["target"].long(), 2, [1.0, 4.0])
        found = largest.read(epoch, positions)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], values) for name, values in expected.items())
    loss = {"distillation_loss": "kd+nkd"}
    _, log, _ = train(
        teacher_logits=str(largest.folder), **loss, teacher=(teachers["a"], teachers["b"]), teacher_weights=(3, 1)
    )
    _, exact, _ = train(teacher_logits=str(full.folder), **loss)
    assert len(log) == len(exact) > 8
    values, exact_values = ([entry["loss"] for entry in each if "loss" in entry] for each in (log, exact))
    assert values == pytest.approx(exact_values, rel=0.05)
    assert log[0]["nkd_target"] == pytest.approx(exact[0]["nkd_target"], rel=1e-6)
    assert values != exact_values


@pytest.mark.runs
def test_a_store_names_all_teachers_and_is_of_no_others(store, teachers, tmp_path):
    info = StoreInfo.read(store)
    assert [(teacher.name, teacher.weight) for teacher in info.teacher] == [("a", 0.75), ("b", 0.25)]
    assert info.fingerprint["teacher"] == ["a", "b"]
    assert info.fingerprint["teacher_weights"] == [0.75, 0.25]
    a, b = teachers["a"], teachers["b"]
    run = {"seed": 42}

    def check(**given):
        check_fingerprint(store, info, RecipeArguments(student="resnet18", teacher_logits=str(store), **given), run)

    check()
    check(teacher=[a, b], teacher_weights=[3, 1])
    check(teacher=[b, a], teacher_weights=[2, 6])
    for given in (
        {"teacher": [b, a], "teacher_weights": [3, 1]},
        {"teacher": [a, b]},
        {"teacher": [a, b, b], "teacher_weights": [6, 1, 1]},
        {"teacher": [a, "timm/resnet34.tv_in1k"], "teacher_weights": [3, 1]},
        {"teacher": a},
        {"teacher": "timm/resnet34.tv_in1k"},
    ):
        with pytest.raises(ValueError, match=r"are not of this run: .*teacher\w*: store \[.*\], run ") as error:
            check(**given)
        assert "\n" not in str(error.value)
    assert (
        "- teachers, whose mean probabilities these are: `a`, `resnet18`, 0.0 M parameters, weight 0.75; `b`,"
        in store_card(info, "x")
    )
    # And a store of one is of no ensemble.
    alone = dataclasses.replace(
        info,
        fingerprint={
            "seed": 42,
            "teacher": "a",
            "teacher_revision": None,
            "teacher_sha256": info.fingerprint["teacher_sha256"][0],
        },
    )
    check_fingerprint(store, alone, RecipeArguments(student="resnet18", teacher=a, teacher_logits=str(store)), run)
    with pytest.raises(ValueError, match="teacher_weights: store None, run"):
        check_fingerprint(
            store, alone, RecipeArguments(student="resnet18", teacher=[a, b], teacher_logits=str(store)), run
        )


def test_teachers_on_the_hub_are_compared_by_their_ids(store):
    info = StoreInfo.read(store)
    fingerprint = {
        "teacher": ["them/a", "them/b"],
        "teacher_revision": [None, None],
        "teacher_sha256": ["0", "1"],
        "teacher_weights": [0.5, 0.5],
    }
    info = dataclasses.replace(info, fingerprint=fingerprint)
    recipe = RecipeArguments(student="resnet18", teacher=["them/b", "them/a"], teacher_logits="store")
    check_fingerprint(store, info, recipe, {})
    with pytest.raises(ValueError, match=r"teacher: store \['them/a', 'them/b'\], run \['them/a', 'them/c'\]"):
        check_fingerprint(store, info, dataclasses.replace(recipe, teacher=["them/c", "them/a"]), {})


def test_a_store_of_other_weights_is_not_continued(store, quick, teachers, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**quick, "mixup_alpha": 0.8, "report_to": "none", "finetune_teacher": "auto"})
    )
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
    with pytest.raises(SystemExit, match=r"another store \(teacher_weights: store \[0.75, 0.25\], run \[0.5, 0.5\]\)"):
        cli.main(["teacher-logits", *options, "--teacher", teachers["a"], teachers["b"]])


# --- planned ---


def test_the_plan_counts_all_teachers(quick, teachers, tmp_path, capsys):
    values = {**quick, "num_processes": 2, "num_train_images": 64, "num_classes": 4, "report_to": "none"}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({name: value for name, value in values.items() if name != "dataset_name"})
    )

    def plan(*names, **options):
        more = [word for name, value in options.items() for word in (f"--{name}", *value)]
        cli.main(["plan", "--config", str(tmp_path / "config.yaml"), "--teacher", *names, *more, "--json"])
        return json.loads(capsys.readouterr().out)

    alone = [plan(teachers[name]) for name in ("a", "b")]
    both = plan(teachers["a"], teachers["b"], teacher_weights=["3", "1"])
    assert both["runs"] == ["student"]
    for name in ("parameters", "gmacs"):
        assert both["teacher"][name] == pytest.approx(sum(each["teacher"][name] for each in alone))
    assert both["teacher"]["members"] == [
        each["teacher"] | {"weight": weight} for each, weight in zip(alone, (0.75, 0.25), strict=True)
    ]
    for part in ("memory", "disk"):
        assert both[part]["teacher"] == sum(each[part]["teacher"] for each in alone)
    assert [note for note in both["notes"] if "classes" in note] == [
        f"the teacher {teachers['b']} has 6 classes and the student is planned with 4: the run stops unless the dataset has as "
        "many as the teacher (set num_classes), or the teacher's include the dataset's by name"
    ]
    # Only a teacher with more classes, which are matched by name, selects the data's.
    for options in ({"ignore_label_names": ["true"]}, {"num_classes": ["8"]}):
        assert plan(teachers["b"], **options)["notes"][-1].endswith("as many as the teacher (set num_classes)")
    unknown = plan(teachers["a"], "them/unknown")
    assert unknown["teacher"]["parameters"] is None
    assert "teacher 'them/unknown' is not on this machine" in unknown["notes"][0]
    cli.main(["plan", "--config", str(tmp_path / "config.yaml"), "--teacher", teachers["a"], teachers["b"]])
    printed = capsys.readouterr().out
    assert "teacher         2, whose probabilities are averaged: 29,6" in printed
    assert f"                {teachers['b']}: 14,8" in printed
    assert printed.count("weight 0.5") == 2


# --- refused ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": ["me/a", "resnet34"]}, r"must be trained already, got the architecture 'resnet34'. Train it first, alone, and name its folder"),
        ({"teacher": ["timm/resnet34.a1_in1k", "me/a"], "teacher_init": "random"}, "teacher_init is random"),
        ({"teacher": ["me/a", "me/b"], "finetune_teacher": "always"}, "finetune_teacher must be auto or never for several teachers"),
        ({"teacher": ["me/a", "me/b"], "distillation_loss": "nkd+mgd"}, r"reads layers of one teacher, got teacher=\['me/a', 'me/b'\]"),
        ({"teacher": ["me/a", "me/b"], "distillation_loss": "uskd"}, "has no teacher, got teacher="),
        ({"teacher": ["me/a", "me/b"], "teacher_weights": [1.0]}, r"teacher_weights must be 2 positive numbers.* got \[1.0\]"),
        ({"teacher": ["me/a", "me/b"], "teacher_weights": [1.0, 0.0]}, r"teacher_weights must be 2 positive numbers"),
        ({"teacher": "me/a", "teacher_weights": [1.0]}, r"teacher_weights must be omitted for one teacher"),
        ({"teacher_logits": "store", "teacher_weights": [1.0]}, r"teacher_weights must be omitted for one teacher"),
        ({"teacher": ["me/a", ""]}, "teacher has no name"),
        ({"teacher": []}, "teacher has no name"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_several_teachers(given, message):
    with pytest.raises(ValueError, match=message) as error:
        RecipeArguments(student="resnet18", **given)
    assert "\n" not in str(error.value)


def test_a_list_of_one_is_one_teacher():
    assert RecipeArguments(student="resnet18", teacher=["me/a"]) == RecipeArguments(student="resnet18", teacher="me/a")


@pytest.mark.parametrize("finetune_teacher", ["auto", "never"])
def test_a_member_that_would_have_to_be_fine_tuned_is_named(tmp_path, quick, teachers, finetune_teacher):
    arguments = {**quick, "teacher": [teachers["a"], teachers["pets"]], "finetune_teacher": finetune_teacher}
    with pytest.raises(
        ValueError, match=r"pets has 2 classes.*fine-tune it on these classes first, alone, and name its folder"
    ) as error:
        distill(**arguments, output_dir=tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "student").exists()


def test_a_member_without_a_folder_or_of_another_number_of_classes(tmp_path, quick, teachers):
    with pytest.raises((ValueError, SystemExit), match="nowhere"):
        distill(**quick, teacher=[teachers["a"], str(tmp_path / "nowhere")], output_dir=tmp_path / "out")
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "out" / "run.yaml").unlink()
    with pytest.raises(ValueError, match=f"teacher must have 4 classes.*, got 6 of {teachers['b']}"):
        distill(
            **quick, teacher=[teachers["a"], teachers["b"]], ignore_label_names=True, output_dir=tmp_path / "other"
        )
