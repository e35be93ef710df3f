"""Sets the defaults of `nkd-hf distill`, for a user's own images.

The defaults are timm's for fine-tuning (AdamW, weight decay 0.05, cosine schedule with a warm-up, RandAugment for
photographs). The learning rate and the number of steps depend on whether the weights start random or pretrained.
`docs/quickstart.md` has a table of the defaults.
"""

import math
import os
from collections.abc import Collection
from typing import Any

import torch

from ..data.arguments import DataArguments
from ..models.architectures import is_architecture
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments
from .build import images_per_epoch

# Optimiser steps of a training, and the least and the most epochs that they may take.
_STEPS = {"pretrained": (1500, 10, 60), "random": (4000, 20, 120)}
_LEARNING_RATE = {"pretrained": 3e-4, "random": 2e-3}
_TEACHER_LEARNING_RATE = {"pretrained": 1e-4, "random": 1e-3}
# Measured with EfficientNet-Lite0, at 5 epochs: 88.05 % of Fashion-MNIST with 1e-3 and 85.45 % with 3e-4, 98.61 % of the digits
# with 1e-3, 95.83 % with 3e-4 and 68.61 % with 1e-4.
_PRETRAINED_WITH_BATCH_NORM = 1e-3
# Pictures up to this input size are small, and a strong augmentation makes them unrecognisable.
_SMALL_PIXELS = 64

# The arguments that set_defaults sets, and the preprocessing that a student takes from its teacher.
BY_DATA_AND_MODELS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "learning_rate", "num_train_epochs", "teacher_learning_rate",
    "teacher_epochs", "early_stopping_patience", "random_resized_crop", "auto_augment",
    "image_size", "image_mean", "image_std", "crop_pct", "interpolation",
}  # fmt: skip


def fixed_defaults(given: set[str]) -> dict[str, Any]:
    """Returns the defaults that depend only on the machine.

    Args:
        given: the names of the arguments that the user has set.
    """
    has_gpu = torch.cuda.is_available()
    # The number of workers decides the parts of a stream, and so the results.
    has_idle_cores = has_gpu or "streaming" in given
    defaults: dict[str, Any] = {
        "finetune_teacher": "auto",
        "optim": "adamw_torch",
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "bf16": has_gpu and torch.cuda.is_bf16_supported() and "fp16" not in given,
        "logging_strategy": "epoch",
        "dataloader_num_workers": count_workers(has_idle_cores),
        # With persistent workers, drop path draws other numbers: on the CPU, results would depend on the number of
        # cores.
        "dataloader_persistent_workers": has_idle_cores and given.isdisjoint({"dataloader_num_workers"}),
        "dataloader_pin_memory": has_gpu,
    }
    if given.isdisjoint({"eval_strategy", "save_strategy", "load_best_model_at_end", "streaming"}):
        # The best checkpoint is kept beside the last one.
        defaults |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
        defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    return {name: value for name, value in defaults.items() if name not in given}


def count_workers(has_idle_cores: bool) -> int:
    """Counts the workers of a data loader.

    Where the models compute on the same cores, a quarter of the cores is enough, since a step takes much longer than
    its input.

    Args:
        has_idle_cores: whether the models compute elsewhere.
    """
    if has_idle_cores:
        return min(4, os.cpu_count() or 1)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, num_cores // 4)


def set_workers(training: DistillationTrainingArguments, given: set[str]) -> None:
    """Sets one worker where the user has set persistent workers and there would be no worker.

    Args:
        training: of the run; its number of workers is changed where the user has not set it.
        given: the names of the arguments that the user has set.

    Raises:
        ValueError: the user has set persistent workers and zero workers.
    """
    if not training.dataloader_persistent_workers or training.dataloader_num_workers > 0:
        return
    if "dataloader_num_workers" in given:
        raise ValueError(
            "dataloader_num_workers must be 1 or more with dataloader_persistent_workers, got 0. Set it to 1, or omit "
            "dataloader_persistent_workers"
        )
    # On a machine with few cores the default is zero workers; the command must work there, too.
    training.dataloader_num_workers = 1


def set_defaults(
    recipe: RecipeArguments,
    data: DataArguments,
    training: DistillationTrainingArguments,
    given: set[str],
    num_images: int | None,
    image_size: int,
    with_batch_norm: Collection[str] = (),
) -> None:
    """Sets the arguments that the user has not set and that depend on the models and on the data.

    Args:
        recipe, data, training: the arguments of the run; they are changed.
        given: the names of the arguments that the user has set.
        num_images: of the training split; None for a stream whose images nobody has counted.
        image_size: size of the student's input, in pixels.
        with_batch_norm: `student`, `teacher` or both, if they have batch norm.
    """

    def set_default(arguments: Any, name: str, value: Any) -> None:
        if name not in given:
            setattr(arguments, name, value)

    def learning_rate(of: str, start: str, rates: dict[str, float]) -> float:
        return _PRETRAINED_WITH_BATCH_NORM if start == "pretrained" and of in with_batch_norm else rates[start]

    num_images = images_per_epoch(data) if num_images is None else num_images
    set_default(training, "per_device_train_batch_size", 32 if num_images is not None and num_images < 2000 else 64)
    set_default(training, "per_device_eval_batch_size", 128)
    start = "random" if is_architecture(recipe.student) else "pretrained"
    set_default(training, "learning_rate", learning_rate("student", start, _LEARNING_RATE))
    if num_images is not None and training.max_steps <= 0:
        set_default(training, "num_train_epochs", _count_epochs(start, num_images, training, data.crops_per_image))
    if len(recipe.teachers) == 1 and recipe.teacher_prompts is None:  # others are not trained
        start = "random" if is_architecture(recipe.teacher) else "pretrained"
        rate = learning_rate("teacher", start, _TEACHER_LEARNING_RATE)
        set_default(recipe, "teacher_learning_rate", rate)
        if num_images is not None and training.max_steps <= 0:
            set_default(recipe, "teacher_epochs", _count_epochs(start, num_images, training, data.crops_per_image))
    set_patience(recipe, training, given)
    if data.random_crop_padding is None:
        set_default(data, "random_resized_crop", [0.5, 1.0] if image_size <= _SMALL_PIXELS else [0.25, 1.0])
    if image_size > _SMALL_PIXELS:
        set_default(data, "auto_augment", "rand-m6-mstd0.5-inc1")


def set_patience(recipe: RecipeArguments, training: DistillationTrainingArguments, given: set[str]) -> None:
    """Sets `early_stopping_patience` by the epochs of the student, if the user has not set it.

    Args:
        recipe, training: the arguments of the run; the patience is changed.
        given: the names of the arguments that the user has set.
    """
    if "early_stopping_patience" not in given and training.load_best_model_at_end and training.max_steps <= 0:
        recipe.early_stopping_patience = max(5, math.ceil(training.num_train_epochs / 3))


def _count_epochs(start: str, num_images: int, training: DistillationTrainingArguments, multiple: int) -> int:
    """Counts the epochs of a training by its `start`, rounded up to a multiple of `crops_per_image`."""
    steps, least, most = _STEPS[start]
    per_epoch = max(1, num_images / training.global_batch_size())
    return math.ceil(min(most, max(least, round(steps / per_epoch))) / multiple) * multiple
