"""A dataset reads its own files alone, whatever its rows and its card name."""

import os
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils import file_utils

from nkd_hf.data.arguments import DataArguments
from nkd_hf.data.image_datasets import ImageDataset, StreamingImageDataset
from nkd_hf.data.loading import load_image_dataset
from nkd_hf.data.row_paths import keep_within
from nkd_hf.errors import OutsideError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "downloads" / "extracted")

    def fetch(*args, **kwargs):
        raise AssertionError(f"{args} was fetched")

    monkeypatch.setattr(file_utils.fsspec, "get_fs_token_paths", fetch)


@pytest.fixture
def private(tmp_path) -> Path:
    """An image beside the dataset, of another colour than the dataset's."""
    path = tmp_path / "private" / "a.png"
    path.parent.mkdir()
    PIL.Image.new("RGB", (4, 4), "red").save(path)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    PIL.Image.new("RGB", (4, 4), "blue").save(path / "own.png")
    return path


def write_rows(folder: Path, images: list, kind: str = "parquet") -> Path:
    if kind == "csv":
        lines = [f"{image},{row % 2}" for row, image in enumerate(images)]
        (folder / "train.csv").write_text("\n".join(["image,label", *lines]) + "\n")
        shutil.copy(folder / "train.csv", folder / "validation.csv")
        return folder
    images = [image if isinstance(image, dict) else {"bytes": None, "path": str(image)} for image in images]
    # Written plainly: Dataset.to_parquet would put the files' bytes in place of their paths.
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.table({"image": pa.array(images, image), "label": [i % 2 for i in range(len(images))]})
    for split in ("train", "validation"):
        pq.write_table(rows, folder / f"{split}.parquet")
    return folder


def colours(name: Path | str, streaming: bool) -> set[tuple[int, ...]]:
    data = load_image_dataset(DataArguments(dataset_name=str(name), streaming=streaming))["validation"]
    kind = StreamingImageDataset if streaming else ImageDataset
    rows = kind(data, lambda image: image.getpixel((0, 0)), training=False)
    samples = list(rows) if streaming else [rows[row] for row in range(len(rows))]
    return {sample["pixel_values"] for sample in samples}


@pytest.mark.parametrize(("kind", "streaming"), [("parquet", False), ("parquet", True), ("csv", False)])
@pytest.mark.parametrize(
    "path",
    ["{private}", "{folder}/../private/a.png", "https://host/a.png", "hf://datasets/a/b/a.png", "file://{private}",
     "zip://a.png::{private}", "data2/a.png"],
)  # fmt: skip
def test_a_row_outside_of_the_dataset_is_refused_with_its_path(folder, private, path, kind, streaming, monkeypatch):
    monkeypatch.chdir(private.parent)
    path = path.format(private=private, folder=folder)
    write_rows(folder, [folder / "own.png"] * 3 + [path], kind)
    names = [folder] if kind == "csv" else [folder, folder / "*.parquet"]
    for name in names[: 1 + (not streaming and path == str(private))]:
        with pytest.raises(
            ValueError, match=r"row.* of '.*data.*' names the file '.*a.png', which lies outside"
        ) as error:
            colours(name, streaming)
        assert repr(path) in str(error.value)
        assert streaming or "row 3 of" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_users_own_paths_stay_usable(folder, streaming, monkeypatch, tmp_path):
    blue = {(0, 0, 255)}
    assert colours(write_rows(folder, [folder / "own.png"] * 4, "csv"), False) == blue
    (folder / "train.csv").unlink()
    (folder / "validation.csv").unlink()
    assert colours(write_rows(folder, [folder / "own.png"] * 4), streaming) == blue
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert colours(link, streaming) == blue
    assert colours(write_rows(folder, [link / "own.png"] * 4) and link, streaming) == blue
    monkeypatch.chdir(tmp_path)
    assert colours(write_rows(folder, ["data/own.png"] * 4), streaming) == blue
    assert colours("data", streaming) == blue


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_named_beside_the_bytes_is_not_read(folder, private, streaming):
    content = (folder / "own.png").read_bytes()
    write_rows(folder, [{"bytes": content, "path": str(private)}] * 4)
    assert colours(folder, streaming) == {(0, 0, 255)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "path", "own"),
    [
        ("me/own", "hf://datasets/me/own@main/a.png", True),
        ("me/own", "hf://datasets/me/other@main/a.png", False),
        ("me/own", "hf://datasets/me/own@main/../../other/a.png", False),
        ("me/own", "zip://a.png::hf://datasets/me/own@main/a.zip", True),
        ("me/own", "zip://a.png::hf://datasets/me/other@main/a.zip", False),
        ("me/own", "{hub}/datasets--me--own/snapshots/0/a.png", True),
        ("me/own", "{hub}/datasets--me--other/snapshots/0/a.png", False),
        ("me/own", "{cache}/downloads/extracted/0/a.png", True),
        ("me/own", "a.png", False),
        ("hf://datasets/me/own/data/*.parquet", "hf://datasets/me/own/data/a.png", True),
        ("hf://datasets/me/own/data/*.parquet", "hf://datasets/me/own/a.png", False),
    ],
)
def test_a_dataset_of_the_hub_has_its_repository_and_its_cache(name, path, own, streaming):
    path = path.format(hub=huggingface_hub.constants.HF_HUB_CACHE, cache=datasets.config.HF_DATASETS_CACHE)
    features = datasets.Features(image=datasets.Image(decode=False))
    rows = datasets.Dataset.from_dict({"image": [None, {"bytes": None, "path": path}]}, features=features)
    rows = rows.to_iterable_dataset() if streaming else rows
    if own:
        assert [row["image"] for row in keep_within(rows, name)][1]["path"] == path
    else:
        with pytest.raises(OutsideError):
            list(keep_within(rows, name))


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "places",
    ["https://host/train.parquet", "{private}", "../private/*", "zip://*::https://host/a.zip", ["own.png", "{private}"],
     [{"split": "train", "path": ["hf://datasets/a/b/*"]}]],
)  # fmt: skip
def test_a_card_that_names_data_files_elsewhere_is_refused(folder, private, file, places):
    text = (
        str(places).format(private=private)
        if isinstance(places, str)
        else repr(places).replace("{private}", str(private))
    )
    rule = "---\n" if file == "README.md" else ""
    (folder / file).write_text(f"{rule}configs:\n- config_name: default\n  data_files: {text!s}\n{rule}")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"^{file} of '.*' names the data files '.*', which lie outside"):
            load_image_dataset(DataArguments(dataset_name=str(folder), streaming=streaming))


def test_a_card_that_names_its_own_files_is_followed(folder):
    write_rows(folder, [folder / "own.png"] * 4)
    os.rename(folder / "train.parquet", folder / "one.parquet")
    files = "[{split: train, path: one.parquet}, {split: test, path: ['val*.parquet']}]"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    assert colours(folder, False) == {(0, 0, 255)}
