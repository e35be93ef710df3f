"""Opens the images of a dataset without its labels."""

import dataclasses
import os

import datasets
from datasets import Dataset

from ..errors import redact
from .arguments import DataArguments
from .row_paths import keep_within
from .source import check_image_column, open_dataset

# In the order of preference.
_SPLITS = ("unlabeled", "train")


def load_unlabeled_images(
    args: DataArguments, evaluated: str | None = None, evaluated_config: str | None = None
) -> Dataset:
    """Loads the images of `unlabeled_dataset`, with only the column `image` (encoded: `datasets.Image(decode=False)`).

    Args:
        args: names the dataset. The split is `unlabeled`, else `train`, else the only split. If `dataset_name` is the
            same dataset and no configuration is set for `unlabeled_dataset`, the configuration of `dataset_name` is
            used.
        evaluated: the split of `dataset_name` that the evaluation reads, or from which it reads a part.
        evaluated_config: the configuration of this split as it was opened; it has a name even if none was set.

    Raises:
        ValueError: the dataset cannot be reached, has several other splits, or has no images, or the evaluation reads
            the same images.

    Example:
        >>> images = load_unlabeled_images(DataArguments(unlabeled_dataset="digits"))
        >>> len(images), images.column_names
        (1437, ['image'])
    """
    name = args.unlabeled_dataset
    config, is_same = args.unlabeled_dataset_config_name, _place(name) == _place(args.dataset_name)
    if config is None and is_same:
        config = args.dataset_config_name
    source = dataclasses.replace(
        args, dataset_name=name, dataset_config_name=config, unlabeled_dataset=None, unlabeled_ratio=1.0,
        unlabeled_dataset_config_name=None, train_split=None,
    )  # fmt: skip
    loaded = open_dataset(source, "unlabeled_dataset")
    chosen = next((split for split in _SPLITS if split in loaded), next(iter(loaded)) if len(loaded) == 1 else None)
    if chosen is None:
        raise ValueError(
            f"unlabeled_dataset={redact(name)!r} must have a split unlabeled or train, or one alone, got {', '.join(loaded)}. "
            "Name a folder or files with the images of one split"
        )
    is_same_config = config == args.dataset_config_name or loaded[chosen].config_name == evaluated_config
    if is_same and is_same_config and chosen == evaluated:
        raise ValueError(
            f"unlabeled_dataset must be without the images of the evaluation, got {redact(name)!r}, whose split {chosen} is "
            "evaluated on too. Set validation_split to another split, or name other images"
        )
    split = _pick_image_column(loaded[chosen], source)
    if len(split) == 0:
        raise ValueError(f"unlabeled_dataset={redact(name)!r} must have images, got none in its split {chosen}")
    return split


def _place(name: str) -> str:
    return os.path.realpath(os.path.expanduser(name))


def _pick_image_column(split: Dataset, args: DataArguments) -> Dataset:
    found = [name for name in (args.image_column_name, "image", "img") if name in split.column_names]
    if not found:
        raise ValueError(
            f"unlabeled_dataset={redact(args.dataset_name)!r} must have a column image or img, got "
            f"{', '.join(split.column_names)}: set image_column_name"
        )
    split = split.select_columns(found[:1]).rename_columns({found[0]: "image"} if found[0] != "image" else {})
    if isinstance(split.features["image"], datasets.Image):
        split = split.cast_column("image", datasets.Image(decode=False))
    check_image_column(split.features["image"])
    return keep_within(split, os.path.expanduser(args.dataset_name))
