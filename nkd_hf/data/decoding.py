"""Decodes the encoded image of a row to RGB."""

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.ImageOps
import torch
from datasets.utils.file_utils import xopen
from torchvision.transforms.v2.functional import pil_to_tensor

from ..errors import BadSampleError, reason
from .seeding import seeded

try:
    from torchcodec.decoders import decode_jpeg
except ImportError:  # no wheel for this machine: Pillow decodes to the same values, in more time
    decode_jpeg = None

_ORIENTATION = PIL.ExifTags.Base.Orientation
# Only these formats are opened. Pillow's other formats contain no photographs, and some start a program: EPS starts
# Ghostscript.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# An evaluation resizes the short side, so that a strip of 1 x 60000 pixels would become a picture of gigabytes.
MAX_ASPECT_RATIO = 50
# Archives that `datasets` streams files from.
_ARCHIVES = ("zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://", "lz4://")


def takes_tensors(transform: Callable) -> bool:
    """Whether a transform also takes [3, H, W] uint8 tensors, as [`~nkd_hf.data.transforms.train_transform`] does."""
    return getattr(transform, "takes_tensors", False)


def draws_from_torch(transform: Callable) -> bool:
    """Whether a transform draws only from torch's generator, by its attribute `draws_from_torch`."""
    return getattr(transform, "draws_from_torch", False)


def read_sample(sample: dict, name: str, as_tensor: bool = False) -> tuple[PIL.Image.Image | torch.Tensor, int]:
    """Decodes the RGB image of a row, and returns it with the label.

    A row is bad if it has no image, an empty or truncated file, a file that is no image of the [`FORMATS`] (whatever
    its name), an image of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million), an image whose long side is more
    than 50 times its short side (both read from the header, before memory is taken), a path that is not read (see
    [`read_bytes`]), or a label that is null or negative. Of an animation the first frame is read. An image of any
    other size from 1 x 1 is good.

    Images turn upright by their EXIF tag and become RGB as in transformers' pipeline (CMYK is converted, alpha is
    dropped), with one difference. The pipeline makes all 16-bit grayscale pixels above 255 of 65535 white.
    `read_sample` keeps the upper 8 bits, as Pillow does with 16-bit RGB. 32-bit integer and float pixels, for which no
    format defines white, are read as 0..255, and an image with other values is bad.

    Args:
        sample: `image` as `{"bytes", "path"}` or None, and `label`, an integer or None.
        name: the row's name in the error.
        as_tensor: whether the image may be a tensor [3, H, W] uint8. A plain JPEG then becomes one: torchcodec decodes it
            to the same values in less time, and Pillow does where torchcodec is missing.

    Returns:
        The image, and the label.

    Raises:
        BadSampleError: the row is bad.
    """
    if sample["label"] is None or sample["label"] < 0:
        raise BadSampleError(f"{name} has no label ({sample['label']})")
    return read_image(sample, name, as_tensor), sample["label"]


def read_image(sample: dict, name: str, as_tensor: bool = False) -> PIL.Image.Image | torch.Tensor:
    """Decodes the RGB image of a row as [`read_sample`] does, without its label."""
    if sample["image"] is None:
        raise BadSampleError(f"{name} has no image")
    try:
        image = _decode(sample["image"], as_tensor)
        return image if isinstance(image, torch.Tensor) else _to_rgb(image)
    except PIL.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise BadSampleError(
            f"{name} cannot be decoded (it is no image of a format that is opened: {formats})"
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything: OSError, SyntaxError, DecompressionBombError
        raise BadSampleError(f"{name} cannot be decoded ({type(error).__name__}: {reason(error)})") from error


def read_bytes(encoded: dict) -> bytes | None:
    """Reads the file of an encoded image: its bytes, or the file at its path on this machine or, in a stream, on the Hub.

    Args:
        encoded: `{"bytes", "path"}`.

    Returns:
        The bytes; None where there are neither bytes nor a path.

    Raises:
        ValueError: the path is an address outside of the Hub. Without this check, a row could make the process fetch
            anything.
        OSError: the file cannot be read.
    """
    path, content = encoded["path"], encoded["bytes"]
    if content is not None or path is None:
        return content
    if os.path.isfile(path):
        return Path(path).read_bytes()
    *archives, place = path.split("::")
    if not all(archive.startswith(_ARCHIVES) for archive in archives) or "://" in place.removeprefix("hf://"):
        raise ValueError(f"it is at {place}, from where nothing is fetched: download it, and name the file")
    with xopen(path, "rb") as file:
        return file.read()


def read_pixels(encoded: dict, name: str, transform: Callable, key: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    # The decoded image is kept for the next crop, for which the same dict is passed.
    if "decoded" not in encoded:
        encoded["decoded"] = read_sample(encoded, name, takes_tensors(transform))
    image, label = encoded["decoded"]
    return transform_image(image, name, transform, key), label


def transform_image(
    image: PIL.Image.Image | torch.Tensor, name: str, transform: Callable, key: tuple[int, ...]
) -> torch.Tensor:
    """Transforms a decoded image with random numbers that are a function of the key alone.

    Raises:
        BadSampleError: there is not enough memory.
    """
    try:
        with seeded(*key, torch_only=draws_from_torch(transform)):
            return transform(image)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # PyTorch's MemoryError
            raise
        raise BadSampleError(f"{name} cannot be transformed ({type(error).__name__}: {reason(error)})") from error


def _decode(encoded: dict, as_tensor: bool) -> PIL.Image.Image | torch.Tensor:
    content = read_bytes(encoded)
    if content is None:
        raise ValueError("it has neither bytes nor a path")
    if not content:
        raise ValueError("it is empty, of 0 bytes")
    image = PIL.Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    # Up to twice its limit, Pillow only warns, without the image's name, and then takes up to 0.7 GB in each worker.
    if PIL.Image.MAX_IMAGE_PIXELS is not None and width * height > PIL.Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} are more than {PIL.Image.MAX_IMAGE_PIXELS} pixels: scale it down")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels are a strip of more than {MAX_ASPECT_RATIO} : 1: crop it")
    is_plain = image.format == "JPEG" and image.mode == "RGB"
    if as_tensor and is_plain and image.getexif().get(_ORIENTATION, 1) == 1:
        if decode_jpeg is None:
            return pil_to_tensor(image)
        with contextlib.suppress(RuntimeError):  # Pillow decodes the file below, or reports its fault
            return decode_jpeg(content, mode="RGB")
    image.load()  # a PNG's EXIF tags may lie behind its pixels
    return image if image.getexif().get(_ORIENTATION) is None else PIL.ImageOps.exif_transpose(image)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # both have 16 bits
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        low, high = np.min(image), np.max(image)
        # Pixels in 0..1 would turn black.
        if not (low >= 0 and high <= 255) or (image.mode == "F" and 0 < high <= 1):
            raise ValueError(f"its 32-bit pixels go from {low:g} to {high:g}, expected 0 to 255: store it with 8 bits")
    return image.convert("RGB")
