"""Decides whether a pretrained teacher is used as it is or fine-tuned first, and with which arguments it is trained."""

import logging
from typing import Any

from transformers import PreTrainedModel

from ..data.arguments import DataArguments, streaming_max_steps
from ..errors import NoClassifierError
from ..models.labels import match_labels, names_all, normalize_id2label
from ..models.teacher import Teacher
from ..models.teacher_loading import open_backbone
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments
from .build import images_per_epoch, open_teacher
from .report import describe_size, say
from .unlabeled import refuse_training_of_teacher

logger = logging.getLogger(__name__)


def open_named_teacher(
    recipe: RecipeArguments, id2label: dict[int, str], training: DistillationTrainingArguments
) -> Teacher:
    """Opens the pretrained teacher of a run, and prints its size.

    A teacher without a classifier is opened if it is fine-tuned first.

    Args:
        recipe: names the teacher, or several.
        id2label: the classes of the data, for `teacher_prompts`.
        training: says which process prints.

    Raises:
        ValueError: see [`~nkd_hf.models.teacher_loading.load_teacher`]; or the teacher has no classifier, and is one of several
            or `finetune_teacher` is `never`.
    """
    start = "pretrained"
    try:
        teacher = open_teacher(recipe, recipe.teacher, id2label)
    except NoClassifierError as error:
        if len(recipe.teachers) > 1:
            raise ValueError(
                f"{error} Or fine-tune it on the classes of the data first, alone, and name its folder"
            ) from error
        if recipe.finetune_teacher not in ("auto", "always"):
            raise ValueError(
                f"finetune_teacher must be auto or always for the teacher {recipe.teacher!r}, which has no classifier, got "
                f"{recipe.finetune_teacher or 'never'}. Set it to auto, which trains the teacher with a new head on the data first"
            ) from error
        options = {"allow_pickle": recipe.allow_pickle, "trust_remote_code": recipe.trust_remote_code}
        teacher, start = open_backbone(recipe.teacher, **options), "pretrained, without a classifier"
    say(training, f"The teacher {', '.join(recipe.teachers)}: {describe_size(teacher)} parameters, {start}")
    return teacher


def needs_finetuning(
    recipe: RecipeArguments, teacher: PreTrainedModel | Teacher | None, id2label: dict[int, str], data: DataArguments
) -> bool:
    """Decides by `finetune_teacher` and the classes of teacher and data whether the teacher is trained first.

    A teacher that has all classes of the data by name, and others, is used as it is: from now on it selects the logits
    of the data's classes.

    Args:
        recipe: the arguments of the run.
        teacher: the pretrained teacher; a value that is no [`Teacher`] is not opened yet, or is trained in this run.
        id2label: the classes of the data.
        data: says whether there are labels to train on.

    Raises:
        ValueError: the classes differ, and `finetune_teacher` is `never`, or the teacher is one of several, or no image has a
            label.
    """
    if not isinstance(teacher, Teacher):
        return False
    needed = [_needs_finetuning(recipe, member, id2label) for member in teacher.members]
    if any(needed) and data.trains_without_labels:
        refuse_training_of_teacher(recipe)
    return any(needed)


def _needs_finetuning(recipe: RecipeArguments, teacher: Teacher, id2label: dict[int, str]) -> bool:
    has_new_head = getattr(teacher.model, "starts_with_new_head", False)
    if recipe.finetune_teacher == "always" or has_new_head:
        return True
    if recipe.ignore_label_names or teacher.id2label is None:
        return False
    names, known = list(id2label.values()), list(normalize_id2label(teacher.id2label).values())
    if len(known) > len(names) and names_all(known, names):
        teacher.selects_classes = True
        return False
    try:
        match_labels(id2label, teacher.id2label, teacher.name)
    except ValueError as error:
        if len(recipe.teachers) > 1:
            raise ValueError(f"{error}. Or fine-tune it on these classes first, alone, and name its folder") from error
        if recipe.finetune_teacher == "auto":
            return True
        advice = "set finetune_teacher to auto, which trains it on these classes first"
        raise ValueError(f"{error}. Or {advice}") from error
    return False


def teacher_changes(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments
) -> dict[str, Any]:
    """Returns the training arguments in which the training of a teacher differs from the student's.

    Raises:
        ValueError: `teacher_epochs` is set for a stream whose images nobody has counted.
    """
    changes: dict[str, Any] = {}
    if recipe.teacher_learning_rate is not None:
        changes["learning_rate"] = recipe.teacher_learning_rate
    if recipe.teacher_epochs is not None:
        changes |= {"num_train_epochs": recipe.teacher_epochs, "max_steps": -1}
        if data.streaming:
            images, batch = images_per_epoch(data), training.global_batch_size()
            changes["max_steps"] = streaming_max_steps(images, recipe.teacher_epochs, batch)
    return changes
