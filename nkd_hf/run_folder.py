"""The folder of a recipe's run: whether a start goes on with the run in it, or begins one."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import checkpoints, remove_unfinished
from .data import DataArguments
from .recipe_args import RecipeArguments
from .training_args import DistillationTrainingArguments

RESULTS = "results.json"
# Other folders in a run's are somebody else's.
STAGES = ("teacher", "baseline", "student")
_SETTINGS = "run.yaml"
# By how their names begin, the arguments that change neither what is trained nor with what.
_WITHOUT_EFFECT = (
    "dataloader_num_workers", "dataloader_persistent", "dataloader_pin", "dataloader_prefetch", "ddp_timeout",
    "disable_tqdm", "eval_", "hub_", "license", "local_rank", "log_", "logging_", "num_processes", "output_dir",
    "per_device_eval", "project", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "save_",
    "skip_memory_metrics", "trackio_",
)  # fmt: skip


def settings_of(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments
) -> dict[str, Any]:
    """What two starts must have in common for the second to go on with the run of the first."""
    settings = dataclasses.asdict(recipe) | dataclasses.asdict(data) | training.to_dict()
    settings = {name: value for name, value in settings.items() if not name.startswith(_WITHOUT_EFFECT)}
    # Where the store lies has no effect, and what is in it is compared with the run by its own fingerprint.
    settings["teacher_logits"] = recipe.teacher_logits is not None
    # Through JSON, as it will be read.
    return json.loads(json.dumps(settings | {"world_size": training.world_size}, default=str))


def begin(folder: Path, settings: dict[str, Any], afresh: bool = False) -> bool:
    """Prepares the folder of a run; whether the run in it goes on.

    A run that was stopped goes on; one that is finished, or any if `afresh`, is cleared away.

    Args:
        folder: `output_dir` of the recipe.
        settings: see [`settings_of`].
        afresh: whether the run in it is given up.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    stages = [folder / name for name in STAGES]
    state = [folder / RESULTS, *(stage / TRAINER_STATE_NAME for stage in stages)]
    has_run = any(path.exists() for path in state) or any(checkpoints(str(stage)) for stage in stages)
    record = folder / _SETTINGS
    if has_run and not afresh:
        earlier = yaml.safe_load(record.read_text(encoding="utf-8")) if record.is_file() else None
        if earlier != settings:
            raise ValueError(
                f"{folder} holds a run with other settings ({_differences(earlier, settings)}): set another output_dir, "
                "or start anew in its place with --resume_from_checkpoint false"
            )
    goes_on = has_run and not afresh and not (folder / RESULTS).is_file()
    if not goes_on:
        for stage in stages:
            remove_unfinished(str(stage))
            for checkpoint in checkpoints(str(stage)):
                shutil.rmtree(checkpoint)
        for path in reversed(state):  # The results last: until then the run counts as finished.
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(record, yaml.safe_dump(settings, sort_keys=False))
    return goes_on


def stage_history(folder: Path) -> list[dict[str, float]] | None:
    """The log of a model that was trained to its end; None if it was not."""
    try:
        return json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _differences(earlier: dict[str, Any] | None, settings: dict[str, Any]) -> str:
    if earlier is None:
        return f"it has no {_SETTINGS}"
    names = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    shown = [f"{name} was {earlier.get(name)!r} and is {settings.get(name)!r}" for name in names[:5]]
    return ", ".join(shown + ([f"and {len(names) - 5} more"] if len(names) > 5 else []))
