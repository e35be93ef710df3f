"""Keeps a dataset from naming files that are not its own: other files of this machine, addresses, other repositories."""

import functools
import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.compute as pc
import yaml
from datasets import Dataset, IterableDataset
from huggingface_hub import DatasetCard, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from ..errors import OutsideError, redact

_Split = TypeVar("_Split", Dataset, IterableDataset)


def check_data_files(name: str) -> None:
    """Refuses a dataset whose card names data files outside of the dataset, before `datasets` opens or fetches them.

    Args:
        name: a folder, or a Hub id.

    Raises:
        OutsideError: the card names an address, an absolute path or a path with `..`.
        OSError: the card cannot be read or fetched.
    """
    for file in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME):
        path = _card(name, file)
        if path is None:
            continue
        if file.endswith(".md"):
            settings = DatasetCard.load(path, ignore_metadata_errors=True).data.to_dict()
        else:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        configs = settings.get("configs") if isinstance(settings, dict) else None
        for place in _places(configs):
            if "://" in place or "::" in place or os.path.isabs(place) or ".." in re.split(r"[/\\]", place):
                raise OutsideError(
                    f"{file} of {redact(name)!r} names the data files {redact(place)!r}, which lie outside of the dataset. Remove them from "
                    f"{file}, or set dataset_name to the place of these files."
                )


def keep_within(split: _Split, name: str) -> _Split:
    """Casts the images to `Image(decode=False)` and refuses paths outside of the dataset, in a stream when a row is read.

    Args:
        split: a split whose column `image` has images, encoded bytes or paths.
        name: the folder, file, glob or Hub id that the user named.

    Raises:
        OutsideError: a row names a path outside of the dataset.
    """
    folders, prefixes = _own_places(name)
    image = datasets.Image(decode=False)
    if isinstance(split, IterableDataset):
        if isinstance(split.features["image"], datasets.Image):
            # The images become plain columns, since Image.encode_example would replace the bytes with the file at the
            # path.
            columns = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
            split = split.cast_column("image", columns)
        check = functools.partial(_check_row, name=name, folders=folders, prefixes=prefixes)
        features = datasets.Features(split.features | {"image": image})
        return split.map(check, input_columns=["image"], features=features)
    split = split.cast_column("image", image)
    row = 0
    for chunk in split.data.column("image").chunks:
        without_bytes = pc.and_(pc.is_valid(chunk), pc.is_null(chunk.field("bytes")))
        paths = pc.if_else(without_bytes, chunk.field("path"), None)
        for offset in pc.indices_nonzero(
            pc.fill_null(pc.invert(_is_plainly_inside(paths, folders)), False)
        ).to_pylist():
            if not _is_inside(paths[offset].as_py(), folders, prefixes):
                raise OutsideError(f"row {row + offset} of {_refusal(name, paths[offset].as_py())}")
        row += len(chunk)
    return split


def _is_plainly_inside(paths: Any, folders: list[str]) -> Any:
    """Whether each of many paths is surely inside; False also where `_is_inside` must decide."""
    inside = functools.reduce(pc.or_, [pc.starts_with(paths, os.path.join(folder, "")) for folder in folders])
    return pc.and_not(inside, pc.match_substring_regex(paths, r"\.\.|::"))


def _check_row(image: Any, name: str, folders: list[str], prefixes: list[str]) -> dict[str, Any]:
    if isinstance(image, bytes):
        image = {"bytes": image, "path": None}
    elif isinstance(image, str):
        image = {"bytes": None, "path": image}
    path = (image or {}).get("path")
    if path is None:
        return {"image": image}
    content = image.get("bytes")
    if content is None and not _is_inside(path, folders, prefixes):
        raise OutsideError(f"a row of {_refusal(name, path)}")
    if content is not None and os.path.isfile(path):
        path = None  # `map` calls Image.encode_example with this result, which would read that file.
    return {"image": {"bytes": content, "path": path}}


def _refusal(name: str, path: str) -> str:
    return (
        f"{redact(name)!r} names the file {redact(path)!r}, which lies outside of the dataset and is not read. Put the image, or its "
        "bytes, into the dataset, or set dataset_name to a folder that holds both"
    )


def _is_inside(path: str, folders: list[str], prefixes: list[str]) -> bool:
    place = path.split("::")[-1]  # for a file in an archive, the archive
    if "://" in place:
        return place.startswith(tuple(prefixes)) and ".." not in place.split("/")
    place = os.path.abspath(place)
    return any(place == folder or place.startswith(os.path.join(folder, "")) for folder in folders)


def _own_places(name: str) -> tuple[list[str], list[str]]:
    """Returns a dataset's folders, also the ones into which `datasets` extracts archives, and its Hub addresses."""
    folders = [datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH]
    prefixes = []
    if os.path.isdir(name):
        folders.append(name)
    elif "://" in name:
        prefixes.append(_glob_parent(name) + "/")
    elif name.endswith(".parquet") or glob.has_magic(name):
        folders.append(_glob_parent(name) or ".")
    else:
        folders.append(os.path.join(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset")))
        prefixes += [f"hf://datasets/{name}@", f"hf://datasets/{name}/"]
    # A folder counts both by its path as named and by its path as `datasets` resolves it.
    absolute = {os.path.abspath(folder) for folder in folders} | {os.path.realpath(folder) for folder in folders}
    return sorted(absolute), prefixes


def _glob_parent(name: str) -> str:
    """Returns the folder of a file, or the folder of a glob up to its first wildcard."""
    parts = os.path.dirname(name).split("/")
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:plain])


def _card(name: str, file: str) -> str | None:
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(name, file, repo_type="dataset")
    except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError):
        # `datasets` then says that there is no such repository or, without a network, opens its cached copy.
        return None


def _places(configs: Any) -> Iterator[str]:
    """Yields all paths and patterns in the `configs` of a card."""
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            yield from _texts([config.get("data_files"), config.get("data_dir")])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([entry for key, entry in value.items() if key != "split"])
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
