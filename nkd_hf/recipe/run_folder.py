"""The folder of a recipe's run: whether a start goes on with the run in it, or begins one."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from ..data.arguments import DataArguments
from ..errors import redact
from ..files import write_text
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.checkpoints import checkpoints, remove_unfinished
from .arguments import RecipeArguments

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


RESULTS = "results.json"
# Other folders in a run's are somebody else's.
STAGES = ("teacher", "baseline", "student")
_SETTINGS = "run.yaml"
# There while all is trained and the results are written, but not all is reported: the push is to come.
_UNREPORTED = ".unreported"
_LOCK = ".lock"
# Seconds in which a process that was ended a moment ago is surely gone.
_PATIENCE = 5.0
# By how their names begin, the arguments that change neither what is trained nor with what.
_WITHOUT_EFFECT = (
    "dataloader_num_workers", "dataloader_persistent", "dataloader_pin", "dataloader_prefetch", "ddp_timeout",
    "disable_tqdm", "eval_", "hub_", "license", "local_rank", "log_", "logging_", "num_processes", "output_dir",
    "per_device_eval", "project", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "save_",
    "skip_memory_metrics", "trackio_",
)  # fmt: skip


# The files of the locks that this process holds, by their folders.
_held: dict[Path, int] = {}


def hold(folder: Path) -> None:
    """Makes the folder of a run and keeps other processes from it, until this one ends or calls [`release`].

    Where the platform or the file system has no locks, nobody is kept from it.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be made or written to.
    """
    release(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _held[folder.resolve()] = file
    until = time.monotonic() + _PATIENCE
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                release(folder)
                raise ValueError(
                    f"another run is at work in {folder}: wait until it ends, or choose another --output_dir"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
        else:
            return


def release(folder: Path) -> None:
    """Lets other processes have the folder."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)


def _leave_to_parent() -> None:
    # A lock lasts as long as a process has its file open, and a DataLoader's worker can outlive its parent.
    for file in _held.values():
        os.close(file)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_to_parent)


def settings_of(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments
) -> dict[str, Any]:
    """What two starts must have in common for the second to go on with the run of the first."""
    settings = dataclasses.asdict(recipe) | dataclasses.asdict(data) | training.to_dict()
    settings = {name: value for name, value in settings.items() if not name.startswith(_WITHOUT_EFFECT)}
    # Where the store lies has no effect, and what is in it is compared with the run by its own fingerprint.
    settings["teacher_logits"] = recipe.teacher_logits and "a store"
    settings["world_size"] = training.world_size
    # A stream's workers divide its images among them, and without one the process is one.
    settings["stream_workers"] = max(1, training.dataloader_num_workers) if data.streaming else None
    # Through JSON, as it will be read. A credential that was renewed is no other setting.
    return json.loads(redact(json.dumps(settings, default=str)))


def continues(folder: Path, settings: dict[str, Any], afresh: bool = False) -> bool:
    """Whether the run in the folder goes on; the folder stays as it is.

    A run that was stopped goes on, also one that [`is_trained`]. A finished one does not, and none does if `afresh`:
    [`clear`] makes room for the next one.

    Args:
        folder: `output_dir` of the recipe.
        settings: see [`settings_of`].
        afresh: whether the run in it is given up.

    Raises:
        ValueError: the folder holds a run with other settings, or with a record of them that cannot be read.
    """
    is_next = has_run(folder) and not afresh
    if is_next and (differences := _differences(folder / _SETTINGS, settings)):
        raise ValueError(
            f"{folder} holds a run with other settings ({differences}): set another output_dir, "
            "or start anew in its place with --resume_from_checkpoint false"
        )
    return is_next and (is_trained(folder) or not (folder / RESULTS).is_file())


def clear(folder: Path, settings: dict[str, Any]) -> None:
    """Removes the run in the folder, if there is one, and records the settings of the next one.

    Raises:
        OSError: the folder cannot be written to.
    """
    (folder / _UNREPORTED).unlink(missing_ok=True)
    # Where there is no run yet, the trainer says what a first save that was killed has left.
    for stage in STAGES if has_run(folder) else ():
        remove_unfinished(str(folder / stage))
        for checkpoint in checkpoints(str(folder / stage)):
            shutil.rmtree(checkpoint)
    for path in reversed(_state_files(folder)):  # The results last: until then the run counts as finished.
        path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _SETTINGS, yaml.safe_dump(settings, sort_keys=False))


def has_run(folder: Path) -> bool:
    """Whether a run, finished or not, has left something in the folder."""
    return any(path.exists() for path in _state_files(folder)) or any(
        checkpoints(str(folder / stage)) for stage in STAGES
    )


def _state_files(folder: Path) -> list[Path]:
    """The files by which a run is known, the results first."""
    return [folder / RESULTS, *(folder / stage / TRAINER_STATE_NAME for stage in STAGES)]


def is_trained(folder: Path) -> bool:
    """Whether the run has its results, and has yet to report them to the end."""
    return (folder / _UNREPORTED).exists() and (folder / RESULTS).is_file()


def write_results(folder: Path, results: dict[str, float | None]) -> None:
    """Writes the results of a run, which [`is_trained`] then."""
    (folder / _UNREPORTED).touch()
    write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")


def finish(folder: Path) -> None:
    """The next start in the folder begins a new run."""
    (folder / _UNREPORTED).unlink(missing_ok=True)
    release(folder)


def stage_history(folder: Path) -> list[dict[str, float]] | None:
    """The log of a model that was trained and evaluated to its end; None if it was not."""
    try:
        history = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
        return history if any("eval_accuracy" in entry for entry in history) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _differences(record: Path, settings: dict[str, Any]) -> str:
    """How the settings differ from those in the record; a field that is None there or here may be missing."""
    if not record.is_file():
        return f"it has no {_SETTINGS}"
    try:
        earlier = yaml.safe_load(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        return f"its {_SETTINGS} cannot be read: {' '.join(str(error).split())}"
    if not isinstance(earlier, dict):
        return f"its {_SETTINGS} holds no mapping"
    names = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    shown = [f"{name} was {earlier.get(name)!r} and is {settings.get(name)!r}" for name in names[:5]]
    return ", ".join(shown + ([f"and {len(names) - 5} more"] if len(names) > 5 else []))
