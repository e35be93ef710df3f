"""Recipes on classes of different sizes: balanced accuracy, class weights and balanced sampling."""

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recipe_runs import FEW, IN_PROCESS, ROOT
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoModelForImageClassification

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    load_image_dataset,
    parse_args,
)
from nkd_hf.metrics import compute_balanced_metrics, compute_metrics
from nkd_hf.recipe.class_sizes import balanced_weights, make_class_settings
from nkd_hf.recipe.plan import PlannedTrainingArguments, make_plan
from nkd_hf.recipe.report import make_card_info
from nkd_hf.recipe.run_folder import can_continue, clear_run, collect_settings, read_history

pytestmark = pytest.mark.usefixtures("no_curves")
SIZES = {0: 60, 1: 6, 2: 12, 3: 30}
# One training, without a teacher, on the images of SIZES.
PLAIN = [
    "--distillation_loss", "none", "--max_train_samples", "108", "--num_train_epochs", "1",
    "--per_device_train_batch_size", "27",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Digits of four classes of different sizes, as parquet files."""
    digits = load_image_dataset(DataArguments())["train"]
    labels = np.array(digits["label"][:])
    folder = tmp_path_factory.mktemp("digits")
    names = datasets.ClassLabel(names=["0", "1", "2", "3"])
    for split, sizes, start in (("train", SIZES, 0), ("test", {0: 20, 1: 4, 2: 4, 3: 12}, 60)):
        rows = np.concatenate([np.flatnonzero(labels == label)[start : start + size] for label, size in sizes.items()])
        rows = digits.select(rows).cast_column("image", datasets.Image()).cast_column("label", datasets.Value("int64"))
        rows.cast_column("label", names).to_parquet(folder / f"{split}.parquet")
    return folder


def open_recipe(folder: Path, output: Path, *arguments: str) -> Recipe:
    config = ROOT / "recipes" / "configs" / "digits_self_distill.yaml"
    given = ["--config", str(config), *FEW, *IN_PROCESS, *PLAIN, "--dataset_name", str(folder)]
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    return Recipe(*parse_args(types, args=[*given, "--output_dir", str(output), *arguments]))


def train(folder: Path, output: Path, *arguments: str) -> Recipe:
    recipe = open_recipe(folder, output, *arguments)
    recipe.train_baseline()
    return recipe


def test_unequal_classes_log_balanced_accuracy_by_which_the_best_checkpoint_may_be_chosen(folder, tmp_path):
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model"]
    recipe = train(folder, tmp_path, *best, "balanced_accuracy")
    entry = read_history(tmp_path / "baseline")[-1]
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "baseline").eval()
    _, evaluation = recipe.datasets(student)
    labels = [evaluation[row]["labels"] for row in range(40)]
    with torch.no_grad():
        logits = student(torch.stack([evaluation[row]["pixel_values"] for row in range(40)])).logits
    expected = balanced_accuracy_score(labels, logits.argmax(-1))
    assert entry["eval_balanced_accuracy"] == pytest.approx(expected)
    assert entry["eval_balanced_accuracy"] != pytest.approx(entry["eval_accuracy"], abs=1e-3)
    assert recipe.accuracies["baseline"].keys() == {"accuracy", "top5_accuracy"}
    with pytest.raises(ValueError, match="loss or accuracy or top5_accuracy or balanced_accuracy"):
        recipe._make_trainer(tmp_path / "worst", student, metric_for_best_model="mean_accuracy").train()


def settings(labels: list[int], **arguments) -> dict:
    features = datasets.Features(label=datasets.ClassLabel(names=["a", "b", "c"]))
    rows = datasets.Dataset.from_dict({"label": labels}, features)
    return make_class_settings(RecipeArguments("resnet18", distillation_loss="none", **arguments), rows, list("abc"))


def test_equal_classes_have_the_metrics_and_the_loss_that_they_had():
    assert settings([0] * 8 + [1] * 4 + [2] * 5) == {"class_weights": None, "metrics": compute_metrics}
    assert settings([0] * 9 + [1] * 4 + [2] * 5)["metrics"] is compute_balanced_metrics
    # Neither a class without images nor rows without a label count.
    assert settings([0] * 8 + [1] * 4 + [-1] * 9)["metrics"] is compute_metrics
    stream = datasets.Dataset.from_dict({"label": [0] * 9}).to_iterable_dataset()
    recipe = RecipeArguments("resnet18", distillation_loss="none")
    assert make_class_settings(recipe, stream, ["a"]) == {"class_weights": None, "metrics": compute_metrics}


def test_the_weights_are_those_of_scikit_learn():
    labels = np.array([0] * 60 + [1] * 7 + [2] * 13)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = settings([*labels.tolist(), -1, -1], class_weights="balanced")["class_weights"]
    assert weights.numpy() == pytest.approx(expected, rel=1e-6)
    assert weights[labels].mean().item() == pytest.approx(1, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"a class has no training images, got balanced, and there are none of b\. Add"
    ):
        balanced_weights(np.array([3, 0, 2]), ["a", "b", "c"])


def test_class_weights_are_of_the_task_loss_of_training_alone(folder, tmp_path):
    recipe = train(folder, tmp_path, "--class_weights", "balanced", "--max_steps", "1", "--learning_rate", "0.0")
    log = read_history(tmp_path / "baseline")
    trainer = recipe._make_trainer(tmp_path / "again", recipe.create(recipe.args.student, recipe.args.student_args))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = trainer.student.train()(batch["pixel_values"]).logits
    weights = torch.tensor([108 / (4 * size) for size in SIZES.values()])
    expected = F.cross_entropy(logits, batch["labels"], weight=weights)
    assert log[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert log[0]["loss"] != pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-4)
    card = (tmp_path / "baseline" / "README.md").read_text()
    assert "class weights: `balanced`" in card
    assert " balanced |" not in card  # no column, and no dataset of this name


def test_a_recipe_draws_classes_equally_often(folder, tmp_path):
    recipe = open_recipe(folder, tmp_path, "--balanced_sampling", "true")
    trainer = recipe._make_trainer(tmp_path / "again", recipe.create(recipe.args.student, recipe.args.student_args))
    labels = torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()])
    assert len(labels) == 108
    assert labels.bincount().min() > 15
    assert "balanced_sampling=True" in make_card_info(recipe.args, recipe.data_args, recipe.data, {}).augmentation


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--class_weights", "balanced", "--balanced_sampling", "true"],
            "class_weights must be None with balanced_sampl",
        ),
        (["--class_weights", "balanced", "--streaming", "true"], "class_weights must be None with streaming"),
        (
            ["--balanced_sampling", "true", "--train_sampling_strategy", "sequential"],
            "must be random with balanced_sampl",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_the_recipe_is_made(folder, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_recipe(folder, tmp_path, *arguments)


def test_a_plan_takes_both(capsys):
    def plan(*arguments: str) -> list[str]:
        types = (RecipeArguments, DataArguments, PlannedTrainingArguments)
        given = ["--student", "resnet18", "--distillation_loss", "uskd", "--num_processes", "1"]
        given += [
            "--num_train_images",
            "1000",
            "--num_classes",
            "4",
            "--image_size",
            "32",
            "--output_dir",
            "unused",
            *arguments,
        ]
        return make_plan(*parse_args(types, args=given))["augmentation"]

    assert "class weights balanced" in plan("--class_weights", "balanced")
    assert "balanced sampling" in plan("--balanced_sampling", "true")
    with pytest.raises(ValueError, match="class_weights must be None with balanced_sampling"):
        plan("--class_weights", "balanced", "--balanced_sampling", "true")
    with pytest.raises(SystemExit):
        plan("--class_weights", "square_root")
    assert "square_root" in capsys.readouterr().err
    with pytest.raises(ValueError, match="class_weights must be balanced, got 'even'"):
        RecipeArguments("resnet18", distillation_loss="none", class_weights="even")


def test_a_run_of_a_version_without_the_arguments_goes_on(tmp_path, caplog):
    training = DistillationTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)

    def collect(**data) -> dict:
        recipe = RecipeArguments("resnet18", distillation_loss="none")
        return collect_settings(recipe, DataArguments(**data), training)

    earlier = {name: value for name, value in collect().items() if name not in ("class_weights", "balanced_sampling")}
    clear_run(tmp_path, earlier)
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "trainer_state.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert can_continue(tmp_path, collect())
    with pytest.raises(ValueError, match="balanced_sampling was False and is True"):
        can_continue(tmp_path, collect(balanced_sampling=True))
