"""Makes the transforms of training and of evaluation images."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import PIL.Image
import timm.data
import torch
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import reason
from ..models.preprocessing import read_processor
from .arguments import DataArguments

# Raise this number with every change that makes other training pixels from the same image, seed and arguments: in
# decoding.py, image_datasets.py, sampler.py, seeding.py, collator.py and this file. Older stores of teacher logits are
# then refused.
PIXELS_VERSION = 3


def train_transform(
    args: DataArguments,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    channel_order: Sequence[int] | None = None,
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """Returns the augmentation of training images, up to normalisation.

    It is torchvision's random crop and flip, then with `auto_augment` timm's RandAugment and with `random_erasing`
    timm's erasing, as in the DeiT recipes. The transform keeps no state and draws only from `random`, numpy and
    torch's CPU generator, which [`~nkd_hf.data.seeding.seeded`] seeds.

    Args:
        args: the augmentation.
        size: height and width of the result, or one integer for both.
        mean: of red, green and blue, for pixels in 0..1.
        std: of red, green and blue, for pixels in 0..1.
        interpolation: `bilinear` or `bicubic`.
        channel_order: the colour of each channel of the result: red (0), green (1) or blue (2). None uses
            `mean.channel_order`, which [`~nkd_hf.models.preprocessing.read_preprocessing`] sets, else red, green and blue.

    Returns:
        A picklable callable: RGB `PIL.Image` -> [3, H, W] float32. It also takes a tensor [3, H, W] uint8, and has a
        true attribute `takes_tensors`. Before RandAugment, the resized crops of image and tensor differ by one step of
        8 bits, rarely two (bicubic: up to three).

    Raises:
        ValueError: `auto_augment` is not in timm's syntax; unknown interpolation.
    """
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation must be bilinear or bicubic, got {interpolation!r}")
    if max(mean) > 1 or min(std) <= 0:
        raise ValueError(
            f"mean and std must be in units of [0, 1], and std above 0, got {list(mean)} and {list(std)}. Divide values of "
            "0 to 255 by 255"
        )
    if channel_order is None:
        channel_order = getattr(mean, "channel_order", (0, 1, 2))
    size = (size, size) if isinstance(size, int) else tuple(size)
    augment = _auto_augment(args.auto_augment, size, mean, interpolation) if args.auto_augment else []
    mode = v2.InterpolationMode(interpolation)
    if args.random_crop_padding is not None:
        crop = v2.Compose([v2.Resize(size, interpolation=mode), v2.RandomCrop(size, padding=args.random_crop_padding)])
    else:
        crop = _RandomResizedCrop(size, tuple(args.random_resized_crop), mode)
    lighting = _Lighting(args.pca_lighting) if args.pca_lighting else None
    erase = RandomErasing(args.random_erasing, mode="pixel", device="cpu") if args.random_erasing else None
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    order = None if tuple(channel_order) == (0, 1, 2) else list(channel_order)
    return _TrainTransform(crop, args.horizontal_flip, augment, lighting, mean, std, order, erase, size)


class TransformColours(NamedTuple):
    """The colours and the size of a transform's result; see [`~nkd_hf.models.preprocessing.Preprocessing`]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: tuple[int, ...]
    size: tuple[int, int]

    def is_near(self, other: Any, field: str) -> bool:
        """Whether a field differs by at most a step of 8 bits from that field of `other`, also a `Preprocessing`."""
        return max(abs(a - b) for a, b in zip(getattr(self, field), getattr(other, field), strict=True)) <= 1 / 255


def read_transform(transform: Any) -> TransformColours | None:
    """Reads the colours of a [`train_transform`] or [`processor_transform`]; None for a transform of another kind."""
    if isinstance(transform, _TrainTransform):
        mean, std = (
            tuple(round(value, 6) for value in values.flatten().tolist()) for values in (transform.mean, transform.std)
        )
        return TransformColours(mean, std, tuple(transform.order or (0, 1, 2)), tuple(transform.size))
    if isinstance(transform, partial) and transform.func is _process:
        try:
            pixels = read_processor(transform.args[0])
        except ValueError:  # Another check refuses a processor that train_transform can't follow.
            return None
        return TransformColours(pixels.mean, pixels.std, pixels.channel_order, pixels.size)
    return None


def _auto_augment(policy: str, size: tuple[int, int], mean: Sequence[float], interpolation: str) -> list[Callable]:
    """Returns timm's steps between crop and normalisation."""
    try:
        with posterize_to_zero_bits():
            _, augment, _ = timm.data.create_transform(
                size,
                is_training=True,
                color_jitter=None,
                auto_augment=policy,
                interpolation=interpolation,
                mean=tuple(mean),  # fills the corners of a rotated image
                separate=True,
            )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"auto_augment={policy!r} is not in timm's syntax ({type(error).__name__}: {reason(error)}): write for example "
            "rand-m9-n2-mstd0.5-inc1"
        ) from error
    return augment.transforms


def posterize_to_zero_bits() -> contextlib.AbstractContextManager:
    """Makes timm's strongest posterize a black image within the `with` block, whatever the version of Pillow.

    timm's posterize keeps 0 bits, which Pillow refuses since version 13, so that training would end at such an image.
    """
    names = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
    return patch.dict(auto_augment.NAME_TO_OP, dict.fromkeys(names, _posterize))


def _posterize(image: PIL.Image.Image, bits_to_keep: int, **kwargs) -> PIL.Image.Image:
    if bits_to_keep == 0:
        return PIL.Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


@dataclass
class _TrainTransform:
    """Crops, flips and normalises with the draws and the values of torchvision's classes, with timm's steps in between.

    torchvision's classes take as long to find their functions as the functions take to run. timm's own crop and
    normalisation of Pillow's images take longer than its RandAugment. The transform also takes [3, H, W] uint8
    tensors.
    """

    crop: Callable
    flip: float
    augment: list[Callable]  # steps on Pillow's images
    lighting: nn.Module | None
    mean: torch.Tensor
    std: torch.Tensor
    order: list[int] | None  # the order of the channels, unless red, green and blue
    erase: RandomErasing | None
    size: tuple[int, int]

    takes_tensors = True

    @property
    def draws_from_torch(self) -> bool:
        return not self.augment and self.erase is None

    def __call__(self, image: PIL.Image.Image | torch.Tensor) -> torch.Tensor:
        image = self.crop(image)
        if torch.rand(1) < self.flip:
            image = F.horizontal_flip(image)
        if self.augment and isinstance(image, torch.Tensor):
            # Merging planes takes a fifth of the time of F.to_pil_image, which joins them pixel by pixel.
            image = PIL.Image.merge("RGB", [PIL.Image.fromarray(plane) for plane in image.numpy()])
        for step in self.augment:
            image = step(image)
        pixels = image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
        if self.lighting is not None:
            pixels = self.lighting(pixels)
        pixels.sub_(self.mean).div_(self.std)
        if self.order is not None:
            pixels = pixels[self.order]
        return pixels if self.erase is None else self.erase(pixels)


@dataclass
class _RandomResizedCrop:
    size: tuple[int, int]
    scale: tuple[float, float]
    interpolation: v2.InterpolationMode

    def __call__(self, image: PIL.Image.Image | torch.Tensor) -> PIL.Image.Image | torch.Tensor:
        if isinstance(image, torch.Tensor):
            box = self._draw_box(*image.shape[1:])
            return F.resized_crop_image(image, *box, self.size, self.interpolation)
        box = self._draw_box(image.height, image.width)
        return F.resized_crop(image, *box, self.size, self.interpolation)

    def _draw_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draws top, left, height and width as torchvision's class does, without its many small tensors."""
        for _ in range(10):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            ratio = torch.empty(1).uniform_(*_LOG_RATIO).exp_().item()
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = torch.randint(height - crop_height + 1, (1,)).item()
                left = torch.randint(width - crop_width + 1, (1,)).item()
                return top, left, crop_height, crop_width
        # The box is the whole image, with its longer side cut if the ratio is beyond the bounds.
        low, high = _RATIO
        crop_height = min(height, round(width / low)) if width / height < low else height
        crop_width = min(width, round(height * high)) if width / height > high else width
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


_RATIO = (3 / 4, 4 / 3)
_LOG_RATIO = torch.tensor(_RATIO).log().tolist()


class _Lighting(torch.nn.Module):
    """Adds the principal axes of ImageNet's colours, each times its eigenvalue times a normal draw (AlexNet, section 4.1).

    Axes and eigenvalues, for RGB in 0..1, come from pycls, which the official RegNetX configuration uses.
    """

    def __init__(self, std: float):
        super().__init__()
        self.std = std
        axes = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
        self.axes = torch.tensor(axes) * torch.tensor([0.2175, 0.0188, 0.0045])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + (self.axes @ (self.std * torch.randn(3)))[:, None, None]


def processor_transform(processor) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """Returns the transform of evaluation, which runs the preprocessing of `pipeline("image-classification")`.

    Args:
        processor: a transformers image processor.

    Returns:
        A picklable callable: RGB `PIL.Image` -> [3, H, W] float32.
    """
    return partial(_process, processor)


def _process(processor, image: PIL.Image.Image) -> torch.Tensor:
    # A processor that neither rescales nor normalises returns uint8.
    return processor(image, return_tensors="pt")["pixel_values"][0].to(torch.float32)
