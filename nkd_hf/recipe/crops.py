"""Describes the settings of a run that do not fit its `crops_per_image`."""

import math
from collections.abc import Collection

from ..data.arguments import DataArguments
from ..data.orders import BATCHES_APART, MIN_BATCHES_APART
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments


def note_crops(
    recipe: RecipeArguments,
    data: DataArguments,
    training: DistillationTrainingArguments,
    stages: Collection[str],
    num_images: int | None,
    batch: int,
) -> list[str]:
    """Returns one sentence for each number of epochs that is no multiple of `crops_per_image`, one for a number of workers
    with which images are decoded again, and one for an epoch that is too short for the crops of an image to lie apart.

    Args:
        recipe, data, training: of the run. `max_steps` replaces `num_train_epochs`, and `teacher_epochs` replaces both
            in the teacher's training.
        stages: the names of the trainings whose epochs are known.
        num_images: of the training split; None for a stream.
        batch: images of an optimiser step of all processes.
    """
    crops = data.crops_per_image
    if crops == 1:  # With one crop, a fraction of an epoch is what the user asked for.
        return []
    sets_epochs = bool(stages) and training.max_steps <= 0
    epochs = {
        "teacher_epochs": recipe.teacher_epochs if "teacher" in stages else None,
        "num_train_epochs": training.num_train_epochs if sets_epochs else None,
    }
    notes = [_describe(name, value, crops) for name, value in epochs.items() if value is not None and value % crops]
    workers = training.dataloader_num_workers
    if workers and BATCHES_APART % workers:
        notes.append(
            f"dataloader_num_workers should be 1, 2, 4 or 8 with crops_per_image, got {workers}: most crops of an image then reach "
            "other workers than its first one, and each of them decodes it again. Set dataloader_num_workers to one of them"
        )
    if num_images is not None and num_images < MIN_BATCHES_APART * batch * crops:
        most = num_images // (MIN_BATCHES_APART * batch)
        notes.append(
            f"crops_per_image should be at most {max(most, 1)} with {num_images} images in steps of {batch}, got {crops}: the crops of "
            f"an image then come in fewer than {MIN_BATCHES_APART} steps after each other, which costs accuracy. Set crops_per_image "
            f"to {max(most, 1)}, or smaller batches"
        )
    return notes


def _describe(name: str, epochs: float, crops: int) -> str:
    below = math.floor(epochs / crops) * crops
    multiples = f"{below} or {below + crops}" if below > 0 else f"{crops}"
    return (
        f"{name} should be a multiple of crops_per_image, which is {crops}, got {epochs:g}: some images are taken more often "
        f"than others. Set {name} to {multiples}"
    )
