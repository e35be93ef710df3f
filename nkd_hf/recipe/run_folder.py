"""Manages the folder of a run: its lock, its record, and the choice between continuing a run and replacing it."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from ..data.arguments import DataArguments
from ..errors import failed_write, redact
from ..files import write_whole
from ..teacher_logits.info import StoreInfo
from ..trainer.agreement import decide_in_first
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.checkpoints import checkpoints, find_damage, is_model_only, remove_unfinished
from .arguments import RecipeArguments

RESULTS, REPORT = "results.json", "report.html"
# The folders of the trained models. A run touches no other folder beside them.
STAGES = ("teacher", "baseline", "student")
_SETTINGS = "run.yaml"
# This file exists from the writing of the results until the push is done and the report is complete.
_UNREPORTED = ".unreported"
# This file records `top_k` and `cycle` of the store that the run trains from, which run.yaml does not contain.
_STORED = ".teacher_logits.json"
LOCK = ".lock"
_LOCK_TIMEOUT = 5.0  # seconds; a killed run may take a moment to release its lock
# Arguments whose names begin in these ways change neither the training nor its data.
_WITHOUT_EFFECT = (
    "dataloader_num_workers", "dataloader_persistent", "dataloader_pin", "dataloader_prefetch", "ddp_timeout",
    "disable_tqdm", "eval_", "hub_", "license", "local_rank", "log_", "logging_", "num_processes", "output_dir",
    "per_device_eval", "project", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "save_",
    "skip_memory_metrics", "trackio_",
)  # fmt: skip

# These arguments decide which weights load_best_model_at_end keeps.
_OF_BEST = ("eval_strategy", "eval_steps", "save_strategy", "save_steps")

# The value of an argument that a record lacks, since an older version without the argument wrote it.
_DEFAULTS = {
    field.name: field.default
    for arguments in (RecipeArguments, DataArguments)
    for field in dataclasses.fields(arguments)
    if field.default is not dataclasses.MISSING and not field.name.startswith(_WITHOUT_EFFECT)
}
_Answer = TypeVar("_Answer")
# The locks that this process holds, by their folders.
_locks: dict[Path, FileLock] = {}


def lock_folder(folder: Path) -> None:
    """Makes and locks the folder of a run, until this process ends or calls [`unlock_folder`].

    A file system without locks does not keep other processes from the folder.

    Raises:
        ValueError: another process has locked the folder.
        OSError: the folder cannot be made or written to.
    """
    unlock_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    path.open("ab").close()  # so that only a file system without locks makes FileLock raise OSError
    # A soft lock is a file that exists, and would outlive a killed process. thread_local would bind the lock to this
    # thread.
    lock = FileLock(path, timeout=_LOCK_TIMEOUT, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run is at work in {folder}: wait until it ends, or choose another --output_dir"
        ) from None
    except OSError:  # a file system without locks
        return
    _locks[folder.resolve()] = lock


def unlock_folder(folder: Path) -> None:
    """Unlocks the folder for other processes."""
    if lock := _locks.pop(folder.resolve(), None):
        lock.release()


def open_run(folder: Path, settings: dict[str, Any], training: DistillationTrainingArguments) -> tuple[bool, bool]:
    """Locks the folder of a run, and decides whether this start continues the run in it.

    A run that was stopped is continued, and so is a run whose checkpoint `resume_from_checkpoint` names.

    Args:
        folder: `output_dir` of the recipe.
        settings: see [`collect_settings`].
        training: `resume_from_checkpoint` says whether to resume, and from where.

    Returns:
        Whether the run is continued, and whether all its models are trained.

    Raises:
        ValueError: the named checkpoint cannot be resumed, another process works in the folder, or the folder holds a
            run with other settings.
        OSError: the folder cannot be written to.
    """
    checkpoint = named_checkpoint(training)
    if checkpoint is not None:  # The user has chosen the run by its checkpoint: settings are not compared.
        check_checkpoint(checkpoint)
        lock_folder(folder)
        return True, False
    lock_folder(folder)
    restarts = str(training.resume_from_checkpoint).lower() == "false"
    goes_on = can_continue(folder, settings, restarts)
    if not has_run(folder):
        clear_run(
            folder, settings
        )  # There is nothing to delete, and a read-only folder is reported before the data load.
    return goes_on, goes_on and is_trained(folder)


def named_checkpoint(training: DistillationTrainingArguments) -> str | None:
    """Returns the checkpoint that `resume_from_checkpoint` names; None where it is unset, true or false."""
    wanted = str(training.resume_from_checkpoint)
    return None if wanted.lower() in ("none", "true", "false") else wanted


def check_checkpoint(checkpoint: str) -> None:
    """Raises ValueError where a checkpoint cannot be resumed."""
    fault = find_damage(checkpoint)
    if fault is None and is_model_only(checkpoint):
        fault = "saved with save_only_model, which omits the optimiser's state"
    if fault is not None:
        raise ValueError(
            f"the checkpoint {checkpoint} cannot be resumed: {fault}. Nothing was trained yet: name another "
            "one, or omit --resume_from_checkpoint: the run in output_dir then continues by itself"
        )


def decide_in_folder(folder: Path, decide: Callable[[], _Answer]) -> _Answer:
    """Calls a function on a run's folder in the first process, and returns its result in all processes.

    Raises:
        SystemExit: with a message, where the function raises ValueError or OSError.
    """
    try:
        return decide_in_first(decide)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        cause, advice = failed_write(error, folder)
        raise SystemExit(
            f"error: the folder {folder} cannot be written to ({cause}): {advice}, or choose another --output_dir"
        ) from error


@contextlib.contextmanager
def exit_if_not_written(what: str, folder: Path) -> Iterator[None]:
    """Ends the process with a message where a file of a run cannot be written.

    Raises:
        SystemExit: in place of OSError or SafetensorError.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause, advice = failed_write(error, folder)
        raise SystemExit(
            f"error: {what} could not be written to {folder} ({cause}). The checkpoints are as they were: {advice}, and "
            "start the run again"
        ) from error


def collect_settings(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments
) -> dict[str, Any]:
    """Collects the settings that must be the same when another start continues a run."""
    settings = dataclasses.asdict(recipe) | dataclasses.asdict(data) | training.to_dict()
    kept = _OF_BEST if training.load_best_model_at_end else ()
    settings = {
        name: value for name, value in settings.items() if name in kept or not name.startswith(_WITHOUT_EFFECT)
    }
    # The place of a store has no effect, and check_fingerprint compares its content with the run.
    settings["teacher_logits"] = recipe.teacher_logits and "a store"
    settings["world_size"] = training.world_size
    # A stream's workers divide its images among themselves. Without workers, the process reads all images, as one
    # worker does.
    settings["stream_workers"] = max(1, training.dataloader_num_workers) if data.streaming else None
    # JSON makes the values comparable with the record that _describe_differences reads. Without credentials, a renewed
    # one is no other setting.
    return json.loads(redact(json.dumps(settings, default=str)))


def can_continue(folder: Path, settings: dict[str, Any], restarts: bool = False) -> bool:
    """Whether this start continues the run in the folder, which is not changed.

    A run that was stopped, also in its report (see [`is_trained`]), is continued. A finished run is not: [`clear_run`]
    removes it for a new run.

    Args:
        folder: `output_dir` of the recipe.
        settings: see [`collect_settings`].
        restarts: whether the user wants a new run in any case.

    Raises:
        ValueError: the folder holds a run with other settings, or with settings that cannot be read.
    """
    is_next = has_run(folder) and not restarts
    if is_next and (differences := _describe_differences(folder / _SETTINGS, settings)):
        raise ValueError(
            f"{folder} holds a run with other settings ({differences}): set another output_dir, "
            "or restart in its place with --resume_from_checkpoint false"
        )
    return is_next and (is_trained(folder) or not (folder / RESULTS).is_file())


def read_record(folder: Path, training: DistillationTrainingArguments) -> dict[str, Any]:
    """Reads the settings of the run that this start continues; empty for a new run or an unreadable record."""
    restarts = str(training.resume_from_checkpoint).lower() == "false"
    is_over = (folder / RESULTS).is_file() and not is_trained(folder) and named_checkpoint(training) is None
    if restarts or is_over or not has_run(folder):
        return {}
    try:
        record = yaml.safe_load((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return record if isinstance(record, dict) else {}


def clear_run(folder: Path, settings: dict[str, Any]) -> None:
    """Removes the run in the folder, if there is one, and records the settings of the new one.

    Raises:
        OSError: the folder cannot be written to.
    """
    (folder / _UNREPORTED).unlink(missing_ok=True)
    # Where there is no run yet, the trainer reports the remains of a killed first save.
    for stage in STAGES if has_run(folder) else ():
        remove_unfinished(str(folder / stage))
        for checkpoint in checkpoints(str(folder / stage)):
            shutil.rmtree(checkpoint)
    (folder / REPORT).unlink(missing_ok=True)
    for path in reversed(_list_state_files(folder)):  # Results last: until then the run counts as finished.
        path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _SETTINGS, yaml.safe_dump(settings, sort_keys=False))


def check_stored_logits(folder: Path, info: StoreInfo, goes_on: bool) -> None:
    """Records `top_k` and `cycle` of the store that a run trains from, or ends the process if a continued run had
    others.

    Args:
        folder: `output_dir` of the recipe.
        info: the content of the store's `store.json`.
        goes_on: whether the run is continued and settings are compared; see [`open_run`].

    Raises:
        SystemExit: with a message.
    """
    kept, path = {"top_k": info.top_k, "cycle": info.cycle}, folder / _STORED

    def compare() -> None:
        earlier = json.loads(path.read_text(encoding="utf-8")) if goes_on and path.is_file() else kept
        if earlier != kept:
            was, now = (f"top_k={values.get('top_k')}, cycle={values.get('cycle')}" for values in (earlier, kept))
            raise ValueError(
                f"{folder} holds a run that trained from a store with {was}, got a store with {now}: name that store in "
                "teacher_logits, set another output_dir, or restart in its place with --resume_from_checkpoint false"
            )
        write_whole(path, json.dumps(kept) + "\n")

    decide_in_folder(folder, compare)


def replace_run(folder: Path, settings: dict[str, Any]) -> None:
    """Removes a finished run in the folder, and prints a message; see [`clear_run`]."""
    if has_run(folder):
        print(f"\nThe earlier run in {folder} was finished: this one replaces it", flush=True)
        clear_run(folder, settings)


def has_run(folder: Path) -> bool:
    """Whether the folder has files of a run, finished or not."""
    return any(path.exists() for path in _list_state_files(folder)) or any(
        checkpoints(str(folder / stage)) for stage in STAGES
    )


def _list_state_files(folder: Path) -> list[Path]:
    """Lists the files that only a run writes, the results first."""
    return [folder / RESULTS, *(folder / stage / TRAINER_STATE_NAME for stage in STAGES)]


def is_trained(folder: Path) -> bool:
    """Whether the run has written its results, and its report is not complete."""
    return (folder / _UNREPORTED).exists() and (folder / RESULTS).is_file()


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Writes the results of a run, which [`is_trained`] from now on."""
    # The mark is written first: results without it would count as a finished run.
    (folder / _UNREPORTED).touch()
    write_whole(folder / RESULTS, json.dumps(results, indent=2) + "\n")


def finish_run(folder: Path) -> None:
    """Marks the run as finished, so that the next start in the folder begins a new one, and unlocks the folder."""
    (folder / _UNREPORTED).unlink(missing_ok=True)
    unlock_folder(folder)


def read_history(folder: Path) -> list[dict[str, float]] | None:
    """Reads the log of a model whose training and evaluation are complete; None where there is no such model."""
    try:
        history = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
        return history if any("eval_accuracy" in entry for entry in history) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _describe_differences(record: Path, settings: dict[str, Any]) -> str:
    """Describes how the settings differ from those in the record; a field that the record lacks has its default."""
    if not record.is_file():
        return f"it has no {_SETTINGS}"
    try:
        earlier = yaml.safe_load(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        return f"its {_SETTINGS} cannot be read: {' '.join(str(error).split())}"
    if not isinstance(earlier, dict):
        return f"its {_SETTINGS} holds no mapping"
    # A record of an older version lacks _OF_BEST.
    defaults = {name: settings[name] for name in _OF_BEST if name in settings} | _DEFAULTS
    earlier = {name: defaults[name] for name in settings if name in defaults} | earlier
    names = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    shown = [f"{name} was {earlier.get(name)!r} and is {settings.get(name)!r}" for name in names[:5]]
    return ", ".join(shown + ([f"and {len(names) - 5} more"] if len(names) > 5 else []))
