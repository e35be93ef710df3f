"""Distils a pretrained teacher into a student for a user's own images, from data to deployment."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
from accelerate import PartialState
from transformers import TrainingArguments

from ..data.arguments import DataArguments
from ..errors import suggest
from ..trainer.arguments import DistillationTrainingArguments
from .announcement import describe_run
from .arguments import RecipeArguments
from .build import runs_teacher
from .defaults import fixed_defaults, set_patience, set_workers
from .deployment import deploy, write_card
from .preparation import prepare
from .recipe import Recipe
from .report import say
from .run_folder import RESULTS
from .yaml_values import check_value


@dataclass
class ExportArguments:
    """Arguments of the student's export.

    Raises:
        ValueError: a value is out of its range.
    """

    max_int8_drop: float = field(
        default=1.0, metadata={"help": "Points of top-1 that the int8 version of the student may lose."}
    )

    def __post_init__(self):
        if not self.max_int8_drop >= 0:
            raise ValueError(
                f"max_int8_drop must be 0 points or more, got {self.max_int8_drop}. Set it to 1, for example"
            )


DISTILL_ARGUMENTS = (RecipeArguments, DataArguments, DistillationTrainingArguments, ExportArguments)


# The types of the arguments whose values `distill` checks, as a YAML file's values are. Some of TrainingArguments' own
# take more than they declare.
_PLAIN_TYPES = {bool, int, float, str, list, dict, NoneType}
_PLAIN_TYPES_OF_TRAINER = {bool, int, float, NoneType}


def distill(
    dataset_name: str | os.PathLike,
    *,
    student: str,
    output_dir: str | os.PathLike,
    teacher: str | list[str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Distils a teacher into a student for the user's own images, as `nkd-hf distill` does.

    The teacher is fine-tuned first if its classes are not those of the data. The student is saved, exported to ONNX and int8,
    measured and described in `report.html`. After an interruption, the same call continues the run.

    Args:
        dataset_name: a folder of images, a Hub id, or `digits`.
        student: Hub id or folder (pretrained), or the name of an architecture (random weights).
        output_dir: for the results.
        teacher: Hub id, folder or name of an architecture; a list of Hub ids and folders for several teachers as one;
            None for a loss without a teacher (`uskd`).
        **arguments: any argument of `nkd-hf distill`, by its name.

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        ValueError: an argument is unknown or has a value of another type, or arguments, data and models do not fit each
            other. Nothing was trained.
        SystemExit: with a message, when a file cannot be written.

    Example:

    ```python
    results = distill("photos", teacher="timm/convnext_tiny.in12k_ft_in1k", student="timm/mobilenetv4_conv_small.e2400_r224_in1k", output_dir="out")
    print(results["models"]["student"]["top1"])
    ```
    """
    given = {
        "dataset_name": dataset_name,
        "student": student,
        "teacher": teacher,
        "output_dir": output_dir,
        **arguments,
    }
    names = {field.name for cls in DISTILL_ARGUMENTS for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(given.keys() - names):
        raise ValueError(f"distill has no argument {unknown[0]!r}{suggest(unknown[0], names)}")
    hints = {name: hint for cls in DISTILL_ARGUMENTS for name, hint in get_type_hints(cls).items()}
    given = {name: _check_type(name, value, hints[name]) for name, value in given.items()}
    values = fixed_defaults(set(given)) | given
    parts = [
        cls(
            **{
                field.name: values[field.name]
                for field in dataclasses.fields(cls)
                if field.init and field.name in values
            }
        )
        for cls in DISTILL_ARGUMENTS
    ]
    return run_distillation(*parts, given=set(given))


def _check_type(name: str, value: Any, hint: Any) -> Any:
    """Returns the value of an argument as a YAML file has it.

    Raises:
        ValueError: the value has another type than the argument.
    """
    value = _plain(value)
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    members = {get_origin(member) or member for member in members}
    is_trainers = name in TrainingArguments.__dataclass_fields__
    if not members <= (_PLAIN_TYPES_OF_TRAINER if is_trainers else _PLAIN_TYPES):
        return value
    return check_value(value, hint, None, name)


def _plain(value: Any) -> Any:
    """Converts paths to text, tuples to lists and the numbers of NumPy to those of Python."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def run_distillation(
    recipe: RecipeArguments,
    data: DataArguments,
    training: DistillationTrainingArguments,
    export: ExportArguments,
    given: set[str],
) -> dict[str, Any]:
    """Runs `nkd-hf distill` with parsed arguments.

    Args:
        recipe, data, training, export: the arguments; those that the user has not set get their defaults.
        given: the names of the arguments that the user has set.

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        ValueError: arguments, data and models do not fit each other.
        SystemExit: with a message, when a file cannot be written or a push failed.
    """
    if recipe.distillation_loss == "none":
        raise ValueError(
            "distillation_loss must be a loss, got 'none'. Set compare_with_baseline to true for the same training without one"
        )
    if recipe.teacher_args and runs_teacher(recipe) and not recipe.names_new_teacher:
        raise ValueError(
            f"teacher_args are for an architecture of timm, which {', '.join(recipe.teachers)} is not: omit them"
        )
    set_workers(training, given)
    prepared = prepare(recipe, data, training, given)
    run = Recipe(recipe, data, training, prepared.splits, prepared.teacher)
    if not run.is_trained:
        run.check()
        set_patience(recipe, training, given)  # time_budget has chosen other epochs
        say(training, "\n".join(describe_run(run, prepared.inherited)))
    run.train_teacher()
    run.train_baseline()
    run.train_student()
    if not run.is_trained:
        if training.should_save:
            deploy(run, export.max_int8_drop)
            write_card(run)
        PartialState().wait_for_everyone()
    run.report()
    return json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))
