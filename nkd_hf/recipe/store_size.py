"""Chooses the content of a store of a teacher's logits, and counts its bytes before it is written."""

from collections.abc import Sequence
from typing import Any

import torch

from ..data.arguments import DataArguments
from ..errors import redact
from ..teacher_logits.compression import sparse_logits
from .arguments import RecipeArguments


def read_top_k(text: str) -> int | None:
    """Reads `--top_k`: a number of logits, or None for `all`.

    Raises:
        ValueError: the text is neither.
    """
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"--top_k must be a positive integer or all, got {text!r}")
    return None if text == "all" else int(text)


def check_cycle(cycle: int | None, epochs: int, crops_per_image: int = 1) -> None:
    """Raises ValueError unless the cycle is from 1 to the number of epochs, and a multiple of `crops_per_image`."""
    if cycle is not None and not 1 <= cycle <= epochs:
        raise ValueError(f"cycle must be from 1 to {epochs}, the epochs, got {cycle}. Omit it to store each epoch")
    if cycle is not None and cycle % crops_per_image:
        raise ValueError(
            f"cycle must be a multiple of {crops_per_image}, the crops_per_image, got {cycle}. That many epochs use each "
            "image equally often"
        )


def check_storable(recipe: RecipeArguments, data: DataArguments, top_k: int | None) -> None:
    """Raises ValueError where a recipe has no teacher whose logits could be stored."""
    if not recipe.needs_teacher or recipe.teacher is None:
        raise ValueError("the recipe has no teacher: set teacher, and a distillation_loss such as nkd")
    if recipe.needs_teacher_layers:
        raise ValueError(
            f"distillation_loss={recipe.distillation_loss} reads layers of the teacher, and a store has its logits alone"
        )
    others = [name for name, view in recipe.top_k_views.items() if view is None]
    if top_k is not None and others:
        raise ValueError(f"{', '.join(others)} needs top_k = all: omit --top_k")
    if data.unlabeled_dataset is not None and not data.trains_without_labels:
        raise ValueError(
            f"unlabeled_dataset must be omitted, got {redact(data.unlabeled_dataset)!r}: a store has the logits of one order of "
            "images. Set train_split to none, which trains on unlabeled_dataset alone"
        )
    if data.streaming:
        raise ValueError("teacher logits need streaming off: a stream has no order in which they could be stored")


def choose_temperatures(
    recipe: RecipeArguments, top_k: int | None, temperatures: Sequence[float] = ()
) -> dict[str, list[float]]:
    """Chooses the temperatures of a store for the logits and for the standardised logits, by the fields of
    `StoreInfo`.
    """
    views = [view for view in recipe.top_k_views.values() if view is not None]
    if top_k is None:  # All logits serve any temperature. store.json names NKD's, as in older stores.
        views = [view for view in views if not view.with_target]
    standardized = {view.temperature for view in views if view.standardized}
    return {
        "temperatures": sorted({1.0, *(view.temperature for view in views if not view.standardized), *temperatures}),
        "standardized_temperatures": sorted(standardized.union(temperatures) if standardized else []),
    }


def count_sample_bytes(
    num_classes: int, top_k: int | None, temperatures: Sequence[float], standardized_temperatures: Sequence[float]
) -> int:
    """Counts the bytes of a sample in a store's shards; see `StoreInfo` for the arguments."""
    logits, target = torch.zeros(1, num_classes), torch.zeros(1, dtype=torch.int64)
    sample = sparse_logits(logits, target, top_k, temperatures, standardized_temperatures)
    return sum(value.nbytes for value in sample.values())


def plan_store(
    recipe: RecipeArguments,
    data: DataArguments,
    num_classes: int,
    num_samples: int,
    epochs: int,
    top_k: int | None,
    cycle: int | None,
) -> dict[str, Any]:
    """Plans the store that `nkd-hf teacher-logits` would write for a recipe.

    Args:
        recipe, data: the arguments of the run.
        num_classes: number of classes of the data.
        num_samples: number of samples of an epoch.
        epochs: number of epochs of the training.
        top_k: number of logits that are stored beside the target's; None for all.
        cycle: number of epochs that are stored, which training repeats; None for all.

    Returns:
        `dict`: `top_k` (None for all), `cycle`, the `epochs` in the store, `bytes_per_sample` and `bytes`.

    Raises:
        ValueError: the recipe has no teacher whose logits could be stored, or the cycle does not fit.
    """
    check_storable(recipe, data, top_k)
    check_cycle(cycle, epochs, data.crops_per_image)
    top_k = None if top_k is None else min(top_k, num_classes - 1)
    size = count_sample_bytes(num_classes, top_k, **choose_temperatures(recipe, top_k))
    stored = epochs if cycle is None else cycle
    total = stored * num_samples * size
    return {"top_k": top_k, "cycle": cycle, "epochs": stored, "bytes_per_sample": size, "bytes": total}
