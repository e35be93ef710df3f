"""The data of evidence.py: scikit-learn's digits and Fashion-MNIST, as folders of parquet files that `datasets` opens.

Each folder has a training part, a validation part that was cut out of it, on which settings are chosen, and the test
part: the 360 digits that the package holds out, and Fashion-MNIST's own test files.
"""

import gzip
import io
import os
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.transforms.v2 import functional as F

from nkd_hf.data.image_datasets import ImageDataset
from nkd_hf.data.sampler import EpochDataset

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
FASHION_CLASSES = [
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]
_FASHION_FILES = {"train": "train", "test": "t10k"}
_IDX_DTYPES = {0x08: np.uint8, 0x09: np.int8, 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file, gzipped or not.

    Raises:
        ValueError: it is none, or its content has another length than its head says.
    """
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise ValueError(
            f"{path} is no IDX file: it begins with {content[:4].hex()}, expected 0000, a type and a rank"
        )
    dtype, rank = np.dtype(_IDX_DTYPES[content[2]]), content[3]
    start = 4 + 4 * rank
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != dtype.itemsize * shape.prod():
        raise ValueError(
            f"{path} has {len(content) - start} bytes of values, and its head says {shape.tolist()}: damaged"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


def has_fashion(folder: Path) -> bool:
    """Whether the four files are there."""
    kinds = ("images-idx3", "labels-idx1")
    return all((folder / f"{name}-{kind}-ubyte.gz").is_file() for name in _FASHION_FILES.values() for kind in kinds)


def write_digits(folder: Path, train: int, validation: int, test: int) -> None:
    """Writes the digits, split as `nkd_hf` splits them, and a validation part out of the training part."""
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rest, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    names = [str(digit) for digit in range(10)]
    _write_parts(
        folder, (images[rest], labels[rest]), (images[held_out], labels[held_out]), names, train, validation, test
    )


def write_numbers(folder: Path, train: int, validation: int, test: int) -> None:
    """Writes numbers from 00 to 99, two digits side by side: each part of the digits of its own part of `write_digits`."""
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rest, held_out = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    rest, middle = train_test_split(rest, test_size=0.2, random_state=0, stratify=labels[rest])
    generator = np.random.default_rng(0)
    names = [f"{number:02d}" for number in range(100)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, number in (("train", rest, train), ("validation", middle, validation), ("test", held_out, test)):
        numbers = np.arange(number) % 100
        places = [rows[labels[rows] == digit] for digit in range(10)]
        pixels = np.zeros((number, 16, 16), np.uint8)
        for index, value in enumerate(numbers.tolist()):
            pixels[index, 4:12] = np.hstack([images[generator.choice(places[digit])] for digit in divmod(value, 10)])
        _write_part(folder, name, pixels, numbers, names)


def write_fashion(folder: Path, train: int, validation: int, test: int, source: Path = FASHION_FOLDER) -> None:
    """Writes a part of Fashion-MNIST; the same images for all seeds."""
    files = {
        split: tuple(read_idx(source / f"{name}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        for split, name in _FASHION_FILES.items()
    }
    _write_parts(folder, files["train"], files["test"], FASHION_CLASSES, train, validation, test)


def _write_parts(folder: Path, training: tuple, testing: tuple, names: list[str], *sizes: int) -> None:
    train, validation, test = sizes
    rows = _draw(training[1], train + validation)
    order = _draw(training[1][rows], train)
    rest = np.setdiff1d(np.arange(len(rows)), order)
    parts = {
        "train": (training, rows[order]),
        "validation": (training, rows[rest]),
        "test": (testing, _draw(testing[1], test)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, ((images, labels), chosen) in parts.items():
        _write_part(folder, name, images[chosen], labels[chosen], names, chosen)


def _write_part(
    folder: Path, name: str, images: np.ndarray, labels: np.ndarray, names: list[str], rows: np.ndarray | None = None
) -> None:
    rows = np.arange(len(images)) if rows is None else rows
    encoded = [
        {"bytes": _png(image), "path": f"{name}-{row:05d}.png"}
        for image, row in zip(images, rows.tolist(), strict=True)
    ]
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))
    columns = {"image": encoded, "label": labels.astype(int).tolist()}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")


def _draw(labels: np.ndarray, number: int) -> np.ndarray:
    """That many rows, of all classes alike."""
    if number == len(labels):
        return np.arange(number)
    if number > len(labels):
        raise ValueError(f"there are {len(labels)} images, and {number} are asked for: ask for fewer")
    rows, _ = train_test_split(np.arange(len(labels)), train_size=number, random_state=0, stratify=labels)
    return np.sort(rows)


class KeptImages(EpochDataset):
    """The augmented training images of some epochs, made once: all methods and students of a seed get the same ones.

    They are those of the dataset bit for bit, and take a fraction of the time. For gray images in 8 bits that are
    normalised by 0.5 and 0.5: one channel of a byte is kept, and the normalisation repeated.

    Args:
        dataset: what is kept.
        path: of the file, which is written if it is not there.
        epochs: how many.
    """

    def __init__(self, dataset: ImageDataset, path: Path, epochs: int):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.npy")
            np.save(temporary, self._make(dataset, epochs))
            temporary.replace(path)
        self.pixels = np.load(path, mmap_mode="r")
        self.labels = dataset.dataset["label"][:]

    @staticmethod
    def _make(dataset: ImageDataset, epochs: int) -> np.ndarray:
        pixels = np.stack(
            [
                [_to_bytes(dataset[(epoch, index)]["pixel_values"]) for index in range(len(dataset))]
                for epoch in range(epochs)
            ]
        )
        first = dataset[(0, 0)]["pixel_values"]
        if not torch.equal(_normalized(pixels[0, 0]), first):
            raise ValueError(
                "the images are not gray ones of 8 bits, normalised by 0.5 and 0.5: they cannot be kept so"
            )
        return pixels

    def __len__(self) -> int:
        return len(self.labels)

    def get_sample(self, epoch: int, index: int) -> dict:
        pixels = _normalized(self.pixels[epoch, index])
        return {"pixel_values": pixels, "labels": self.labels[index], "epoch": epoch, "index": index, "draw": 0}


def _to_bytes(pixels: torch.Tensor) -> np.ndarray:
    return ((pixels[0] * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy()


def _normalized(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(_NORMALIZED[pixels]).expand(3, -1, -1)


# By the functions of nkd_hf.data.transforms, whose rounding it should have.
_BYTES = F.to_dtype_image(torch.arange(256, dtype=torch.uint8).expand(3, 1, -1), torch.float32, scale=True)
_NORMALIZED = F.normalize_image(_BYTES, [0.5] * 3, [0.5] * 3)[0, 0].numpy()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
