"""Checks that the files of a run fit on its disk, before anything is trained."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from accelerate.utils import gather_object

from ..trainer.agreement import decide_in_first, first_fault
from ..trainer.checkpoints import checkpoints
from ..trainer.distillation_model import DistillationModel
from .build import count_steps
from .plan_costs import count_checkpoint_bytes, count_checkpoints, count_model_bytes, count_state_bytes
from .run_folder import LOCK, STAGES
from .stage import find_trained
from .teacher_start import teacher_changes

if TYPE_CHECKING:
    from .recipe import Recipe

# The name of a store in a message, and the advice for a smaller one.
_STORE = "the teacher's logits", ", set fewer epochs or a smaller top_k"


def check_disk(run: "Recipe", stages: Sequence[str], store_bytes: int = 0) -> None:
    """Checks that the models and checkpoints that are yet to be written fit on the disk.

    Args:
        run: a run whose trainings have not begun.
        stages: the names of the trainings, in their order.
        store_bytes: bytes of a store of logits that are yet to be written into the first process's folder.

    Raises:
        ValueError: they do not fit.
    """
    todo = [name for name in stages if not run.goes_on or find_trained(run.folder / name) is None]
    # The checkpoints in the folder belong to a run that continues, or are deleted before a new run begins.
    folders = [run.folder / name for name in (todo if run.goes_on else STAGES)]
    written = sum(_count_file_bytes(path) for folder in folders for path in checkpoints(str(folder)))
    needed = store_bytes + _count_peak(run, todo) - written
    purpose, advice = "the checkpoints", ""
    if store_bytes:
        purpose, advice = _STORE
    elif not run.training_args.save_total_limit:
        advice = ", set save_total_limit to 1"
    if lack := decide_in_first(lambda: _describe_lack(run.folder, needed, purpose, advice)):
        raise ValueError(lack)


def check_own_disk(folder: Path, store_bytes: int) -> None:
    """Checks on each machine that its part of a store of logits fits on its disk. All processes must call this.

    Args:
        folder: the folder of the store.
        store_bytes: bytes that the processes with this process's folder will write.

    Raises:
        ValueError: the part does not fit on one of the machines.
    """
    if lack := first_fault(_describe_lack(folder, store_bytes, *_STORE)):
        raise ValueError(lack)


def group_by_folder(folder: Path) -> list[int]:
    """Returns a number for each process; processes that write into one folder have the same number. All must call
    this.

    Processes that see the lock of the first process share its folder. The others share the folder of their machine.

    Args:
        folder: the folder that the first process has locked, see [`~nkd_hf.recipe.run_folder.lock_folder`].
    """
    state = PartialState()
    is_shared = _read_time(folder / LOCK) == decide_in_first(lambda: _read_time(folder / LOCK))
    return gather_object([0 if is_shared else state.process_index - state.local_process_index])


def _read_time(path: Path) -> int | None:
    """Reads the time when a file was written, in nanoseconds; None without a file. Two locks differ in it."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _describe_lack(folder: Path, needed: float, purpose: str, advice: str) -> str | None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return None
    return (
        f"output_dir must have {_in_words(needed)} of free disk for {purpose}, got {_in_words(free)} in {existing}. "
        f"Free some{advice}, or set another output_dir"
    )


def _count_peak(run: "Recipe", stages: Sequence[str]) -> int:
    """Counts the most bytes that successive trainings have on disk at once."""
    peak = left = 0
    for name in stages:
        model, args = _open_model(run, name), copy.copy(run.training_args)
        changes = teacher_changes(run.args, run.data_args, args) if name == "teacher" else {}
        for argument, value in changes.items():
            setattr(args, argument, value)
        num_steps, epochs = count_steps(run.data_args, args, run.data["train"])
        kept, at_once = count_checkpoints(args, num_steps, epochs)
        checkpoint = count_checkpoint_bytes(model, count_state_bytes(model, args, []), args)
        saved = count_model_bytes(model.student)
        peak = max(peak, left + saved + at_once * checkpoint)
        left += saved + kept * checkpoint
    return peak


def _open_model(run: "Recipe", name: str) -> DistillationModel:
    if name == "teacher":
        return DistillationModel(run.create_teacher(), {})
    if name == "baseline":
        return DistillationModel(run.create(run.args.student, run.args.student_args), {})
    return run.make_stage("student", teacher_compile=False).model


def _count_file_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _in_words(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
