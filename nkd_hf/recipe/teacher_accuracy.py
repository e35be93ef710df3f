"""Measures a teacher with its own preprocessing and on the student's pixels, and names the settings that differ."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from ..data.transforms import processor_transform
from ..metrics import compute_metrics, top5_indices
from ..models.preprocessing import Preprocessing, load_image_processor, read_preprocessing, read_processor
from ..models.teacher import Teacher
from ..models.zero_shot import ZeroShotClassifier
from ..trainer.arguments import DistillationTrainingArguments
from .report import ON_STUDENT_PIXELS, say

logger = logging.getLogger(__name__)

# Two preprocessings whose normalised pixels differ by less are the same: rounding in the resizing is a step of 8 bits,
# 0.02.
_TOLERANCE = 0.1
# A larger difference between the teacher's two accuracies, as fractions, is a warning.
_MOST_LOST = 0.01


def measure_teacher(
    teacher: Teacher,
    student: PreTrainedModel,
    evaluate: Callable[..., dict[str, float]],
    training: DistillationTrainingArguments,
    own: dict[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Measures a teacher with its own preprocessing and, where the student's pixels differ, on the student's pixels.

    Args:
        teacher: the teacher; it is copied and not changed.
        student: the student, with the pixels and classes of the training.
        evaluate: returns the accuracies of a teacher on images that one processor has prepared, or one processor for
            each member.
        training: sets the precision and memory layout of the teacher.
        own: the accuracies with the teacher's own preprocessing, if they are known.

    Returns:
        The accuracies by their keys in `results.json`: `teacher`, and `teacher_on_student_pixels` if pixels differ.
    """
    own_processors = [load_image_processor(member.model) for member in teacher.members]
    given = load_image_processor(student)
    prepared = _prepare(teacher, read_preprocessing(student, given), student, training)
    pairs = zip(prepared.members, own_processors, strict=True)
    if all(has_same_pixels(member, own_processor, given) for member, own_processor in pairs):
        return {"teacher": own or evaluate(prepared, given)}
    on_student_pixels = evaluate(prepared, given)
    if own is None:
        prepared = _prepare(teacher, None, student, training)
        own = evaluate(prepared, *own_processors)
    return {"teacher": own, ON_STUDENT_PIXELS: on_student_pixels}


def _prepare(
    teacher: Teacher, pixels: Preprocessing | None, student: PreTrainedModel, training: DistillationTrainingArguments
) -> Teacher:
    """Copies the teacher, and prepares the copy as in training for `pixels`, or each member for its own pixels."""
    copy = teacher.copy()
    for member in copy.members:
        member.align(pixels or member.preprocessing, student.config.id2label)
    copy = copy.for_inference(training.teacher_dtype, channels_last=training.teacher_channels_last)
    return copy.to(training.device)


def evaluate_teacher(
    teacher: Teacher, loaders: Sequence[DataLoader], accelerator: Accelerator, shows_bar: bool = False
) -> dict[str, float]:
    """Evaluates a teacher on the images of a loader, each counted once over all processes.

    Args:
        teacher: aligned to the loaders' pixels and labels, on their device.
        loaders: one, or one for each member of the teacher with the same images. `accelerator` has prepared them, with
            batches of `pixel_values` and `labels`.
        accelerator: gathers the predictions of all processes.
        shows_bar: whether to show the progress.

    Returns:
        `dict`: `accuracy` and `top5_accuracy`, fractions.
    """
    predictions, labels = [], []
    silent = not (shows_bar and accelerator.is_main_process)
    first = tqdm(loaders[0], desc="Evaluating the teacher", leave=False, disable=silent)
    # strict exhausts each loader: accelerate keeps references to loaders that are not exhausted.
    for batches in zip(first, *loaders[1:], strict=True):
        answer = top5_indices(teacher(*(batch["pixel_values"] for batch in batches)))
        answer, label = accelerator.gather_for_metrics((answer, batches[0]["labels"]))
        predictions.append(answer.cpu())
        labels.append(label.cpu())
    return compute_metrics(EvalPrediction(torch.cat(predictions).numpy(), torch.cat(labels).numpy()))


def say_teacher_accuracy(
    accuracies: dict[str, dict[str, float]],
    teacher: Teacher,
    student: PreTrainedModel,
    training: DistillationTrainingArguments,
) -> None:
    """Prints the accuracies of [`measure_teacher`], and warns of a teacher from which a student learns little."""
    num_classes, is_first = student.config.num_labels, training.process_index == 0
    own = accuracies["teacher"]["accuracy"]
    given = accuracies.get(ON_STUDENT_PIXELS, accuracies["teacher"])["accuracy"]
    if given <= 1.5 / num_classes and is_first:
        if any(isinstance(member.model, ZeroShotClassifier) for member in teacher.members):
            advice = "Set other teacher_prompts, or name another teacher."
        else:
            advice = "Train it for longer or at another learning_rate, or name a pretrained teacher."
        logger.warning(
            "The teacher's top-1 is %.2f %%, where guessing gives %.2f %%: a student learns nothing good from it. %s",
            100 * given,
            100 / num_classes,
            advice,
        )
    if ON_STUDENT_PIXELS not in accuracies:
        say(training, f"The teacher's top-1: {own:.2%}, with the same pixels as the student")
        return
    say(
        training,
        f"The teacher's top-1: {own:.2%} with its own preprocessing, {given:.2%} on the student's pixels, which "
        "distillation uses",
    )
    if abs(own - given) > _MOST_LOST and is_first:
        processor = load_image_processor(student)
        differences = dict.fromkeys(
            difference
            for member in teacher.members
            for difference in describe_differences(load_image_processor(member.model), processor)
        )
        logger.warning(
            "The teacher's top-1 is %.2f %% on the student's pixels and %.2f %% with its own preprocessing: %s. Set "
            "the teacher's values for the student, too, and the teacher keeps the accuracy of its own preprocessing.",
            100 * given,
            100 * own,
            ", ".join(differences) or "their image processors differ",
        )


def has_same_pixels(teacher: Teacher, own: BaseImageProcessor, student: BaseImageProcessor) -> bool:
    """Whether the student's preprocessing and the teacher's own make the same pixels of a picture.

    Args:
        teacher: aligned to the student's pixels.
        own: the teacher's image processor.
        student: the student's image processor.
    """
    # The picture is neither square nor smooth, so that another crop, size or interpolation changes the pixels.
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


def describe_differences(teacher: BaseImageProcessor, student: BaseImageProcessor) -> list[str]:
    """Describes the settings of evaluation in which two image processors differ, without the normalisation."""
    settings = [read_geometry(processor) for processor in (teacher, student)]
    return [
        f"{name} is {settings[1][name]} for the student and {settings[0][name]} for the teacher"
        for name in settings[0]
        if settings[0][name] != settings[1][name]
    ]


def read_geometry(processor: BaseImageProcessor) -> dict[str, Any]:
    """Reads the settings of evaluation that decide which pixels a model sees: `image_size`, `crop_pct`, `interpolation`."""
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
