"""`nkd-hf evaluate`: measures top-1, top-5 and throughput of a saved model on a split, with its own preprocessing."""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel
from transformers.hf_argparser import string_to_bool

from ..data.arguments import DataArguments
from ..data.loading import load_evaluation_split
from ..data.student_datasets import make_evaluation_images
from ..errors import reason, redact
from ..metrics import compute_metrics, top5_indices
from ..models.labels import normalize_id2label
from ..models.loading import open_classifier, open_image_processor
from ..models.outputs import check_inputs, read_logits
from ..models.preprocessing import IMAGE_PROCESSOR, load_image_processor
from ..recipe.figures import unique_names
from .classes import match_classes

# The printed table has at most so many classes; JSON has all classes.
_MOST_CLASSES = 20
# `--json` and `--json true` are the same, as in `nkd-hf plan`.
_SWITCH = {"nargs": "?", "const": True, "default": False, "type": string_to_bool, "metavar": "BOOL"}


def evaluate(
    model: PreTrainedModel,
    data: DataArguments,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "cpu",
    match_names: bool = True,
    per_class: bool = False,
) -> dict[str, Any]:
    """Evaluates a model on one split of a dataset.

    The model's own processor prepares the images, as in `pipeline("image-classification")`.

    Args:
        model: any `*ForImageClassification` that came from a folder or from the Hub.
        data: the dataset; `validation_split` is the split, by default the first of `validation`, `val`, `valid`, `test`.
        batch_size: images of one forward pass.
        num_workers: processes that read and preprocess images.
        device: where the model runs, such as `cuda`.
        match_names: whether classes are matched by their names. If not, they are matched by their numbers: the names,
            if all names are whole numbers, else the positions.
        per_class: whether the result has the accuracy of each class.

    Returns:
        `dict`: `top1` and `top5` (fractions), `images`, `bad_images`, `images_per_second` (from file to prediction, without
        the first batch; None when there is no other), `no_predictions` (images for which the model's logits are NaN, which
        count as wrong), and the names of model, dataset and split with the settings of the evaluation. With `per_class`, also
        `per_class`: a list of `name`, `images` and `top1` of each class that has an image, the worst class first.

    Raises:
        ValueError: the dataset cannot be loaded, or its classes are not the model's.
    """
    check_inputs(model, "the model")
    processor = load_image_processor(model)
    split_name, split = load_evaluation_split(data)
    images = make_evaluation_images(split, data, processor)
    order, numbers = match_classes(split.features["label"], model, match_names)
    loader = DataLoader(images, batch_size, num_workers=num_workers, pin_memory=torch.device(device).type == "cuda")
    predictions, labels, images_per_second = _predict(model, loader, device, order)
    if not labels:
        raise ValueError(f"the split {split_name!r} has no images that can be read: name another one")
    labels = torch.cat(labels) if numbers is None else numbers[torch.cat(labels)]
    if labels.max() >= model.config.num_labels:
        raise ValueError(f"the labels go up to {labels.max()}, but the model has {model.config.num_labels} classes")
    predictions = torch.cat(predictions)
    results = {
        "model": model.name_or_path,
        "dataset": redact(data.dataset_name),
        "split": split_name,
        "images": len(labels),
        "bad_images": images.num_bad_images,
        **_score(predictions, labels),
        "images_per_second": images_per_second,
        "device": str(device),
        "batch_size": batch_size,
        "num_workers": num_workers,
        "preprocessing": _read_settings(processor),
    }
    if per_class:
        results["per_class"] = _measure_classes(model, order, predictions[:, 0], labels)
    return results


def _predict(
    model: PreTrainedModel, loader: DataLoader, device: str, order: list[int] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor], float | None]:
    """Returns each batch's five best classes and its labels, and the images per second without the first batch."""
    model.to(device).eval()
    predictions, labels = [], []
    start, before = None, 0
    with torch.inference_mode():
        for batch in tqdm(loader, desc="Evaluating", disable=None):
            output = model(batch["pixel_values"].to(device, non_blocking=True))
            logits = read_logits(output, "the model", len(batch["labels"]), model.config.num_labels)
            # Copying to the CPU waits for the device, so that the measured time includes its work.
            predictions.append(top5_indices(logits if order is None else logits[:, order]).cpu())
            labels.append(batch["labels"])
            if start is None:
                start, before = time.perf_counter(), len(batch["labels"])
    timed = sum(map(len, labels)) - before
    return predictions, labels, timed / (time.perf_counter() - start) if timed else None


def _score(predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    metrics = compute_metrics(EvalPrediction(predictions.numpy(), labels.numpy()))
    no_predictions = (predictions[:, 0] < 0).sum().item()
    return {"top1": metrics["accuracy"], "top5": metrics["top5_accuracy"], "no_predictions": no_predictions}


def _measure_classes(
    model: PreTrainedModel, order: list[int] | None, predictions: torch.Tensor, labels: torch.Tensor
) -> list[dict[str, Any]]:
    id2label = normalize_id2label(model.config.id2label)
    names = [id2label[number] for number in order or id2label]
    images = labels.bincount(minlength=len(names)).tolist()
    hits = labels[predictions == labels].bincount(minlength=len(names)).tolist()
    rows = zip(unique_names(names), images, hits, strict=True)
    classes = [{"name": name, "images": count, "top1": hit / count} for name, count, hit in rows if count]
    return sorted(classes, key=lambda row: row["top1"])


def _read_settings(processor: BaseImageProcessor) -> dict[str, Any]:
    settings = json.loads(processor.to_json_string())
    # timm's transforms follow from data_config.
    settings = settings.get("data_config", settings) | {"processor": type(processor).__name__}
    return {key: value for key, value in settings.items() if value is not None and key != "image_processor_type"}


def _check_output(path: Path) -> None:
    """Raises ValueError if the results cannot be written. It is called before hours of evaluation."""
    if path.is_dir():
        raise ValueError(
            f"--output must be a file, got the folder {path}. Name a file in it, such as {path / 'top1.json'}"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--output {path}: there is no such folder, make it first")
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise ValueError(f"--output {path} cannot be written ({error.strerror}). Name another file") from error


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device).item()  # A tensor on meta has no value.
    except (RuntimeError, AssertionError) as error:
        # For a device that torch was built without, torch's message lists the dispatch table in 59 lines.
        unknown = isinstance(error, NotImplementedError)
        fault = "this build of torch has no such device" if unknown else reason(error).partition(". ")[0]
        raise ValueError(f"device {device!r} cannot be used: {fault}. Set --device cpu, cuda or cuda:1") from error


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf evaluate`.

    Args:
        args: the command line after `nkd-hf evaluate`; None uses `sys.argv[1:]`.

    Raises:
        SystemExit: with code 2 and a message, where an argument is unknown.
        ValueError: an argument cannot be used, or as [`evaluate`].
    """
    args = _make_parser().parse_args(args)
    if args.output is not None:
        _check_output(Path(args.output))
    if args.batch_size < 1 or args.num_workers < 0:
        raise ValueError(
            f"batch_size must be positive and num_workers not negative, got {args.batch_size} and {args.num_workers}"
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    model = _open_model(args)
    results = evaluate(
        model,
        _read_data(args),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=device,
        match_names=not args.ignore_label_names,
        per_class=args.per_class,
    )
    if args.revision is not None:
        results["revision"] = args.revision
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        _print_results(args, results, model)
    if args.output is not None:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _read_data(args: argparse.Namespace) -> DataArguments:
    return DataArguments(
        dataset_name=args.dataset,
        dataset_config_name=args.dataset_config_name,
        validation_split=args.split,
        image_column_name=args.image_column_name,
        label_column_name=args.label_column_name,
        streaming=args.streaming,
        max_eval_samples=args.max_samples,
        on_bad_image=args.on_bad_image,
    )


def _open_model(args: argparse.Namespace) -> PreTrainedModel:
    if args.revision is not None and os.path.isdir(os.path.expanduser(args.model)):
        raise ValueError(
            f"--revision must be of a model on the Hub, got {args.revision!r} for the folder {args.model}. Omit --revision"
        )
    where = {} if args.revision is None else {"revision": args.revision}
    trust = args.trust_remote_code
    model = open_classifier(
        args.model, dtype=torch.float32, allow_pickle=args.allow_pickle, trust_remote_code=trust, **where
    )
    # A pretrained_cfg contains the preprocessing. Other models have a file for it, which also depends on the revision.
    if where and not getattr(model.config, "pretrained_cfg", None):
        setattr(model, IMAGE_PROCESSOR, open_image_processor(args.model, trust_remote_code=trust, **where))
    return model


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nkd-hf evaluate", description=__doc__, allow_abbrev=False)
    help_of = {field.name: field.metadata["help"] for field in dataclasses.fields(DataArguments)}
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    parser.add_argument("--dataset", required=True, help=help_of["dataset_name"])
    parser.add_argument("--dataset_config_name", help=help_of["dataset_config_name"])
    parser.add_argument("--split", help="default: the first of validation, val, valid, test that exists")
    parser.add_argument("--image_column_name", help=help_of["image_column_name"])
    parser.add_argument("--label_column_name", help=help_of["label_column_name"])
    parser.add_argument("--streaming", action="store_true", help="read the split alone, with no copy on disk")
    parser.add_argument("--max_samples", type=int, help=help_of["max_eval_samples"])
    parser.add_argument("--on_bad_image", choices=["error", "skip"], default="error", help=help_of["on_bad_image"])
    parser.add_argument("--ignore_label_names", action="store_true", help="take the classes by their numbers")
    parser.add_argument("--batch_size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument(
        "--num_workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that read images (default: %(default)s)",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--per_class", **_SWITCH, help="top-1 of each class, the worst first")
    parser.add_argument("--json", **_SWITCH, help="print the results as JSON, and nothing else, on standard output")
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON, too")
    parser.add_argument("--allow_pickle", action="store_true", help="open weights that are a pickle, tensors alone")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that lies beside the weights")
    return parser


def _print_results(args: argparse.Namespace, results: dict[str, Any], model: PreTrainedModel) -> None:
    speed = results["images_per_second"]
    measured = (
        "reading, preprocessing and forward pass, without the first batch" if speed else "there is only one batch"
    )
    bad = f", {results['bad_images']} of them bad and replaced" if results["bad_images"] else ""
    print(f"model          {args.model} ({type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters)")
    print(f"dataset        {args.dataset}, split {results['split']}, {results['images']} images{bad}")
    print("preprocessing  " + ", ".join(f"{key} {value}" for key, value in results["preprocessing"].items()))
    print(f"top-1          {100 * results['top1']:.2f} %")
    print(f"top-5          {100 * results['top5']:.2f} %")
    if results["no_predictions"]:
        print(f"no prediction  {results['no_predictions']} images, whose logits are NaN: they count as wrong")
    print(
        f"throughput     {f'{speed:.0f} images/s' if speed else 'not measured'} on {results['device']}, batch {args.batch_size}, "
        f"{args.num_workers} workers ({measured})"
    )
    if "per_class" in results:
        _print_classes(results["per_class"])


def _print_classes(classes: list[dict[str, Any]]) -> None:
    print("\ntop-1 of each class, the worst first\n\n     top-1  images  class")
    for row in classes[:_MOST_CLASSES]:
        print(f"  {100 * row['top1']:6.2f} %  {row['images']:6}  {row['name']}")
    if len(classes) > _MOST_CLASSES:
        print(f"\n{len(classes) - _MOST_CLASSES} more classes are in the JSON of --json or --output")
