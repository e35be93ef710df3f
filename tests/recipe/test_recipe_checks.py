"""What a recipe refuses before it trains anything, and what it says of its teacher before it is distilled."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipe_runs import ROOT, run
from tiny import DIGITS
from transformers import AutoModelForImageClassification

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    create_student,
    parse_args,
)
from nkd_hf.cli.evaluate import evaluate
from nkd_hf.hub.teacher_logits import store_card
from nkd_hf.models.saving import save_student
from nkd_hf.models.students import describe_start
from nkd_hf.recipe import build as build_module
from nkd_hf.recipe import recipe as recipe_module
from nkd_hf.teacher_logits.info import StoreInfo, TeacherDescription

pytestmark = pytest.mark.usefixtures("no_curves")
TYPES = (RecipeArguments, DataArguments, DistillationTrainingArguments)
CNN = {"channels": [8, 16, 32, 64]}


def save(folder: Path, architecture: str = "resnet18", **kwargs) -> str:
    torch.manual_seed(0)
    kwargs = {"id2label": DIGITS, "image_size": 32, "model_args": CNN} | kwargs
    save_student(create_student(architecture, **kwargs), str(folder))
    return str(folder)


def refused(folder: Path, message: str, *arguments: str, recipe: str = "distill_cnn") -> None:
    """The recipe, with its baseline first, ends with the message before it has trained that."""
    with pytest.raises(ValueError, match=message):
        run(recipe, "--output_dir", str(folder / "run"), *arguments)
    assert {path.name for path in (folder / "run").glob("*")} <= {".lock", "run.yaml"}


# Errors come first


def test_an_output_folder_among_the_images_is_refused(tmp_path):
    (tmp_path / "zero").mkdir()
    refused(tmp_path, "output_dir must be outside of the data's folder", "--dataset_name", str(tmp_path))


def test_a_mistyped_teacher_is_refused_before_the_data_are_loaded(tmp_path, monkeypatch):
    save(tmp_path / "teacher")
    monkeypatch.setattr(recipe_module, "open_data", lambda *args: pytest.fail("the data come later"))
    wrong = tmp_path / "teachr"
    message = (
        rf"teacher '{wrong}' is not opened: there is no folder '{wrong}', did you mean '{tmp_path / 'teacher'}'\?"
    )
    refused(tmp_path, message, "--teacher", str(wrong))
    refused(tmp_path, "student '~/no/such' is not opened: there is no folder", "--student", "~/no/such")
    refused(tmp_path, r"'resnet51' is neither a timm architecture \(near: resnet5.*", "--teacher", "resnet51")


@pytest.mark.parametrize("by_number", ["true", "false"])
def test_a_teacher_of_other_classes_is_refused_before_the_baseline(tmp_path, by_number):
    teacher = save(tmp_path / "teacher", id2label={i: f"class {i}" for i in range(7)})
    message = "teacher must have 10 classes, as 'digits' has, got 7" if by_number == "true" else "has 7 classes"
    refused(tmp_path, message, "--teacher", teacher, "--ignore_label_names", by_number)


def test_a_teacher_whose_answer_is_no_row_of_its_classes_is_refused_before_the_baseline(tmp_path, monkeypatch):
    """As one whose config.json says ten classes, and whose head has twelve."""
    teacher = save(tmp_path / "teacher")
    load = build_module.load_teacher

    def load_wider(name, **kwargs):
        opened = load(name, **kwargs)
        if isinstance(name, str):
            opened.model.timm_model.fc = torch.nn.Linear(64, 12)
        return opened

    monkeypatch.setattr(build_module, "load_teacher", load_wider)
    refused(tmp_path, "12", "--teacher", teacher)


def test_a_teacher_to_be_trained_whose_arguments_are_wrong_is_refused_first(tmp_path):
    refused(tmp_path, "timm's resnet34 does not take model_args", "--teacher_args", '{"chanels": 3}')


def test_a_first_image_that_cannot_be_read_is_refused_before_the_teacher_is_trained(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (32, 32)).save(tmp_path / "data" / split / label / f"{i}.png")
    (tmp_path / "data" / "val" / "cat" / "0.png").write_bytes(b"no image")
    refused(
        tmp_path, "row 0 of the evaluation data .*0.png.* cannot be decoded", "--dataset_name", str(tmp_path / "data")
    )


def test_a_dataset_of_one_class_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "folder" / "0.png")
    (tmp_path / "folder" / "train.csv").write_text("image,label\n" + f"{tmp_path / 'folder' / '0.png'},cat\n" * 20)
    refused(tmp_path, r"must have two classes at least, got \['cat'\]", "--dataset_name", str(tmp_path / "folder"))


def test_a_last_batch_of_one_image_is_refused_before_a_teacher_without_batch_norm_is_trained(tmp_path):
    vit = '{"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}'
    message = "the last batch of an epoch must have at least 2 images, got 1: 33 images in batches of 16"
    refused(
        tmp_path, message, "--teacher", "deit_tiny_patch16_224", "--teacher_args", vit, "--max_train_samples", "33",
        "--per_device_train_batch_size", "16",
    )  # fmt: skip


def test_an_odd_batch_that_is_mixed_in_pairs_is_refused_before_the_baseline_is_trained(tmp_path):
    refused(
        tmp_path, "per_device_train_batch_size must be even with mix_pairs, got 15", "--mix_pairs", "true",
        "--mixup_alpha", "0.2", "--per_device_train_batch_size", "15", "--teacher", save(tmp_path / "teacher", "resnet34"),
    )  # fmt: skip


@pytest.mark.runs
def test_the_check_changes_no_training(tmp_path, monkeypatch):
    """Student, losses with parameters of their own and data are those of a run without it."""
    teacher = save(tmp_path / "teacher", "resnet34")
    arguments = ["--teacher", teacher, "--distillation_loss", "nkd+srrl", "--loss_args", "{}", "--max_steps", "3"]
    checked = run("distill_cnn", "--output_dir", str(tmp_path / "a"), *arguments)
    monkeypatch.setattr(Recipe, "check", Recipe.open_teacher)
    monkeypatch.setattr(Recipe, "measure_teacher", lambda self: None)
    unchecked = run("distill_cnn", "--output_dir", str(tmp_path / "b"), *arguments)
    assert checked.results["distilled"] == unchecked.results["distilled"]
    for name in ("baseline", "student"):
        saved = [
            AutoModelForImageClassification.from_pretrained(tmp_path / run / name).state_dict() for run in ("a", "b")
        ]
        torch.testing.assert_close(*saved, rtol=0, atol=0)


# Each recipe keeps its method


@pytest.mark.parametrize(
    ("recipe", "loss", "loss_args"),
    [
        ("distill_cnn", "nkd", {"gamma": 1.5}),
        ("distill_deit", "nkd", {"gamma": 1.0}),
        ("self_distill", "uskd", {"alpha": 1.0, "beta": 0.1, "mu": 0.005}),
    ],
)
def test_own_data_keep_the_method_and_none_of_the_digits_settings(monkeypatch, recipe, loss, loss_args):
    script = {"__name__": recipe, "__file__": str(ROOT / "recipes" / f"{recipe}.py")}
    exec((ROOT / "recipes" / f"{recipe}.py").read_text(), script)
    default = {"default_config": script["DIGITS"], "default_config_keeps": script["METHOD"]}

    def parse(*arguments: str):
        teacher = [] if recipe == "self_distill" else ["--teacher", "me/teacher"]
        return parse_args(
            TYPES, args=["--dataset_name", "me/mine", "--student", "resnet18", *teacher, *arguments], **default
        )

    args, data, training = parse()
    assert (args.distillation_loss, args.loss_args, args.compare_with_baseline) == (loss, loss_args, True)
    assert (args.image_size, args.student_args, data.horizontal_flip) == (None, None, 0.5)
    assert (training.num_train_epochs, training.learning_rate, training.eval_strategy.value) == (3, 5e-5, "no")
    args, *_ = parse("--compare_with_baseline", "false", "--loss_args", "{}")
    assert (args.distillation_loss, args.loss_args, args.compare_with_baseline) == (loss, {}, False)
    # The recipe's own loss, by its name, is no other one.
    for given in (["--distillation_loss", loss], [f"--distillation_loss={loss}"]):
        args, *_ = parse(*given)
        assert (args.distillation_loss, args.loss_args) == (loss, loss_args)
    # Another loss has other arguments.
    other = "none" if recipe == "self_distill" else "kd"
    args, *_ = parse("--distillation_loss", other)
    assert (args.distillation_loss, args.loss_args, args.compare_with_baseline) == (other, None, True)


# The teacher's two accuracies


@pytest.fixture(scope="module")
def big_teacher(tmp_path_factory) -> tuple[str, Path]:
    """One of 32 pixels that has learned a little, and its run."""
    folder = tmp_path_factory.mktemp("big")
    first = run(
        "distill_cnn", "--output_dir", str(folder), "--distillation_loss", "none", "--image_size", "32", "--student_args",
        json.dumps({"channels": [16, 32, 64, 128]}), "--max_train_samples", "320", "--num_train_epochs", "4",
        "--crop_pct", "0.875", "--learning_rate", "0.05", "--precise_bn_images", "256",
    )  # fmt: skip
    assert first.results["baseline"] > 0.2
    return str(folder / "baseline"), folder


@pytest.mark.runs
def test_a_teacher_of_larger_images_is_measured_on_its_own_and_on_the_students(tmp_path, big_teacher, capsys, caplog):
    teacher, _ = big_teacher
    arguments = [
        "--teacher",
        teacher,
        "--compare_with_baseline",
        "false",
        "--max_eval_samples",
        "360",
        "--max_steps",
        "2",
    ]
    arguments += ["--image_size", "4"]
    recipe = run("distill_cnn", "--output_dir", str(tmp_path), *arguments)
    recipe.report()
    model = AutoModelForImageClassification.from_pretrained(teacher)
    own = evaluate(model, DataArguments())["top1"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["teacher"] == own
    assert abs(results["teacher_on_student_pixels"] - own) > 0.01
    said = capsys.readouterr().out
    assert f"teacher ({teacher})" in said
    assert f"{results['teacher_on_student_pixels']:.2%}" in said.partition("teacher, on the student's pixels")[2]
    assert "image_size is 4 for the student and 32 for the teacher" in caplog.text
    assert "crop_pct is 1.0 for the student and 0.875 for the teacher" in caplog.text
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"| the teacher, `resnet18` | {100 * own:.2f} |" in card
    assert f"on the student's pixels | {100 * results['teacher_on_student_pixels']:.2f} |" in card


@pytest.mark.runs
def test_a_teacher_of_the_students_pixels_is_measured_once(tmp_path, big_teacher, capsys, monkeypatch):
    teacher, _ = big_teacher
    passes = []
    measure = recipe_module.evaluate_teacher
    monkeypatch.setattr(recipe_module, "evaluate_teacher", lambda *args: passes.append(args) or measure(*args))
    recipe = run(
        "distill_cnn", "--output_dir", str(tmp_path), "--teacher", teacher, "--image_size", "32", "--crop_pct", "0.875",
        "--max_steps", "2",
    )  # fmt: skip
    assert len(passes) == 1
    assert recipe.results["teacher"] == recipe.results["teacher_on_student_pixels"] > 0.2
    # Before the baseline is trained, and with no word of pixels that would differ.
    said = capsys.readouterr().out
    assert said.index("The teacher's top-1:") < said.index("Training the baseline")
    assert "own preprocessing" not in said
    assert recipe.accuracies["teacher"].keys() == {"accuracy", "top5_accuracy"}


def test_a_store_without_the_teachers_own_accuracy_opens_and_says_which_it_has(tmp_path):
    info = StoreInfo(2, 4, 1, None, [1.0], 4, {}, TeacherDescription(None, "resnet18", 100), teacher_accuracy=0.5)
    info.write(tmp_path)
    values = json.loads((tmp_path / "store.json").read_text())
    del values["teacher_own_accuracy"]
    (tmp_path / "store.json").write_text(json.dumps(values))
    assert StoreInfo.read(tmp_path) == info
    assert "top-1 on the validation split 50.00 % on the student's pixels" in store_card(info, "store")
    info.teacher_own_accuracy = 0.75
    said = "75.00 % with its own preprocessing and 50.00 % on the student's pixels"
    assert said in store_card(info, "store")


def test_what_weights_a_student_starts_from(tmp_path):
    folder = save(tmp_path / "student")
    assert describe_start(create_student("resnet18", num_labels=10, image_size=32)) == "random weights"
    assert describe_start(create_student(folder, id2label=DIGITS)) == "pretrained"
    assert describe_start(create_student(folder, num_labels=7)) == "pretrained, new head of 7 classes"


def test_the_weights_of_a_model_are_those_of_the_seed_however_often_it_is_built(tmp_path):
    """Baseline and student begin alike; a generator that was used in between changes nothing."""
    config = ROOT / "recipes" / "configs" / "digits_distill_cnn.yaml"
    more = [
        "--distillation_loss",
        "none",
        "--max_train_samples",
        "32",
        "--use_cpu",
        "true",
        "--output_dir",
        str(tmp_path),
    ]
    recipe = Recipe(*parse_args(TYPES, args=["--config", str(config), *more]))
    first, second = (recipe.create("resnet18", CNN).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_teacher_that_gives_nan_is_refused_before_the_baseline_is_trained(tmp_path):
    teacher = create_student("resnet34", id2label=DIGITS, image_size=32, model_args=CNN)
    teacher.timm_model.fc.bias.data[0] = float("nan")
    save_student(teacher, str(tmp_path / "teacher"))
    refused(
        tmp_path,
        "an image gives no finite loss before .* The teacher's logits are not finite",
        "--teacher",
        str(tmp_path / "teacher"),
    )
    # A half precision that overflows is found as well.
    teacher.timm_model.fc.bias.data[0] = 1e30
    save_student(teacher, str(tmp_path / "teacher"))
    refused(
        tmp_path,
        "The teacher's logits are not finite",
        "--teacher",
        str(tmp_path / "teacher"),
        "--teacher_dtype",
        "fp16",
    )


def test_a_teacher_that_guesses_held_out_images_and_a_run_that_is_replaced_are_said(tmp_path, capsys, caplog):
    """Of a folder with a training split alone."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / f"{i}.png")
    teacher = save(tmp_path / "teacher", id2label={0: "cat", 1: "dog"})
    arguments = ["--dataset_name", str(tmp_path / "data"), "--teacher", teacher, "--max_steps", "1"]
    arguments += ["--compare_with_baseline", "false", "--output_dir", str(tmp_path / "run")]
    run("distill_cnn", *arguments).report()
    said = capsys.readouterr().out
    assert "has no split to evaluate on: 4 of its 40 training images are held out (train_val_split=0.1)" in said
    assert "replaces it" not in said
    run("distill_cnn", *arguments)
    assert f"The earlier run in {tmp_path / 'run'} was finished: this one replaces it" in capsys.readouterr().out
    assert "where guessing gives 50.00 %: a student learns nothing good from it" in caplog.text
