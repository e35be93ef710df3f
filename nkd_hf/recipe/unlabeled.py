"""Checks the arguments of a run with images without labels, and describes these images."""

from ..data.arguments import DataArguments
from ..errors import redact
from ..trainer.unlabeled_checks import check_losses
from .arguments import RecipeArguments


def check_unlabeled(recipe: RecipeArguments, data: DataArguments) -> None:
    """Checks the images without labels against the other arguments.

    Raises:
        ValueError: the loss cannot learn from images without labels, the teacher's logits are stored, or an argument
            needs labels where there are none.
    """
    if data.unlabeled_dataset is None:
        return
    check_losses(recipe.losses)
    if not data.trains_without_labels:
        if recipe.teacher_logits is not None:
            raise ValueError(
                f"teacher_logits must be omitted with unlabeled_dataset, got {redact(recipe.teacher_logits)!r}: a store has the "
                "logits of one order of images. Set a teacher, or train_split to none, which trains on unlabeled_dataset alone"
            )
        return
    if recipe.compare_with_baseline:
        raise ValueError(
            "compare_with_baseline must be false with train_split=none, got true: a baseline learns from labels alone"
        )
    if recipe.class_weights is not None:
        raise ValueError(
            f"class_weights must be omitted with train_split=none, got {recipe.class_weights}: no label is trained on"
        )
    if recipe.names_new_teacher or recipe.finetune_teacher == "always":
        refuse_training_of_teacher(recipe)


def refuse_training_of_teacher(recipe: RecipeArguments) -> None:
    """Raises ValueError, since the training of a teacher needs labels."""
    raise ValueError(
        f"the teacher must know the classes of the data with train_split=none, got {', '.join(recipe.teachers)}, which would be "
        "trained on labels first. Name a teacher that has these classes, a zero-shot one (teacher_prompts), or the folder of "
        "one that was fine-tuned before"
    )


def describe_unlabeled(data: DataArguments) -> str:
    """Describes how images without labels take part in a training; empty without such images."""
    if data.unlabeled_dataset is None:
        return ""
    name = redact(data.unlabeled_dataset)
    if data.trains_without_labels:
        return f"all training images, those of {name}: labels are for the evaluation alone"
    return f"{data.unlabeled_ratio:g} of {name} for each labelled image of the student's batches"
