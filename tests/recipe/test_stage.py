"""What a recipe takes from a model that is trained already, and what it says of a teacher."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import DIGITS, timm_cnn

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    load_teacher,
    parse_args,
)
from nkd_hf.hub.model_card.curves import OTHER_DATASET
from nkd_hf.models.saving import save_student
from nkd_hf.recipe.stage import open_trained
from nkd_hf.recipe.teacher_accuracy import ON_STUDENT_PIXELS, say_teacher_accuracy

TRAINING = DistillationTrainingArguments("unused", report_to="none", use_cpu=True)


def test_a_trained_model_of_other_classes_is_no_stage_of_this_run(tmp_path):
    trained, student = timm_cnn(seed=1), timm_cnn(seed=2)
    save_student(trained, str(tmp_path))
    opened = open_trained(tmp_path, student, trust_remote_code=False)
    assert torch.equal(opened.state_dict()["timm_model.conv1.weight"], trained.state_dict()["timm_model.conv1.weight"])
    student.config.id2label = dict(enumerate(reversed(DIGITS.values())))
    with pytest.raises(ValueError, match="order"):
        open_trained(tmp_path, student, trust_remote_code=False)


def test_a_run_that_is_killed_before_its_model_is_saved_repeats_no_epoch(tmp_path, monkeypatch, capsys):
    """The best checkpoint is the first one: training would go on from there."""

    def run(folder: str) -> Path:
        args = ["--student", "resnet18", "--student_args", '{"channels": [4, 4, 4, 4], "layers": [1, 1, 1, 1]}']
        args += [
            "--dataset_name",
            "digits",
            "--max_train_samples",
            "16",
            "--max_eval_samples",
            "16",
            "--image_size",
            "16",
        ]
        args += ["--distillation_loss", "tfkd", "--num_train_epochs", "3", "--per_device_train_batch_size", "8"]
        args += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--save_total_limit", "1"]
        args += ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
        args += ["--use_cpu", "true", "--report_to", "none", "--output_dir", str(tmp_path / folder)]
        types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
        recipe = Recipe(*parse_args(types, args=args))
        recipe.train_student()
        return tmp_path / folder / "student"

    def kill(trainer, output_dir=None, **kwargs):
        if output_dir is None:
            raise KeyboardInterrupt
        return save_model(trainer, output_dir, **kwargs)

    whole = run("whole")
    assert [path.name for path in whole.glob("checkpoint-*")] == ["checkpoint-2"]
    save_model = DistillationTrainer.save_model
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "save_model", kill)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    capsys.readouterr()
    killed = run("killed")
    assert f"Continues from {killed / 'checkpoint-6'}" in capsys.readouterr().out
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]


def test_the_result_is_that_of_held_out_images():
    run = SimpleNamespace(results={}, accuracies={}, curves={}, data_args=DataArguments(), training_args=TRAINING)
    entries = [{"eval_accuracy": value, "eval_top5_accuracy": 1.0, "epoch": 1.0} for value in (0.5, 0.75, 0.25)]
    Recipe._record(run, "student", [*entries[:2], entries[2] | {OTHER_DATASET: True}])
    assert run.results == {"distilled": 0.75}
    assert run.curves == {"distilled": [(1.0, 0.5), (1.0, 0.75)]}


@pytest.mark.parametrize(("own", "given", "warns"), [(0.5, 0.6, True), (0.6, 0.5, True), (0.6, 0.595, False)])
def test_a_teacher_that_differs_on_the_students_pixels_is_a_warning_in_both_directions(
    own, given, warns, caplog, capsys
):
    accuracies = {"teacher": {"accuracy": own}, ON_STUDENT_PIXELS: {"accuracy": given}}
    with caplog.at_level(logging.WARNING):
        say_teacher_accuracy(accuracies, load_teacher(timm_cnn()), timm_cnn(), TRAINING)
    assert f"{own:.2%} with its own preprocessing, {given:.2%} on the student's pixels" in capsys.readouterr().out
    assert ("with its own preprocessing" in caplog.text) == warns
