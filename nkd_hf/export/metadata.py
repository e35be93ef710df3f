"""Describes a student's classes and preprocessing for users of its ONNX file."""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedModel, TimmWrapperImageProcessor
from transformers.image_utils import PILImageResampling

from ..files import write_whole
from ..models.preprocessing import load_image_processor, read_crop_pct, read_processor
from ..models.saving import read_class_names


def read_metadata(model: PreTrainedModel) -> dict[str, str]:
    """Returns the metadata of a model's ONNX file.

    Args:
        model: a `*ForImageClassification` with known preprocessing.

    Returns:
        `dict`: `id2label` and `preprocessing` as JSON, and `nkd_hf_version`. The preprocessing is `size` (height and width in
        pixels), `mean` and `std` (of red, green and blue, in units of [0, 1]), `interpolation`, `crop_pct` (the part of
        the resized short side that the central crop shows) and `channel_order` (`RGB` or `BGR`).

    Raises:
        ValueError: the preprocessing or the names of the classes are not known.
        OSError: the model came from a folder without an image processor.
    """
    processor = load_image_processor(model)
    pixels = read_processor(processor)
    preprocessing = {
        "size": list(pixels.size),
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "interpolation": pixels.interpolation,
        "crop_pct": _read_crop_pct(processor),
        "channel_order": "".join("RGB"[channel] for channel in pixels.channel_order),
    }
    return {
        "id2label": json.dumps(read_class_names(model)),
        "preprocessing": json.dumps(preprocessing),
        "nkd_hf_version": version("nkd_hf"),
    }


def save_preprocessing(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model's `preprocessor_config.json` into its folder, from which users of ONNX files on the Hub read it.

    transformers still reads the preprocessing of timm's models from `config.json`.
    """
    processor = load_image_processor(model)
    if not isinstance(processor, TimmWrapperImageProcessor):
        processor.save_pretrained(folder)
        return
    content = json.dumps(_describe_timm(processor), indent=2) + "\n"
    write_whole(folder / "preprocessor_config.json", content)


def _describe_timm(processor: TimmWrapperImageProcessor) -> dict[str, Any]:
    """Returns the settings as other processors have them. TimmWrapperImageProcessor.save_pretrained writes none."""
    settings = processor.data_config
    height, width = settings["input_size"][1:]
    scaled = [math.floor(side / settings["crop_pct"]) for side in (height, width)]
    keeps_ratio = settings["crop_mode"] == "center" and height == width
    return {
        "image_processor_type": type(processor).__name__,
        "do_resize": True,
        "size": {"shortest_edge": scaled[0]} if keeps_ratio else {"height": scaled[0], "width": scaled[1]},
        "resample": int(PILImageResampling[settings["interpolation"].upper()]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
    }


def _read_crop_pct(processor: BaseImageProcessor) -> float:
    if isinstance(processor, TimmWrapperImageProcessor):
        return processor.data_config["crop_pct"]
    return round(read_crop_pct(processor), 3)
