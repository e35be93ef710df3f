"""The recipe of recipes/configs/digits_distill_cnn.yaml, as the benchmarks of accuracy run it."""

import argparse
from pathlib import Path

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, parse_args

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "digits_distill_cnn.yaml"


def arguments(options: argparse.Namespace) -> list[str]:
    """Without evaluations, checkpoints and workers; one model a run."""
    return [
        *("--num_train_epochs", str(options.epochs), "--compare_with_baseline", "false", "--save_strategy", "no"),
        *("--eval_strategy", "no", "--logging_strategy", "steps", "--logging_steps", "1", "--disable_tqdm", "true"),
        *("--report_to", "none", "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"),
        *(["--use_cpu", "true"] if options.device == "cpu" else []),
    ]


def train(folder: Path, args: list[str], kind: type[Recipe] = Recipe) -> Recipe:
    """A run whose student is trained: with the loss that it names, or with cross-entropy alone."""
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    recipe = kind(*parse_args(types, args=["--config", str(CONFIG), "--output_dir", str(folder), *args]))
    recipe.train_baseline()
    recipe.train_student()
    return recipe
