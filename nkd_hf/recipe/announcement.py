"""Describes a run in a dozen lines, after its data and models are opened and before the first training."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import PreTrainedModel

from ..errors import redact
from ..export.runtime import describe_missing_extra
from ..models.architectures import is_architecture, with_start
from ..models.preprocessing import load_image_processor, read_preprocessing
from ..models.students import describe_start
from ..models.teacher import Teacher
from ..models.zero_shot import ZeroShotClassifier
from .build import runs_teacher
from .class_sizes import are_unequal, count_images
from .report import describe_size
from .teacher_start import teacher_changes
from .unlabeled import describe_unlabeled

if TYPE_CHECKING:
    from .recipe import Recipe


def describe_run(run: "Recipe", inherited: Sequence[str] = ()) -> list[str]:
    """Describes a run: data, models, and the settings of its trainings.

    Args:
        run: a run whose data and teacher are open.
        inherited: the settings of the student's preprocessing that come from the teacher.

    Returns:
        One line for each fact, `name  text`.
    """
    training, recipe = run.training_args, run.args
    lines = {"data": redact(run.data_args.dataset_name)}
    for name, split in run.data.items():
        lines[name] = _describe_split(split, list(run.id2label.values()))
    if unlabeled := describe_unlabeled(run.data_args):
        lines["without labels"] = unlabeled
    if runs_teacher(recipe):
        lines |= _describe_teachers(run)
    elif recipe.teacher_logits is not None:
        lines["teacher"] = f"does not run: its logits come from {redact(recipe.teacher_logits)}"
        if run.teacher_logits.info.cycle is not None:
            lines["teacher"] += f", whose {run.teacher_logits.info.cycle} epochs of augmentation are repeated"
    student = run.create(recipe.student, recipe.student_args)
    lines["student"] = f"{redact(recipe.student)}: {describe_model(student)}, {describe_start(student)}"
    if inherited:
        lines["student"] += f"; the teacher's {', '.join(inherited)}"
    labels = "without labels" if run.data_args.trains_without_labels else "with the labels"
    lines["loss"] = "the labels" if recipe.distillation_loss == "none" else f"{recipe.distillation_loss}, {labels}"
    for name in run.stages:
        changes = teacher_changes(recipe, run.data_args, training) if name == "teacher" else {}
        lines[f"training of the {name}"] = _describe_training(run, changes)
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "float32"
    lines["machine"] = f"{training.world_size} x {training.device.type}, {precision}"
    missing = describe_missing_extra()
    lines["export"] = "ONNX and int8" if missing is None else f"no ONNX: {missing}"
    lines["output"] = str(run.folder)
    width = max(map(len, lines))
    return [f"{name:<{width}}  {text}" for name, text in lines.items()]


def describe_model(model: PreTrainedModel) -> str:
    """Describes a model's size and input."""
    pixels = read_preprocessing(model, load_image_processor(model))
    return f"{describe_size(model)} parameters, {pixels.size[0]} x {pixels.size[1]} pixels"


def _describe_split(split: Dataset, names: list[str]) -> str:
    if not isinstance(split, Dataset):
        return f"a stream, {len(names)} classes"
    if "label" not in split.column_names:
        return f"{len(split)} images without labels"
    counts = count_images(split, len(names))
    text = f"{len(split)} images, {len(names)} classes"
    present = counts[counts > 0]
    if len(present) < len(names):
        missing = [name for name, count in zip(names, counts, strict=True) if count == 0]
        text += f", {len(missing)} without an image ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''})"
    if are_unequal(counts):
        text += f", imbalanced: {present.min()} to {present.max()} images a class"
    return text


def _describe_teachers(run: "Recipe") -> dict[str, str]:
    names, teacher = run.args.teachers, run.teacher
    if len(names) == 1:
        return {"teacher": _describe_teacher(run)}
    lines = {"teacher": f"the mean of {len(names)} teachers' probabilities"}
    for number, (name, member, weight) in enumerate(zip(names, teacher.members, teacher.weights, strict=True), 1):
        lines[f"teacher {number}"] = f"{_describe_pretrained(name, member.model, run)}, weight {weight:.3g}"
    return lines


def _describe_teacher(run: "Recipe") -> str:
    recipe, teacher = run.args, run.teacher
    if run.trains_teacher:
        model = run.create_teacher()
        start = describe_start(model)
        text = f"{redact(recipe.teacher)}: {describe_model(model)}, {start}, trained first"
        if is_architecture(recipe.teacher) and recipe.teacher_init is None:
            with contextlib.suppress(ValueError):
                text += f" (pretrained: {with_start(recipe.teacher, 'pretrained')})"
        return text
    return _describe_pretrained(recipe.teacher, teacher.model if isinstance(teacher, Teacher) else teacher, run)


def _describe_pretrained(name: str, teacher: PreTrainedModel, run: "Recipe") -> str:
    classes = teacher.config.num_labels
    if isinstance(teacher, ZeroShotClassifier):
        prompts = run.args.teacher_prompts
        used = f"by {prompts[0]!r}" if len(prompts) == 1 else f"by {len(prompts)} prompts"
        return f"{redact(name)}: {describe_model(teacher)}, pretrained, used zero-shot {used}"
    used = f"{len(run.id2label)} of its {classes} classes by name" if classes > len(run.id2label) else "as it is"
    return f"{redact(name)}: {describe_model(teacher)}, pretrained, used {used}"


def _describe_training(run: "Recipe", changes: dict) -> str:
    training = run.training_args
    max_steps = changes.get("max_steps", training.max_steps)
    epochs = changes.get("num_train_epochs", training.num_train_epochs)
    rate = changes.get("learning_rate", training.scaled_learning_rate(training.global_batch_size()))
    length = f"{max_steps} steps"
    if max_steps <= 0:
        per_epoch = -(-len(run.data["train"]) // training.global_batch_size())
        steps = round(epochs * per_epoch)
        length = f"{epochs:g} epochs, {steps} steps"
    patience = run.args.early_stopping_patience
    # With `time_budget`, there may be fewer epochs than the patience.
    can_stop = patience is not None and (max_steps > 0 or patience < epochs)
    stop = f", ends after {patience} evaluations without a gain" if can_stop else ""
    batch = training.global_batch_size()
    schedule = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    optimizer = getattr(training.optim, "value", training.optim)
    return f"{length} of {batch} images, {optimizer}, learning rate {rate:g} ({schedule}){stop}"
