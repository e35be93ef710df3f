"""Reads a model's preprocessing from the settings of transformers and timm, and checks it on test pictures."""

import functools
import logging
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from timm.layers import PatchEmbed
from torch import nn
from transformers import (
    BaseImageProcessor,
    BitImageProcessor,
    PreTrainedModel,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)
from transformers.image_utils import PILImageResampling

from ..errors import RefusedError, reason
from .loading import comes_with_code, open_image_processor

logger = logging.getLogger(__name__)

RGB = (0, 1, 2)
# Attribute of a student for its image processor, if the image processor differs from the folder's.
IMAGE_PROCESSOR = "_nkd_hf_image_processor"
# Training and the teacher resize by bilinear or bicubic. Other kernels are replaced with the more similar of the two.
_NEAREST_KERNEL = {"lanczos": "bicubic", "lanczos3": "bicubic", "hamming": "bilinear", "box": "bilinear"}
_NEAREST_KERNEL |= {"nearest": "bilinear", "nearest-exact": "bilinear"}
# Each picture has four colours, one in each quarter. The colours span RGB and reach both ends of each channel.
_COLOURS = np.array(
    [
        [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]],
        [[255, 255, 255], [40, 90, 200], [130, 10, 60], [220, 180, 30]],
        [[90, 140, 250], [250, 60, 170], [15, 230, 120], [128, 128, 128]],
    ],
    dtype=np.uint8,
)


class ChannelMeans(tuple):
    """The mean of red, green and blue, with the order of the model's channels.

    [`train_transform`] reads the order from the mean, so that training gets the right channels from size, mean and std
    alone.

    Attributes:
        channel_order (`tuple[int, ...]`): see [`Preprocessing`].
    """

    channel_order: tuple[int, ...] = RGB


class Preprocessing(NamedTuple):
    """The settings that turn pixels in [0, 1] into a model's input.

    Attributes:
        mean ([`ChannelMeans`]): of red, green and blue, in units of [0, 1].
        std (`tuple[float, ...]`): of red, green and blue, in units of [0, 1].
        size (`tuple[int, int]`): height and width in pixels.
        interpolation (`str`): `bilinear` or `bicubic`.
        channel_order (`tuple[int, ...]`): the colour of each channel of the input: red (0), green (1) or blue (2).
    """

    mean: ChannelMeans
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: str
    channel_order: tuple[int, ...] = RGB

    @property
    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
        """The settings that change colours: two models with equal `colours` take the same pixels."""
        return self.mean, self.std, self.channel_order


def read_preprocessing(model: nn.Module, processor: BaseImageProcessor | None = None) -> Preprocessing | None:
    """Reads a model's preprocessing from its image processor, or from timm's `pretrained_cfg`.

    The processor also preprocesses three test pictures. The returned mean, std and order describe the colours of its
    output, whichever of its settings they come from.

    Args:
        model: a `*ForImageClassification`, or a bare timm model.
        processor: the image processor of the model. None means the image processor that `pretrained_cfg` describes, or
            the one in the folder or repo of a native transformers model.

    Returns:
        The preprocessing, or None if it is not known.

    Raises:
        ValueError: training and a teacher can't preprocess as the processor does, or the processor and the model's own
            `pretrained_cfg` contradict each other.

    Example:

    ```python
    >>> from nkd_hf import create_student
    >>> from nkd_hf.models.preprocessing import read_preprocessing
    >>> read_preprocessing(create_student("resnet18", num_labels=10, image_size=32)).size
    (32, 32)

    ```
    """
    config = getattr(model, "config", None)
    # pretrained_cfg is an attribute of the configuration of a transformers model, and of a bare timm model itself.
    in_config = getattr(config, "pretrained_cfg", None)
    pretrained_cfg = in_config or getattr(model, "pretrained_cfg", None)
    # A ProcessorMixin, such as CLIPProcessor, has a part for images. A tokenizer is ignored.
    processor = getattr(processor, "image_processor", processor)
    processor = processor if isinstance(processor, BaseImageProcessor) else None
    if pretrained_cfg and (processor is None or in_config):
        own = _read_timm(model, pretrained_cfg)
        if processor is not None:
            _check_equal(read_processor(processor), own, type(processor).__name__)
        return own
    if processor is None and config is not None and config.name_or_path:
        try:
            processor = open_image_processor(config.name_or_path)
        except RefusedError:
            raise
        except (OSError, ValueError):
            return None
    return None if processor is None else read_processor(processor)


def read_processor(processor: BaseImageProcessor) -> Preprocessing:
    """Reads the preprocessing of an image processor and checks it on test pictures; see [`read_preprocessing`].

    Raises:
        ValueError: the processor does more than resize, crop, reorder channels and normalise each channel.
    """
    name = type(processor).__name__
    if isinstance(processor, TimmWrapperImageProcessor):
        settings = processor.data_config
        exact, stated = (settings["mean"], settings["std"]), tuple(settings["input_size"][1:])
        resample = settings["interpolation"]
    else:
        settings = processor.to_dict()
        exact, stated, resample = _normalisation(settings), _stated_size(settings), _resample(settings)
    with torch.device("cpu"):  # `nkd-hf plan` calls this under the meta device, whose tensors have no colours
        pictures = _run(processor, [_picture(number, (512, 512)).copy() for number in range(len(_COLOURS))])
        mean, std, order = _read_colours(pictures, name)
        size = _read_size(processor, tuple(pictures[0].shape[1:]), stated)
    mean, std = _exact(exact, mean, std)
    mean = ChannelMeans(mean)
    mean.channel_order = order
    return Preprocessing(mean, std, size, kernel(resample, name), order)


def read_crop_pct(processor: BaseImageProcessor) -> float:
    """Measures the part of a square image's side that the output shows: below 1 if the borders are cropped."""
    with torch.device("cpu"):
        ramp = np.broadcast_to((np.arange(512) // 2).astype(np.uint8)[None, :, None], (512, 512, 3))
        [row] = _run(processor, [PIL.Image.fromarray(np.ascontiguousarray(ramp))])
        colours = read_processor(processor)
        first = colours.channel_order.index(0)
        shades = row[first, row.shape[1] // 2].double() * colours.std[0] + colours.mean[0]
        left, right = len(shades) // 4, len(shades) - 1 - len(shades) // 4
        slope = (shades[right] - shades[left]).item() / max(right - left, 1)
    return slope * len(shades) * 255 / 256


def kernel(name: str, of: str) -> str:
    """Returns `bilinear` or `bicubic`, whichever is more similar to an interpolation; warns if they differ."""
    if name in ("bilinear", "bicubic"):
        return name
    if name not in _NEAREST_KERNEL:
        raise ValueError(f"the interpolation of {of} must be bilinear or bicubic, got {name!r}. Set it to one of them")
    near = _NEAREST_KERNEL[name]
    _warn_once(
        f"{of} resizes by {name}, which training's crops and the teacher's pixels can't: they are resized by {near}."
    )
    return near


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def load_image_processor(student: PreTrainedModel) -> BaseImageProcessor:
    """Returns the image processor of a student, which `pipeline("image-classification")` will use.

    Evaluation calls the same processor, so that a user of the student gets the accuracy that was measured.

    Args:
        student: a student of [`create_student`].

    Returns:
        `BaseImageProcessor`: `processor(image, return_tensors="pt")["pixel_values"]` is [1, 3, H, W] float32.

    Raises:
        ValueError: the student was built from a configuration, which has no preprocessing; or its image processor belongs
            to a model that needs more than pixels.
        OSError: the student came from a folder without an image processor.
    """
    if (changed := getattr(student, IMAGE_PROCESSOR, None)) is not None:
        return changed
    if isinstance(student, TimmWrapperForImageClassification):
        with torch.device("cpu"):  # `nkd-hf plan` opens students on the meta device
            return TimmWrapperImageProcessor(student.config.pretrained_cfg, architecture=student.config.architecture)
    if pretrained_cfg := getattr(student.config, "pretrained_cfg", None):
        size = pretrained_cfg["input_size"][-1]
        # BitImageProcessor crops as torchvision does, but rounds half a pixel down, and torchvision to even.
        return BitImageProcessor(
            size={"shortest_edge": round(size / pretrained_cfg["crop_pct"])},
            crop_size={"height": size, "width": size},
            resample=PILImageResampling[pretrained_cfg["interpolation"].upper()],
            image_mean=pretrained_cfg["mean"],
            image_std=pretrained_cfg["std"],
        )
    if not student.name_or_path:
        raise ValueError(
            f"student must come from a folder or the Hub, got a {type(student).__name__} that was built here, whose "
            "preprocessing is not known. Save the model and its image processor into a folder (save_pretrained of both), and "
            "open the folder"
        )
    return open_image_processor(student.name_or_path, trust_remote_code=comes_with_code(student))


# Preprocessing by the text of a `pretrained_cfg`: a run reads the same `pretrained_cfg` dozens of times, each with
# four test pictures.
_read_before: dict[str, Preprocessing] = {}


def _read_timm(model: nn.Module, pretrained_cfg: Any) -> Preprocessing:
    with torch.device("cpu"):
        try:
            settings = repr(dict(pretrained_cfg))
            input_size = dict(pretrained_cfg).get("input_size")
            if input_size is not None and next(iter(input_size)) != 3:
                raise ValueError(f"its input_size {list(input_size)} has not 3 channels")
            processor = TimmWrapperImageProcessor(dict(pretrained_cfg))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the pretrained_cfg of {type(model).__name__} describes no preprocessing ({type(error).__name__}: {reason(error)})"
            ) from error
    if settings not in _read_before:
        _read_before[settings] = read_processor(processor)
    own = _read_before[settings]
    patch_embed = getattr(model, "patch_embed", None)
    if isinstance(patch_embed, PatchEmbed) and patch_embed.img_size is not None:
        # In a bare timm model that was built for another size, only patch_embed has that size.
        own = own._replace(size=tuple(patch_embed.img_size))
    return own


def _check_equal(processor: Preprocessing, own: Preprocessing, name: str) -> None:
    for what in ("size", "channel_order", "mean", "std"):
        given, wanted = getattr(processor, what), getattr(own, what)
        if not np.allclose(given, wanted, rtol=1e-5, atol=1e-5):
            raise ValueError(
                f"the image processor ({name}) must preprocess as the pretrained_cfg in the model's config, whose {what} is "
                f"{list(wanted)}, got {list(given)}. Pass load_image_processor(model), or change the config"
            )


def _run(processor: BaseImageProcessor, images: list[PIL.Image.Image]) -> list[torch.Tensor]:
    name, wanted = type(processor).__name__, "the image processor must give `pixel_values` of [3, height, width]"
    pixels = []
    for image in images:
        try:
            pixels.append(processor(image, return_tensors="pt")["pixel_values"][0])
        except Exception as error:  # an image processor may be anybody's code
            raise ValueError(f"{wanted}, but {name} raised {type(error).__name__}: {error}") from error
    if odd := [tuple(each.shape) for each in pixels if each.ndim != 3 or each.shape[0] != 3]:
        raise ValueError(
            f"{wanted}, but those of {name} are {list(odd[0])}. Models of such an input can't be trained here"
        )
    return pixels


@functools.lru_cache(maxsize=16)
def _picture(number: int, size: tuple[int, int]) -> PIL.Image.Image:
    """Makes a picture of four flat quarters, in the colours of this number."""
    height, width = size
    quarters = _COLOURS[number].reshape(2, 2, 3).repeat((height + 1) // 2, axis=0).repeat((width + 1) // 2, axis=1)
    return PIL.Image.fromarray(quarters[:height, :width])


def _read_colours(pictures: list[torch.Tensor], name: str) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Computes the mean, std and order of the channels from the outputs of the pictures of `_COLOURS`."""
    rows = []
    for picture in pictures:
        # One pixel of each quarter is read, too far from the edges to be cropped or blurred.
        (top, bottom), (left, right) = ((length // 6, length - 1 - length // 6) for length in picture.shape[1:])
        rows += [picture[:, y, x].double().numpy() for y in (top, bottom) for x in (left, right)]
    colours = np.column_stack([_COLOURS.reshape(-1, 3) / 255, np.ones(len(rows))])
    seen = np.stack(rows)
    if not np.isfinite(seen).all():
        raise ValueError(f"{name} gives pixels that are not finite. Set its image_std above 0")
    weights, *_ = np.linalg.lstsq(colours, seen, rcond=None)
    factors, offsets = weights[:3].T, weights[3]
    # One step of 8 bits.
    step = np.abs(factors).max() / 255
    if step == 0 or np.abs(colours @ weights - seen).max() > 1.01 * step:
        raise ValueError(
            f"{name} does more to colours than to shift and scale each channel (or flips, turns or pads the picture): "
            "training and a teacher can't do the same. Take another image processor"
        )
    order = np.abs(factors).argmax(axis=1)
    own = np.abs(factors[RGB, order])
    if (np.abs(factors).sum(axis=1) - own > step).any() or sorted(order) != list(RGB):
        raise ValueError(
            f"{name} mixes colour channels (as grayscale does): training and a teacher can't do the same. Take another "
            "image processor"
        )
    std, mean = np.empty(3), np.empty(3)
    std[order] = 1 / factors[RGB, order]
    mean[order] = -offsets / factors[RGB, order]
    if mean.max() > 1.5:
        raise ValueError(
            f"{name} subtracts a mean of {mean.round(1).tolist()} from pixels in [0, 1], which makes all images alike. "
            "Divide image_mean and image_std by 255, or set do_rescale to false"
        )
    return mean, std, tuple(map(int, order))


def _read_size(processor: BaseImageProcessor, square: tuple[int, int], stated: tuple[int, int] | None):
    """Returns height and width of the processor's output."""
    [wide] = _run(processor, [_picture(0, (384, 640)).copy()])
    if tuple(wide.shape[1:]) == square:
        return square
    name = type(processor).__name__
    if stated is not None:
        [kept] = _run(processor, [_picture(0, stated).copy()])
        if tuple(kept.shape[1:]) == stated:
            _warn_once(
                f"{name} does not make all images {stated[0]} x {stated[1]}: evaluation needs images of that shape, as "
                "training makes them. Set do_resize, and size to a height and a width."
            )
            return stated
    raise ValueError(
        f"the size of {name} must be a height and a width, or a shortest edge before do_center_crop: its images are "
        f"{square[0]} x {square[1]} for a square and {wide.shape[1]} x {wide.shape[2]} for another. Set do_resize and size"
    )


def _exact(
    settings: tuple[Any, Any] | None, mean: np.ndarray, std: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and std of the settings if they agree with the measured ones, else the measured ones."""
    if settings is not None:
        try:
            stated = [np.broadcast_to(np.asarray(values, dtype=np.float64), 3) for values in settings]
        except (TypeError, ValueError):
            stated = None
        if stated is not None and np.allclose(stated, [mean, std], rtol=1e-5, atol=1e-6):
            return tuple(map(float, stated[0])), tuple(map(float, stated[1]))
    return tuple(round(float(value), 6) + 0.0 for value in mean), tuple(float(f"{value:.6g}") for value in std)


def _normalisation(settings: dict[str, Any]) -> tuple[Any, Any] | None:
    try:
        # Mean and std in units of [0, 1]: pixels that are not rescaled are 255 times larger.
        unit = 1 / (255 * (settings["rescale_factor"] if settings.get("do_rescale", True) else 1.0))
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if settings.get("do_normalize", True):
            mean, std = settings["image_mean"], settings["image_std"]
        return tuple(value * unit for value in mean), tuple(value * unit for value in std)
    except (KeyError, TypeError):
        return None


def _stated_size(settings: dict[str, Any]) -> tuple[int, int] | None:
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if isinstance(size, int):
        return size, size
    size = dict(size or {})
    side = size.get("shortest_edge")
    height, width = size.get("height", side), size.get("width", side)
    return None if height is None or width is None else (int(height), int(width))


def _resample(settings: dict[str, Any]) -> str:
    resample = settings.get("resample")
    resample = PILImageResampling.BILINEAR if resample is None else resample
    try:
        return PILImageResampling(int(resample)).name.lower()
    except ValueError:
        return str(getattr(resample, "value", resample)).lower()
