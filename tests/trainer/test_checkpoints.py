"""Checkpoints are whole or absent: damage, a full disk, and what the trainer resumes from."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny import accuracy, digits, make_trainer, native_vit, timm_cnn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from nkd_hf import USKDLoss
from nkd_hf.errors import CheckpointError
from nkd_hf.trainer.checkpoints import find_damage, is_model_only, remove_old


def trainer_of(folder: Path, **kwargs):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 4}
    return make_trainer(folder, timm_cnn(), digits(0, 96), distillation_loss=USKDLoss(32, 10), **settings | kwargs)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer_of(folder).train()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "distillation_losses.safetensors"]
)
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_checkpoint_is_said_and_passed_over(copy, caplog, name, damage):
    damage(copy / "checkpoint-6" / name)
    checkpoint = trainer_of(copy).last_checkpoint()
    assert checkpoint == str(copy / "checkpoint-4")
    assert (
        f"checkpoint-6 is not whole: {name} has" in caplog.text
        or f"checkpoint-6 is not whole: it has no {name}" in caplog.text
    )
    # Put aside, so that it does not count as one when old ones are deleted; nothing is lost.
    assert {path.name for path in copy.glob("*checkpoint*")} == {
        "checkpoint-2",
        "checkpoint-4",
        "damaged-checkpoint-6",
    }


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "its record cannot be read"),
        ('{"log_history": [', "its record cannot be read"),
        (None, "it has no trainer_state.json"),
    ],
)
def test_a_state_that_cannot_be_read_is_a_damage(copy, content, fault):
    state = copy / "checkpoint-6" / "trainer_state.json"
    state.unlink() if content is None else state.write_text(content)
    assert fault in find_damage(str(state.parent))
    trainer = trainer_of(copy, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert find_damage(str(copy / "checkpoint-6")) is None
    assert (copy / "checkpoint-4").is_dir()


def test_what_cannot_be_resumed_is_said(copy, tmp_path):
    truncate(copy / "checkpoint-6" / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"checkpoint-6 is not whole: optimizer.pt has \d+ bytes of \d+. Resume from another"
    ):
        trainer_of(copy).train(resume_from_checkpoint=str(copy / "checkpoint-6"))
    with pytest.raises(ValueError, match="holds no whole checkpoint: train without resume_from_checkpoint"):
        trainer_of(tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_only_is_not_resumed_and_can_be_the_best(tmp_path):
    def trainer():
        return make_trainer(
            tmp_path, timm_cnn(), digits(0, 96), digits(96, 128), max_steps=4, save_strategy="steps", save_steps=2,
            eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_only_model=True, learning_rate=0.01,
        )  # fmt: skip

    first = trainer()
    first.train()
    best = trainer().student.from_pretrained(first.state.best_model_checkpoint)
    torch.testing.assert_close(first.student.state_dict(), best.state_dict(), rtol=0, atol=0)
    said = "cannot be resumed: saved with save_only_model, which omits the optimiser's state. Train again"
    named = tmp_path / "checkpoint-4"
    with pytest.raises(ValueError, match=f"the checkpoint {named} {said}"):
        trainer().train(resume_from_checkpoint=str(named))
    with pytest.raises(ValueError, match=f"the checkpoints in {tmp_path} {said}"):
        trainer().train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "optimizer.bin", "optimizer_0/a.distcp", "global_step4/a_optim_states.pt"]
)
def test_the_optimizer_of_fsdp_and_deepspeed_is_known(tmp_path, name):
    (tmp_path / "model.safetensors").touch()
    assert is_model_only(str(tmp_path))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert not is_model_only(str(tmp_path))


def test_nothing_is_resumed_unasked(copy):
    trainer = trainer_of(copy, max_steps=7)
    trainer.train()
    assert trainer.state.log_history[0]["step"] == 4


def test_a_resumed_run_logs_what_the_whole_one_logs(run, tmp_path):
    def losses(folder):
        history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in history]

    trainer = trainer_of(tmp_path, logging_steps=4)
    # Two of the four steps of the first entry were before the checkpoint.
    output = trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert losses(tmp_path) == losses(run)
    assert losses(run)[0]["step"] == 4
    whole = trainer_of(tmp_path / "whole").train()
    assert output.training_loss == whole.training_loss
    assert output.metrics["train_loss"] == whole.metrics["train_loss"]


def test_a_run_that_is_resumed_at_its_end_trains_no_step(run, tmp_path):
    # 5 steps are less than an epoch of 6, where the Trainer would go on to a sixth.
    settings = {"max_steps": 5, "save_steps": 5}
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer_of(tmp_path / "whole", **settings)
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == 5
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_the_best_checkpoint_keeps_its_name(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 96), digits(96, 128), max_steps=6, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=1, learning_rate=0.01,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best == tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert find_damage(str(best)) is None


def test_an_evaluation_at_the_end_of_an_epoch_comes_before_its_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), digits(96, 128), max_steps=8, save_strategy="steps", save_steps=2,
        eval_strategy="epoch", logging_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert ["loss" in history[0], "eval_loss" in history[1]] == [True, True]


class Terminate(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (2, {"eval_strategy": "steps", "eval_steps": 1}),
        # At the end of an epoch, whose own log and evaluation belong to the checkpoint.
        (8, {"eval_strategy": "steps", "eval_steps": 1, "logging_strategy": "epoch"}),
        (8, {"eval_strategy": "epoch", "logging_strategy": "epoch"}),
    ],
)
def test_sigterm_saves_its_step_also_when_the_best_alone_are_saved(tmp_path, step, settings):
    # With a learning rate of 0 none is better than the first.
    trainer = make_trainer(
        tmp_path, native_vit(), digits(0, 64), digits(96, 128), max_steps=12, learning_rate=0.0, save_strategy="best",
        metric_for_best_model="eval_loss", greater_is_better=False, callbacks=[Terminate(step)], **settings,
    )  # fmt: skip
    with pytest.raises(SystemExit, match="143"):
        trainer.train()
    assert trainer.state.global_step == step
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert find_damage(str(checkpoint)) is None
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert {key for entry in history if entry["step"] == step for key in entry} >= {"loss", "eval_loss"}


def test_an_evaluation_that_is_not_finite_is_said_with_its_step(tmp_path, caplog):
    held_out = digits(96, 128)
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), held_out, max_steps=4, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    assert "not finite" not in caplog.text
    held_out[3]["pixel_values"] = torch.full((3, 32, 32), float("nan"))
    trainer.evaluate()
    assert "the evaluation after step 4 is not finite (eval_loss=nan): the student's logits are NaN" in caplog.text


def full_disk(folder: Path, limit: int) -> None:
    """Trains until a file cannot be written any longer."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer = trainer_of(folder, save_total_limit=1)
    save = trainer._save_checkpoint

    def save_on_a_full_disk(*args):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(*args)

    trainer._save_checkpoint = save_on_a_full_disk
    trainer.train()


@pytest.mark.parametrize("limit", [0, 20_000, 200_000])
def test_a_full_disk_is_an_error_and_the_older_checkpoint_is_intact(tmp_path, limit):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            full_disk(tmp_path, limit)
            os.write(writer, b"no error")
        except CheckpointError as error:
            os.write(writer, str(error).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    message = os.read(reader, 100_000).decode()
    assert message.startswith(f"the checkpoint of step 4 could not be written to {tmp_path} (")
    assert "GiB are free there). The checkpoints before it are as they were" in message
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_old_checkpoints_are_known_by_their_steps_when_the_clock_was_set_back(copy):
    for step in (2, 4):
        os.utime(copy / f"checkpoint-{step}", (2**32, 2**32))
    trainer_of(copy, save_total_limit=1).train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert [path.name for path in copy.glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_run_that_was_killed_while_it_removed_a_checkpoint_removes_the_rest_of_it(copy):
    """It was its last removal: nothing is saved after it. Without a limit, and from an earlier checkpoint, all stay."""
    (copy / "checkpoint-4" / "model.safetensors").unlink()
    trainer_of(copy).train(resume_from_checkpoint=True)
    assert {path.name for path in copy.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    trainer_of(copy, save_total_limit=1, save_strategy="no").train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert (copy / "checkpoint-6").is_dir()
    trainer_of(copy, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in copy.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("step", "limit", "best", "kept"),
    [
        (10, 2, None, {8, 10}),
        (10, 2, "checkpoint-2", {2, 10}),
        (10, 1, "run/checkpoint-2", {2, 10}),
        (4, 2, None, {2, 4}),  # those with more steps are of a run that was given up
        (2, 1, None, {2}),
        (2, 4, None, {2, 6, 8, 10}),
        (10, None, None, {2, 4, 6, 8, 10}),
        (10, 0, None, {2, 4, 6, 8, 10}),
    ],
)
def test_checkpoints_beyond_the_limit_are_removed(tmp_path, step, limit, best, kept):
    for number in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    remove_old(str(tmp_path), step, limit, best)
    assert {int(path.name.removeprefix("checkpoint-")) for path in tmp_path.iterdir()} == kept


def test_the_log_is_written_once_for_a_checkpoint(tmp_path, monkeypatch):
    """Of 100 000 entries, save_to_json takes 3.3 s."""
    saves, save = [], TrainerState.save_to_json
    monkeypatch.setattr(TrainerState, "save_to_json", lambda self, path: (saves.append(path), save(self, path)))
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 32), digits(32, 48), max_steps=1, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert len(saves) == 1
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1") == trainer.state.best_model_checkpoint
    assert find_damage(str(tmp_path / "checkpoint-1")) is None


def test_a_run_that_was_stopped_early_trains_no_more_when_it_is_resumed(tmp_path):
    def make_early(folder: Path):
        settings = {
            "max_steps": -1, "num_train_epochs": 5, "save_strategy": "epoch", "eval_strategy": "epoch", "learning_rate": 1e-9,
            "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
            "restore_callback_states_from_checkpoint": True,
        }  # fmt: skip
        options = {"compute_metrics": accuracy, "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]}
        return make_trainer(folder, timm_cnn(), digits(0, 32), digits(32, 48), **settings, **options)

    trainer = make_early(tmp_path)
    trainer.train()
    assert trainer.state.global_step == 4  # two epochs of two steps: the second one gained nothing
    resumed = make_early(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert resumed.state.log_history[:-1] == trainer.state.log_history[:-1]
    for name, value in trainer.student.state_dict().items():
        torch.testing.assert_close(resumed.student.state_dict()[name], value, rtol=0, atol=0)
    # A training from the beginning does not end at once, with the callback that has counted.
    trainer.train()
    assert trainer.state.global_step > 0
