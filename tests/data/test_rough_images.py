"""Rough images and labels, each as a real file: what is good, what is bad, and what is said of it."""

import io
import json
import logging
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from processes import in_processes
from sklearn.datasets import load_sample_image
from tiny import make_trainer, native_resnet
from torch.utils.data import DataLoader
from transformers.image_utils import load_image

from nkd_hf.data.arguments import DataArguments
from nkd_hf.data.bad_images import BadImageReport, describe_bad_images
from nkd_hf.data.collator import ImageCollator
from nkd_hf.data.image_datasets import ImageDataset, StreamingImageDataset
from nkd_hf.data.loading import load_image_dataset
from nkd_hf.data.transforms import train_transform


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Keeps what `datasets` prepares out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
        # A DataLoader that dies in a cycle, as after an error, waits five seconds for each worker.
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        yield


PHOTO = PIL.Image.fromarray(load_sample_image("china.jpg")).resize((48, 32))
PIXELS = np.array(PHOTO)
RAMP = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)


def encode(image, format="PNG", **keywords):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **keywords)
    return buffer.getvalue()


def png(width, height, bits, colour_type, rows):
    """A PNG by hand: of 16 bits a channel, or with a header that promises more than there is."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(pixels, colour_type):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, colour_type, rows)


def exif(orientation):
    tags = PIL.Image.Exif()
    tags[PIL.Image.ExifTags.Base.Orientation] = orientation
    return tags


def to_pixels(image):
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def write(root, files, split="train"):
    """`files`: {name: bytes}, in the class `a`; the class `b` has a good image, so that there are two."""
    contents = {f"a/{name}": content for name, content in files.items()} | {"b/z.png": encode(PHOTO)}
    for name, content in contents.items():
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def load(root, **keywords):
    return load_image_dataset(DataArguments(dataset_name=str(root), validation_split="train", **keywords))


def open_rows(root, on_bad_image="error", **keywords):
    return ImageDataset(load(root, **keywords)["train"], to_pixels, on_bad_image=on_bad_image)


def open_stream(root, on_bad_image="error", training=False):
    return StreamingImageDataset(
        load(root, streaming=True)["train"], to_pixels, on_bad_image=on_bad_image, training=training
    )


# Good images

FRAMES = [PHOTO.rotate(180), PHOTO.rotate(90)]
PALETTE = PHOTO.quantize(16)
ALPHA = PHOTO.convert("RGBA")
ALPHA.putalpha(PIL.Image.fromarray(np.arange(48 * 32, dtype=np.uint8).reshape(32, 48)))
GRAY = np.array(PHOTO.convert("L"))
BLACK_AND_WHITE = PHOTO.convert("1")
GOOD = {  # name: file, what it shows, and by how much a pixel may differ in the mean
    "one_pixel.png": (encode(PHOTO.crop((3, 4, 4, 5))), PIXELS[4:5, 3:4], 0),
    "cmyk.jpg": (encode(PHOTO.convert("CMYK"), "JPEG", quality=95), PIXELS, 5),
    "gray16.png": (png16(RAMP, 0), np.stack([RAMP / 257] * 3, -1), 0.6),
    "rgb16.png": (png16(np.stack([RAMP, RAMP.T, RAMP[::-1]], -1), 2), np.stack([RAMP, RAMP.T, RAMP[::-1]], -1) / 257, 0.6),
    "gray16.tiff": (encode(PIL.Image.fromarray(RAMP), "TIFF"), np.stack([RAMP / 257] * 3, -1), 0.6),
    "gray16.pgm": (b"P5 32 32 65535\n" + RAMP.astype(">u2").tobytes(), np.stack([RAMP / 257] * 3, -1), 0.6),
    "int32.tiff": (encode(PIL.Image.fromarray(GRAY.astype(np.int32)), "TIFF"), np.stack([GRAY] * 3, -1), 0),
    "float.tiff": (encode(PIL.Image.fromarray(GRAY.astype(np.float32)), "TIFF"), np.stack([GRAY] * 3, -1), 0),
    "gray_alpha.png": (encode(ALPHA.convert("LA")), np.stack([GRAY] * 3, -1), 1),
    "alpha.png": (encode(ALPHA), PIXELS, 0),
    "palette.png": (encode(PALETTE, transparency=0), np.array(PALETTE.convert("RGB")), 0),
    "bit.png": (encode(BLACK_AND_WHITE), np.stack([np.array(BLACK_AND_WHITE) * 255] * 3, -1), 0),
    "animated.gif": (encode(PHOTO, "GIF", save_all=True, append_images=FRAMES), PIXELS, 5),
    "animated.webp": (encode(PHOTO, "WEBP", save_all=True, append_images=FRAMES, lossless=True), PIXELS, 0),
    "png_inside.jpg": (encode(PHOTO), PIXELS, 0),
    "rotated.jpg": (encode(PHOTO.rotate(90, expand=True), "JPEG", quality=95, exif=exif(6)), PIXELS, 5),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("good"), {name: content for name, (content, *_) in GOOD.items()})


def test_good_images_show_what_they_hold(good):
    dataset = open_rows(good)
    assert len(dataset) == len(GOOD) + 1
    streamed = list(open_stream(good))
    for row in range(len(GOOD)):
        name = os.path.basename(dataset.dataset[row]["image"]["path"])
        _, expected, tolerance = GOOD[name]
        for sample in (dataset[row], streamed[row]):
            shown = sample["pixel_values"].permute(1, 2, 0).numpy()
            assert shown.shape == expected.shape, name
            assert np.abs(shown - expected).mean() <= tolerance, name


def test_16_bit_grayscale_is_where_the_pipeline_differs(good):
    path = good / "train" / "a" / "gray16.png"
    assert np.mean(np.array(load_image(str(path))) == 255) > 0.99  # the day this fails, the docstring has it wrong
    rgb = np.array(load_image(str(good / "train" / "a" / "rgb16.png")))
    rows = open_rows(good)
    (row,) = (row for row in range(len(rows)) if rows.dataset[row]["image"]["path"] == str(path))
    assert np.array_equal(rows[row]["pixel_values"][0].numpy(), rgb[..., 0])  # as Pillow reads the same values in RGB


@pytest.mark.parametrize(
    "arguments",
    [{}, {"random_crop_padding": 4}, {"auto_augment": "rand-m9-n2-mstd0.5-inc1", "random_erasing": 1.0}],
)
def test_one_pixel_is_augmented_like_any_other_image(good, arguments):
    transform = train_transform(DataArguments(**arguments), 32, [0.5] * 3, [0.5] * 3)
    pixels = transform(PIL.Image.open(good / "train" / "a" / "one_pixel.png"))
    assert pixels.shape == (3, 32, 32)
    assert pixels.isfinite().all()


# Bad images

JPEG = encode(PHOTO, "JPEG")
BAD = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "[Tt]runcated"),
    "lacks_its_end.jpg": (JPEG[:-2], "truncated"),
    "header_alone.jpg": (JPEG[:20], "no image of a format"),
    "truncated.png": (encode(PHOTO)[:900], "truncated"),
    "zero.jpg": (b"", "of 0 bytes"),
    "text.jpg": (b"<html>404 Not Found</html>\n" * 20, "no image of a format"),
    "bomb.png": (png(20000, 20000, 8, 2, b"\0" * 60001), "DecompressionBombError: .*400000000 pixels"),
    "large.png": (png(10000, 10000, 8, 2, b"\0" * 30001), "10000 x 10000 are more than 89478485 pixels: scale it down"),
    "strip.png": (png(1, 60000, 8, 2, b"\0" * 240000), "1 x 60000 pixels are a strip of more than 50 : 1: crop it"),
    "script.png": (encode(PHOTO, "EPS"), "no image of a format that is opened: AVIF, BMP"),
    "fractions.tiff": (encode(PIL.Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF"), "from 0 to 1, expected 0 to 255"),
    "wide.tiff": (encode(PIL.Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "from 0 to 65535, expected 0 to 255"),
    "nan.tiff": (encode(PIL.Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "from nan to nan"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_an_error_with_file_and_row_or_skipped(tmp_path, name, caplog):
    content, reason = BAD[name]
    root = write(tmp_path, {name: content})
    file = rf"\({root}/train/a/{name}\)"
    expected = (
        rf"^row 0 of the training data {file} cannot be decoded \(.*{reason}.*\): repair or remove it, or set on_bad"
    )
    with pytest.raises(ValueError, match=expected):
        open_rows(root)[0]
    with pytest.raises(ValueError, match=rf"^{root}/train/a/{name} cannot be decoded \(.*{reason}"):
        list(open_stream(root))
    dataset = open_rows(root, "skip")
    assert [dataset[row]["index"] for row in (0, 1)] == [1, 1]
    assert (dataset.num_bad_images, dataset.bad_rows) == (1, [0])
    streamed = open_stream(root, "skip")
    assert [sample["labels"] for sample in streamed] == [1]
    assert (streamed.num_bad_images, streamed.bad_names) == (1, [f"{root}/train/a/{name}"])
    assert caplog.text.count(f"{name}") == 2
    assert "set on_bad_image" not in caplog.text


@pytest.mark.parametrize("name", ["bomb.png", "large.png", "strip.png"])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, name, monkeypatch, recwarn):
    def load_pixels(self):
        raise AssertionError("the pixels were asked for")

    dataset = open_rows(write(tmp_path, {name: BAD[name][0]}))
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load_pixels)
    with pytest.raises(ValueError, match=BAD[name][1]):
        dataset[0]
    # Pillow's own warning, of what lies between its two limits, is not swallowed.
    warned = [warning for warning in recwarn if warning.category is PIL.Image.DecompressionBombWarning]
    assert len(warned) == (name == "large.png")


def test_memory_that_runs_out_in_the_transform_has_the_name_of_the_row(tmp_path):
    def takes_all(image):
        if image.width == 1:
            torch.empty(2**62, dtype=torch.uint8)
        raise MemoryError

    root = write(tmp_path, {"a.png": encode(PHOTO.crop((0, 0, 1, 1)))})
    for kind in (open_rows, open_stream):
        dataset = kind(root)
        dataset.transform = takes_all
        with pytest.raises(
            ValueError, match=r"train/a/a.png\)? cannot be transformed \(RuntimeError: .*repair or remove"
        ):
            next(iter(dataset))
    rows = open_rows(root, "skip")
    rows.transform = lambda image: takes_all(image) if image.width == 1 else torch.zeros(3, 1, 1)
    assert (rows[0]["index"], rows.bad_rows) == (1, [0])
    rows.transform = takes_all
    with pytest.raises(ValueError, match="all 2 rows are bad"):
        rows[1]


@pytest.mark.parametrize(
    "path", ["https://host/a.png", "zip://a.png::https://host/a.zip", "https://host/a.png::hf://datasets/a/b/c.zip",
             "file:///etc/passwd", "ftp://host/a.png"]
)  # fmt: skip
def test_an_address_in_a_row_is_not_fetched(path, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("it was fetched")

    monkeypatch.setattr("nkd_hf.data.decoding.xopen", fetch)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": path}], "label": [0]},
        features=datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a"])),
    )
    for dataset in (ImageDataset(rows, to_pixels), StreamingImageDataset(rows.to_iterable_dataset(), to_pixels)):
        with pytest.raises(ValueError, match="from where nothing is fetched: download it, and name the file"):
            next(iter(dataset))


@pytest.mark.parametrize("kind", [open_rows, open_stream])
def test_a_bad_image_ends_persistent_workers_with_its_name(tmp_path, kind):
    loader = DataLoader(
        kind(write(tmp_path, {f"{i}.jpg": b"" if i == 5 else JPEG for i in range(8)})),
        batch_size=2, num_workers=2, persistent_workers=True, collate_fn=ImageCollator(2), timeout=60,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"train/a/5.jpg\)? cannot be decoded \(.*0 bytes\): repair or remove it"):
        list(loader)


# Labels


def write_table(root, labels, split="train"):
    """Images with a table of labels, as CSV."""
    (root / split).mkdir(parents=True)
    for row in range(len(labels)):
        (root / split / f"{row}.jpg").write_bytes(JPEG)
    lines = [f"{row}.jpg,{label}" for row, label in enumerate(labels)]
    (root / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    return root


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ([0, 1, -1, 1], "-1"),  # integers
        ([0, 1, "", 1], "None"),  # which pandas reads as floats
        (["cat", "dog", "", "dog"], "None"),
    ],
)
def test_a_missing_label_is_a_bad_row(tmp_path, labels, shown):
    root = write_table(tmp_path, labels)
    dataset = open_rows(root)
    assert [dataset[row]["labels"] for row in (0, 1, 3)] == [0, 1, 1]
    for access in (lambda: dataset[2], dataset.check_labels):
        with pytest.raises(
            ValueError, match=rf"^row 2 of the training data \({root}/train/2.jpg\) has no label \({shown}\)"
        ):
            access()
    dataset = open_rows(root, "skip")
    dataset.check_labels()
    assert (dataset[2]["index"], dataset[2]["labels"], dataset.bad_rows) == (3, 1, [2])


def test_a_missing_label_in_a_stream_is_a_bad_row(tmp_path):
    root = write_table(tmp_path, [0, 1, -1])
    with pytest.raises(ValueError, match=rf"^{root}/train/2.jpg has no label \(-1\)"):
        list(open_stream(root))
    assert [sample["labels"] for sample in open_stream(root, "skip")] == [0, 1]


def test_text_is_mapped_or_refused_and_fractions_are_refused(tmp_path):
    root = write_table(tmp_path / "text", ["dog", "cat"])
    assert load(root)["train"].features["label"].names == ["cat", "dog"]
    assert open_rows(root)[0]["labels"] == 1
    with pytest.raises(ValueError, match="are text, and a stream does not say which"):
        load(root, streaming=True)
    raw = datasets.Dataset.from_dict({"image": ["x.png"], "label": ["dog"]})
    for kind, rows in ((ImageDataset, raw), (StreamingImageDataset, raw.to_iterable_dataset())):
        with pytest.raises(
            ValueError, match=r"labels are Value\('string'\), expected integers: .*class_encode_column"
        ):
            kind(rows, to_pixels)
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match=r"the label column (holds fractions|is Value\('float64'\)).* one integer or"
        ):
            load(write_table(tmp_path / f"fractions {streaming}", [0.5, 1]), streaming=streaming)


# Splits and classes


def write_classes(root, splits):
    for split, names in splits.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                (root / split / name / f"{number}.jpg").write_bytes(JPEG)
    return root


def test_classes_without_images_are_named_and_ids_agree_between_splits(tmp_path, caplog):
    root = write_classes(tmp_path / "data", {"train": ["ant", "bee"], "val": ["bee", "cat"]})
    (root / "train" / "dog").mkdir()
    (root / "train" / ".cache").mkdir()  # no class
    arguments = DataArguments(dataset_name=str(root))
    data = load_image_dataset(arguments)
    assert [sorted(set(data[split]["label"])) for split in ("train", "validation")] == [[0, 1], [1, 2]]
    for split in data.values():
        assert split.features["label"].names == ["ant", "bee", "cat"]
    empty, train, validation = (record.getMessage() for record in caplog.records)
    # Its model has three classes.
    assert empty.endswith("has folders without images, which become no classes: dog")
    assert "the train split of" in train
    assert train.endswith("no images of 1 of 3 classes, so that they cannot be learned: cat")
    assert "the validation split of" in validation
    assert validation.endswith("no images of 1 of 3 classes, so that nothing is measured of them: ant")
    caplog.clear()
    load_image_dataset(DataArguments(dataset_name=str(write_classes(tmp_path / "whole", {"train": ["a", "b"]}))))
    load_image_dataset(DataArguments(max_train_samples=5))
    assert not caplog.records


def test_many_classes_without_images_are_cut_short(tmp_path, caplog):
    load(write_table(tmp_path, [0, 30]))
    assert "29 of 31 classes" in caplog.text
    assert "LABEL_9" not in caplog.text.split("\n")[0].split("LABEL_18")[-1]
    assert "and 19 more" in caplog.text


def write_parquet(root, train, validation):
    for name, labels in (("train", train), ("validation", validation)):
        table = pa.table({"image": pa.array([JPEG] * len(labels), pa.binary()), "label": pa.array(labels, pa.int64())})
        pq.write_table(table, root / f"{name}.parquet")
    return DataArguments(dataset_name=str(root))


@pytest.mark.parametrize(("train", "validation"), [([0, 1], []), ([], [0, 1])])
def test_an_empty_split_is_an_error(tmp_path, train, validation):
    arguments = write_parquet(tmp_path, train, validation)
    with pytest.raises(ValueError, match=r"could not be loaded: one of its splits has no rows .*put images in it"):
        load_image_dataset(arguments)
    arguments.streaming = True
    empty = "validation" if train else "train"
    with pytest.raises(ValueError, match=rf"the {empty} split of .* has no rows: name another one"):
        load_image_dataset(arguments)


def test_an_image_outside_of_the_class_folders_is_explained(tmp_path):
    root = write_classes(tmp_path, {"train": ["ant", "bee"]})
    assert set(load(root)["train"]["label"]) == {0, 1}
    (root / "train" / "stray.jpg").write_bytes(JPEG)
    with pytest.raises(ValueError, match=r"no label column .* needs two classes .* <split>/<class>/<image>"):
        load(root)


# The report


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "nkd_hf.data.bad_images"]


def resized(image):
    return to_pixels(image.resize((32, 32))) / 255


def train(folder, training, evaluation, report, **keywords):
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, native_resnet(), training, evaluation, callbacks=[report], data_collator=ImageCollator(10),
        per_device_train_batch_size=4, per_device_eval_batch_size=4, **keywords,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_each_epoch_ends_with_the_count_and_the_list(tmp_path, caplog):
    root = write(tmp_path / "data", {f"{i}.jpg": b"" if i in (2, 5) else JPEG for i in range(9)})
    write(root, {f"{i}.jpg": b"" if i == 1 else JPEG for i in range(4)}, split="val")
    data = load_image_dataset(DataArguments(dataset_name=str(root)))
    training, evaluation = (
        ImageDataset(data[name], resized, on_bad_image="skip", training=name == "train")
        for name in ("train", "validation")
    )
    train(
        tmp_path / "run", training, evaluation, BadImageReport(), max_steps=6, eval_strategy="epoch",
        dataloader_num_workers=2, dataloader_persistent_workers=True,
    )  # fmt: skip
    said = messages(caplog)
    assert len(said) == 4  # two epochs, each with an evaluation
    assert said[0] == said[2] == (
        "2 of 10 training images were bad so far, and the next good rows took their place:\n"
        f"  row 2 of the training data ({root}/train/a/2.jpg)\n  row 5 of the training data ({root}/train/a/5.jpg)"
    )  # fmt: skip
    assert said[1] == said[3] == (
        "1 of 5 evaluation images were bad so far, and the next good rows took their place and count twice: accuracy is "
        f"off by at most 20.00%:\n  row 1 of the evaluation data ({root}/val/a/1.jpg)"
    )  # fmt: skip


def test_a_stream_reports_after_the_steps_of_an_epoch(tmp_path, caplog):
    root = write(tmp_path / "data", {f"{i}.jpg": b"" if i == 3 else JPEG for i in range(8)})
    dataset = StreamingImageDataset(load(root, streaming=True)["train"], resized, on_bad_image="skip")
    train(tmp_path / "run", dataset, None, BadImageReport(steps_per_epoch=2), max_steps=4, dataloader_num_workers=2)
    said = messages(caplog)
    assert len(said) == 2
    for text in said:
        assert "bad images were met in the training stream so far" in text
        assert text.splitlines()[1:] == [f"  {root}/train/a/3.jpg"]
    with pytest.raises(ValueError, match="steps_per_epoch must be positive, got 0"):
        BadImageReport(0)


def test_a_long_list_is_cut_short_and_an_empty_one_is_not_said(tmp_path, caplog):
    files = {f"{i:02d}.jpg": b"" for i in range(25)}
    root = write(tmp_path, files)
    dataset, streamed = open_rows(root, "skip"), open_stream(root, "skip")
    assert describe_bad_images(dataset) is None
    assert describe_bad_images(streamed) is None
    assert dataset[0]["index"] == 25
    lines = describe_bad_images(dataset).splitlines()
    assert len(lines) == 22
    assert lines[0].startswith("25 of 26 training images were bad")
    assert lines[-1] == "  and 5 more"
    for _ in range(2):
        assert len(list(streamed)) == 1
    lines = describe_bad_images(streamed).splitlines()
    assert len(lines) == 22
    assert lines[0].startswith("50 bad images were met in the evaluation stream")
    assert lines[-1] == "  at most 20 different ones are named"
    caplog.set_level(logging.WARNING)
    caplog.clear()
    good = write(tmp_path / "good", {f"{i}.jpg": JPEG for i in range(3)})
    rows = ImageDataset(load(good)["train"], resized, on_bad_image="skip")
    train(tmp_path / "run", rows, None, BadImageReport(), max_steps=1)
    assert messages(caplog) == []


def report(folder: Path) -> None:
    said = []
    logging.getLogger("nkd_hf.data.bad_images").addFilter(lambda record: said.append(record.getMessage()))
    data = load_image_dataset(DataArguments(dataset_name=str(folder / "data")))
    training, evaluation = (
        ImageDataset(data[name], resized, on_bad_image="skip", training=name == "train")
        for name in ("train", "validation")
    )
    train(
        folder / "run", training, evaluation, BadImageReport(), max_steps=2, eval_strategy="epoch",
        dataloader_num_workers=1,
    )  # fmt: skip
    alone = gather_object([training.num_bad_images])
    streams = load_image_dataset(DataArguments(dataset_name=str(folder / "data"), streaming=True))
    stream = StreamingImageDataset(streams["train"], resized, on_bad_image="skip")
    train(folder / "run", stream, None, BadImageReport(), max_steps=1)
    said = gather_object([said])
    if PartialState().is_main_process:
        (folder / "result.json").write_text(json.dumps({"said": said, "alone": alone}))


@pytest.mark.runs
def test_two_processes_report_once_what_both_of_them_met(tmp_path):
    data = write(tmp_path / "data", {f"{i:02d}.jpg": b"" if i in (1, 6, 9) else JPEG for i in range(15)})
    write(data, {f"{i}.jpg": b"" if i in (0, 5) else JPEG for i in range(7)}, split="val")
    log = tmp_path / "log"
    assert in_processes(2, lambda: report(tmp_path), log) == [0, 0], log.read_text()[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert max(result["alone"]) < 3  # so that neither could have said it alone
    (first, second, third), others = result["said"]
    assert others == []
    names = [f"  row {row} of the training data ({data}/train/a/{row:02d}.jpg)" for row in (1, 6, 9)]
    assert first.splitlines() == [
        "3 of 16 training images were bad so far, and the next good rows took their place:", *names
    ]  # fmt: skip
    assert "2 of 8 evaluation images were bad so far" in second
    assert [line.split("/")[-1] for line in second.splitlines()[1:]] == ["0.jpg)", "5.jpg)"]
    assert "bad images were met in the training stream" in third
    assert {line.split("/")[-1] for line in third.splitlines()[1:]} <= {"01.jpg", "06.jpg", "09.jpg"}
