"""What several processes decide together: where to resume, whether they share a folder, and why a save failed."""

import json
import os
import re
import shutil
import signal
import types
from pathlib import Path

import pytest
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from processes import in_processes
from tiny import digits, make_trainer, native_vit

from nkd_hf import NKDLoss
from nkd_hf.errors import CheckpointError, failed_write
from nkd_hf.trainer import checkpoint_writer, checkpoints
from nkd_hf.trainer.agreement import decide_in_first, first_fault
from nkd_hf.trainer.checkpoints import find_damage

pytestmark = pytest.mark.runs


def trainer_in(folder: Path, **kwargs):
    """Logs after 3 of 6 steps: what was summed up until step 2 is in its checkpoint, a sum for each process."""
    settings = {"max_steps": 6, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "ddp_timeout": 77}
    return make_trainer(
        folder, native_vit(), digits(0, 64), teacher=native_vit(seed=1), distillation_loss=NKDLoss(),
        per_device_train_batch_size=8, **(settings | kwargs),
    )  # fmt: skip


def logs(trainer) -> list[dict]:
    return [{name: value for name, value in entry.items() if "_runtime" not in name and "_second" not in name}
            for entry in trainer.state.log_history]  # fmt: skip


def error_of(action) -> list[str]:
    """The message of each process."""
    try:
        action()
        message = "none"
    except (ValueError, CheckpointError) as error:
        message = f"{type(error).__name__}: {error}"
    return gather_object([message])


def work(folder: Path) -> None:
    """What the processes of the first test do."""
    rank, groups, new_group = PartialState(cpu=True).process_index, [], dist.new_group
    dist.new_group = lambda *args, **kwargs: groups.append(kwargs) or new_group(*args, **kwargs)
    whole = trainer_in(folder)
    whole.train()
    dist.new_group = new_group
    result = {
        "timeouts": gather_object([kwargs["timeout"].total_seconds() for kwargs in groups]),
        "whole": logs(whole),
    }
    if rank == 0:
        (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
        shutil.rmtree(folder / "checkpoint-4")
        sums = json.loads((folder / "checkpoint-2" / "sums_since_log.json").read_text())
        result["sums"] = [entry["loss"] for entry in sums]
    PartialState().wait_for_everyone()
    resumed = trainer_in(folder)
    resumed.train(resume_from_checkpoint=True)
    result["resumed"] = logs(resumed)

    def refuse() -> None:
        raise ValueError("refused")

    result["refused"] = error_of(lambda: decide_in_first(refuse))
    result["fault"] = gather_object([first_fault("a fault" if rank == 1 else None)])
    # The second process sees no checkpoint, and then nothing that the first one writes.
    if rank == 1:
        checkpoints.find_damage = lambda checkpoint: "there is no such folder"
    result["resume"] = error_of(lambda: trainer_in(folder).train(resume_from_checkpoint=True))
    checkpoint_writer._PATIENCE = 0.2
    if rank == 1:
        path = types.SimpleNamespace(**(vars(os.path) | {"exists": lambda name: False}))
        checkpoint_writer.os = types.SimpleNamespace(**(vars(os) | {"path": path}))
    result["save"] = error_of(trainer_in(folder / "other", max_steps=2).train)
    checkpoint_writer.os, checkpoints.find_damage = os, find_damage
    result["files"] = sorted(os.listdir(folder / "other"))
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("many")
    log = folder / "log"
    assert in_processes(2, lambda: work(folder / "run"), log) == [0, 0], log.read_text()[-3000:]
    return {**json.loads((folder / "run" / "result.json").read_text()), "folder": folder / "run"}


def test_processes_resume_from_the_last_whole_checkpoint_with_sums_of_their_own(result):
    # Of other batches, so that sums of one process would give another log.
    assert result["sums"][0] != result["sums"][1]
    assert [entry["step"] for entry in result["whole"]] == [3, 6, 6]
    assert result["resumed"] == result["whole"]
    assert {path.name for path in result["folder"].glob("*checkpoint*")} == {
        *("checkpoint-2", "checkpoint-4", "checkpoint-6", "damaged-checkpoint-6")
    }


def test_our_own_process_groups_wait_as_long_as_ddp_timeout_says(result):
    assert set(result["timeouts"]) == {77}


def test_an_error_of_one_process_is_raised_in_all(result):
    assert result["refused"] == ["ValueError: refused"] * 2
    assert result["fault"] == ["a fault (said by process 1 of 2)"] * 2


def test_a_folder_that_one_process_does_not_see_is_refused_by_all(result):
    checkpoint = result["folder"] / "checkpoint-6"
    assert (
        result["resume"]
        == [
            f"ValueError: the checkpoint {checkpoint} must be whole for all processes: there is no such folder (said by process "
            "1 of 2). Put it on a file system that all nodes share"
        ]
        * 2
    )
    assert (
        result["save"]
        == [
            f"CheckpointError: output_dir must be one folder for all processes: {result['folder'] / 'other'} lacks a file that "
            "the first process has written there (said by process 1 of 2). Put it on a file system that all nodes share"
        ]
        * 2
    )
    assert result["files"] == [] or result["files"] == [".nkd_hf-unfinished"]


def die_in_a_save(folder: Path) -> None:
    trainer = trainer_in(folder, max_steps=2)
    if trainer.args.process_index == 1:
        trainer.checkpoint_writer.complete = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    trainer.train()


def test_a_peer_that_dies_in_a_save_is_no_full_disk(tmp_path):
    log = tmp_path / "log"
    assert in_processes(2, lambda: die_in_a_save(tmp_path / "run"), log) == [1, -signal.SIGKILL]
    said = log.read_text()
    assert "CheckpointError: the checkpoint of step 2 could not be written" in said
    assert "as they were: read the last message of the process that has ended, and resume" in said
    assert "GiB" not in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("error", "cause", "advice"),
    [
        (OSError(28, "No space left on device"), r"OSError: .*; [\d.]+ GiB are free there", "make room"),
        (OSError(122, "Disk quota exceeded"), r"OSError: .*; [\d.]+ GiB are free there", "make room"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
            r".* GiB are free there",
            "make room",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), r".* GiB are free there", "make room"),
        (RuntimeError("I/O error: Permission denied (os error 13)"), r"[^;]*", "allow this user to write there"),
        (PermissionError(13, "Permission denied"), r"[^;]*", "allow this user to write there"),
        (OSError(30, "Read-only file system"), r"[^;]*", "allow this user to write there"),
        (OSError(5, "Input/output error"), r"[^;]*", "check the path and the disk"),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
            r"[^;]*",
            "read the last message of the process that has ended",
        ),
    ],
)
def test_what_to_do_about_a_write_that_failed_depends_on_its_cause(tmp_path, error, cause, advice):
    said, todo = failed_write(error, tmp_path / "not yet there")
    assert todo == advice
    assert re.fullmatch(cause, said)
