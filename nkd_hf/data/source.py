"""Opens a dataset with `datasets`, with all of its splits and columns."""

import os
import pickle

import datasets
import yaml
from datasets import DatasetDict, IterableDatasetDict

from ..errors import OutsideError, explain_gated_repo, reason, redact
from ..files import path_fault
from .arguments import DataArguments
from .digits import load_digits_dataset
from .labels import _check_parquet_classes
from .row_paths import check_data_files

IMAGE_DTYPES = ("binary", "large_binary", "string", "large_string")


def open_dataset(args: DataArguments, argument: str = "dataset_name") -> DatasetDict | IterableDatasetDict:
    """Opens the dataset that `dataset_name` of the arguments names.

    Args:
        args: names the dataset.
        argument: the argument that errors name. Only `dataset_name` has labels, which parquet files must number alike.

    Raises:
        ValueError: the dataset cannot be reached or read.
    """
    named = f"{argument}={redact(args.dataset_name)!r}"
    expected = _EXPECTED.format(config=f"{argument.removesuffix('_name')}_config_name")
    name = os.path.expanduser(args.dataset_name)
    if name == "digits":
        digits = load_digits_dataset()
        if args.streaming:
            return IterableDatasetDict({key: split.to_iterable_dataset(num_shards=4) for key, split in digits.items()})
        return digits
    if not args._is_parquet and (fault := path_fault(args.dataset_name)):
        raise ValueError(f"{named} could not be loaded: {fault}. {expected}")
    source = {"path": name, "name": args.dataset_config_name}
    if args._is_parquet:
        source = {"path": "parquet", "data_files": name}
    elif os.path.normpath(name) == os.curdir:
        source["path"] = os.path.abspath(name)  # datasets names the dataset by its folder, and "." has no name
    try:
        if not args._is_parquet:
            check_data_files(name)
        loaded = datasets.load_dataset(**source, streaming=args.streaming)
    except OutsideError:
        raise
    except (
        *(OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError),
        *(yaml.YAMLError, pickle.UnpicklingError),  # from its card, and from a tar file: no code in them was run
    ) as error:
        if how := explain_gated_repo(error, name, "dataset"):
            raise ValueError(f"{named} could not be loaded: {how}") from error
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        if any(text in str(cause) for text in EMPTY_SPLIT):
            raise ValueError(
                f"{named} could not be loaded: one of its splits has no rows ({reason(cause)}). Remove its "
                "file, or put images in it"
            ) from error
        raise ValueError(
            f"{named} could not be loaded ({type(cause).__name__}: {reason(cause)}). {expected}"
        ) from error
    if argument == "dataset_name" and (args._is_parquet or os.path.exists(name)):
        _check_parquet_classes(loaded, args, source)
    return loaded


_EXPECTED = (
    "Expected an existing folder of images or of parquet files, a parquet file or a quoted glob, digits, or a dataset of the "
    "Hub (check its name and {config}; if it is gated, accept its terms on its page and run `hf auth login`; with "
    "no network, only one that was loaded before)"
)
# Parts of `datasets`' errors for a split without rows: the first for an empty file, the second if all files are empty.
EMPTY_SPLIT = ("BatchSize must be greater than 0", "corresponds to no data")


def check_image_column(feature: object) -> None:
    """Raises ValueError where a column has neither images nor their bytes or paths."""
    encoded = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not (encoded or isinstance(feature, datasets.Image) or feature in map(datasets.Value, IMAGE_DTYPES)):
        raise ValueError(
            f"the image column is {feature}, expected images, encoded bytes or paths: set image_column_name"
        )
