"""Runs a recipe in this process."""

from pathlib import Path

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    parse_args,
)

ROOT = Path(__file__).parents[2]
FEW = ["--max_train_samples", "96", "--max_eval_samples", "40", "--num_train_epochs", "2", "--disable_tqdm", "true"]


IN_PROCESS = ["--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"]


def run(recipe: str, *arguments: str) -> Recipe:
    """The recipe in this process."""
    config = ROOT / "recipes" / "configs" / f"digits_{recipe}.yaml"
    run = Recipe(
        *parse_args(
            (RecipeArguments, DataArguments, DistillationTrainingArguments),
            args=["--config", str(config), *FEW, *IN_PROCESS, *arguments],
        )
    )
    run.train_teacher()
    run.train_baseline()
    run.train_student()
    return run
