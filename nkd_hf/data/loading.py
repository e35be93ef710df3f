"""Opens image classification datasets with `datasets`, in one form: the columns `image` and `label`."""

import math
import os
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.iterable_dataset import ExamplesIterable

from ..errors import reason, redact
from .arguments import DataArguments
from .labels import (
    _LABEL_COLUMNS,
    _cast_labels,
    _in_order_of_numbers,
    _is_text,
    _warn_of_empty_classes,
    _with_class_labels,
)
from .row_paths import keep_within
from .source import EMPTY_SPLIT, check_image_column, open_dataset
from .unlabeled import load_unlabeled_images


def load_image_dataset(args: DataArguments, seed: int = 42) -> DatasetDict | IterableDatasetDict:
    """Loads any image-classification dataset as two splits with `image` and `label`.

    Args:
        args: the dataset to load.
        seed: draws the validation split where it must be made (stratified by label if each class has enough images),
            and the subsets of `max_train_samples` and `max_eval_samples`.

    Returns:
        The splits `train` and `validation` with the columns `image` (encoded: `datasets.Image(decode=False)`) and `label`
        (`ClassLabel`; text labels become the sorted names, plain integers `LABEL_0`, `LABEL_1`, ...), numbered alike in
        both. Names that are all whole numbers, such as those of the folders `0` to `11`, are in the order of the numbers.
        In a stream, integers without names stay integers. A warning names the classes, and the folders of classes, that
        have no images in a split.

        With `unlabeled_dataset` there is a third split, `unlabeled`, with the column `image` alone; with `train_split` none, it
        is the split `train`, and `max_train_samples` are drawn from it.

    Raises:
        ValueError: the dataset cannot be reached, has no such split, column or kind of label (the message names the
            existing ones), a split has no rows, local parquet files number their classes differently, or the images
            without labels contain the images of the evaluation.

    Example:
        >>> data = load_image_dataset(DataArguments(dataset_name="digits", max_eval_samples=100))
        >>> len(data["train"]), len(data["validation"]), data["train"].column_names
        (1437, 100, ['image', 'label'])
    """
    if args.trains_without_labels:
        evaluated, validation = load_evaluation_split(args, seed, "validation_split")
        train = load_unlabeled_images(args, evaluated, validation.config_name)
        return DatasetDict(train=_subset(train, args.max_train_samples, seed), validation=validation)
    loaded = open_dataset(args)
    splits = {"train": _pick_split(loaded, args.train_split, ["train"], "train_split")}
    candidates = [name for name in _EVALUATION_SPLITS if name != args.train_split]
    if args.validation_split is not None or any(name in loaded for name in candidates):
        splits["validation"] = _pick_split(loaded, args.validation_split, candidates, "validation_split")
    elif args.streaming:
        raise ValueError(
            f"{redact(args.dataset_name)!r} has no validation split (its splits: {', '.join(loaded)}), and none can be cut out of "
            "a stream: name one with validation_split, or load without streaming"
        )
    splits = {name: _pick_columns(split, args) for name, split in splits.items()}
    if args.streaming:
        for name, split in splits.items():
            _check_stream(split, args, name)
        splits = _in_order_of_numbers(splits)
        limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
        return IterableDatasetDict(
            {name: _first_rows(split, limits[name]) if limits[name] else split for name, split in splits.items()}
        )

    splits = _with_class_labels(splits)
    _warn_of_empty_classes(splits, args)
    if "validation" not in splits:
        train, validation = _split_rows(splits["train"]["label"][:], args.train_val_split, seed)
        splits = {"train": splits["train"].select(train), "validation": splits["train"].select(validation)}
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    found = DatasetDict({name: _subset(split, limits[name], seed) for name, split in splits.items()})
    if args.unlabeled_dataset is not None:
        held_out = found["validation"]
        found["unlabeled"] = load_unlabeled_images(args, str(held_out.split), held_out.config_name)
    return found


def load_evaluation_split(
    args: DataArguments, seed: int = 42, option: str = "the split to evaluate on"
) -> tuple[str, Dataset | IterableDataset]:
    """Loads the split for the evaluation of a finished model; unlike in [`load_image_dataset`], it may be the only
    split.

    Args:
        args: the dataset to load; `validation_split` may name any split.
        seed: draws the subset of `max_eval_samples`.
        option: the name, in errors, of the setting that names the split.

    Returns:
        The split's name, and the split with the columns of [`load_image_dataset`].

    Raises:
        ValueError: as in [`load_image_dataset`]; a validation split is never made from the training split here.

    Example:
        >>> name, split = load_evaluation_split(DataArguments(dataset_name="digits"))
        >>> name, len(split), split.column_names
        ('validation', 360, ['image', 'label'])
    """
    loaded = open_dataset(args)
    wanted = args.validation_split or next((name for name in _EVALUATION_SPLITS if name in loaded), None)
    split = _pick_columns(_pick_split(loaded, wanted, [_EVALUATION_SPLITS[0]], option), args)
    if args.streaming:
        _check_stream(split, args, wanted)
        split = _in_order_of_numbers({wanted: split})[wanted]
        return wanted, _first_rows(split, args.max_eval_samples) if args.max_eval_samples else split
    # Text and plain integers get the classes that they had in training.
    train = _pick_columns(loaded["train"], args) if "train" in loaded else split
    split = _with_class_labels({"train": train, "validation": split})["validation"]
    return wanted, _subset(split, args.max_eval_samples, seed)


def _pick_split(loaded: dict, wanted: str | None, candidates: list[str], option: str):
    for name in candidates if wanted is None else [wanted]:
        if name in loaded:
            return loaded[name]
    raise ValueError(
        f"there is no split {wanted or candidates[0]!r}, only {', '.join(loaded)}: set {option} to one of these"
    )


def _pick_columns(split, args: DataArguments):
    """Returns the split with only the columns `image` and `label`."""
    if split.features is None:
        raise ValueError(
            f"{redact(args.dataset_name)!r} does not say which columns its stream has: load it without streaming"
        )
    columns = {}
    for target, wanted, candidates in (
        ("image", args.image_column_name, ["image", "img"]),
        ("label", args.label_column_name, _LABEL_COLUMNS),
    ):
        found = [name for name in (candidates if wanted is None else [wanted]) if name in split.column_names]
        if not found and target == "label" and wanted is None and os.path.isdir(os.path.expanduser(args.dataset_name)):
            raise ValueError(
                f"there is no label column {' or '.join(candidates)}, only {', '.join(split.column_names)}: set "
                "label_column_name to one of these. A folder of images needs two classes at least, and all of its images "
                "as <split>/<class>/<image>: with an image elsewhere, no image gets a label"
            )
        if not found:
            raise ValueError(
                f"there is no {target} column {' or '.join(candidates) if wanted is None else wanted!r}, only "
                f"{', '.join(split.column_names)}: set {target}_column_name to one of these"
            )
        columns[found[0]] = target
    if len(columns) != 2:
        raise ValueError(f"image and label are both taken from the column {found[0]!r}: set two different ones")
    split = split.select_columns(list(columns))
    for source, target in columns.items():
        if target == "image" and isinstance(split.features[source], datasets.Image):
            # The cast comes first, since in a stream any later step would decode each image, and stop at a bad one.
            split = split.cast_column(source, datasets.Image(decode=False))
    split = split.rename_columns({source: target for source, target in columns.items() if source != target})
    image, label = split.features["image"], split.features["label"]
    check_image_column(image)
    if isinstance(split, Dataset) and label in (datasets.Value("float32"), datasets.Value("float64")):
        # One missing label makes the integers of a CSV file floats. (In a stream, the cast would cut fractions off.)
        try:
            split = _cast_labels(split, datasets.Value("int64"))
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"the label column holds fractions ({reason(error)}), expected one integer or name a row: set label_column_name"
            ) from error
        label = split.features["label"]
    if isinstance(label, datasets.List):
        raise ValueError(
            f"the label column is {label}, expected one integer or name a row. Several labels an image are not supported: "
            "give each image one class, or set label_column_name to another column"
        )
    if not (isinstance(label, datasets.ClassLabel) or _is_text(label) or label in map(datasets.Value, INTEGER_DTYPES)):
        raise ValueError(f"the label column is {label}, expected one integer or name a row: set label_column_name")
    return keep_within(split, os.path.expanduser(args.dataset_name))


# In the order of preference.
_EVALUATION_SPLITS = ("validation", "val", "valid", "test")
INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def _check_stream(split: IterableDataset, args: DataArguments, name: str) -> None:
    if _is_text(split.features["label"]):
        raise ValueError(
            f"the labels of {redact(args.dataset_name)!r} are text, and a stream does not say which there are: load without "
            "streaming, or store the dataset with `class_encode_column`"
        )
    # The stream is checked here, since a DataLoader worker without rows does not know whether other workers have rows.
    try:
        empty = next(iter(split), None) is None
    except pa.ArrowInvalid as error:
        if not any(text in str(error) for text in EMPTY_SPLIT):
            raise
        empty = True
    if empty:
        raise ValueError(f"the {name} split of {redact(args.dataset_name)!r} has no rows: name another one")


def _first_rows(split: IterableDataset, limit: int) -> IterableDataset:
    # The rows are one shard: `take` alone divides the number among shards, so that several workers would read other
    # rows.
    rows = ExamplesIterable(_keyed_rows, {"stream": split.take(limit)})
    return IterableDataset(rows, info=split.info.copy(), split=split.split)


def _keyed_rows(stream: IterableDataset) -> Iterator[tuple[int, dict]]:
    # stream.iter, since stream.__iter__ divides the shards among the workers of a DataLoader.
    for number, batch in enumerate(stream.iter(batch_size=1)):
        yield number, {name: values[0] for name, values in batch.items()}


def _subset(split: Dataset, limit: int | None, seed: int) -> Dataset:
    # The rows are shuffled, since a folder of images is sorted by class.
    return split if limit is None or limit >= len(split) else split.shuffle(seed=seed).select(range(limit))


def _split_rows(labels: Sequence[int | None], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([-1 if label is None else label for label in labels])
    num_validation = math.ceil(fraction * len(labels))
    _, counts = np.unique(labels, return_counts=True)
    if not 0 < num_validation < len(labels):
        raise ValueError(f"train_val_split={fraction} leaves a split of {len(labels)} rows empty: change it")
    stratified = counts.min() > 1 and len(counts) <= min(num_validation, len(labels) - num_validation)
    from sklearn.model_selection import train_test_split  # the import takes a second, and few splits are made

    return train_test_split(
        np.arange(len(labels)), test_size=num_validation, random_state=seed, stratify=labels if stratified else None
    )
