"""What a model expects of its pixels, read from the places where transformers and timm keep it."""

from typing import NamedTuple

from timm.data import resolve_data_config
from timm.layers import PatchEmbed
from torch import nn
from transformers import AutoImageProcessor, BaseImageProcessor


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
    """Reads a model's preprocessing from timm's `pretrained_cfg`, or else from its image processor.

    Args:
        model: a `*ForImageClassification`, or a bare timm model.
        processor: the transformers image processor that belongs to a native transformers model. None looks where the
            model came from.

    Returns:
        The preprocessing, or None when nothing tells it.
    """
    config = getattr(model, "config", None)
    # In the configuration of transformers' models; a bare timm model has it itself.
    pretrained_cfg = getattr(config, "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None)
    if pretrained_cfg:
        data_config = resolve_data_config(dict(pretrained_cfg), verbose=False)
        size = data_config["input_size"][1:]
        if isinstance(getattr(model, "patch_embed", None), PatchEmbed):
            # A bare timm model that was built for another size says so here alone.
            size = model.patch_embed.img_size
        return Preprocessing(
            tuple(data_config["mean"]),
            tuple(data_config["std"]),
            tuple(size),
            data_config["interpolation"],
        )
    if processor is None and config is not None and config.name_or_path:
        try:
            processor = AutoImageProcessor.from_pretrained(config.name_or_path, trust_remote_code=False)
        except (OSError, ValueError):
            return None
    return None if processor is None else _read_processor(processor)


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
