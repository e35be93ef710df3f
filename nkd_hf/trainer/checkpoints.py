"""Finds whole checkpoints, and removes half-written ones."""

import contextlib
import functools
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..files import remove_leftovers
from .agreement import decide_in_first, first_fault

logger = logging.getLogger(__name__)

# The folder in `output_dir` into which a checkpoint is written. CheckpointWriter moves the complete one to its place.
UNFINISHED = ".nkd_hf-unfinished"
# The folder in UNFINISHED that keeps an older checkpoint of the same step until the new one is in its place.
REPLACED = "replaced"
# The files of a checkpoint and their sizes; written last.
FILES = "checkpoint_files.json"
_DAMAGED = "damaged-"
_NAME = re.compile(r"checkpoint-(\d+)")
# The names of the folders in output_dir from which checkpoints are pushed begin with this.
PUSH_COPY = "_push-"
SHARE_FOLDER = "Put it on a file system that all nodes share"
_OF_TRAINER = (
    "saved by transformers.Trainer, whose checkpoints this trainer does not resume. Pass its model "
    "(AutoModelForImageClassification.from_pretrained of that folder) as model, and train without resume_from_checkpoint."
)
_MODEL_ONLY = (
    "cannot be resumed: saved with save_only_model, which omits the optimiser's state. Train again without "
    "resume_from_checkpoint, and without save_only_model if it is to be resumed later"
)


def find_checkpoint(output_dir: str, wanted: str | bool | None) -> str | None:
    """Removes the leftovers of killed processes in `output_dir`, and returns the checkpoint to resume from.

    All processes must call this.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint, or True for the last one in `output_dir` that is whole; None and False resume nothing.

    Raises:
        ValueError: the checkpoint is not whole for all processes, holds the model only, or there is none.
    """
    checkpoint = decide_in_first(functools.partial(_find_checkpoint, output_dir, wanted))
    fault = checkpoint and first_fault(find_damage(str(checkpoint)))
    if fault:
        raise ValueError(f"the checkpoint {checkpoint} must be whole for all processes: {fault}. {SHARE_FOLDER}")
    return checkpoint


def _find_checkpoint(folder: str, wanted: str | bool | None) -> str | None:
    remove_leftovers(PUSH_COPY, folder)
    for name in remove_unfinished(folder):
        logger.warning("%s in %s is half-written: it is ignored, and removed.", name, folder)
    if wanted is True:
        wanted = last_checkpoint(folder)
        if wanted is None and any(map(is_model_only, checkpoints(folder))):
            raise ValueError(f"the checkpoints in {folder} {_MODEL_ONLY}")
        if wanted is None and any(map(is_of_trainer, checkpoints(folder))):
            raise ValueError(f"the checkpoints in {folder} cannot be resumed: {_OF_TRAINER}")
        if wanted is None:
            raise ValueError(f"{folder} holds no whole checkpoint: train without resume_from_checkpoint")
    elif wanted and is_of_trainer(str(wanted)):
        raise ValueError(f"the checkpoint {wanted} cannot be resumed: {_OF_TRAINER}")
    elif wanted and (fault := find_damage(str(wanted))):
        raise ValueError(f"the checkpoint {wanted} is not whole: {fault}. Resume from another one")
    elif wanted and is_model_only(str(wanted)):
        raise ValueError(f"the checkpoint {wanted} {_MODEL_ONLY}")
    return wanted or None


@contextlib.contextmanager
def refused_pickles(checkpoint: str | None) -> Iterator[None]:
    """Raises ValueError for a checkpoint with a dangerous pickle; torch's own error advises to run the pickle's code."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} is not resumed, since a file of it holds more than tensors and could run code: "
            f"{str(error).splitlines()[0]}"
        ) from error


def last_checkpoint(output_dir: str) -> str | None:
    """Returns the last checkpoint that is whole; damaged ones after it are renamed, with a warning.

    A checkpoint that holds the model only (`save_only_model`) is ignored.
    """
    checkpoint, faults = last_whole_checkpoint(output_dir)
    for damaged, fault in faults.items():
        logger.warning("%s is not whole: %s. It is ignored, and renamed to %s.", damaged, fault, move_aside(damaged))
    return checkpoint


def write_files(folder: str) -> None:
    """Records the files of a complete checkpoint and their sizes."""
    sizes = {name: size for name, size in _sizes(Path(folder)).items() if name != FILES}
    Path(folder, FILES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: str) -> str | None:
    """Describes the fault of a checkpoint, or returns None if the checkpoint is whole.

    A missing file is a fault, and so is a file of another size than recorded. Sizes of text files are not compared, since a
    push to the Hub shortens the paths in them.
    """
    if not os.path.isdir(folder):
        return "there is no such folder"
    if is_of_trainer(folder):
        return "transformers.Trainer saved it, whose checkpoints are not resumed here"
    try:
        records = {
            name: json.loads(Path(folder, name).read_text(encoding="utf-8")) for name in (FILES, TRAINER_STATE_NAME)
        }
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except (OSError, ValueError) as error:
        return f"its record cannot be read: {error}"
    for name, record in records.items():
        if not isinstance(record, dict):
            return f"{name} holds no mapping"
    found = _sizes(Path(folder))
    for name, size in records[FILES].items():
        if name not in found:
            return f"it has no {name}"
        if found[name] != size and not name.endswith((".json", ".yaml")):
            return f"{name} has {found[name]} bytes of {size}"
    return None


def is_of_trainer(folder: str) -> bool:
    """Whether `transformers.Trainer` saved the checkpoint: it pickles its arguments, and keeps no record of the files."""
    return os.path.isfile(os.path.join(folder, TRAINING_ARGS_NAME)) and not os.path.exists(os.path.join(folder, FILES))


def is_model_only(folder: str) -> bool:
    """Whether a checkpoint was saved with `save_only_model`: training cannot resume from it.

    The optimiser's state is in `optimizer.pt`, FSDP's `optimizer.bin` or `optimizer_0`, or DeepSpeed's `global_step*`.
    """
    return not any("optimizer" in name or name.startswith("global_step") for name in os.listdir(folder))


def last_whole_checkpoint(output_dir: str) -> tuple[str | None, dict[str, str]]:
    """Returns the whole checkpoint with the most steps, and the faults of damaged ones with more steps, by folder.

    Checkpoints that hold the model only, and checkpoints of `transformers.Trainer`, are ignored.
    """
    faults = {}
    for folder in checkpoints(output_dir)[::-1]:
        if is_of_trainer(folder):
            continue
        fault = find_damage(folder)
        if fault is not None:
            faults[folder] = fault
        elif not is_model_only(folder):
            return folder, faults
    return None, faults


def checkpoints(output_dir: str) -> list[str]:
    """Lists the folders `checkpoint-*` in the order of their steps."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    folders = [os.path.join(output_dir, name) for name in sorted(filter(_NAME.fullmatch, names), key=_step)]
    return [folder for folder in folders if os.path.isdir(folder)]


def remove_old(output_dir: str, step: int, limit: int | None, best: str | None) -> None:
    """Deletes checkpoints beyond `limit`: first the ones with more steps (of an abandoned run), then the oldest ones.

    The checkpoint of `step` and the best one stay. File times are not read, since a clock may be set back.
    """
    folders = checkpoints(output_dir)
    if not limit or limit < 0:
        return
    kept = {f"checkpoint-{step}", os.path.basename(best or "")}
    old = [folder for folder in folders if os.path.basename(folder) not in kept]
    old.sort(key=lambda folder: _step(folder) < step)  # the sort is stable: each part stays in the order of its steps
    for folder in old[: max(len(folders) - limit, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: str) -> int:
    return int(_NAME.fullmatch(os.path.basename(folder))[1])


def move_aside(folder: str) -> str:
    """Renames a damaged checkpoint, which `remove_old` would count as a whole one, and returns the new path."""
    parent, name = os.path.split(folder)
    target = os.path.join(parent, _DAMAGED + name)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)
    return target


def remove_unfinished(output_dir: str) -> list[str]:
    """Removes the checkpoints that a killed process left in [`UNFINISHED`], and returns their names."""
    folder = Path(output_dir, UNFINISHED)
    names = os.listdir(folder) if folder.is_dir() else []
    names = [name for name in names if name == REPLACED or _NAME.fullmatch(name)]
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds other files
        folder.rmdir()
    return names


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
