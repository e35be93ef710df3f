"""What a recipe takes from a model that is trained already, and what it says of a teacher."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tiny import DIGITS, timm_cnn

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, load_teacher
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
