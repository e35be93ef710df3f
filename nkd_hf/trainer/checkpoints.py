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
    folders = [os.path.join(output_dir, name) for name in sorted(filter(_NAME.fullmatch, names), key=_step)]
    return [folder for folder in folders if os.path.isdir(folder)]


def remove_old(output_dir: str, step: int, limit: int | None, best: str | None) -> None:
    """Deletes checkpoints beyond `limit`: those of an abandoned run, with more steps, then those with the fewest steps.

    The one of `step` and the best one stay. Times of files say nothing, since clocks are set back.
    """
    folders = checkpoints(output_dir)
    if not limit or limit < 0:
        return
    kept = {f"checkpoint-{step}", os.path.basename(best or "")}
    old = [folder for folder in folders if os.path.basename(folder) not in kept]
    old.sort(key=lambda folder: _step(folder) < step)  # stable: each part stays in the order of its steps
    for folder in old[: max(len(folders) - limit, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: str) -> int:
    return int(_NAME.fullmatch(os.path.basename(folder))[1])


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
