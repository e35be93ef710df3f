"""Compares a distilled student with its baseline and its teacher, in words and a few numbers."""

from collections.abc import Callable, Mapping
from typing import Any

from .html_elements import compare, file_size, milliseconds, percent, points


def verdict(
    models: Mapping[str, Any],
    gain: tuple[float, float] | None,
    images: int,
    int8_fault: str | None = None,
    onnx_fault: str | None = None,
    only_answer: str | None = None,
) -> tuple[str, str]:
    """Sums up a run.

    Args:
        models: figures by model; see [`nkd_hf.recipe.html_report.read_models`].
        gain: the student's accuracy less the baseline's, and half of its 95% interval, as fractions, or None.
        images: number of images.
        int8_fault: the reason for a missing int8 version, if it was tried.
        onnx_fault: the reason for a missing ONNX version, if it was tried.
        only_answer: the class that the student predicts for every image, if it is always the same class.

    Returns:
        A headline and a paragraph.
    """
    student, teacher = models["student"], models.get("teacher")
    counted = f"{images:,} held-out image{'' if images == 1 else 's'}"
    text = f"The student recognises {percent(student['top1'])} of {counted}."
    if gain is not None:
        text += f" {_against_baseline(gain)}"
    if teacher is not None:
        text += f" {_against_teacher(student, teacher)}"
    if "student_int8" in models:
        text += f" {_int8(models['student_int8'])}"
    elif int8_fault is not None:
        text += f" It has no int8 version: {int8_fault}."
    elif onnx_fault is not None:
        text += f" It has no ONNX version: {onnx_fault}."
    if only_answer is not None:
        text += f" Every answer is {only_answer}: train it longer, or with another learning rate."
        return "The student has learned nothing: its answer is the same for every image.", text
    return _headline(student, teacher, gain), text


def _headline(student: Mapping[str, Any], teacher: Mapping[str, Any] | None, gain: tuple[float, float] | None) -> str:
    if gain is not None and abs(gain[0]) <= gain[1]:
        return "Distillation made no clear difference to the student's accuracy."
    if gain is not None:
        change = "raised" if gain[0] > 0 else "lowered"
        return f"Distillation {change} the student's accuracy by {_distance(gain[0])}."
    if teacher is not None:
        lead = round(student["top1"] - teacher["top1"], 4)
        side = "as accurate as" if lead == 0 else f"{_distance(lead)} {'above' if lead > 0 else 'below'}"
        return f"The student is {side} its teacher."
    return f"The student recognises {percent(student['top1'], 1)} of the images."


def _against_baseline(gain: tuple[float, float]) -> str:
    difference, margin = gain
    interval = f"95% interval {points(difference - margin)} to {points(difference + margin)}"
    if difference == 0:
        return "The same network, trained without distillation, recognises as many."
    compared = f"{_distance(difference)} {'more' if difference > 0 else 'fewer'} than the same network trained without distillation"
    if abs(difference) <= margin:
        return f"It recognises {compared}, and chance can explain such a difference ({interval})."
    return f"It recognises {compared}, which is more than chance explains ({interval})."


def _against_teacher(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    lead = round(student["top1"] - teacher["top1"], 4)
    side = "as accurate as" if lead == 0 else f"{_distance(lead)} {'above' if lead > 0 else 'below'}"
    parts = [f"It is {side} its teacher"]
    for name, more, less in (("size_bytes", "larger", "smaller"), ("p50", "slower", "faster")):
        if name in student and name in teacher:
            parts.append(compare(student[name], teacher[name], more, less))
    *first, last = [part for part in parts if part is not None]
    return f"{', '.join(first)} and {last}." if first else f"{last}."


def _int8(model: Mapping[str, Any]) -> str:
    text = f"In int8, it recognises {percent(model['top1'])}"
    if "size_bytes" in model:
        text += f" with {file_size(model['size_bytes'])}"
    if "p50" in model:
        text += f" in {milliseconds(model['p50'])} an image"
    return f"{text}."


def _distance(difference: float) -> str:
    size = abs(100 * difference)
    text = f"{size:.1f}" if size >= 0.1 else f"{size:.2f}"
    return f"{text} point{'' if text == '1.0' else 's'}"


def facts(
    models: Mapping[str, Any], gain: tuple[float, float] | None, agreement: float | None
) -> list[tuple[str, str]]:
    """Returns the numbers at the top of the page, each with its explanation.

    Args:
        models: figures by model; see [`nkd_hf.recipe.html_report.read_models`].
        gain: as for [`verdict`].
        agreement: the fraction of images for which student and teacher predict the same class.
    """
    student, teacher = models["student"], models.get("teacher")
    found = [(percent(student["top1"], 1), "top-1 accuracy of the student")]
    if gain is not None:
        found.append((points(gain[0]), f"points against the baseline (± {100 * gain[1]:.1f})"))
    if teacher is not None:
        found.append((points(student["top1"] - teacher["top1"]), "points against the teacher"))
    if agreement is not None:
        found.append((percent(agreement, 1), "of its answers are the teacher's"))
    if "size_bytes" in student:
        note = _compare_models(models, "size_bytes", "larger", "smaller", file_size)
        found.append((file_size(student["size_bytes"]), f"on disk{note}"))
    if "p50" in student:
        note = _compare_models(models, "p50", "slower", "faster", milliseconds)
        found.append((milliseconds(student["p50"]), f"an image{note}"))
    return found


def _compare_models(models: Mapping[str, Any], name: str, more: str, less: str, write: Callable[[float], str]) -> str:
    text = ""
    if name in models.get("teacher", {}):
        compared = compare(models["student"][name], models["teacher"][name], more, less)
        text += f", {compared} than the teacher" if compared else ", like the teacher"
    if name in models.get("student_int8", {}):
        text += f"; {write(models['student_int8'][name])} in int8"
    return text
