"""What a training of a recipe prints, in a terminal and without one."""

import re
import sys

import pytest
from tiny import digits, make_trainer, timm_cnn
from transformers import PrinterCallback, ProgressCallback

from nkd_hf.metrics import compute_metrics, top5_indices
from nkd_hf.recipe import progress
from nkd_hf.recipe.progress import TrainingProgress, show_progress, shows_bars
from nkd_hf.recipe.time_left import TimeLeft


@pytest.fixture
def train(tmp_path):
    """Trains two epochs of three steps each, and evaluates the result as a recipe does."""

    def train(**changes):
        arguments = {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch", "eval_strategy": "epoch"}
        trainer = make_trainer(
            tmp_path, timm_cnn(), digits(0, 48), digits(48, 72), compute_metrics=compute_metrics,
            **(arguments | {"disable_tqdm": False} | changes),
        )  # fmt: skip
        trainer.preprocess_logits_for_metrics = top5_indices
        show_progress(trainer, "student")
        trainer.train()
        trainer.evaluate()
        return trainer

    return train


def set_terminals(monkeypatch, *names: str) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda name=name: name in names)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_without_a_terminal_an_epoch_is_a_line(train, capsys, monkeypatch, disable_tqdm):
    set_terminals(monkeypatch, *(["stdout", "stderr"] if disable_tqdm else []))
    trainer = train(disable_tqdm=disable_tqdm)
    said = capsys.readouterr()
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    accuracies = [f"{100 * entry['eval_accuracy']:.2f} %" for entry in log if "eval_accuracy" in entry]
    first, second, last = said.out.splitlines()
    assert re.sub(r"  \S+ s left$", "", first) == f"student   epoch 1/2  loss {losses[0]:.4g}  top-1 {accuracies[0]}"
    assert second == f"student   epoch 2/2  loss {losses[1]:.4g}  top-1 {accuracies[1]}"
    assert re.fullmatch(rf"student   trained in \d+ s  top-1 {accuracies[2]}", last)
    assert said.err == ""


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"eval_strategy": "no"}, ["epoch 1/2", "epoch 2/2"]),
        ({"eval_strategy": "no", "logging_strategy": "no"}, ["epoch 1/2", "epoch 2/2"]),
        ({"eval_strategy": "no", "logging_strategy": "steps"}, ["epoch 1/2", "epoch 2/2"]),
        ({"eval_strategy": "steps", "eval_steps": 2}, [f"epoch {part}/2" for part in ("0.6667", "1", "1.333", "2")]),
        ({"max_steps": 4}, ["step 3/4", "step 4/4"]),
    ],
)
def test_each_epoch_and_evaluation_is_one_line(train, capsys, changes, positions):
    train(**changes)
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"(epoch|step) \S+", line)[0] for line in lines[:-1]] == positions


def test_a_long_epoch_shows_signs_of_life(train, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SILENCE", 0)
    train(num_train_epochs=1, eval_strategy="no", logging_strategy="steps")
    positions = [line.split("  ")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert positions[:3] == ["epoch 0.3333/1", "epoch 0.6667/1", "epoch 1/1"]


def test_the_time_left_of_a_resumed_training_is_that_of_its_last_steps(tmp_path, capsys):
    def train(max_steps, checkpoint=None):
        changes = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 12}
        trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 48), callbacks=[TimeLeft("student", [])], **changes)
        trainer.train(resume_from_checkpoint=checkpoint)
        return re.search(r"left for the (.*), and its evaluations", capsys.readouterr().out)[1]

    assert train(12) == "12 steps of the student"
    assert train(30, str(tmp_path / "checkpoint-12")) == "last 7 of 30 steps of the student"  # 12 + 11 are done


def test_in_a_terminal_a_training_is_one_line(train, capsys, monkeypatch):
    set_terminals(monkeypatch, "stdout", "stderr")
    trainer = train()
    said = capsys.readouterr()
    assert not any(
        isinstance(callback, ProgressCallback | PrinterCallback) for callback in trainer.callback_handler.callbacks
    )
    assert re.fullmatch(r"student   trained in \d+ s  top-1 \d+\.\d\d %\n", said.out)
    # Every part of the live line goes back to its beginning.
    assert "\n" not in said.err
    drawn = said.err.split("\r")
    accuracy = next(entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry)
    assert any("3/6" in line and f"top-1 {100 * accuracy:.2f} %" in line and "loss" in line for line in drawn)


def test_a_log_file_beside_a_terminal_gets_the_lines(train, capsys, monkeypatch):
    set_terminals(monkeypatch, "stderr")
    train()
    said = capsys.readouterr()
    assert "epoch 1/2" in said.out
    assert "6/6" in said.err


def test_a_notebook_keeps_its_table(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 48), disable_tqdm=False)
    before = list(trainer.callback_handler.callbacks)
    monkeypatch.setattr(progress, "is_in_notebook", lambda: True)
    show_progress(trainer, "student")
    assert trainer.callback_handler.callbacks == before
    assert shows_bars(trainer.args)


def test_other_processes_are_silent(tmp_path, capsys, monkeypatch):
    set_terminals(monkeypatch, "stderr")
    trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 48), digits(48, 72), eval_strategy="epoch")
    trainer.remove_callback(PrinterCallback)
    trainer.state.is_world_process_zero = False
    callback = TrainingProgress("student", shows_bar=True, prints_lines=True)
    monkeypatch.setattr(type(trainer), "is_world_process_zero", lambda self: False)
    trainer.add_callback(callback)
    trainer.train()
    trainer.evaluate()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
