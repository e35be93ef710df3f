"""Checks a run before anything is trained: names, classes, and the loss of one image."""

import os
import re
from pathlib import Path
from typing import Any

from ..data.arguments import DataArguments
from ..errors import redact
from ..files import path_fault
from ..hub.model_card.licences import check_license
from ..models.architectures import is_architecture
from ..models.labels import class_numbers
from ..models.students import check_name
from ..models.teacher import Teacher
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.checks import check_batches
from ..trainer.loaders import check_sampling
from ..trainer.non_finite import LossWatch
from ..trainer.trainer import DistillationTrainer
from .arguments import RecipeArguments
from .build import runs_teacher
from .class_sizes import check_class_balance
from .unlabeled import check_unlabeled

# Words in the names of folders by which `datasets` knows a split.
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}


def check_arguments(recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments) -> None:
    """Checks the arguments against each other, without data or models.

    Raises:
        ValueError: the Hub knows no such licence, the data's folder would contain the run's pictures, an argument is for a teacher and the loss has none, or the arguments
            for classes of different sizes or for images without labels do not fit.
    """
    check_license(recipe.license)
    _check_output_folder(data, training)
    check_class_balance(recipe, data)
    check_unlabeled(recipe, data)
    if data.balanced_sampling:
        check_sampling(training.train_sampling_strategy, is_balanced=True)
    if recipe.time_budget is not None and training.max_steps > 0:
        raise ValueError(f"time_budget chooses the epochs, but max_steps is {training.max_steps}. Omit one of the two")
    if recipe.early_stopping_patience is not None and not training.load_best_model_at_end:
        raise ValueError(
            f"early_stopping_patience={recipe.early_stopping_patience} needs load_best_model_at_end, got false. Set it to "
            "true, or omit early_stopping_patience"
        )
    if training.teacher_settings and not recipe.needs_teacher:
        raise ValueError(
            f"{', '.join(training.teacher_settings)} set how a teacher computes, and distillation_loss="
            f"{recipe.distillation_loss} has none: omit them"
        )


def _check_output_folder(data: DataArguments, training: DistillationTrainingArguments) -> None:
    """Raises ValueError where the pictures of the run would be read as images of the data by the next start."""
    for name in filter(None, (data.dataset_name, data.unlabeled_dataset)):
        if _would_be_read(training.output_dir, os.path.expanduser(name)):
            raise ValueError(
                f"output_dir must be outside of the data's folder, got {training.output_dir} in {redact(name)}: the pictures "
                "of the run would be read as images of the data. Set another output_dir"
            )


def _would_be_read(output_dir: str, name: str) -> bool:
    """Whether the images of a dataset that is a folder would include those of an output folder."""
    if not os.path.isdir(name):
        return False
    root, output = Path(name).resolve(), Path(output_dir).resolve()
    if not output.is_relative_to(root):
        return False
    parts = output.relative_to(root).parts
    if any(part.startswith(".") for part in parts):
        return False
    # Beside the folders of splits, `datasets` reads nothing else.
    folders = [entry.name for entry in (*root.iterdir(), *root.glob("data/*")) if entry.is_dir()]
    return not any(map(_names_split, folders)) or any(map(_names_split, parts))


def _names_split(name: str) -> bool:
    return not _SPLITS.isdisjoint(re.split(r"[-._ 0-9]+", name))


def check_names(recipe: RecipeArguments) -> None:
    """Looks for the folders of student and teacher, without opening them.

    Raises:
        ValueError: there is no such folder, or no such architecture.
    """
    names = [("student", recipe.student)]
    if runs_teacher(recipe):
        names += [("teacher", name) for name in recipe.teachers]
    for role, name in names:
        if is_architecture(name):
            continue
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"{role} {error}") from None
        if fault := path_fault(name):
            raise ValueError(f"{role} {name!r} is not opened: {fault}")


def check_classes(recipe: RecipeArguments, data: DataArguments, names: list[str]) -> None:
    """Checks the classes of the data.

    Args:
        recipe: says whether a teacher's classes are matched by their numbers.
        data: may record the number of classes.
        names: the names of the classes, by label.

    Raises:
        ValueError: there is only one class, the number of classes is not `num_classes`, or the names are numbers that
            are not the positions of a teacher's logits.
    """
    if len(names) < 2:
        raise ValueError(
            f"{redact(data.dataset_name)!r} must have two classes at least, got {names}. Set "
            "label_column_name, or name another dataset"
        )
    if data.num_classes not in (None, len(names)):
        raise ValueError(
            f"num_classes is {data.num_classes}, but {redact(data.dataset_name)!r} has {len(names)} classes: set it to "
            f"{len(names)}, or omit it"
        )
    if recipe.ignore_label_names:
        class_numbers(names, len(names))


def check_number_of_classes(teacher: Teacher, recipe: RecipeArguments, data: DataArguments, num_classes: int) -> None:
    """Checks that a teacher whose classes are matched by their numbers has as many classes as the data.

    Raises:
        ValueError: the teacher has another number of classes.
    """
    for name, member in zip(recipe.teachers, teacher.members, strict=True):
        got = member.model.config.num_labels
        if got != num_classes:
            raise ValueError(
                f"teacher must have {num_classes} classes, as {redact(data.dataset_name)!r} has, got "
                f"{got} of {name}. ignore_label_names takes them by their numbers, so these must be "
                "the same: load a teacher that was trained on these classes"
            )


def check_one_step(trainer: DistillationTrainer, sample: dict[str, Any]) -> None:
    """Computes the loss of a batch that has one image twice, except under FSDP or DeepSpeed.

    The image is there twice because BatchNorm needs more than one value.

    Args:
        trainer: trains the student with the teacher; its collator is an [`ImageCollator`].
        sample: an image of the evaluation.

    Raises:
        ValueError: the models do not fit the loss, or the loss is not finite and `on_non_finite_loss` is `error`.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    args = trainer.args
    batch = trainer.data_collator.without_mixing()([sample, sample])
    batch = {name: value.to(args.device) for name, value in batch.items()}
    watch = LossWatch()
    with trainer.accelerator.autocast():
        trainer.compute_loss(trainer.model.train(), batch)
    watched = trainer.step_guard.take_note()
    if args.on_non_finite_loss == "error" and watched is not None:
        watch.add(0, args.learning_rate, index=None, **watched)
        watch.close_step(grad_norm=None, scaled=False)
        if fault := watch.fault(wait=True):
            raise ValueError(f"an image gives no finite loss before anything is trained: {fault}")


def check_batch_sizes(trainer: DistillationTrainer) -> None:
    """Checks the sizes of a training's batches; see [`~nkd_hf.trainer.checks.check_batches`]."""
    loader = trainer.get_train_dataloader()
    *_, max_steps = trainer.set_initial_training_values(trainer.args, loader)
    check_batches(trainer, loader, max_steps)
