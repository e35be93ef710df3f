"""Opens the shapes of student and teacher without a network, on torch's meta device."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from ..data.arguments import DataArguments
from ..errors import reason
from ..files import path_fault
from ..models.architectures import is_architecture
from ..models.build_limit import build_limit
from ..models.loading import open_image_processor
from ..models.meta_device import OnlyShapes
from ..models.model_config import is_timm_config, read_config
from ..models.preprocessing import Preprocessing, load_image_processor, read_preprocessing
from ..models.student_preprocessing import change_preprocessing
from ..models.zero_shot import ZeroShotClassifier, is_zero_shot
from ..teacher_logits.info import STORE, StoreInfo
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.distillation_model import DistillationModel
from .arguments import RecipeArguments
from .loss_shapes import loss_shapes


@dataclass
class PlannedModels:
    """The models of a run on the meta device."""

    trained: DistillationModel  # the student with its losses
    pixels: Preprocessing  # the student's
    teachers: list[tuple[nn.Module | None, Preprocessing | None]]  # see open_teachers
    teacher: nn.Module | None  # the teacher if there is one alone, and it is known


def open_models(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments, notes: list[str]
) -> PlannedModels:
    """Opens student and teachers, and builds the losses on their shapes.

    Raises:
        ValueError: as [`open_student`]; or a loss reads layers of a teacher that is not on this machine.
    """
    with torch.device("meta"), OnlyShapes():
        student, pixels = open_student(recipe, data)
        teachers = open_teachers(recipe, data, student, pixels, notes)
        # Only a loss with one teacher reads its layers.
        teacher, teacher_pixels = teachers[0] if len(teachers) == 1 else (None, None)
        if recipe.needs_teacher_layers and teacher is None:
            raise ValueError(f"{recipe.distillation_loss}'s parameters depend on the teacher: {notes[-1]}")
        size = teacher_pixels and teacher_pixels.size
        shapes = loss_shapes(recipe.losses.values(), student, pixels.size, teacher, training.feature_layer, size)
        losses = recipe.build_loss(**shapes) or {}
        losses = losses if isinstance(losses, dict) else {"distillation": losses}
        # The model has no moving average here: count_memory_bytes counts it as a copy of the student.
        trained = DistillationModel(student, losses, training.feature_layer, training.label_smoothing_factor)
    return PlannedModels(trained, pixels, teachers, teacher)


def open_student(recipe: RecipeArguments, data: DataArguments) -> tuple[nn.Module, Preprocessing]:
    """Opens the student, and reads the preprocessing that it expects.

    Raises:
        ValueError: the student is no architecture and not on this machine, or its arguments do not fit.
    """
    # For a name that is neither an architecture nor a path nor an id, create_student suggests similar architectures.
    if is_architecture(recipe.student) or not ("/" in recipe.student or os.path.isdir(recipe.student)):
        return _create(recipe, data, recipe.student, recipe.student_args)
    if fault := path_fault(recipe.student):
        raise ValueError(f"student {recipe.student!r} is not opened: {fault}")
    try:
        model, pixels = _open_config(recipe.student, data.num_classes, trust_remote_code=recipe.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"student {recipe.student!r} is no architecture, and cannot be read without a network: download it first "
            f"({reason(error)})"
        ) from error
    if any(value is not None for value in recipe.preprocessing.values()):
        processor = None
        if getattr(model.config, "pretrained_cfg", None) is None:
            local = {"local_files_only": True, "trust_remote_code": recipe.trust_remote_code}
            processor = open_image_processor(recipe.student, **local)
        change_preprocessing(model, **recipe.preprocessing, processor=processor)
        pixels = read_preprocessing(model, load_image_processor(model))
    return model, pixels


def open_teachers(
    recipe: RecipeArguments, data: DataArguments, student: nn.Module, student_pixels: Preprocessing, notes: list[str]
) -> list[tuple[nn.Module | None, Preprocessing | None]]:
    """Opens the teachers as [`open_student`] does; a teacher that is not on this machine is None, with a note.

    A zero-shot teacher has the student's number of classes. The list is empty where no teacher runs.
    """
    if not recipe.needs_teacher:
        return []
    if recipe.teacher_logits is not None:
        notes.append(f"the teacher does not run: its logits come from {_describe_store(recipe.teacher_logits)}")
        return []
    if recipe.names_new_teacher:
        return [_create(recipe, data, recipe.teacher, recipe.teacher_args)]
    num_classes = student.config.num_labels
    opened = [_open_teacher(name, recipe, num_classes, student_pixels, notes) for name in recipe.teachers]
    models = [model for model, _ in opened]
    if recipe.teacher_prompts is not None and not any(
        model is None or isinstance(model, ZeroShotClassifier) for model in models
    ):
        notes.append("teacher_prompts are for a CLIP or SigLIP model, and no teacher is one: the run stops. Omit them")
    return opened


def _describe_store(name: str) -> str:
    """Returns the name of a store, with its epochs and bytes if it is on this machine."""
    folder = Path(name).expanduser()
    if not (folder / STORE).is_file():
        return name
    info = StoreInfo.read(folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("epoch-*/*.safetensors"))
    repeated = "" if info.cycle is None else ", which training repeats"
    return f"{name}, {info.epochs} epochs of {info.num_samples:,} images{repeated}, {num_bytes / 1e6:,.1f} MB"


def _open_teacher(
    teacher: str, recipe: RecipeArguments, num_classes: int, student_pixels: Preprocessing, notes: list[str]
) -> tuple[nn.Module | None, Preprocessing | None]:
    name = teacher.removeprefix("timm/")
    try:
        # The folder may be on another machine, on which the run will start: a fault becomes a note.
        if fault := path_fault(teacher):
            raise ValueError(fault)
        if recipe.teacher_prompts is not None and (
            len(recipe.teachers) == 1 or is_zero_shot(teacher, recipe.trust_remote_code, local_files_only=True)
        ):
            return _open_zero_shot(teacher, num_classes, recipe.trust_remote_code)
        if name != teacher and timm.is_model(name):
            settings = timm.get_pretrained_cfg(name).to_dict()
            lacks_classifier = settings["num_classes"] == 0
            labels = num_classes if lacks_classifier else settings["num_classes"]
            # The plan may train the teacher. That needs a configuration, which timm's own model lacks.
            model = TimmWrapperForImageClassification(
                TimmWrapperConfig(architecture=name, num_labels=labels, pretrained_cfg=settings)
            )
            pixels = read_preprocessing(model)
        else:
            trust = recipe.trust_remote_code
            # A zero-shot teacher with teacher_prompts is opened above.
            lacks_prompts = is_zero_shot(teacher, trust, local_files_only=True)
            config = read_config(teacher, trust, local_files_only=True) or {}
            lacks_classifier = not lacks_prompts and _lacks_classifier(config)
            labels = num_classes if lacks_classifier or lacks_prompts else None
            model, pixels = _open_config(teacher, labels, default=student_pixels, trust_remote_code=trust)
            if lacks_prompts:
                notes.append(f"the teacher {teacher} classifies by texts: the run stops. Set teacher_prompts")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a tag that timm does not know
        notes.append(
            f"teacher {teacher!r} is not on this machine, so its parameters, GMACs and bytes are unknown: "
            f"{reason(error)}"
        )
        return None, None
    model.starts_with_new_head = lacks_classifier
    if lacks_classifier and len(recipe.teachers) > 1:
        notes.append(
            f"the teacher {teacher} has no classifier: the run stops. Fine-tune it first, alone, and name its folder"
        )
    elif lacks_classifier and recipe.finetune_teacher not in ("auto", "always"):
        notes.append(f"the teacher {teacher} has no classifier: the run stops. Set finetune_teacher to auto")
    return model, pixels


def _lacks_classifier(config: dict[str, Any]) -> bool:
    """Whether a configuration seems to be of a model without a classifier; only the weights tell for sure."""
    if is_timm_config(config):
        return config.get("num_classes") == 0
    classes = config.get("architectures") or ()
    return (
        bool(classes)
        and not config.get("auto_map")
        and not any("ImageClassification" in str(name) for name in classes)
    )


def _open_zero_shot(name: str, num_classes: int, trust_remote_code: bool) -> tuple[ZeroShotClassifier, Preprocessing]:
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    read_config(name, **local)  # read_config refuses odd values
    config = AutoConfig.from_pretrained(name, **local)
    with build_limit():
        model = AutoModelForZeroShotImageClassification.from_config(config, trust_remote_code=trust_remote_code)
    size = getattr(model, "projection_dim", config.vision_config.hidden_size)
    classifier = ZeroShotClassifier(model, torch.zeros(num_classes, size), list(map(str, range(num_classes))))
    return classifier, read_preprocessing(classifier, open_image_processor(name, **local))


def _create(
    recipe: RecipeArguments, data: DataArguments, name: str, model_args: dict | None
) -> tuple[nn.Module, Preprocessing]:
    model = recipe.create(name, model_args, num_labels=data.num_classes)
    return model, read_preprocessing(model)


def _open_config(
    name: str,
    num_classes: int | None = None,
    default: Preprocessing | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Preprocessing]:
    """Builds the model of a folder, or of a Hub id in the cache, from its configuration; no weights are read."""
    labels = {} if num_classes is None else {"num_labels": num_classes}
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    settings = read_config(name, trust_remote_code, local_files_only=True) or {}
    if is_timm_config(settings):
        config = TimmWrapperConfig.from_dict(settings, **labels)
    else:
        config = AutoConfig.from_pretrained(name, **local, **labels)
    with build_limit():
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)
    if getattr(config, "pretrained_cfg", None) is not None:
        return model, read_preprocessing(model)
    try:
        return model, read_preprocessing(model, open_image_processor(name, **local))
    except (OSError, ValueError):
        if default is None:
            raise
        return model, default
