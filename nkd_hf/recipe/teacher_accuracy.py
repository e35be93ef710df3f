"""Measures a teacher on the pixels of its own preprocessing and on the student's, and names what makes the two differ."""

from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, EvalPrediction

from ..data.transforms import processor_transform
from ..metrics import compute_metrics, top5_indices
from ..models.preprocessing import read_processor
from ..models.teacher import Teacher

# The key in `results.json` of the teacher's accuracy on the pixels that it is distilled on.
ON_STUDENT_PIXELS = "teacher_on_student_pixels"
# Normalised pixels that differ by less have the same source: one step of 8 bits is 0.02, by rounding in the resizing.
_TOLERANCE = 0.1


def teacher_metrics(
    teacher: Teacher, loader: DataLoader, accelerator: Accelerator, disable_tqdm: bool = False
) -> dict[str, float]:
    """Measures a teacher on the images of a loader, each counted once over all processes.

    Args:
        teacher: aligned to the loader's pixels and labels, on the loader's device.
        loader: one that `accelerator` has prepared, with batches of `pixel_values` and `labels`.
        accelerator: gathers the predictions of all processes.
        disable_tqdm: whether to show no progress.

    Returns:
        `dict`: `accuracy` and `top5_accuracy`, fractions.
    """
    predictions, labels = [], []
    silent = disable_tqdm or not accelerator.is_local_main_process
    for batch in tqdm(loader, desc="Evaluating the teacher", disable=silent):
        answer = top5_indices(teacher(batch["pixel_values"]))
        answer, label = accelerator.gather_for_metrics((answer, batch["labels"]))
        predictions.append(answer.cpu())
        labels.append(label.cpu())
    return compute_metrics(EvalPrediction(torch.cat(predictions).numpy(), torch.cat(labels).numpy()))


def has_same_pixels(teacher: Teacher, own: BaseImageProcessor, student: BaseImageProcessor) -> bool:
    """Whether a teacher sees one picture through the student's preprocessing as through its own.

    Args:
        teacher: aligned to the student's pixels.
        own: the teacher's image processor.
        student: the student's image processor.
    """
    # Neither square nor smooth, so that another crop, size or interpolation shows.
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise).resize((320, 240), PIL.Image.Resampling.NEAREST)
    seen: list[torch.Tensor] = []
    hook = teacher.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].float().cpu()))
    try:
        device = next(teacher.parameters()).device
        teacher(processor_transform(student)(picture)[None].to(device))
    finally:
        hook.remove()
    wanted = processor_transform(own)(picture)
    return seen[0][0].shape == wanted.shape and (seen[0][0] - wanted).abs().max().item() < _TOLERANCE


def differences(teacher: BaseImageProcessor, student: BaseImageProcessor) -> list[str]:
    """Names the settings of evaluation in which two image processors differ, but for the normalisation."""
    settings = [_geometry(processor) for processor in (teacher, student)]
    return [
        f"{name} is {settings[1][name]} for the student and {settings[0][name]} for the teacher"
        for name in settings[0]
        if settings[0][name] != settings[1][name]
    ]


def _geometry(processor: BaseImageProcessor) -> dict[str, Any]:
    pixels, settings = read_processor(processor), processor.to_dict()
    height, width = pixels.size
    if data_config := settings.get("data_config"):
        crop = data_config.get("crop_pct")
    else:
        short = (settings.get("size") or {}).get("shortest_edge") if settings.get("do_center_crop") else None
        crop = settings.get("crop_pct") or (min(height, width) / short if short else 1.0)
    return {
        "image_size": height if height == width else f"{height} x {width}",
        "crop_pct": None if crop is None else round(crop, 3),
        "interpolation": pixels.interpolation,
    }
