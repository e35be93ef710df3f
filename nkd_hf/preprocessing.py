"""What a model expects of its pixels, read from the places where transformers and timm keep it."""

from typing import NamedTuple

from torch import nn
from transformers import BaseImageProcessor
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig


class Preprocessing(NamedTuple):
    """How pixels in [0, 1] become a model's input.

    Attributes:
        mean (`tuple[float, ...]`): per channel, in units of [0, 1].
        std (`tuple[float, ...]`): per channel, in units of [0, 1].
        size (`tuple[int, int]`): height and width in pixels.
        interpolation (`str`): `bilinear` or `bicubic`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    interpolation: str


def read_preprocessing(model: nn.Module, processor: BaseImageProcessor | None = None) -> Preprocessing | None:
    """Reads a model's preprocessing from its timm configuration, or else from its image processor.

    Args:
        model: a `*ForImageClassification`, or a bare timm model.
        processor: the transformers image processor that belongs to a native transformers model.

    Returns:
        The preprocessing, or None when neither the model nor the processor tells it.
    """
    config = getattr(model, "config", None)
    if isinstance(config, TimmWrapperConfig):
        pretrained_cfg = getattr(config, "pretrained_cfg", None)
    else:
        pretrained_cfg = getattr(model, "pretrained_cfg", None)
    if pretrained_cfg:
        from timm.data import resolve_data_config

        data_config = resolve_data_config(dict(pretrained_cfg), verbose=False)
        return Preprocessing(
            tuple(data_config["mean"]),
            tuple(data_config["std"]),
            tuple(data_config["input_size"][1:]),
            data_config["interpolation"],
        )
    if processor is None:
        return None
    return _read_processor(processor)


def _read_processor(processor: BaseImageProcessor) -> Preprocessing:
    settings = processor.to_dict()
    size = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    side = size.get("shortest_edge")
    height, width = size.get("height", side), size.get("width", side)
    # Unscaled pixels are 255 times larger, so mean and std shrink by as much to mean the same.
    scale = settings["rescale_factor"] if settings.get("do_rescale", True) else 1.0
    unit = 1 / (255 * scale)
    mean = settings["image_mean"] if settings.get("do_normalize", True) else (0.0, 0.0, 0.0)
    std = settings["image_std"] if settings.get("do_normalize", True) else (1.0, 1.0, 1.0)
    # PIL's codes: 2 is bilinear, 3 is bicubic.
    interpolation = "bicubic" if int(settings.get("resample", 2)) == 3 else "bilinear"
    return Preprocessing(
        tuple(value * unit for value in mean), tuple(value * unit for value in std), (height, width), interpolation
    )
