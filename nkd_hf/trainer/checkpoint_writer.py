"""Writes a checkpoint to a temporary folder, and moves it to its place when all processes have written their part."""

import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import CheckpointError, failed_write
from .agreement import decide_in_first, first_fault
from .checkpoints import REPLACED, SHARE_FOLDER, UNFINISHED, write_files

# The sums since the last entry of the log, a list with an entry per process.
_SUMS = "sums_since_log.json"
# Seconds to wait until a file shows up on a shared file system.
_PATIENCE = 30.0


class CheckpointWriter:
    """Writes checkpoints that are whole or absent, even if the run is killed while it writes one.

    `Trainer._save_checkpoint` writes to the final path, so that half a checkpoint looks like a whole one, and counts
    as a whole one when older ones are deleted. All processes must call the methods.
    """

    def __init__(self):
        self.is_writing = False
        self._shared_folder: str | None = None

    @contextmanager
    def write(self, run_folder: str, state: TrainerState, read_sums: Callable[[], dict[str, Any]]) -> Iterator[str]:
        """Yields a checkpoint's final path to a `with` block, which writes the checkpoint into [`UNFINISHED`] of the
        folder.

        Args:
            run_folder: the folder of the checkpoints.
            state: the trainer's state; `best_model_checkpoint` is set to the final path.
            read_sums: returns this process's sums since the last log, in types of JSON.

        Raises:
            CheckpointError: the checkpoint could not be written; the checkpoints before it are unchanged.
        """
        name = f"checkpoint-{state.global_step}"
        written, target = os.path.join(run_folder, UNFINISHED, name), os.path.join(run_folder, name)
        self.is_writing = True
        try:
            self._check_is_shared(run_folder)
            yield target
            self.complete(written, target, state, read_sums())
        except CheckpointError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(os.path.dirname(written), ignore_errors=True)
            cause, advice = failed_write(error, run_folder)
            raise CheckpointError(
                f"the checkpoint of step {state.global_step} could not be written to {run_folder} ({cause}). The "
                f"checkpoints before it are as they were: {advice}, and resume from the last checkpoint"
            ) from error
        finally:
            self.is_writing = False

    def complete(self, written: str, target: str, state: TrainerState, sums: dict[str, Any]) -> None:
        """Moves a checkpoint to its place when all processes have written their part."""
        processes, sums = PartialState(), gather_object([sums])
        is_best = state.best_model_checkpoint == written
        if is_best:
            state.best_model_checkpoint = target
        processes.wait_for_everyone()
        if processes.is_main_process:
            Path(written, _SUMS).write_text(json.dumps(sums), encoding="utf-8")
            if is_best:
                # The path is replaced in the text, since a second save_to_json would take seconds for a long log.
                file = Path(written, TRAINER_STATE_NAME)
                text = file.read_text(encoding="utf-8").replace(json.dumps(written), json.dumps(target))
                file.write_text(text, encoding="utf-8")
            write_files(written)
            if os.path.isdir(target):  # The same step was saved by an earlier run or a moment ago.
                os.rename(target, os.path.join(os.path.dirname(written), REPLACED))
            os.rename(written, target)
            shutil.rmtree(os.path.dirname(written))
        processes.wait_for_everyone()

    def _check_is_shared(self, folder: str) -> None:
        """Raises CheckpointError, in all processes, where a process does not see the files of the first process."""
        processes = PartialState()
        if processes.num_processes == 1 or folder == self._shared_folder:
            return
        mark = decide_in_first(functools.partial(_make_mark, folder))
        until = time.monotonic() + _PATIENCE
        while not (seen := os.path.exists(mark)) and time.monotonic() < until:
            time.sleep(0.1)
        fault = first_fault(None if seen else f"{folder} lacks a file that the first process has written there")
        if fault:
            raise CheckpointError(f"output_dir must be one folder for all processes: {fault}. {SHARE_FOLDER}")
        self._shared_folder = folder
        if processes.is_main_process:
            os.remove(mark)


def find_sums(checkpoint: str | None, num_processes: int, process: int) -> dict[str, Any] | None:
    """Returns the sums that a process had when a checkpoint was written; None for another number of processes."""
    path = Path(checkpoint or "", _SUMS)
    if checkpoint is None or not path.is_file():
        return None
    sums = json.loads(path.read_text(encoding="utf-8"))
    return sums[process] if len(sums) == num_processes else None


def _make_mark(folder: str) -> str:
    """Writes an empty file into a folder's unfinished part, and returns its path."""
    os.makedirs(os.path.join(folder, UNFINISHED), exist_ok=True)
    number, path = tempfile.mkstemp(prefix="seen-by-all-", dir=os.path.join(folder, UNFINISHED))
    os.close(number)
    return path
