"""Runs that are killed and started again, held against the run that never was. Real processes, real signals."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from processes import in_a_process
from tiny import make_trainer, timm_deit

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    ImageDataset,
    Recipe,
    RecipeArguments,
    USKDLoss,
    load_image_dataset,
    parse_args,
    train_transform,
)

pytestmark = pytest.mark.usefixtures("no_curves")
CONFIG = Path(__file__).parents[2] / "recipes" / "configs" / "digits_distill_cnn.yaml"
# Two losses, one with parameters of its own, mixup, a moving average and accumulation; nothing that is logged, evaluated
# and saved falls together.
SETTINGS = {
    "teacher_args": '{"channels": [8, 16, 32, 64]}',
    "distillation_loss": "nkd+uskd",
    "loss_args": "{}",
    "compare_with_baseline": "false",
    "mixup_alpha": "0.4",
    "ema_decay": "0.9",
    "max_train_samples": "96",
    "max_eval_samples": "40",
    "num_train_epochs": "2",
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "2",
    "logging_strategy": "steps",
    "logging_steps": "5",
    "save_strategy": "steps",
    "save_steps": "4",
    "save_total_limit": "1",
    "dataloader_num_workers": "0",
    "dataloader_persistent_workers": "false",
    "disable_tqdm": "true",
    "use_cpu": "true",
}


def train(folder: Path, **settings: str) -> None:
    arguments = [part for name, value in (SETTINGS | settings).items() for part in (f"--{name}", value)]
    recipe = Recipe(
        *parse_args(
            (RecipeArguments, DataArguments, DistillationTrainingArguments),
            args=["--config", str(CONFIG), "--output_dir", str(folder), *arguments],
        )
    )
    recipe.train_teacher()
    recipe.train_baseline()
    recipe.train_student()
    recipe.report()


def outcome(folder: Path) -> dict:
    """Everything that the run without an interruption must have in common with one that was interrupted."""
    result = {"results": json.loads((folder / "results.json").read_text())}
    for stage in ("teacher", "student"):
        history = json.loads((folder / stage / "trainer_state.json").read_text())["log_history"]
        timed = ("_runtime", "_per_second")
        result[stage, "log"] = [{k: v for k, v in e.items() if not k.endswith(timed)} for e in history]
        checkpoint = folder / stage / "checkpoint-12"
        assert [path.name for path in (folder / stage).glob("*checkpoint*")] == [checkpoint.name]
        for path in [folder / stage / "model.safetensors", *checkpoint.glob("*.safetensors")]:
            result[stage, path.parent.name, path.name] = safetensors.torch.load_file(path)
        result[stage, "optimizer"] = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        result[stage, "scheduler"] = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    return result


def assert_same(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    folder, log = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("log") / "log"
    assert in_a_process(lambda: train(folder), log) == 0, log.read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def whole(whole_run) -> dict:
    return outcome(whole_run)


def kill_in(owner, name: str, nth: int, prepare: Callable = lambda *args: None, signum: int = signal.SIGKILL) -> None:
    """Sends this process a signal in the `nth` call of a function."""
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            prepare(*args)
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def kill_at_write(folder: Path, nth: int) -> None:
    """Kills this process as it makes, renames, removes or opens for writing the `nth` file or folder of the run."""
    seen = []

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(path, str) or not (flags & (os.O_WRONLY | os.O_RDWR)):
                return
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            path = args[0]
        else:
            return
        if str(path).startswith(str(folder)):
            seen.append(path)
            if len(seen) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def half_of_a_file(content, path, *args) -> None:
    Path(path).write_bytes(b"PK\x03\x04" + bytes(1000))


# What is interrupted, and for some what the second start says. In a step of the teacher and of the student, in an
# evaluation, half a file into a checkpoint, between its files, before anything is saved.
MOMENTS = [
    ("training_step", 1, ""),
    ("training_step", 10, ""),
    ("training_step", 24, "teacher/checkpoint-8"),
    ("training_step", 37, "student/checkpoint-4"),
    ("training_step", 48, "student/checkpoint-8"),
    ("prediction_step", 1, "teacher/checkpoint-4"),
    ("prediction_step", 2, "teacher/checkpoint-8"),
    ("prediction_step", 3, "teacher/checkpoint-12"),
    ("prediction_step", 4, "student/checkpoint-4"),
    ("save", 1, ""),
    ("save", 2, ""),
    ("save", 6, "teacher/checkpoint-4"),
    ("save", 9, "teacher/checkpoint-8"),
    ("save", 16, "student/checkpoint-8"),
    *(("write", n, "") for n in (3, 14, 25, 40, 60, 80, 100)),
]
FEW = [("training_step", 37), ("save", 16)]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("what", "nth", "goes_on_from"),
    [pytest.param(*moment, marks=[] if moment[:2] in FEW else pytest.mark.slow) for moment in MOMENTS],
)
def test_killed_and_started_again(tmp_path, whole, what, nth, goes_on_from):
    folder, log = tmp_path / "run", tmp_path / "log"

    def work() -> None:
        if what == "save":
            kill_in(torch, "save", nth, half_of_a_file)
        elif what == "write":
            kill_at_write(folder, nth)
        else:
            kill_in(DistillationTrainer, what, nth)
        train(folder)

    assert in_a_process(work, log) == -signal.SIGKILL, log.read_text()[-3000:]
    log.unlink()
    assert in_a_process(lambda: train(folder), log) == 0, log.read_text()[-3000:]
    if goes_on_from:
        assert f"Continues from {folder / goes_on_from}\n" in log.read_text()
    if what == "save":
        assert "is half-written: it is ignored" in log.read_text()
    assert_same(outcome(folder), whole)


@pytest.mark.runs
def test_sigterm_saves_the_step_and_the_same_command_goes_on(tmp_path, whole):
    folder, log = tmp_path / "run", tmp_path / "log"

    def work() -> None:
        kill_in(DistillationTrainer, "training_step", 37, signum=signal.SIGTERM)
        train(folder)

    assert in_a_process(work, log) == 128 + signal.SIGTERM
    # The 37th half step is of the student's 7th.
    assert (
        f"SIGTERM was received: the run is saved as {folder / 'student' / 'checkpoint-7'} of 12 steps"
        in log.read_text()
    )
    assert in_a_process(lambda: train(folder), log) == 0
    assert f"Continues from {folder / 'student' / 'checkpoint-7'}\n" in log.read_text()
    assert_same(outcome(folder), whole)


@pytest.mark.runs
def test_a_finished_run_starts_afresh(tmp_path, whole_run, whole):
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole_run, folder)
    (folder / "teacher" / "model.safetensors").write_bytes(b"")  # it would not open
    assert in_a_process(lambda: train(folder), log) == 0
    assert "Continues from" not in log.read_text()
    assert_same(outcome(folder), whole)


@pytest.mark.runs
def test_a_run_with_other_settings_is_refused(tmp_path, whole_run):
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole_run, folder)

    def times() -> dict[Path, int]:
        # filelock 3.30 truncates the file of a lock that it takes.
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}

    before = times()
    other = {"learning_rate": "0.05", "mixup_alpha": "0.2"}
    for finished in (True, False):
        if not finished:
            (folder / "results.json").unlink()
            del before[folder / "results.json"]
        assert in_a_process(lambda: train(folder, **other), log) == 1
        message = "holds a run with other settings (mixup_alpha was 0.4 and is 0.2, learning_rate was 0.1 and is 0.05)"
        assert f"error: {folder} {message}" in log.read_text()
        assert times() == before
        log.unlink()
    # What has no effect on the result may change.
    assert in_a_process(lambda: train(folder, save_steps="3", dataloader_num_workers="1"), log) == 0
    assert f"The student in {folder / 'student'} is trained already" in log.read_text()


@pytest.mark.runs
def test_persistent_workers_resume_bit_for_bit(tmp_path):
    """Drop path draws from the generator that a DataLoader takes a number from for each iterator that it makes."""
    data = load_image_dataset(DataArguments(max_train_samples=40))["train"]
    transform = train_transform(DataArguments(random_crop_padding=4), 32, [0.5] * 3, [0.5] * 3)

    def weights(checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        trainer = make_trainer(
            tmp_path, timm_deit(drop_path=0.3), ImageDataset(data, transform), distillation_loss=USKDLoss(32, 10),
            data_collator=ImageCollator(10), per_device_train_batch_size=8, max_steps=7, save_strategy="steps",
            save_steps=1, dataloader_num_workers=1, dataloader_persistent_workers=True,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    whole = weights()
    # In the middle of the first epoch, and at its end.
    for step in (3, 5):
        assert_same(weights(tmp_path / f"checkpoint-{step}"), whole)
