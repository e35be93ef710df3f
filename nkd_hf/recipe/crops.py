"""Describes the trainings of a run that take some images more often than others, by `crops_per_image`."""

import math
from collections.abc import Collection

from ..data.arguments import DataArguments
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments


def describe_uneven_crops(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments, stages: Collection[str]
) -> list[str]:
    """Returns one sentence for each argument whose number of epochs is no multiple of `crops_per_image`.

    Args:
        recipe, data, training: of the run. `max_steps` takes the place of `num_train_epochs`, and `teacher_epochs` that of
            both in the teacher's training.
        stages: the names of the trainings whose epochs are known.
    """
    crops = data.crops_per_image
    if crops == 1:  # A part of an epoch is one that was asked for.
        return []
    sets_epochs = bool(stages) and training.max_steps <= 0
    epochs = {
        "teacher_epochs": recipe.teacher_epochs if "teacher" in stages else None,
        "num_train_epochs": training.num_train_epochs if sets_epochs else None,
    }
    return [_describe(name, value, crops) for name, value in epochs.items() if value is not None and value % crops]


def _describe(name: str, epochs: float, crops: int) -> str:
    below = math.floor(epochs / crops) * crops
    multiples = f"{below} or {below + crops}" if below > 0 else f"{crops}"
    return (
        f"{name} should be a multiple of crops_per_image, which is {crops}, got {epochs:g}: some images are taken more often "
        f"than others. Set {name} to {multiples}"
    )
