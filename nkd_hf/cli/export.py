"""`nkd-hf export`: the plain student out of a training checkpoint, or the ONNX files of a saved classifier."""

import argparse
import dataclasses
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data.arguments import DataArguments
from ..data.loading import load_image_dataset
from ..data.student_datasets import make_evaluation_images
from ..export.int8 import Int8Report
from ..export.runtime import check_extra
from ..export.student import StudentExport, export_student
from ..files import new_folder, path_fault
from ..hub.student_files import is_checkpoint
from ..models.loading import open_classifier
from ..models.preprocessing import load_image_processor
from ..models.saving import save_image_processor, save_student
from .classes import match_classes

logger = logging.getLogger(__name__)

# Number of images that compare the ONNX file with PyTorch, and that calibrate int8.
_COMPARED, _CALIBRATION = 16, 256
_BATCH_SIZE = 32


def export(checkpoint: str, output: str, overwrite: bool = False, trust_remote_code: bool = False) -> PreTrainedModel:
    """Writes the student of a checkpoint as a folder that transformers and, if it is one of timm's models, timm open.

    Args:
        checkpoint: a `checkpoint-*` folder. With a moving average (`ema_decay`), the averaged student is written.
        output: a new or empty folder.
        overwrite: whether a student that is saved in `output` is replaced.
        trust_remote_code: whether code beside the weights may run.

    Returns:
        `PreTrainedModel`: the student.

    Raises:
        ValueError: the folder is no checkpoint, or is a run with several checkpoints; `output` is not empty.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {checkpoint}")
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f": name one of its checkpoints, {', '.join(inside)}" if inside else ""
        raise ValueError(f"{checkpoint} is no checkpoint, since it has no config.json{hint}")
    with new_folder(output, overwrite) as new:
        student = open_classifier(str(folder), trust_remote_code=trust_remote_code)
        save_student(student, new)
        try:
            save_image_processor(student, new)
        except OSError:
            logger.warning(
                "%s holds no preprocessing, so that pipeline() cannot open %s: save the student's image processor there.",
                checkpoint,
                output,
            )
    return student


def export_onnx(
    model: str,
    *,
    int8: bool = False,
    calibration_data: DataArguments | None = None,
    max_int8_drop: float = 1.0,
    match_names: bool = True,
    num_workers: int = 0,
    trust_remote_code: bool = False,
) -> StudentExport:
    """Writes the ONNX files of a saved classifier into its folder; see [`~nkd_hf.export.student.export_student`].

    Args:
        model: the folder of the classifier.
        int8: whether an int8 file is tried, too.
        calibration_data: the dataset of the classifier: its training split calibrates int8, and its validation split
            measures the accuracy. Without int8 it may be None; the ONNX file is then compared with PyTorch on digits.
        max_int8_drop: percentage points of top-1 that int8 may lose.
        match_names: whether classes are matched by their names; see [`~nkd_hf.cli.evaluate.evaluate`].
        num_workers: processes that read and preprocess images.
        trust_remote_code: whether code beside the weights may run.

    Returns:
        [`StudentExport`]

    Raises:
        ValueError: the folder is a checkpoint or holds no classifier; the dataset cannot be loaded, or its classes are not
            the classifier's; the classifier cannot be exported.
        MissingExtraError: onnx, onnxscript or onnxruntime is missing.
    """
    check_extra()
    if not max_int8_drop >= 0:
        raise ValueError(f"max_int8_drop must be 0 points or more, got {max_int8_drop:g}.")
    if int8 and calibration_data is None:
        raise ValueError("calibration_data must name a dataset for int8, got none. Name the dataset of the training.")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        fault = path_fault(model) or f"{model!r} is no folder"
        raise ValueError(f"model must be the folder of a saved classifier, but {fault}. Save the classifier first.")
    if is_checkpoint(folder):
        raise ValueError(
            f"model must be a saved student, got the training checkpoint {model}. Write its student into a folder of its own "
            f"with `nkd-hf export --checkpoint {shlex.quote(model)} --output DIR`, and export that."
        )
    data = calibration_data or DataArguments(dataset_name="digits")
    data = dataclasses.replace(data, max_train_samples=_CALIBRATION if int8 else _COMPARED)
    student = open_classifier(str(folder), dtype=torch.float32, trust_remote_code=trust_remote_code)
    splits = load_image_dataset(data)
    train = _make_loader(splits["train"], data, student, num_workers)
    validation = _Labelled(splits["validation"], data, student, num_workers, match_names) if int8 else None
    images = torch.cat([batch["pixel_values"] for batch in train])[:_COMPARED]
    return export_student(
        student,
        folder,
        images,
        calibration=train if int8 else None,
        labelled=validation,
        max_drop=max_int8_drop,
    )


def _make_loader(split: Dataset, data: DataArguments, student: PreTrainedModel, num_workers: int) -> DataLoader:
    return DataLoader(
        make_evaluation_images(split, data, load_image_processor(student)), _BATCH_SIZE, num_workers=num_workers
    )


class _Labelled:
    """Yields the batches of a split, with labels numbered as a model's classes."""

    def __init__(
        self, split: Dataset, data: DataArguments, student: PreTrainedModel, num_workers: int, match_names: bool
    ):
        order, numbers = match_classes(split.features["label"], student, match_names)
        self._numbers = torch.tensor(order) if order is not None else numbers
        self._loader = _make_loader(split, data, student, num_workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            labels = batch["labels"] if self._numbers is None else self._numbers[batch["labels"]]
            yield {"pixel_values": batch["pixel_values"], "labels": labels}


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf export`."""
    parser = _make_parser()
    args = parser.parse_args(args)
    if (args.checkpoint is None) == (args.model is None):
        parser.error("one of --checkpoint and --model is required: a checkpoint-* folder, or a saved classifier")
    if args.model is not None:
        _main_onnx(parser, args)
        return
    if args.output is None or args.format is not None:
        parser.error("--checkpoint goes with --output DIR, and --model with --format onnx")
    student = export(args.checkpoint, args.output, args.overwrite, args.trust_remote_code)
    print(f"{args.output}: {type(student).__name__}, {student.config.num_labels} classes; files: ", end="")
    print(", ".join(sorted(os.listdir(args.output))))


def _main_onnx(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.format is None or args.output is not None:
        parser.error("--model goes with --format onnx, which writes into the folder itself")
    data = None
    if args.calibration_data is not None:
        data = DataArguments(
            dataset_name=args.calibration_data,
            dataset_config_name=args.dataset_config_name,
            image_column_name=args.image_column_name,
            label_column_name=args.label_column_name,
        )
    reports = export_onnx(
        args.model,
        int8=args.int8,
        calibration_data=data,
        max_int8_drop=args.max_int8_drop,
        match_names=not args.ignore_label_names,
        num_workers=args.num_workers,
        trust_remote_code=args.trust_remote_code,
    )
    onnx = reports.onnx
    print(
        f"{onnx.path}: {onnx.size_bytes / 1e6:.1f} MB; logits within {onnx.max_difference:.1g} of PyTorch's in batches of 1, 5 "
        f"and {onnx.images} images"
    )
    if reports.int8 is not None:
        _print_int8(reports.int8)


def _print_int8(report: Int8Report) -> None:
    accuracies = f"top-1 {100 * report.accuracy_int8:.2f} %, float {100 * report.accuracy_float:.2f} %"
    if not report.kept:
        print(f"{report.path} is not written: {report.reason} ({accuracies}, {report.images} images)")
        return
    nodes = f"; in float: {', '.join(report.float_nodes)}" if report.float_nodes else ""
    print(
        f"{report.path}: {report.size_bytes / 1e6:.1f} MB; {accuracies}, {report.images} images; calibrated by "
        f"{report.method}{nodes}"
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nkd-hf export", description=__doc__, allow_abbrev=False)
    help_of = {field.name: field.metadata["help"] for field in dataclasses.fields(DataArguments)}
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that lies beside the weights")
    checkpoint = parser.add_argument_group("the student out of a checkpoint")
    checkpoint.add_argument("--checkpoint", metavar="DIR", help="a checkpoint-* folder")
    checkpoint.add_argument("--output", metavar="DIR", help="folder to write")
    checkpoint.add_argument("--overwrite", action="store_true", help="replace a student that is in the folder")
    onnx = parser.add_argument_group("ONNX files of a saved classifier, in its folder")
    onnx.add_argument("--model", metavar="DIR", help="folder of the classifier")
    onnx.add_argument("--format", choices=["onnx"], help="onnx/model.onnx")
    onnx.add_argument("--int8", action="store_true", help="onnx/model_int8.onnx, too")
    onnx.add_argument(
        "--calibration_data",
        metavar="DATA",
        help="dataset of the classifier; calibrates int8 and measures its accuracy",
    )
    onnx.add_argument(
        "--max_int8_drop",
        type=float,
        default=1.0,
        help="percentage points of top-1 that int8 may lose (default: %(default)s)",
    )
    onnx.add_argument("--dataset_config_name", help=help_of["dataset_config_name"])
    onnx.add_argument("--image_column_name", help=help_of["image_column_name"])
    onnx.add_argument("--label_column_name", help=help_of["label_column_name"])
    onnx.add_argument("--ignore_label_names", action="store_true", help="take the classes by their numbers")
    onnx.add_argument(
        "--num_workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that read images (default: %(default)s)",
    )
    return parser
