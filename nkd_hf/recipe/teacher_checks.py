"""Checks the arguments of several teachers and of a zero-shot teacher."""

from typing import TYPE_CHECKING

from ..models.architectures import is_architecture
from ..models.teacher_ensemble import normalize_weights

if TYPE_CHECKING:
    from .arguments import RecipeArguments


def check_ensemble(recipe: "RecipeArguments") -> None:
    """Raises ValueError for arguments that do not fit several teachers."""
    if recipe.needs_teacher_layers:
        raise ValueError(
            f"distillation_loss={recipe.distillation_loss} reads layers of one teacher, got teacher={recipe.teacher}. Name one "
            "teacher, or a loss of logits alone such as nkd"
        )
    if untrained := [name for name in recipe.teachers if is_architecture(name)]:
        raise ValueError(
            f"each of several teachers must be trained already, got the architecture {untrained[0]!r}. Train it first, alone, "
            "and name its folder"
        )
    if recipe.finetune_teacher == "always":
        raise ValueError(
            "finetune_teacher must be auto or never for several teachers, got always. Fine-tune each alone, and name their "
            "folders"
        )
    normalize_weights(recipe.teacher_weights, len(recipe.teachers), "teacher_weights")


def check_zero_shot(recipe: "RecipeArguments") -> None:
    """Raises ValueError for arguments that do not fit a teacher, or one of several, with `teacher_prompts`."""
    if not recipe.teachers or recipe.names_new_teacher:
        raise ValueError(
            f"teacher_prompts are for a CLIP or SigLIP model, got teacher={recipe.teacher!r}. Set teacher to its Hub id or "
            "folder, or omit teacher_prompts"
        )
    if recipe.needs_teacher_layers:
        raise ValueError(
            f"distillation_loss={recipe.distillation_loss} reads layers of the teacher, and a teacher with teacher_prompts has "
            "its logits alone. Name a loss of logits alone such as nkd"
        )
    if recipe.finetune_teacher == "always":
        raise ValueError(
            "finetune_teacher must be auto or never for a teacher with teacher_prompts, got always. It is used as it is"
        )
