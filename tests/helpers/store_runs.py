"""Writes stores of teacher logits on a few digits, and trains from them, in this process."""

from pathlib import Path

import torch

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, cli
from nkd_hf.data.sampler import EpochDataset
from nkd_hf.recipe.parser import parse_args
from nkd_hf.recipe.run_folder import read_history
from nkd_hf.teacher_logits.store import TeacherLogits

NUM_TRAIN = 47  # odd, and no multiple of a batch
MIXING = ["--mixup_alpha", "0.8", "--cutmix_alpha", "1.0"]


class Pixels(EpochDataset):
    """Random pixels that are a function of epoch and index."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def get_sample(self, epoch, index):
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        pixels = torch.rand(3, 4, 4, generator=generator)
        return {"pixel_values": pixels, "labels": index % 5, "epoch": epoch, "index": index}


class Position:
    """The collator, with the positions of its samples beside the batch."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, samples):
        return self.collator(samples) | {"position": torch.tensor([sample["position"] for sample in samples])}


def arguments(teacher: str | None, *more: str) -> list[str]:
    given = [
        "--student", "resnet18", "--student_args", '{"channels": [4, 8, 8, 8]}', "--image_size", "32", "--seed", "0",
        "--max_train_samples", str(NUM_TRAIN), "--max_eval_samples", "30", "--use_cpu", "true", "--disable_tqdm", "true",
        "--report_to", "none", "--optim", "sgd", "--learning_rate", "0.05", "--per_device_train_batch_size", "8",
        "--num_train_epochs", "2", "--logging_steps", "1", "--save_strategy", "no", "--random_resized_crop", "0.6", "1.0",
    ]  # fmt: skip
    return given + (["--teacher", teacher] if teacher else []) + list(more)


def write(folder: Path, teacher: str, *more: str) -> TeacherLogits:
    options = ["--output", str(folder), "--epochs", "2", "--batch_size", "16", "--shard_size", "16"]
    cli.main(["teacher-logits", *options, *arguments(teacher, *more)])
    return TeacherLogits(folder)


def train(folder: Path, *given: str) -> tuple[Recipe, list[dict]]:
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    recipe = Recipe(*parse_args(types, args=[*given, "--output_dir", str(folder)]))
    recipe.train_teacher()
    recipe.train_baseline()
    recipe.train_student()
    return recipe, read_history(folder / "student")
