"""Exports the student of `nkd-hf distill` to ONNX, measures all models, and writes the report."""

import dataclasses
import importlib.metadata
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import PIL.Image
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data.image_datasets import ImageDataset, StreamingImageDataset
from ..data.student_datasets import make_evaluation_images
from ..errors import MissingExtraError, redact
from ..export import StudentExport, export_student, measure_latency
from ..export.runtime import open_session, run_session
from ..models.loading import open_classifier
from ..models.outputs import read_logits
from ..models.preprocessing import load_image_processor
from ..models.teacher import Teacher
from ..models.teacher_loading import load_teacher
from .figures import agreement, fit_temperature, model_figures, per_class
from .html_report import write_html_report
from .report import say
from .run_folder import REPORT, exit_if_not_written

if TYPE_CHECKING:
    from .recipe import Recipe

# Number of training images from which the ranges of int8 are read.
_CALIBRATION_IMAGES = 256
# Images of a batch, for predictions and throughput.
_BATCH = 32
_LIBRARIES = ("nkd_hf", "torch", "torchvision", "transformers", "timm", "datasets", "accelerate", "pillow")
_ORDER = ("teacher", "baseline", "student", "student_onnx", "student_int8")
# Settings of a run that explain its figures.
_SETTINGS = (
    "student", "teacher", "teacher_weights", "teacher_prompts", "distillation_loss", "loss_args", "finetune_teacher",
    "teacher_epochs", "teacher_learning_rate",
    "image_size", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "optim", "weight_decay", "lr_scheduler_type", "class_weights", "balanced_sampling", "random_resized_crop", "auto_augment",
    "mixup_alpha", "cutmix_alpha", "time_budget", "seed", "unlabeled_dataset", "unlabeled_ratio",
    "unlabeled_dataset_config_name", "crops_per_image",
)  # fmt: skip


def deploy(run: "Recipe", max_int8_drop: float) -> None:
    """Exports the student of a run, measures all of its models, and writes `report.html`.

    Call it only in the first process. It sets `run.figures`, which `results.json` contains beside the accuracies.

    Args:
        run: a run whose models are trained.
        max_int8_drop: points of top-1 that int8 may lose.

    Raises:
        SystemExit: with a message, when a file cannot be written.
    """
    folder = run.folder / "student"
    student = open_classifier(str(folder), trust_remote_code=run.args.trust_remote_code)
    models: dict[str, nn.Module | Path] = {"student": student}
    if "baseline" in run.stages:
        models["baseline"] = open_classifier(
            str(run.folder / "baseline"), trust_remote_code=run.args.trust_remote_code
        )
    loader = _make_loader(run, student, run.data["validation"])
    with exit_if_not_written("the export", folder):
        export, fault = _export(run, student, loader, max_int8_drop)
    if export is not None:
        models["student_onnx"] = export.onnx.path
        if export.int8 is not None and export.int8.kept:
            models["student_int8"] = export.int8.path
    logits, pixels, labels = {}, {}, np.empty(0, np.int64)
    for name, model in models.items():
        images = _make_loader(run, model, run.data["validation"]) if name == "baseline" else loader
        logits[name], labels, pixels[name] = predict(_make_runner(model, student.config.num_labels), images)
    if run.teacher is not None:
        teacher = load_teacher(run.teacher).copy().cpu().float()
        logits["teacher"], labels, pixels["teacher"] = _predict_teacher(run, teacher)
        models["teacher"] = teacher if len(teacher.members) > 1 else teacher.model
    models = {name: models[name] for name in _ORDER if name in models}
    run.figures = _collect(run, models, logits, labels, pixels, export)
    if fault is not None:
        run.figures["onnx"] = {"reason": fault}
    data = run.data_args
    trained_on = data.unlabeled_dataset if data.trains_without_labels else data.dataset_name
    with exit_if_not_written("the report", run.folder):
        write_html_report(
            run.folder / REPORT,
            results=run.all_results(),
            logits={name: logits[name] for name in models},
            labels=labels,
            class_names=list(run.id2label.values()),
            curves={name: run.curves[name] for name in ("baseline", "distilled") if name in run.curves},
            read_image=_image_reader(run),
            title=f"{redact(run.args.student)}, distilled on {redact(trained_on)}",
        )


def write_card(run: "Recipe") -> None:
    """Writes the student's model card again, with the figures of [`deploy`]."""
    trainer = run.result_trainer
    trainer.card_info = dataclasses.replace(
        trainer.card_info, deployment=run.figures["models"], temperature=run.figures["temperature"]
    )
    with exit_if_not_written("the model card", run.folder / "student"):
        trainer.create_model_card(model_name=trainer.args.hub_model_id.split("/")[-1])


def predict(
    compute: Callable[[torch.Tensor], np.ndarray], batches: Iterable[dict[str, torch.Tensor]]
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Computes the logits of all images.

    Args:
        compute: returns logits [B, C] of pixels [B, 3, H, W].
        batches: with `pixel_values` and `labels`.

    Returns:
        Logits [N, C] float32, labels [N] int64, and the pixels of the first batch.
    """
    logits, labels, first = [], [], None
    for batch in batches:
        first = batch["pixel_values"] if first is None else first
        logits.append(np.asarray(compute(batch["pixel_values"]), dtype=np.float32))
        labels.append(np.asarray(batch["labels"]))
    return np.concatenate(logits), np.concatenate(labels).astype(np.int64), first


def _make_loader(
    run: "Recipe", model: PreTrainedModel, split: datasets.Dataset | datasets.IterableDataset
) -> DataLoader:
    images = make_evaluation_images(split, run.data_args, load_image_processor(model), run.training_args.seed)
    return DataLoader(images, _BATCH)


def _make_runner(model: nn.Module | Path, num_labels: int) -> Callable[[torch.Tensor], np.ndarray]:
    if isinstance(model, Path):
        session = open_session(model)
        return lambda pixel_values: run_session(session, pixel_values)
    model = model.cpu().float().eval()

    def compute(pixel_values: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return read_logits(model(pixel_values), "the model", len(pixel_values), num_labels).numpy()

    return compute


def _predict_teacher(run: "Recipe", teacher: Teacher) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Computes the logits of a teacher with its own preprocessing, in the order of the run's classes.

    The pixels are those of the first member. At the end, all members are aligned to them.
    """
    found = []
    for member in teacher.members:
        member.align(member.preprocessing, run.id2label)
        loader = _make_loader(run, member.model, run.data["validation"])
        found.append(predict(lambda pixels, member=member: member(pixels).numpy(), loader))
    logits = teacher.combine([torch.from_numpy(each) for each, _, _ in found]).numpy()
    teacher.align(teacher.members[0].preprocessing, run.id2label)
    _, labels, pixels = found[0]
    return logits, labels, pixels


def _export(
    run: "Recipe", student: PreTrainedModel, labelled: DataLoader, max_drop: float
) -> tuple[StudentExport | None, str | None]:
    """Writes the ONNX files, or returns the reason why they cannot be made."""
    train = run.data["train"]
    if isinstance(train, datasets.IterableDataset):
        chosen = train.take(_CALIBRATION_IMAGES)
    else:
        rows = np.random.default_rng(run.training_args.seed).permutation(len(train))[:_CALIBRATION_IMAGES]
        chosen = train.select(sorted(rows.tolist()))
    calibration = list(_make_loader(run, student, chosen))
    pixels = torch.cat([batch["pixel_values"] for batch in calibration[:2]])
    try:
        export = export_student(
            student, run.folder / "student", pixels, calibration=calibration, labelled=labelled, max_drop=max_drop
        )
    except (MissingExtraError, ValueError) as error:
        say(run.training_args, f"There is no ONNX file: {error}")
        return None, redact(str(error)).rstrip(".")
    int8 = export.int8
    said = f"int8 has {100 * int8.accuracy_int8:.2f} % top-1, float {100 * int8.accuracy_float:.2f} %"
    say(
        run.training_args,
        f"{export.onnx.path.parent}: {said}" + ("" if int8.kept else f"; int8 is not kept: {int8.reason}"),
    )
    return export, None


def _collect(
    run: "Recipe",
    models: dict[str, nn.Module | Path],
    logits: dict[str, np.ndarray],
    labels: np.ndarray,
    pixels: dict[str, torch.Tensor],
    export: StudentExport | None,
) -> dict[str, Any]:
    """Collects the figures that `results.json` has beside the accuracies of a recipe."""
    measured = _rounded(measure_latency({name: (model, pixels[name]) for name, model in models.items()}))
    figures = {}
    for name, model in models.items():
        counted = models["student"] if isinstance(model, Path) else model
        saved = run.folder / name / "model.safetensors"
        size = {"size_bytes": saved.stat().st_size} if saved.is_file() else {}
        parameters = sum(parameter.numel() for parameter in counted.parameters())
        figures[name] = model_figures(logits[name], labels) | {"parameters": parameters} | measured[name] | size
    settings = vars(run.args) | vars(run.data_args) | run.training_args.to_dict()
    if run.data_args.unlabeled_dataset is None:
        del settings["unlabeled_ratio"]  # nothing reads it
    if not run.trains_teacher:
        settings |= {"teacher_epochs": None, "teacher_learning_rate": None}
    if run.data_args.crops_per_image == 1:
        del settings["crops_per_image"]
    torch_models = ("teacher", "baseline", "student")
    results: dict[str, Any] = {"models": figures}
    if "teacher" in logits:
        results["agreement_with_teacher"] = agreement(logits["student"], logits["teacher"])
    results["per_class"] = per_class(
        {name: logits[name] for name in torch_models if name in logits}, labels, list(run.id2label.values())
    )
    results["temperature"] = fit_temperature(logits["student"], labels)
    if export is not None and export.int8 is not None:
        int8 = export.int8
        results["int8"] = {
            "kept": int8.kept, "method": int8.method, "float_nodes": len(int8.float_nodes), "reason": int8.reason,
            "top1_drop": round(int8.drop / 100, 4),
        }  # fmt: skip
    results["settings"] = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    results["dataset"] = {
        "name": redact(run.data_args.dataset_name),
        "classes": len(run.id2label),
        "images": {name: len(split) for name, split in run.data.items() if isinstance(split, datasets.Dataset)},
    }
    results["versions"] = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return results


def _rounded(figures: Any) -> Any:
    """Rounds measured numbers to four digits."""
    if isinstance(figures, dict):
        return {name: _rounded(value) for name, value in figures.items()}
    return float(f"{figures:.4g}") if isinstance(figures, float) else figures


def _image_reader(run: "Recipe") -> Callable[[int], PIL.Image.Image]:
    """Returns a function that reads a validation image by its number, as the models got it: without skipped images."""
    data = run.data_args
    kind = StreamingImageDataset if data.streaming else ImageDataset
    images = kind(run.data["validation"], lambda image: image, on_bad_image=data.on_bad_image, training=False)

    def read_image(number: int) -> PIL.Image.Image:
        sample = next(itertools.islice(images, number, None)) if data.streaming else images[number]
        return sample["pixel_values"]

    return read_image
