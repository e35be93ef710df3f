"""Writes the text of a card, section by section."""

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping

from torch import nn

from ...teacher_logits.info import TeacherDescription
from .curves import read_accuracies
from .facts import Run, architecture
from .text import code, code_block, link, plain, plain_folder, plain_name

_FILES = {
    "student": "**this model**",
    "student_onnx": "`onnx/model.onnx`",
    "student_int8": "`onnx/model_int8.onnx`",
    "baseline": "this model, trained without distillation",
    "teacher": "the teacher",
}
_LIBRARIES = ("nkd_hf", "torch", "transformers", "timm", "datasets", "accelerate", "huggingface_hub")


def body(run: Run) -> str:
    """Returns the text of the card without its metadata."""
    title = f"# {_name_or_code(plain_name(run.name))}"
    sections = (summary, results, deployment, usage, training, limitations, citation)
    return "\n\n".join([title, *(text for section in sections if (text := section(run)))])


def summary(run: Run) -> str:
    """Names student, teacher, losses, dataset and accuracy in a few sentences."""
    classes = f"{run.student.config.num_labels} classes"
    what = f"{_architecture(run.student)} ({_count(run.student.num_parameters())} parameters, {classes}), "
    losses = " and ".join(map(_loss, run.losses.values()))
    if not losses:
        what += "trained with the cross-entropy alone, without a distillation loss"
    elif run.teacher is None:
        what += f"distilled from itself, without a teacher, with {losses}"
    else:
        what += f"distilled from {_teacher(run)} with {losses}"
    trained_on = [] if run.info.trained_without_labels else [_datasets(run)] if run.datasets else []
    trained_on += [f"{_unlabeled(run)} without labels"] if run.info.unlabeled_dataset else []
    what += f", on {' and '.join(trained_on)}" if trained_on else ""
    what += f". Its weights started from {link(run.start)}." if run.start else "."
    accuracy, baseline = run.results.get("", {}).get("accuracy"), run.info.baseline
    if accuracy is not None:
        what += f" Top-1 accuracy on held-out images: {100 * accuracy:.2f} %"
        if losses and baseline:
            what += (
                f"; {100 * baseline['accuracy']:.2f} % without distillation "
                f"({100 * (accuracy - baseline['accuracy']):+.2f} points)"
            )
        what += "."
    return what


def results(run: Run) -> str:
    """Lists the measured accuracies, and shows the curves."""
    lines = ["## Results", ""]
    if run.results:
        where = f", {_dataset(run.datasets[0])}" if run.datasets else ""
        where += f", split {code(run.info.dataset_split)}" if run.info.dataset_split else ""
        images = (
            "held-out images" if run.info.num_eval_images is None else f"{run.info.num_eval_images} held-out images"
        )
        lines += [f"Accuracy in % on {images}{where}:", "", "| model | top-1 | top-5 |", "|---|---|---|"]
        student = _architecture(run.student)
        if run.info.teacher and run.teachers:
            lines.append(_row(_teacher_of_row(run), run.info.teacher))
        if run.info.teacher_on_student_pixels and run.teachers:
            name = f"{_teacher_of_row(run)}, on the student's pixels"
            lines.append(_row(name, run.info.teacher_on_student_pixels))
        if run.info.baseline and run.losses:
            lines.append(_row(f"{student}, trained in the same way without distillation", run.info.baseline))
        for part, values in run.results.items():
            lines.append(_row(f"**{student}, this model**{f', on {code(part)}' if part else ''}", values))
    else:
        lines.append("**Not evaluated**: the accuracy of these weights was not measured.")
        if run.last_evaluation:
            accuracy = next(iter(read_accuracies(run.last_evaluation).values()))["accuracy"]
            lines[-1] += (
                f" The last evaluation was at step {run.last_evaluation['step']} (top-1 {100 * accuracy:.2f} %), and these "
                f"are the weights of step {run.state.global_step}."
            )
    if run.curves:
        alt = "Accuracy on held-out images, and training loss with its components, in the course of training"
        lines += ["", f"![{alt}]({run.curves})"]
    return "\n".join(lines)


def deployment(run: Run) -> str:
    """Lists size and speed of the models, and names the ONNX files."""
    models = run.info.deployment
    if not models:
        return ""
    lines = [
        "## Deployment",
        "",
        "| model | top-1 | size, MB | one image, ms (p95) | images/s |",
        "|---|---|---|---|---|",
    ]
    for name, figures in models.items():
        latency = figures["latency_ms"]
        cells = [
            _FILES.get(name, name),
            f"{100 * figures['top1']:.2f}",
            f"{figures['size_bytes'] / 1e6:.2f}",
            f"{latency['p50']:.2f} ({latency['p95']:.2f})",
            f"{figures['images_per_second']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Measured on one CPU thread; the models took turns."]
    if "student_onnx" in models:
        lines[-1] += (
            " The ONNX files take `pixel_values` [batch, 3, H, W] float32, which `preprocessor_config.json` describes."
        )
    if run.info.temperature is not None:
        lines[-1] += (
            f" For calibrated probabilities, divide the logits by {run.info.temperature:g} (temperature scaling on the held-out "
            "images); the weights are without it."
        )
    return "\n".join(lines)


def usage(run: Run) -> str:
    """Shows code that opens the student."""
    source = plain_name(run.repo_id or run.name) if run.folder is None else plain_folder(run.folder)
    model, trust = json.dumps(source), ", trust_remote_code=True" if run.has_own_code else ""
    blocks = [
        f"""\
from transformers import pipeline

classifier = pipeline("image-classification", model={model}{trust})
print(classifier("image.png"))""",
        f"""\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained({model})
model = AutoModelForImageClassification.from_pretrained({model}{trust}).eval()
with torch.no_grad():
    logits = model(**processor(Image.open("image.png").convert("RGB"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax(-1).item()])""",
    ]
    if run.is_timm:
        model = json.dumps(("local-dir:" if run.repo_id is None else "hf-hub:") + source)
        blocks.append(f"""\
import timm
import torch
from PIL import Image

model = timm.create_model({model}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.no_grad():
    logits = model(transform(Image.open("image.png").convert("RGB")).unsqueeze(0))""")
    text = "## How to use\n\n" + "\n\n".join(code_block(block, "python") for block in blocks)
    if trust:
        text += "\n\n`trust_remote_code=True` runs the modelling file that lies beside the weights: read it first."
    return text


def training(run: Run) -> str:
    """Lists settings, launch line and versions."""
    args, state = run.args, run.state
    batch, accumulation = args.process_batch_size(state.train_batch_size), args.gradient_accumulation_steps
    global_batch = args.global_batch_size(state.train_batch_size)
    split = f" = {batch} x {accumulation} accumulated x {args.world_size} processes" if global_batch > batch else ""
    images = "" if run.info.num_train_images is None else f"{run.info.num_train_images} images"
    # With max_steps, epochs have no meaning: a stream is one epoch.
    epochs = "" if args.max_steps > 0 else f"{state.epoch or 0:.4g} of {args.num_train_epochs:g} epochs, "
    # Below 1, warmup_steps is a fraction of the steps.
    warmup = f"{100 * args.warmup_steps:g} %" if args.warmup_steps < 1 else f"{args.warmup_steps:g} steps"
    smoothing = f" (label smoothing {args.label_smoothing_factor:g})" if args.label_smoothing_factor else ""
    task_weight = math.prod(getattr(loss, "task_weight", 1) for loss in run.losses.values())
    task = "cross-entropy" if task_weight == 1 else f"{task_weight:.3g} x cross-entropy"
    tasks = [] if run.info.trained_without_labels else [f"{task}{smoothing}"]
    facts = {
        "data": "" if run.info.trained_without_labels else ", ".join(filter(None, (_datasets(run), images))),
        "data without labels": _unlabeled(run),
        "length": f"{epochs}{state.global_step} optimiser steps",
        "loss": " + ".join([*tasks, *map(_loss, run.losses.values())]),
        "global batch": f"{global_batch}{split}",
        "optimiser": code(args.optim.value)
        + (f" ({code(args.optim_args)})" if args.optim_args else "")
        + f", learning rate {args.scaled_learning_rate(global_batch):g}, weight decay {args.weight_decay:g}"
        + (f", gradient norm clipped at {args.max_grad_norm:g}" if args.max_grad_norm else ""),
        "schedule": code(args.lr_scheduler_type.value)
        + (f" ({code(json.dumps(args.lr_scheduler_kwargs))})" if args.lr_scheduler_kwargs else "")
        + (f", warm-up {warmup}" if args.warmup_steps else ""),
        "class weights": code(run.info.class_weights) if run.info.class_weights else "",
        "augmentation": code(run.info.augmentation) if run.info.augmentation else "",
        "mixed precision": "" if args.mixed_precision == "no" else args.mixed_precision,
        "moving average of the weights": "" if args.ema_decay is None else f"decay {args.ema_decay:g}",
        "seed": str(args.seed),
    }
    lines = ["## Training", "", *(f"- {name}: {value}" for name, value in facts.items() if value)]
    if run.info.launch:
        lines += ["", code_block(plain(run.info.launch), "bash")]
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{library} {importlib.metadata.version(library)}" for library in _LIBRARIES]
    return "\n".join([*lines, "", f"Versions: {', '.join(versions)}."])


def limitations(run: Run) -> str:
    """States the properties that were not measured, and a missing licence."""
    text = (
        f"For any image, the model answers with one of its {run.student.config.num_labels} classes; its scores are no "
        "calibrated probabilities. Robustness, bias and other data were not measured."
    )
    text += " It may have learned its teacher's errors." if run.teacher is not None else ""
    text += " The figures are of one run with one seed." if run.results else ""
    text += " No licence was set for these weights." if run.info.license is None else ""
    return f"## Limitations\n\n{text}"


def citation(run: Run) -> str:
    """Returns the BibTeX entries of the methods' papers; empty if there are none."""
    citations = dict.fromkeys(filter(None, (own_text(loss, "citation") for loss in run.losses.values())))
    return "## Citation\n\n" + code_block("\n\n".join(citations), "bibtex") if citations else ""


def _name_or_code(name: str) -> str:
    """Returns the name, as a code span if Markdown could read it as markup."""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]*", name) else code(name)


def _row(name: str, values: Mapping[str, float]) -> str:
    cells = [f"{100 * values[key]:.2f}" if key in values else "" for key in ("accuracy", "top5_accuracy")]
    # In a table, a pipe ends a cell even in a code span.
    return f"| {' | '.join([name.replace('|', chr(92) + '|'), *cells])} |"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters / 1e3:.0f} k"


def _architecture(model: nn.Module) -> str:
    return code(architecture(model))


def _teacher(run: Run) -> str:
    members = [_member(teacher) for teacher in run.teachers]
    return members[0] if len(members) == 1 else f"an ensemble of {', '.join(members[:-1])} and {members[-1]}"


def _member(teacher: TeacherDescription) -> str:
    name = code(teacher.architecture) if teacher.name is None else link(teacher.name)
    weight = "" if teacher.weight is None else f", weight {teacher.weight:.3g}"
    return f"{name} ({_count(teacher.num_parameters)} parameters{weight})"


def _teacher_of_row(run: Run) -> str:
    names = [code(teacher.architecture) for teacher in run.teachers]
    return f"the teacher, {names[0]}" if len(names) == 1 else f"the teachers together, {' + '.join(names)}"


def _loss(loss: nn.Module) -> str:
    name, paper = own_text(loss, "name"), own_text(loss, "paper")
    text = _name_or_code(name) if name else code(type(loss).__name__)
    text = f"[{text}]({paper})" if re.fullmatch(r"https?://[^\s<>()]+", paper) else text
    return f"{text} ({code(loss.extra_repr())})" if loss.extra_repr() else text


def own_text(loss: nn.Module, attribute: str) -> str:
    """Returns `name`, `paper` or `citation` of a loss's own class, since a subclass of NKDLoss is another method."""
    text = vars(type(loss)).get(attribute)
    return text if isinstance(text, str) else ""


def _datasets(run: Run) -> str:
    return " and ".join(map(_dataset, run.datasets))


def _unlabeled(run: Run) -> str:
    if run.info.unlabeled_dataset is None:
        return ""
    count = run.info.num_unlabeled_images
    images = "" if count is None else f"{count} images of "
    return images + _dataset(run.info.unlabeled_dataset)


def _dataset(dataset: str) -> str:
    return "scikit-learn's digits" if dataset == "digits" else link(dataset, "datasets/")
