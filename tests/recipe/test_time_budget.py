"""Epochs that are chosen so that a run ends within a given time."""

import json
import re
import time
import types

import pytest
from recipe_runs import run
from tiny import digit_folder

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments
from nkd_hf.recipe import time_budget
from nkd_hf.recipe.duration import describe_duration, parse_duration
from nkd_hf.recipe.time_budget import CHOSEN_EPOCHS, Speed, fit_epochs


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45), ("30m", 1800), ("1h30m", 5400), ("0.5d", 43200)])
def test_times_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 m", "-5m", "0s", "30m later", "1y"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="must be a time such as 30m"):
        parse_duration(text)


@pytest.mark.parametrize("seconds", [90, 3600, 86400])
def test_the_chosen_epochs_fill_the_time_and_no_more(seconds):
    speeds = [
        Speed("teacher", 10, 0.05, 20, 0.3),
        Speed("baseline", 20, 0.02, 20, 0.2),
        Speed("student", 20, 0.03, 20, 0.2),
    ]
    epochs = fit_epochs(seconds, speeds)
    assert epochs["baseline"] == epochs["student"]
    assert epochs["student"] == pytest.approx(2 * epochs["teacher"], abs=1)
    total = sum(epochs[speed.name] * speed.epoch + 2 * speed.evaluation for speed in speeds)
    assert 0.7 * seconds < total <= seconds


def test_too_little_time_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"one epoch of each training, which take 14 s here, got 5 s"):
        fit_epochs(5, [Speed("student", 20, 0.5, 20, 1.0)])


@pytest.mark.parametrize(("seconds", "expected"), [(1000, (96, 24)), (150, (12, 4)), (100, (4, 4))])
def test_with_several_crops_all_epochs_are_multiples_of_them(seconds, expected):
    speeds = [Speed("student", 40, 0.05, 100, 2.0), Speed("teacher", 10, 0.05, 100, 2.0)]
    epochs = fit_epochs(seconds, speeds, multiple=4)
    assert tuple(epochs.values()) == expected
    assert list(epochs) == ["student", "teacher"]
    assert sum(epochs[speed.name] * speed.epoch + 2 * speed.evaluation for speed in speeds) <= seconds
    with pytest.raises(
        ValueError, match=r"suffice for 4 epochs \(crops_per_image\) of each training, which take 1 min"
    ):
        fit_epochs(60, speeds, multiple=4)


@pytest.mark.parametrize("crops", [1, 4])
def test_a_training_that_gets_the_least_leaves_the_others_in_time(crops):
    speeds = [Speed("teacher", 1, 1.0, 10, 0.0), Speed("student", 100, 0.1, 10, 0.0)]
    epochs = fit_epochs(60, speeds, multiple=crops)
    assert epochs["teacher"] == crops
    assert epochs["student"] == {1: 41, 4: 8}[crops]


def test_the_run_passes_its_crops_on(tmp_path, monkeypatch):
    speed = Speed("student", epochs=2, step=0.1, steps_per_epoch=5, evaluation=0.5)
    monkeypatch.setattr(time_budget, "measure_speed", lambda trainer, name: speed)
    recipe = RecipeArguments("resnet18", distillation_loss="tfkd", image_size=32, time_budget="1000s")
    data = DataArguments("digits", crops_per_image=4, max_train_samples=40, max_eval_samples=8)
    training = DistillationTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    run = Recipe(recipe, data, training)
    run.check()
    assert training.num_train_epochs == 848  # 849 would fit


@pytest.mark.runs
def test_a_run_ends_in_time_and_its_epochs_are_kept(tmp_path, capsys, monkeypatch):
    def clock() -> float:
        return 2 * time.monotonic()  # half as many epochs as otherwise fit in a time

    monkeypatch.setattr("nkd_hf.recipe.time_budget.time", types.SimpleNamespace(perf_counter=clock))
    images = digit_folder(tmp_path / "images", ["zero", "one"], train=40, validation=4)
    arguments = [
        "distill_cnn", "--output_dir", str(tmp_path / "run"), "--dataset_name", images, "--teacher_epochs", "1",
        "--compare_with_baseline", "false", "--per_device_train_batch_size", "32",
    ]  # fmt: skip
    start = clock()
    recipe = run(*arguments, "--time_budget", "12s")
    passed = clock() - start
    said = re.findall(r"^About (.+) left for the (\d+) steps of the (\w+)", capsys.readouterr().out, re.MULTILINE)
    steps = {"teacher": 3 * recipe.args.teacher_epochs, "student": 3 * recipe.training_args.num_train_epochs}
    assert {name: int(count) for _, count, name in said} == {name: n for name, n in steps.items() if n > 10}
    chosen = json.loads((tmp_path / "run" / CHOSEN_EPOCHS).read_text())
    assert chosen == {"teacher": recipe.args.teacher_epochs, "student": recipe.training_args.num_train_epochs}
    assert chosen["student"] == pytest.approx(2 * chosen["teacher"], abs=1)  # 2 epochs and 1, by the arguments
    assert chosen["student"] > 2
    assert [epoch for epoch, _ in recipe.curves["distilled"]][-1] == chosen["student"]
    assert passed < 60, passed  # The machine may have become slower since it was measured.


def test_a_budget_excludes_max_steps(tmp_path):
    with pytest.raises(ValueError, match="time_budget chooses the epochs, but max_steps is 5"):
        run("distill_cnn", "--output_dir", str(tmp_path), "--time_budget", "5m", "--max_steps", "5")


def test_durations_are_written_for_readers():
    assert [describe_duration(seconds) for seconds in (59.6, 600, 7200)] == ["1 min", "10 min", "2 h"]


def test_a_budget_that_is_too_short_leaves_the_results_of_an_earlier_run(tmp_path):
    images = digit_folder(tmp_path / "images", ["zero", "one"], train=8, validation=2)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text("{}")  # of a run that has ended
    with pytest.raises(ValueError, match="time_budget must suffice for one epoch of each training"):
        run(
            "distill_cnn", "--output_dir", str(folder), "--dataset_name", images, "--time_budget", "0.001s",
            "--resume_from_checkpoint", "false",
        )  # fmt: skip
    assert (folder / "results.json").read_text() == "{}"
