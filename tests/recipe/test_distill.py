"""`nkd-hf distill`: own images and a pretrained teacher become a student, its ONNX files, figures and a report."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from accelerate import PartialState
from command_runs import run
from PIL import Image
from processes import in_processes
from safetensors.torch import load_file
from tiny import digit_folder
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.training_args import OptimizerNames

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    RecipeArguments,
    cli,
    create_student,
    distill,
    parse_args,
)
from nkd_hf.data import load_image_dataset
from nkd_hf.models import teacher_loading
from nkd_hf.models.saving import save_student
from nkd_hf.recipe import checks, preparation, time_budget
from nkd_hf.recipe import distill as distill_module
from nkd_hf.recipe import recipe as recipe_module
from nkd_hf.recipe.crops import note_crops
from nkd_hf.recipe.defaults import fixed_defaults, set_defaults, set_patience
from nkd_hf.recipe.deployment import _image_reader
from nkd_hf.recipe.time_budget import Speed

pytestmark = pytest.mark.usefixtures("no_curves")
NAMES = ["one", "three", "two", "zero"]
MODEL = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
TEACHERS_PIXELS = {
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3, "crop_pct": 0.95, "interpolation": "bicubic"
}  # fmt: skip
QUICK = {
    "image_size": 32, "num_train_epochs": 2, "teacher_epochs": 1, "dataloader_num_workers": 0, "use_cpu": True,
    "dataloader_persistent_workers": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A folder of four unequal classes, and a teacher of two others with pixels of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    images = digit_folder(folder / "images", ["zero", "one", "two", "three"], train=[12, 4, 12, 10], validation=3)
    torch.manual_seed(0)
    teacher = create_student("resnet18", id2label=["cat", "dog"], image_size=40, model_args=MODEL, **TEACHERS_PIXELS)
    save_student(teacher, str(folder / "teacher"))
    return {
        "dataset_name": images, "teacher": str(folder / "teacher"), "student": "resnet18", "student_args": MODEL,
        "compare_with_baseline": True,
    }  # fmt: skip


def command_line(arguments: dict) -> list[str]:
    words = []
    for name, value in arguments.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict | bool) else str(value)]
    return words


@pytest.fixture(scope="module")
def starts(tmp_path_factory, inputs) -> tuple[Path, str, str]:
    """The folder of a command that was stopped after its trainings and started again, and what each start printed."""
    folder = tmp_path_factory.mktemp("distill") / "out"
    arguments = command_line({**inputs, **QUICK, "output_dir": str(folder)})

    def stop(*args):
        raise OSError("No space left on device")

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as first:
        patch.setattr(distill_module, "deploy", stop)
        with pytest.raises(SystemExit, match="2"):
            cli.main(["distill", *arguments])
    assert not (folder / "results.json").exists()
    with contextlib.redirect_stdout(io.StringIO()) as second:
        cli.main(["distill", *arguments])
    return folder, first.getvalue(), second.getvalue()


@pytest.fixture(scope="module")
def out(starts) -> Path:
    return starts[0]


@pytest.fixture(scope="module")
def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.mark.runs
def test_results_have_the_figures_of_all_models(out, results):
    assert {
        "teacher",
        "baseline",
        "distilled",
        "agreement_with_teacher",
        "settings",
        "dataset",
        "versions",
    } <= results.keys()
    assert list(results["models"])[:4] == ["teacher", "baseline", "student", "student_onnx"]
    for name, figures in results["models"].items():
        assert {
            "top1",
            "balanced_accuracy",
            "ece",
            "parameters",
            "size_bytes",
            "latency_ms",
            "images_per_second",
        } <= figures.keys()
        assert "top5" not in figures  # four classes
        assert figures["latency_ms"].keys() == {"p50", "p95"}
        assert 0 < figures["latency_ms"]["p50"] <= figures["latency_ms"]["p95"], name
    models = results["models"]
    assert models["student"]["top1"] == results["distilled"] == models["student_onnx"]["top1"]
    assert models["baseline"]["top1"] == results["baseline"]
    assert models["teacher"]["top1"] == results["teacher"]
    assert models["student"]["size_bytes"] == (out / "student" / "model.safetensors").stat().st_size
    assert models["student_onnx"]["size_bytes"] == (out / "student" / "onnx" / "model.onnx").stat().st_size
    assert set(results["per_class"]) == set(NAMES)
    assert results["per_class"]["one"].keys() == {"support", "teacher", "baseline", "student"}
    support = sum(entry["support"] * entry["student"] for entry in results["per_class"].values())
    assert support / 12 == pytest.approx(models["student"]["top1"], abs=1e-3)
    assert results["dataset"]["images"] == {"train": 38, "validation": 12}
    # Rounded: no number has more than six digits.
    numbers = re.findall(r"\d+\.\d+", json.dumps({**models, "per_class": results["per_class"]}))
    assert max(len(number.replace(".", "").lstrip("0")) for number in numbers) <= 6


@pytest.mark.runs
def test_the_onnx_file_gives_the_students_logits(out, inputs):
    image = next(Path(inputs["dataset_name"], "validation").rglob("*.png"))
    processor = AutoImageProcessor.from_pretrained(out / "student")
    student = AutoModelForImageClassification.from_pretrained(out / "student").eval()
    pixels = processor(Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
    session = onnxruntime.InferenceSession(out / "student" / "onnx" / "model.onnx")
    (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, student(pixels).logits.numpy(), atol=1e-4)


def test_what_lies_in_the_folder(out, results):
    assert {"teacher", "baseline", "student", "results.json", "accuracy.png", "report.html", "run.yaml"} <= {
        path.name for path in out.iterdir()
    }
    page = (out / "report.html").read_text()
    assert f"{100 * results['models']['student']['top1']:.1f}" in page
    card = (out / "student" / "README.md").read_text()
    assert "## Deployment" in card
    assert "| `onnx/model.onnx` |" in card
    assert f"divide the logits by {results['temperature']:g}" in card
    saved = AutoModelForImageClassification.from_pretrained(out / "teacher")
    assert [saved.config.id2label[number] for number in range(4)] == NAMES


def test_the_record_of_a_run_is_a_configuration_of_a_recipe(out):
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    recipe, data, training = parse_args(types, args=["--config", str(out / "run.yaml"), "--output_dir", "elsewhere"])
    assert (recipe.finetune_teacher, recipe.teacher_epochs, training.num_train_epochs) == ("auto", 1, 2)
    assert yaml.safe_load((out / "run.yaml").read_text())["learning_rate"] == training.learning_rate == 2e-3
    assert data.random_resized_crop == [0.5, 1.0]
    # The student began with random weights, so it took the teacher's pixels, but for their size.
    assert {name: recipe.preprocessing[name] for name in TEACHERS_PIXELS} == TEACHERS_PIXELS
    pixels = yaml.safe_load((out / "student" / "config.json").read_text())["pretrained_cfg"]
    assert (pixels["mean"], pixels["crop_pct"], pixels["interpolation"]) == ([0.5, 0.4, 0.3], 0.95, "bicubic")
    assert pixels["input_size"] == [3, 32, 32]


def test_a_run_whose_report_is_left_needs_no_model_but_its_own(tmp_path, out, inputs, monkeypatch, capsys):
    folder = tmp_path / "out"
    shutil.copytree(out, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    (folder / ".unreported").touch()
    before = (folder / "run.yaml").read_bytes()
    monkeypatch.setattr(preparation, "create_model", None)
    monkeypatch.setattr("nkd_hf.models.teacher_loading.open_pretrained", None)
    results = distill(**inputs, **QUICK, output_dir=folder)
    assert "are trained: only the report is unfinished" in capsys.readouterr().out
    assert results == json.loads((out / "results.json").read_text())
    assert not (folder / ".unreported").exists()
    assert (folder / "run.yaml").read_bytes() == before


def test_data_and_teacher_are_opened_once(tmp_path, inputs, monkeypatch, caplog):
    opened = []
    open_model = teacher_loading.open_pretrained
    monkeypatch.setattr(
        teacher_loading, "open_pretrained", lambda name, **options: opened.append(name) or open_model(name, **options)
    )
    images = digit_folder(tmp_path / "images", ["zero", "one", "two"], train=4, validation=2)
    shutil.rmtree(Path(images) / "validation" / "two")
    (Path(images) / "validation" / "two").mkdir()
    arguments = {
        **inputs,
        **QUICK,
        "dataset_name": images,
        "output_dir": tmp_path / "run",
        "finetune_teacher": "never",
    }
    with pytest.raises(ValueError, match="set finetune_teacher to auto"):
        distill(**arguments)
    assert opened == [inputs["teacher"]]
    assert sum("two" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("changes", "given", "recorded", "expected"),
    [
        ({}, {"output_dir"}, None, TEACHERS_PIXELS),
        ({}, {"output_dir", "image_mean"}, None, TEACHERS_PIXELS | {"image_mean": None}),
        ({"student": "TEACHER"}, {"output_dir"}, None, dict.fromkeys(TEACHERS_PIXELS)),
        ({"teacher": "resnet18"}, {"output_dir"}, None, dict.fromkeys(TEACHERS_PIXELS)),
        ({"teacher": ["TEACHER", "OTHER"]}, {"output_dir"}, None, {"image_mean": None, "image_std": [0.5] * 3, "crop_pct": 0.95}),
        ({}, {"output_dir"}, {"image_mean": None, "seed": 42}, dict.fromkeys(TEACHERS_PIXELS)),
        ({}, {"output_dir"}, TEACHERS_PIXELS, TEACHERS_PIXELS),
        ({}, {"output_dir", "crop_pct"}, {"crop_pct": 0.8, "image_mean": None}, dict.fromkeys(TEACHERS_PIXELS)),
    ],
)  # fmt: skip
def test_which_pixels_a_student_takes_from_its_teacher(tmp_path, inputs, changes, given, recorded, expected):
    other = {**TEACHERS_PIXELS, "image_mean": [0.1] * 3}
    model = create_student("resnet18", id2label=["cat", "dog"], image_size=32, model_args=MODEL, **other)
    save_student(model, str(tmp_path / "other"))
    folders = {"TEACHER": inputs["teacher"], "OTHER": str(tmp_path / "other")}
    read = lambda name: [folders[each] for each in name] if isinstance(name, list) else folders.get(name, name)  # noqa: E731
    names = {
        role: read(changes.get(role, default)) for role, default in (("student", "resnet18"), ("teacher", "TEACHER"))
    }
    recipe = RecipeArguments(**names, image_size=32)
    training = DistillationTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    if recorded is not None:  # a run of an older version, or of this one, that was stopped in its first training
        (tmp_path / "run" / "teacher").mkdir(parents=True)
        (tmp_path / "run" / "teacher" / "trainer_state.json").touch()
        (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(recorded))
    prepared = preparation.prepare(recipe, DataArguments(inputs["dataset_name"]), training, given)
    assert {name: recipe.preprocessing[name] for name in expected} == expected
    assert set(prepared.inherited) == {name for name in TEACHERS_PIXELS if recipe.preprocessing[name] is not None}
    assert recipe.image_size == 32


@pytest.mark.parametrize(
    ("changes", "given", "recorded", "expected"),
    [
        ({}, set(), None, 40),
        ({}, set(), {"image_size": 40}, 40),
        ({}, set(), {"image_size": None}, None),  # of a version in which the student had 224 pixels
        ({"image_size": 64}, {"image_size"}, None, 64),
        ({}, {"image_size"}, None, None),  # null, in a YAML
        ({"student": "TEACHER"}, set(), None, None),
        ({"student": "resnet18_cifar"}, set(), None, None),  # 32 pixels
        ({"student": "deit_tiny_patch16_224"}, set(), None, None),
        ({"student": "inception_v3"}, set(), None, None),  # which takes 75 pixels or more
        ({"teacher": ["TEACHER", "LARGER"]}, set(), None, 48),
        ({"teacher": ["TEACHER", "LARGEST"]}, set(), None, None),
        ({"teacher": "resnet18"}, set(), None, None),
    ],
)  # fmt: skip
def test_a_student_whose_size_nobody_named_takes_that_of_a_smaller_teacher(
    tmp_path, inputs, changes, given, recorded, expected
):
    names = {"student": "resnet18", "teacher": "TEACHER"} | changes
    size = names.pop("image_size", None)

    def read(name):
        if isinstance(name, list):
            return [read(each) for each in name]
        if name in ("LARGER", "LARGEST"):
            pixels = 48 if name == "LARGER" else 224
            model = create_student("resnet18", id2label=["cat", "dog"], image_size=pixels, model_args=MODEL)
            save_student(model, str(tmp_path / name))
            return str(tmp_path / name)
        return inputs["teacher"] if name == "TEACHER" else name

    recipe = RecipeArguments(**{role: read(name) for role, name in names.items()}, image_size=size)
    training = DistillationTrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    if recorded is not None:
        (tmp_path / "run" / "teacher").mkdir(parents=True)
        (tmp_path / "run" / "teacher" / "trainer_state.json").touch()
        (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(recorded))
    data = DataArguments(inputs["dataset_name"])
    prepared = preparation.prepare(recipe, data, training, {"output_dir", *given})
    assert recipe.image_size == expected
    assert ("image_size" in prepared.inherited) == (expected not in (None, size))
    # Photographs alone are augmented strongly.
    is_small = expected is not None or recipe.student.endswith(("_cifar", "teacher"))
    assert (data.auto_augment is None) == is_small


def test_the_command_says_its_plan_and_continues_after_a_stop(starts, results):
    folder, said, said_then = starts
    plan = said[: said.index("Training the teacher")]
    assert "train                     38 images, 4 classes, imbalanced: 4 to 12 images a class" in plan
    assert "validation                12 images, 4 classes" in plan
    assert re.search(r"teacher  .*40 x 40 pixels, pretrained, new head of 4 classes, trained first", plan)
    assert re.search(
        r"student  .*32 x 32 pixels, random weights; the teacher's image_mean, image_std, crop_pct, interpolation",
        plan,
    )
    assert re.search(
        r"training of the teacher   1 epochs, 2 steps of 32 images, adamw_torch, learning rate 0.001 ", plan
    )
    for name in ("teacher", "baseline", "student"):
        assert f"The {name} in {folder / name} is trained already" in said_then
    assert "Training the" not in said_then
    assert "## Deployment" in (folder / "student" / "README.md").read_text()
    assert "student_onnx" in results["models"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_epoch": 3}, "teacher_epoch.*did you mean 'teacher_epochs'"),
        ({"max_int8_drop": -1}, "max_int8_drop must be 0 points or more, got -1"),
        ({"distillation_loss": "none"}, "distillation_loss must be a loss, got 'none'"),
        ({"time_budget": "soon"}, "time_budget must be a time such as 30m"),
        ({"teacher_args": {"drop_path_rate": 0.1}}, "teacher_args are for an architecture of timm"),
        ({"finetune_teacher": "never"}, "set finetune_teacher to auto"),
        ({"early_stopping_patience": 2, "load_best_model_at_end": False}, "needs load_best_model_at_end"),
        (
            {"dataloader_persistent_workers": True},
            "dataloader_num_workers must be 1 or more with dataloader_persistent_workers, got 0",
        ),
    ],
)
def test_wrong_arguments_train_nothing(tmp_path, inputs, capsys, changes, message):
    with pytest.raises(ValueError, match=message):
        distill(**{**inputs, **QUICK, "output_dir": tmp_path / "run", **changes})
    code, _, error = run(
        capsys, "distill", *command_line({**inputs, **QUICK, "output_dir": str(tmp_path / "run"), **changes})
    )
    assert code == 2
    assert re.search(message.partition(".*")[0], error)
    assert "Traceback" not in error
    assert not any((tmp_path / "run" / name).exists() for name in ("teacher", "baseline", "student", "results.json"))


def test_images_that_cannot_be_read_are_named_before_training(tmp_path, capsys):
    images = digit_folder(tmp_path / "images", ["zero", "one"], train=4, validation=2)
    (Path(images) / "train" / "zero" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"the train split .* got 1 of 8 that cannot: .*1\.png"):
        distill(
            images, teacher="resnet18", student="resnet18", output_dir=tmp_path / "run", image_size=32, use_cpu=True
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"finetune_teacher": "yes"}, "finetune_teacher must be auto, always or never, got 'yes'"),
        ({"teacher_init": "rand"}, "teacher_init must be pretrained or random, got 'rand'"),
        ({"time_budget": 30}, "time_budget: expected a string or null, got the number 30"),
        ({"time_budget": "30"}, "time_budget must be a time such as 30m, 2h or 1h30m, got '30'"),
        ({"max_int8_drop": None}, "max_int8_drop: expected a number, got null: omit it to keep the default"),
        ({"num_train_epochs": "3"}, "num_train_epochs: expected a number, got the string '3': remove the quotes"),
        ({"seed": 1.5}, "seed: expected an integer, got the number 1.5"),
        ({"student_args": "layers"}, "student_args: expected a mapping or null, got the string 'layers'"),
    ],
)
def test_a_wrong_value_is_refused_in_python_too(tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr("nkd_hf.recipe.distill.prepare", lambda *_: pytest.fail("the run begins"))
    with pytest.raises(ValueError, match=message):
        distill("digits", teacher="resnet18", student="resnet18", output_dir=tmp_path / "run", **wrong)


def test_python_s_values_are_those_of_the_command(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("nkd_hf.recipe.distill.run_distillation", lambda *parts, given: seen.append(parts))
    distill(
        tmp_path, teacher=[tmp_path / "a", tmp_path / "b"], student="resnet18", output_dir=tmp_path / "run",
        image_mean=(0.1, 0.2, 0.3), learning_rate=np.float32(0.5), optim=OptimizerNames.SGD, student_args={"layers": (1, 1)},
    )  # fmt: skip
    recipe, data, training, _ = seen[0]
    assert recipe.student_args == {"layers": [1, 1]}
    assert (recipe.teacher, data.dataset_name) == ([f"{tmp_path}/a", f"{tmp_path}/b"], str(tmp_path))
    assert (training.output_dir, type(training.learning_rate), training.optim) == (f"{tmp_path}/run", float, "sgd")


@pytest.mark.parametrize(
    ("with_splits", "output", "is_refused"),
    [
        (False, "out", True),
        (False, ".", True),
        (False, ".out", False),
        (True, "out", False),
        (True, "train/out", True),
        (True, "my_val-run", True),
        (True, "runs/test", True),
    ],
)
def test_an_output_folder_whose_pictures_would_be_read_as_data_is_refused(tmp_path, with_splits, output, is_refused):
    root = tmp_path / "images"
    for folder in ("data/train_set/zero", "data/val/zero") if with_splits else ("zero",):
        (root / folder).mkdir(parents=True)
    training = DistillationTrainingArguments(str(root / output), use_cpu=True, report_to="none")
    for data in (DataArguments(str(root)), DataArguments("photos", unlabeled_dataset=str(root))):
        training.output_dir = str(root / output)
        with pytest.raises(ValueError, match="must be outside of") if is_refused else contextlib.nullcontext():
            checks._check_output_folder(data, training)
        training.output_dir = str(tmp_path / "images-out")
        checks._check_output_folder(data, training)


def test_the_command_needs_data_and_a_folder(capsys):
    code, _, error = run(capsys, "distill", "--student", "resnet18", "--teacher", "resnet34")
    assert code == 2
    assert re.search(r"are required: --dataset_name\S*, --output_dir", error)


@pytest.mark.parametrize(
    ("student", "images", "given", "expected"),
    [
        ("resnet18", 1437, {}, {"per_device_train_batch_size": 32, "learning_rate": 2e-3, "num_train_epochs": 89}),
        ("resnet18", 10**6, {}, {"per_device_train_batch_size": 64, "num_train_epochs": 20}),
        ("timm/resnet18.a1_in1k", 5000, {}, {"learning_rate": 3e-4, "num_train_epochs": 19}),
        ("timm/resnet18.a1_in1k", 5000, {"learning_rate": 0.1}, {"learning_rate": 0.1}),
        ("timm/resnet18.a1_in1k", 100, {"per_device_train_batch_size": 8}, {"num_train_epochs": 60}),
    ],
)
def test_defaults_follow_the_start_and_the_number_of_images(student, images, given, expected):
    values = {**fixed_defaults(set(given)), **given, "use_cpu": True, "report_to": "none"}
    training = DistillationTrainingArguments(
        "unused", **{name: value for name, value in values.items() if name != "finetune_teacher"}
    )
    recipe, data = RecipeArguments(student=student, teacher="timm/resnet34.a1_in1k"), DataArguments("somewhere")
    set_defaults(recipe, data, training, set(given), images, image_size=224)
    assert {name: getattr(training, name) for name in expected} == expected
    assert (recipe.teacher_learning_rate, data.auto_augment) == (1e-4, "rand-m6-mstd0.5-inc1")
    assert training.metric_for_best_model == "accuracy"


@pytest.mark.parametrize(
    ("epochs", "given", "expected"), [(9, set(), 5), (2005, set(), 669), (9, {"early_stopping_patience"}, 40)]
)
def test_the_patience_follows_the_epochs_that_a_time_budget_has_chosen(epochs, given, expected):
    training = DistillationTrainingArguments(
        "unused", num_train_epochs=epochs, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        use_cpu=True, report_to="none",
    )  # fmt: skip
    recipe = RecipeArguments(student="resnet18", teacher="resnet34", time_budget="10m", early_stopping_patience=40)
    set_patience(recipe, training, given)
    assert recipe.early_stopping_patience == expected


def test_the_plan_of_a_time_budget_has_the_patience_of_its_epochs(tmp_path, monkeypatch):
    speed = Speed("student", epochs=60, step=0.01, steps_per_epoch=2, evaluation=0.1)
    monkeypatch.setattr(time_budget, "measure_speed", lambda trainer, name: speed)

    def stop(run, inherited):
        raise KeyboardInterrupt((run.training_args.num_train_epochs, run.args.early_stopping_patience))

    monkeypatch.setattr(distill_module, "describe_run", stop)
    changes = {"max_train_samples": 40, "max_eval_samples": 8, "image_size": 32, "use_cpu": True, "report_to": "none"}
    with pytest.raises(KeyboardInterrupt) as chosen:
        distill(
            "digits", student="resnet18", distillation_loss="tfkd", output_dir=tmp_path, time_budget="1000s", **changes
        )
    epochs, patience = chosen.value.args[0]
    assert patience == -(-epochs // 3) > 1000


@pytest.mark.parametrize(("images", "epochs", "teacher_epochs"), [(1437, 92, 36), (10**6, 20, 12), (100, 120, 60)])
def test_default_epochs_are_a_multiple_of_the_crops(images, epochs, teacher_epochs):
    training = DistillationTrainingArguments("unused", per_device_train_batch_size=32, use_cpu=True, report_to="none")
    recipe = RecipeArguments(student="resnet18", teacher="timm/resnet34.a1_in1k", compare_with_baseline=False)
    data = DataArguments("somewhere", crops_per_image=4)
    set_defaults(recipe, data, training, {"per_device_train_batch_size"}, images, image_size=224)
    assert (training.num_train_epochs, recipe.teacher_epochs) == (epochs, teacher_epochs)
    assert note_crops(recipe, data, training, ["teacher", "student"], 10**6, 32) == []


@pytest.mark.parametrize("with_batch_norm", [[], ["student"], ["teacher"], ["student", "teacher"]])
def test_pretrained_models_with_batch_norm_get_a_higher_rate(with_batch_norm):
    training = DistillationTrainingArguments("unused", use_cpu=True, report_to="none")
    recipe, data = RecipeArguments(student="timm/some.tag", teacher="timm/other.tag"), DataArguments("somewhere")
    set_defaults(recipe, data, training, set(), 5000, 224, with_batch_norm)
    assert training.learning_rate == (1e-3 if "student" in with_batch_norm else 3e-4)
    assert recipe.teacher_learning_rate == (1e-3 if "teacher" in with_batch_norm else 1e-4)


@pytest.mark.parametrize(
    ("num_cores", "given", "expected"),
    [(2, set(), (0, False)), (16, set(), (4, False)), (2, {"streaming"}, (2, True)), (16, {"dataloader_num_workers"}, (None, False))],
)  # fmt: skip
def test_results_on_the_cpu_do_not_depend_on_the_number_of_cores(monkeypatch, num_cores, given, expected):
    """Drop path draws other numbers with persistent workers; the parts of a stream are those of its workers."""
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    defaults = fixed_defaults(given)
    assert tuple(defaults.get(f"dataloader_{name}") for name in ("num_workers", "persistent_workers")) == expected


@pytest.mark.runs
def test_a_native_vit_is_fine_tuned_resumed_and_used(tmp_path, monkeypatch, caplog):
    """transformers' own Trainer does not restore a native ViT from its checkpoint, whose keys have other names."""
    images = digit_folder(tmp_path / "images", ["zero", "one", "two"], train=8, validation=3)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(
        ViTConfig(**shape, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog"})
    ).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    monkeypatch.setattr(distill_module, "deploy", lambda *args: None)
    monkeypatch.setattr(distill_module, "write_card", lambda run: None)
    arguments = {
        **QUICK, "student": "resnet18", "student_args": MODEL, "teacher": str(tmp_path / "vit"),
        "teacher_epochs": 3, "teacher_learning_rate": 1e-2, "num_train_epochs": 1, "per_device_train_batch_size": 8,
    }  # fmt: skip
    del arguments["image_size"]
    results = [distill(images, **arguments, output_dir=tmp_path / "whole")]
    train_model = recipe_module.train_model

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:  # of 9
                raise KeyboardInterrupt

    def interrupt(trainer, *args, **options):
        trainer.add_callback(Stop())
        train_model(trainer, *args, **options)

    monkeypatch.setattr(recipe_module, "train_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(images, **arguments, output_dir=tmp_path / "cut")
    monkeypatch.setattr(recipe_module, "train_model", train_model)
    results += [distill(images, **arguments, output_dir=tmp_path / "cut")]
    assert results[0] == results[1]
    for name in ("teacher", "student"):
        whole, cut = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    # It is a folder that transformers opens whole, with the accuracy that was measured.
    teacher, loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "cut" / "teacher", output_loading_info=True
    )
    assert not any(loaded[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(teacher.config.id2label.values()) == ["one", "two", "zero"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "cut" / "teacher")
    files = sorted(Path(images, "validation").rglob("*.png"))
    pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    with torch.no_grad():
        answers = teacher.eval()(**pixels).logits.argmax(-1)
    right = [
        teacher.config.id2label[int(answer)] == file.parent.name for answer, file in zip(answers, files, strict=True)
    ]
    assert np.mean(right) == pytest.approx(results[1]["teacher"])
    config = json.loads((tmp_path / "cut" / "student" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert "num_labels" not in caplog.text  # transformers' warning that the classes are others, at each opening


def test_persistent_workers_without_a_number_are_one_at_least(tmp_path, monkeypatch):
    """Where 2 cores make the default 0, too; PyTorch would refuse that."""
    monkeypatch.setattr("nkd_hf.recipe.defaults.count_workers", lambda has_idle_cores: 0)
    counts = []

    def stop(recipe, data, training, given):
        counts.append(training.dataloader_num_workers)
        raise ValueError("stopped")

    monkeypatch.setattr(distill_module, "prepare", stop)
    for persistent in (True, False):
        with pytest.raises(ValueError, match="stopped"):
            distill(
                "digits", teacher="resnet18", student="resnet18", output_dir=tmp_path, use_cpu=True,
                dataloader_persistent_workers=persistent,
            )  # fmt: skip
    assert counts == [1, 0]


@pytest.mark.runs
def test_two_processes_distil_into_one_folder(tmp_path, inputs):
    def work():
        PartialState.destroy_process_group = lambda self: None  # in_processes does so itself
        distill(**inputs, output_dir=tmp_path / "out", **QUICK | {"num_train_epochs": 1})

    codes = in_processes(2, work, tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "student_onnx" in results["models"]
    assert results["models"]["student"]["top1"] == results["distilled"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_pictures_of_a_report_are_the_images_that_the_models_got(tmp_path, streaming):
    folder = Path(digit_folder(tmp_path, ["zero", "one"], train=2, validation=3))
    files = sorted(folder.glob("validation/*/*.png"))
    good = [np.asarray(Image.open(file).convert("RGB")) for file in files[1:]]
    files[0].write_bytes(b"no image")
    data = DataArguments(str(folder), on_bad_image="skip", streaming=streaming, num_train_images=4)
    read_image = _image_reader(SimpleNamespace(data_args=data, data=load_image_dataset(data)))
    # The next good row takes the place of a bad one; a stream goes on with the next good one.
    expected = good if streaming else [good[0], *good]
    for number, pixels in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(read_image(number)), pixels)
