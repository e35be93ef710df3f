"""Checkpoint folders: which of them are whole, and what is left of those that are not."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

# A checkpoint is written here, inside of `output_dir`, and takes its place when all of it is there.
UNFINISHED = ".nkd_hf-unfinished"
# In there: a checkpoint of the same step, until the new one has taken its place.
REPLACED = "replaced"
# The files of a checkpoint and their sizes; written last.
FILES = "checkpoint_files.json"
_DAMAGED = "damaged-"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


def write_files(folder: str) -> None:
    """Notes the files of a checkpoint that is all there."""
    sizes = {name: size for name, size in _sizes(Path(folder)).items() if name != FILES}
    Path(folder, FILES).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def fault_of(folder: str) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole.

    A file that is missing, or that is longer or shorter than it was, is found. Text files are only read, since a
    checkpoint that went through the Hub has lost the paths of its machine.
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
    """Whether a checkpoint was saved with `save_only_model`: training cannot go on from it.

    The optimiser's state is in `optimizer.pt`, FSDP's `optimizer.bin` or `optimizer_0`, or DeepSpeed's `global_step*`.
    """
    return not any("optimizer" in name or name.startswith("global_step") for name in os.listdir(folder))


def last_whole_checkpoint(output_dir: str) -> tuple[str | None, dict[str, str]]:
    """The checkpoint with the most steps that is whole, and the faults of those with more steps, by folder.

    One that holds the model only is neither, and so is one of `transformers.Trainer`.
    """
    faults = {}
    for folder in checkpoints(output_dir)[::-1]:
        if is_of_trainer(folder):
            continue
        fault = fault_of(folder)
        if fault is not None:
            faults[folder] = fault
        elif not is_model_only(folder):
            return folder, faults
    return None, faults


def checkpoints(output_dir: str) -> list[str]:
    """The folders `checkpoint-*` by their steps."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    folders = [os.path.join(output_dir, name) for name in sorted(steps, key=steps.get)]
    return [folder for folder in folders if os.path.isdir(folder)]


def put_aside(folder: str) -> str:
    """Renames a damaged checkpoint, which would count as a whole one when old ones are deleted; the new path."""
    parent, name = os.path.split(folder)
    target = os.path.join(parent, _DAMAGED + name)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)
    return target


def remove_unfinished(output_dir: str) -> list[str]:
    """Removes what a process that was killed had begun to write; the names of these checkpoints."""
    folder = Path(output_dir, UNFINISHED)
    names = os.listdir(folder) if folder.is_dir() else []
    names = [name for name in names if name == REPLACED or _NAME.fullmatch(name)]
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # somebody else's files are in it
        folder.rmdir()
    return names


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
