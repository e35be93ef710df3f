"""Opens image classification datasets with `datasets`, in one shape whatever they were."""

import functools
import io
import logging
import math
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.iterable_dataset import ExamplesIterable
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import ImageNetInfo

from .access import gate
from .errors import reason
from .folders import path_fault
from .labels import sort_by_number
from .redaction import redact
from .repo_ids import read_repo_id
from .row_paths import OutsideError, check_data_files, keep_within

logger = logging.getLogger(__name__)

_Split = TypeVar("_Split", Dataset, IterableDataset)


@dataclass
class DataArguments:
    """Where the images come from and how the training images are augmented; reads like any `HfArgumentParser` dataclass.

    Raises:
        ValueError: a value is out of its range.
    """

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "Hub id (`uoft-cs/cifar100`), local folder of images or of parquet files, parquet file or quoted glob "
            "(all of it is training data), or `digits`, scikit-learn's 1797 digits, which need no download."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where the Hub has several."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Training split. Default: `train`."})
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on. Default: the first of `validation`, `val`, `valid`, `test` that exists; "
            "otherwise one is made from the training split (`train_val_split`)."
        },
    )
    train_val_split: float = field(
        default=0.1,
        metadata={"help": "Fraction of the training split that becomes the validation split if none exists."},
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Default: `image` or `img`."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "Default: the first of `label`, `labels`, `fine_label` that exists."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many samples, drawn with the seed (streaming: the first ones)."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on this many samples, drawn with the seed (streaming: the first ones)."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset as a stream, with no copy on disk."})
    num_train_images: int | None = field(
        default=None,
        metadata={"help": "Images in an epoch: a stream's number of steps, and `nkd-hf plan`, are computed from it."},
    )
    num_classes: int | None = field(
        default=None,
        metadata={
            "help": "Classes that the dataset must have; `nkd-hf plan` reckons with them. Default for the plan: the "
            "architecture's own, 1000 or CIFAR's 100."
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "Unreadable image or missing label: stop with its name (`error`), or let the next good sample take its "
            "place and count it (`skip`).",
            "choices": ["error", "skip"],
        },
    )
    random_resized_crop: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Smallest and largest part of the image's area that the random crop takes."},
    )
    random_crop_padding: int | None = field(
        default=None,
        metadata={"help": "CIFAR's crop in place of the resized one: pad by this many black pixels, crop the size."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "RandAugment or AutoAugment in timm's syntax, e.g. `rand-m9-n2-mstd0.5-inc1`."}
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability that a rectangle is replaced with noise (timm's `pixel` mode)."}
    )
    pca_lighting: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of AlexNet's lighting noise along the principal axes of ImageNet's colours."
        },
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Beta parameter of mixup; 0 switches it off."})
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Beta parameter of cutmix; 0 switches it off. With mixup: one of them a batch."}
    )
    mix_pairs: bool = field(
        default=False,
        metadata={
            "help": "Mix the samples 2k and 2k + 1 of the epoch's order with each other, a ratio drawn for each pair, as "
            "`nkd-hf teacher-logits` does; the batch of each process must be even."
        },
    )

    def __post_init__(self):
        if not self._is_parquet:  # whose files may have addresses
            self.dataset_name = read_repo_id(self.dataset_name, "dataset_name", "dataset")
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be error or skip, got {self.on_bad_image!r}")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split must lie between 0 and 1, got {self.train_val_split}")
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "num_train_images",
            "num_classes",
            "random_crop_padding",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}: leave it out to switch it off")
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("pca_lighting", "mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}: 0 switches it off")
        crop = self.random_resized_crop
        if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
            raise ValueError(f"random_resized_crop must be two fractions, 0 < smallest <= largest <= 1, got {crop}")
        if self.mix_pairs and self.streaming:
            raise ValueError("mix_pairs needs streaming off: a stream has no order of which pairs could be a part")

    @property
    def _is_parquet(self) -> bool:
        return self.dataset_name.endswith(".parquet") or any(character in self.dataset_name for character in "*?[")


def load_image_dataset(args: DataArguments, seed: int = 42) -> DatasetDict | IterableDatasetDict:
    """Loads an image-classification dataset in one shape, whatever it was.

    Args:
        args: what to load.
        seed: draws the validation split where one must be made (stratified by label if each class has images enough),
            and the subsets of `max_train_samples` and `max_eval_samples`.

    Returns:
        The splits `train` and `validation` with the columns `image` (encoded: `datasets.Image(decode=False)`) and `label`
        (`ClassLabel`; text labels become the sorted names, plain integers `LABEL_0`, `LABEL_1`, ...), numbered alike in
        both. Where all names are whole numbers, as those of the folders `0` to `11`, they stand in the order of these. In
        a stream, integers without names stay integers. A warning names the classes, and the folders of classes,
        that have no images in a split.

    Raises:
        ValueError: the dataset cannot be reached, or has no such split, column or kind of label, or a split has no rows;
            the message says which there are. Or local parquet files number their classes differently.

    Example:
        >>> data = load_image_dataset(DataArguments(dataset_name="digits", max_eval_samples=100))
        >>> len(data["train"]), len(data["validation"]), data["train"].column_names
        (1437, 100, ['image', 'label'])
    """
    loaded = _load(args)
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
    return DatasetDict({name: _subset(split, limits[name], seed) for name, split in splits.items()})


def load_evaluation_split(args: DataArguments, seed: int = 42) -> tuple[str, Dataset | IterableDataset]:
    """Loads the one split that a finished model is evaluated on; unlike in [`load_image_dataset`], it may be the only one.

    Args:
        args: what to load; `validation_split` may name any split.
        seed: draws the subset of `max_eval_samples`.

    Returns:
        The split's name, and the split with the columns of [`load_image_dataset`].

    Raises:
        ValueError: as in [`load_image_dataset`]; a validation split is never made from the training split here.

    Example:
        >>> name, split = load_evaluation_split(DataArguments(dataset_name="digits"))
        >>> name, len(split), split.column_names
        ('validation', 360, ['image', 'label'])
    """
    loaded = _load(args)
    wanted = args.validation_split or next((name for name in _EVALUATION_SPLITS if name in loaded), None)
    split = _pick_columns(_pick_split(loaded, wanted, [_EVALUATION_SPLITS[0]], "the split to evaluate on"), args)
    if args.streaming:
        _check_stream(split, args, wanted)
        split = _in_order_of_numbers({wanted: split})[wanted]
        return wanted, _first_rows(split, args.max_eval_samples) if args.max_eval_samples else split
    # Text and plain integers get the classes that they had in training.
    train = _pick_columns(loaded["train"], args) if "train" in loaded else split
    split = _with_class_labels({"train": train, "validation": split})["validation"]
    return wanted, _subset(split, args.max_eval_samples, seed)


def label_names(data: DatasetDict | IterableDatasetDict) -> list[str]:
    """The class names of what [`load_image_dataset`] returned, by label: `dict(enumerate(names))` is an `id2label`.

    Raises:
        ValueError: a stream whose labels are integers without names.

    Example:
        >>> label_names(load_image_dataset(DataArguments(dataset_name="digits")))[:3]
        ['0', '1', '2']
    """
    feature = data["train"].features["label"]
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"the stream's labels are {feature.dtype} without names, so the number of classes is unknown: load without "
            "streaming, or store the dataset with a ClassLabel feature"
        )
    return describe_synsets(feature.names)


def describe_synsets(names: list[str]) -> list[str]:
    """ImageNet's descriptions, where classes are named by its WordNet synsets, as folders of ImageNet are.

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


def streaming_max_steps(num_train_images: int, num_train_epochs: float, global_batch_size: int) -> int:
    """The Trainer's `max_steps` for a stream: optimiser steps in which `num_train_epochs` epochs of images pass.

    Args:
        num_train_images: images in an epoch.
        num_train_epochs: epochs, fractions allowed.
        global_batch_size: images of one optimiser step (per-device batch x processes x accumulation).

    Example:
        >>> streaming_max_steps(1_281_167, 100, 256)
        500456
    """
    for name, value in (
        ("num_train_images", num_train_images),
        ("num_train_epochs", num_train_epochs),
        ("global_batch_size", global_batch_size),
    ):
        if value is None or value <= 0:
            raise ValueError(f"{name} must be positive to know the length of a streamed run, got {value}: set {name}")
    return math.ceil(num_train_images * num_train_epochs / global_batch_size)


def _load(args: DataArguments) -> DatasetDict | IterableDatasetDict:
    name = os.path.expanduser(args.dataset_name)
    if name == "digits":
        digits = _digits()
        if args.streaming:
            return IterableDatasetDict({key: split.to_iterable_dataset(num_shards=4) for key, split in digits.items()})
        return digits
    if not args._is_parquet and (fault := path_fault(args.dataset_name)):
        raise ValueError(f"dataset_name={redact(args.dataset_name)!r} could not be loaded: {fault}. {_EXPECTED}")
    source = {"path": name, "name": args.dataset_config_name}
    if args._is_parquet:
        source = {"path": "parquet", "data_files": name}
    try:
        if not args._is_parquet:
            check_data_files(name)
        loaded = datasets.load_dataset(**source, streaming=args.streaming)
    except OutsideError:
        raise
    except (
        *(OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError),
        *(yaml.YAMLError, pickle.UnpicklingError),  # of its card, and of a tar file: nothing of it was run
    ) as error:
        if how := gate(error, name, "dataset"):
            raise ValueError(f"dataset_name={redact(args.dataset_name)!r} could not be loaded: {how}") from error
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        if any(text in str(cause) for text in _EMPTY_SPLIT):
            raise ValueError(
                f"dataset_name={redact(args.dataset_name)!r} could not be loaded: one of its splits has no rows ({reason(cause)}). Remove its "
                "file, or put images in it"
            ) from error
        raise ValueError(
            f"dataset_name={redact(args.dataset_name)!r} could not be loaded ({type(cause).__name__}: {reason(cause)}). {_EXPECTED}"
        ) from error
    if args._is_parquet or os.path.exists(name):
        _check_parquet_classes(loaded, args, source)
    return loaded


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


_EXPECTED = (
    "Expected an existing folder of images or of parquet files, a parquet file or a quoted glob, digits, or a dataset of the "
    "Hub (check its name and dataset_config_name; if it is gated, accept its terms on its page and run `hf auth login`; with "
    "no network, only one that was loaded before)"
)
# What `datasets` says where a split has no rows: a file with none, or none in all of its files.
_EMPTY_SPLIT = ("BatchSize must be greater than 0", "corresponds to no data")


def _digits() -> DatasetDict:
    bunch = load_digits()
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    # A fixed seed: figures measured on the held-out digits must be comparable between runs.
    train, validation = train_test_split(
        np.arange(len(bunch.target)), test_size=0.2, random_state=0, stratify=bunch.target
    )

    def encoded(rows: np.ndarray) -> Dataset:
        images = []
        for row in rows:
            buffer = io.BytesIO()
            PIL.Image.fromarray(np.rint(bunch.images[row] * (255 / 16)).astype(np.uint8)).save(buffer, format="PNG")
            images.append({"bytes": buffer.getvalue(), "path": f"digit-{row:04d}.png"})
        return Dataset.from_dict({"image": images, "label": bunch.target[rows].tolist()}, features=features)

    return DatasetDict(train=encoded(train), validation=encoded(validation))


def _pick_split(loaded: dict, wanted: str | None, candidates: list[str], option: str):
    for name in candidates if wanted is None else [wanted]:
        if name in loaded:
            return loaded[name]
    raise ValueError(
        f"there is no split {wanted or candidates[0]!r}, only {', '.join(loaded)}: set {option} to one of these"
    )


# In the order in which they are looked for.
_LABEL_COLUMNS = ["label", "labels", "fine_label"]


def _pick_columns(split, args: DataArguments):
    """The split with `image` and `label` alone."""
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
                "as <split>/<class>/<image>: one that lies elsewhere leaves all of them without a label"
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
            # Before anything else: in a stream, a step that follows would decode each image, and stop at a bad one.
            split = split.cast_column(source, datasets.Image(decode=False))
    split = split.rename_columns({source: target for source, target in columns.items() if source != target})
    image, label = split.features["image"], split.features["label"]
    encoded = isinstance(image, dict) and set(image) <= {"bytes", "path"}
    if not (encoded or isinstance(image, datasets.Image) or image in map(datasets.Value, IMAGE_DTYPES)):
        raise ValueError(
            f"the image column is {image}, expected images, encoded bytes or paths: set image_column_name"
        )
    if isinstance(split, Dataset) and label in (datasets.Value("float32"), datasets.Value("float64")):
        # One missing label makes the integers of a CSV file floats. (A stream would cut fractions off as it passes.)
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


# In the order in which they are looked for.
_EVALUATION_SPLITS = ("validation", "val", "valid", "test")
IMAGE_DTYPES = ("binary", "large_binary", "string", "large_string")
INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def _is_text(feature) -> bool:
    return feature in (datasets.Value("string"), datasets.Value("large_string"))


def _check_stream(split: IterableDataset, args: DataArguments, name: str) -> None:
    if _is_text(split.features["label"]):
        raise ValueError(
            f"the labels of {redact(args.dataset_name)!r} are text, and a stream does not say which there are: load without "
            "streaming, or store the dataset with `class_encode_column`"
        )
    # Here, since DataLoader workers with nothing to do cannot tell whether others have something.
    try:
        empty = next(iter(split), None) is None
    except pa.ArrowInvalid as error:
        if not any(text in str(error) for text in _EMPTY_SPLIT):
            raise
        empty = True
    if empty:
        raise ValueError(f"the {name} split of {redact(args.dataset_name)!r} has no rows: name another one")


def _warn_of_empty_classes(splits: dict[str, Dataset], args: DataArguments) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    for name, split in splits.items():
        names = split.features["label"].names
        found = {names[label] for label in split.unique("label") if label is not None and label >= 0}
        # The folder of a class without images is no class to `datasets`, unless another split has some.
        path = split[0]["image"]["path"] or "" if len(split) and split[0]["image"] else ""
        is_class = os.path.isabs(path) and Path(path).parent.name in names
        folders = {entry.name for entry in os.scandir(Path(path).parents[1]) if entry.is_dir()} if is_class else set()
        missing = sorted({*names, *folders} - found)
        if missing:
            logger.warning(
                "the %s split of %r has no images of %d of %d classes, so that %s: %s",
                name,
                redact(args.dataset_name),
                len(missing),
                len({*names, *folders}),
                "they cannot be learned" if name == "train" else "nothing is measured of them",
                ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else ""),
            )


def _first_rows(split: IterableDataset, limit: int) -> IterableDataset:
    # As one shard: `take` alone divides the number among shards, so that several workers would get other rows.
    rows = ExamplesIterable(_keyed_rows, {"stream": split.take(limit)})
    return IterableDataset(rows, info=split.info.copy(), split=split.split)


def _keyed_rows(stream: IterableDataset) -> Iterator[tuple[int, dict]]:
    # `iter` and not __iter__, which divides the shards among the workers of a DataLoader.
    for number, batch in enumerate(stream.iter(batch_size=1)):
        yield number, {name: values[0] for name, values in batch.items()}


def _subset(split: Dataset, limit: int | None, seed: int) -> Dataset:
    # Shuffled, since the rows of a folder of images are sorted by class.
    return split if limit is None or limit >= len(split) else split.shuffle(seed=seed).select(range(limit))


def _with_class_labels(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Gives text and plain integer labels a `ClassLabel` that holds for all splits; numbers are in order."""
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
    """Numbers the classes by their names where these are whole numbers: as text, 10 would come before 2."""
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
    # The label column alone, as casting the dataset would write all images to the cache once more; and at once, as
    # Dataset.cast handles the schema, with all names of classes, in every thousand rows.
    labels = split["label"][:]
    if isinstance(feature, datasets.ClassLabel) and _is_text(split.features["label"]):
        numbers = {name: number for number, name in enumerate(feature.names)}
        labels = [numbers.get(label) for label in labels]
    table = datasets.table.InMemoryTable(pa.table({"label": pa.array(labels).cast(feature.pa_type)}))
    info = datasets.DatasetInfo(features=datasets.Features(label=feature))
    return _with_labels(split, Dataset(table, info=info))


def _with_labels(split: Dataset, labels: Dataset) -> Dataset:
    return datasets.concatenate_datasets([split.select_columns("image"), labels], split=split.split, axis=1)


def _split_rows(labels: Sequence[int | None], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([-1 if label is None else label for label in labels])
    num_validation = math.ceil(fraction * len(labels))
    _, counts = np.unique(labels, return_counts=True)
    if not 0 < num_validation < len(labels):
        raise ValueError(f"train_val_split={fraction} leaves a split of {len(labels)} rows empty: change it")
    stratified = counts.min() > 1 and len(counts) <= min(num_validation, len(labels) - num_validation)
    return train_test_split(
        np.arange(len(labels)), test_size=num_validation, random_state=seed, stratify=labels if stratified else None
    )
