"""Reads the names of a dataset's classes, and numbers the classes alike in all splits."""

import functools
import logging
import os
import re
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from timm.data import ImageNetInfo

from ..errors import redact
from ..models.labels import sort_by_number
from .arguments import DataArguments

logger = logging.getLogger(__name__)

_Split = TypeVar("_Split", Dataset, IterableDataset)


def label_names(data: DatasetDict | IterableDatasetDict) -> list[str]:
    """Returns the class names of the splits of [`load_image_dataset`], by label: `dict(enumerate(names))` is an `id2label`.

    Raises:
        ValueError: the data is a stream whose labels are integers without names.

    Example:
        >>> from nkd_hf.data import DataArguments, load_image_dataset
        >>> label_names(load_image_dataset(DataArguments(dataset_name="digits")))[:3]
        ['0', '1', '2']
    """
    # The training images have no labels where `train_split` is none.
    features = data["train"].features
    feature = (features if "label" in features else data["validation"].features)["label"]
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"the stream's labels are {feature.dtype} without names, so the number of classes is unknown: load without "
            "streaming, or store the dataset with a ClassLabel feature"
        )
    return describe_synsets(feature.names)


def read_labels(split: Dataset) -> np.ndarray:
    """Returns the class of each row of a split of [`load_image_dataset`], [N] int64; -1 for a row without a label.

    Example:
        >>> from nkd_hf.data import DataArguments, load_image_dataset
        >>> read_labels(load_image_dataset(DataArguments(dataset_name="digits"))["validation"])[:4]
        array([7, 6, 3, 7])
    """
    return np.array([-1 if label is None else label for label in split["label"][:]], dtype=np.int64)


def describe_synsets(names: list[str]) -> list[str]:
    """Returns ImageNet's descriptions for names that are WordNet synsets, as ImageNet's folders have; others
    unchanged.

    Example:
        >>> describe_synsets(["n01440764", "n01443537"])
        ['tench, Tinca tinca', 'goldfish, Carassius auratus']
        >>> describe_synsets(["cat", "dog"])
        ['cat', 'dog']
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    descriptions = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    descriptions |= ImageNetInfo().label_descriptions(as_dict=True)
    return [descriptions.get(name, name) for name in names]


def _check_parquet_classes(loaded: DatasetDict | IterableDatasetDict, args: DataArguments, source: dict) -> None:
    """Raises ValueError where local parquet files number their classes differently: `datasets` reads the first file's names."""
    first = next(iter(loaded.values()))
    if first.info.builder_name != "parquet":
        return
    columns = [args.label_column_name] if args.label_column_name else _LABEL_COLUMNS
    column = next((name for name in columns if name in (first.features or ())), None)
    classes = {}
    for files in datasets.load_dataset_builder(**source).config.data_files.values():
        for file in filter(os.path.isfile, files):
            feature = datasets.Features.from_arrow_schema(pq.read_schema(file)).get(column)
            if isinstance(feature, datasets.ClassLabel):
                classes[file] = feature.names
    if not classes:
        return
    label = first.features[column]
    expected = label.names if isinstance(label, datasets.ClassLabel) else next(iter(classes.values()))
    where = next((file for file, names in classes.items() if names == expected), "the dataset's card")
    for file, names in classes.items():
        if names == expected[: len(names)]:
            continue
        number = next(i for i, name in enumerate(names) if name not in expected[i : i + 1])
        other = repr(expected[number]) if number < len(expected) else "no class"
        raise ValueError(
            f"the files of {redact(args.dataset_name)!r} must number their classes alike, got {names[number]!r} for class {number} in "
            f"{file}, which is {other} in {where}. Write all files with one ClassLabel"
        )


# In the order of preference.
_LABEL_COLUMNS = ["label", "labels", "fine_label"]


def _is_text(feature) -> bool:
    return feature in (datasets.Value("string"), datasets.Value("large_string"))


def _warn_of_empty_classes(splits: dict[str, Dataset], args: DataArguments) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    for name, split in splits.items():
        names = split.features["label"].names
        found = {names[label] for label in split.unique("label") if label is not None and label >= 0}
        # `datasets` ignores the folder of a class without images, unless another split has images of the class.
        path = split[0]["image"]["path"] or "" if len(split) and split[0]["image"] else ""
        is_class = os.path.isabs(path) and Path(path).parent.name in names
        # Hidden folders, such as .git, are no classes, and `datasets` does not read them.
        entries = os.scandir(Path(path).parents[1]) if is_class else ()
        folders = {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
        if empty := sorted(folders - {*names}):
            logger.warning(
                "the %s split of %r has folders without images, which become no classes: %s",
                name,
                redact(args.dataset_name),
                _list_names(empty),
            )
        if missing := sorted({*names} - found):
            logger.warning(
                "the %s split of %r has no images of %d of %d classes, so that %s: %s",
                name,
                redact(args.dataset_name),
                len(missing),
                len(names),
                "they cannot be learned" if name == "train" else "nothing is measured of them",
                _list_names(missing),
            )


def _list_names(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _with_class_labels(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Casts text and plain integer labels to one `ClassLabel` for all splits; sorts numbers as names by number."""
    feature = splits["train"].features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return _in_order_of_numbers(splits)
    labels = set().union(*(split.unique("label") for split in splits.values())) - {None}
    names = (
        sort_by_number(sorted(labels))
        if _is_text(feature)
        else [f"LABEL_{label}" for label in range(max(labels, default=-1) + 1)]
    )
    if not names:
        raise ValueError("the label column holds no label at all: set label_column_name")
    return {name: _cast_labels(split, datasets.ClassLabel(names=names)) for name, split in splits.items()}


def _in_order_of_numbers(splits: dict[str, _Split]) -> dict[str, _Split]:
    """Orders the classes by number where their names are whole numbers: as text, 10 would come before 2."""
    ordered = {}
    for key, split in splits.items():
        feature = split.features["label"]
        names = sort_by_number(feature.names) if isinstance(feature, datasets.ClassLabel) else []
        if not names or names == feature.names:
            ordered[key] = split
            continue
        number = {feature.str2int(name): i for i, name in enumerate(names)}
        features = datasets.Features(split.features | {"label": datasets.ClassLabel(names=names)})
        if isinstance(split, IterableDataset):
            renumber = functools.partial(_renumber, number=number)
            ordered[key] = split.map(renumber, input_columns=["label"], features=features)
        else:
            labels = [number.get(label, label) for label in split["label"][:]]
            labels = Dataset.from_dict({"label": labels}, features=datasets.Features(label=features["label"]))
            ordered[key] = _with_labels(split, labels)
    return ordered


def _renumber(label: int | None, number: dict[int, int]) -> dict[str, int | None]:
    return {"label": number.get(label, label)}


def _cast_labels(split: Dataset, feature: datasets.Value | datasets.ClassLabel) -> Dataset:
    # Only the label column is cast, since Dataset.cast on the whole dataset would write all images to the cache again.
    # It is cast as one table, since Dataset.cast handles the schema, with all class names, for every thousand rows.
    labels = split["label"][:]
    if isinstance(feature, datasets.ClassLabel) and _is_text(split.features["label"]):
        numbers = {name: number for number, name in enumerate(feature.names)}
        labels = [numbers.get(label) for label in labels]
    table = datasets.table.InMemoryTable(pa.table({"label": pa.array(labels).cast(feature.pa_type)}))
    info = datasets.DatasetInfo(features=datasets.Features(label=feature))
    return _with_labels(split, Dataset(table, info=info))


def _with_labels(split: Dataset, labels: Dataset) -> Dataset:
    return datasets.concatenate_datasets([split.select_columns("image"), labels], split=split.split, axis=1)
