"""The recipe of recipes/configs/digits_distill_cnn.yaml, as the benchmarks of accuracy run it, and data for it."""

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    load_image_dataset,
    parse_args,
)

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "digits_distill_cnn.yaml"


def arguments(options: argparse.Namespace) -> list[str]:
    """Without evaluations, checkpoints and workers; one model a run."""
    return [
        *("--num_train_epochs", str(options.epochs), "--compare_with_baseline", "false", "--save_strategy", "no"),
        *("--eval_strategy", "no", "--logging_strategy", "steps", "--logging_steps", "1", "--disable_tqdm", "true"),
        *("--report_to", "none", "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"),
        *(["--use_cpu", "true"] if options.device == "cpu" else []),
    ]


def train(folder: Path, args: list[str], kind: type[Recipe] = Recipe, config: Path = CONFIG) -> Recipe:
    """A run whose student is trained: with the loss that it names, or with cross-entropy alone."""
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    recipe = kind(*parse_args(types, args=["--config", str(config), "--output_dir", str(folder), *args]))
    recipe.train_baseline()
    recipe.train_student()
    return recipe


def write_numbers(folder: Path, train: int, validation: int) -> None:
    """Numbers from 00 to 99, as `<split>.parquet`: two digits of the split side by side on a black square of 16 x 16."""
    folder.mkdir()
    generator, sizes = np.random.default_rng(0), {"train": train, "validation": validation}
    for split, rows in load_image_dataset(DataArguments(dataset_name="digits")).items():
        digits = np.stack([np.asarray(PIL.Image.open(io.BytesIO(image["bytes"]))) for image in rows["image"]])
        places = [np.flatnonzero(np.array(rows["label"]) == digit) for digit in range(10)]
        images = []
        for index in range(sizes[split]):
            pixels, png = np.zeros((16, 16), np.uint8), io.BytesIO()
            pixels[4:12] = np.hstack([digits[generator.choice(places[digit])] for digit in divmod(index % 100, 10)])
            PIL.Image.fromarray(pixels).save(png, "PNG")
            images.append({"image": {"bytes": png.getvalue(), "path": None}, "label": index % 100})
        names = datasets.ClassLabel(names=[f"{number:02d}" for number in range(100)])
        features = datasets.Features(image=datasets.Image(), label=names)
        datasets.Dataset.from_list(images, features=features).to_parquet(folder / f"{split}.parquet")
