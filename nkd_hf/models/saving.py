"""Saves students as transformers models and folders."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TimmWrapperForImageClassification
from transformers.utils import logging

from .feature_layers import classifier_layers
from .labels import invert_labels, normalize_id2label
from .preprocessing import load_image_processor

# The ONNX files in a student's folder have the names that users of ONNX on the Hub expect.
ONNX_FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_int8.onnx"


def save_image_processor(student: PreTrainedModel, folder: str) -> None:
    """Writes a student's image processor into its folder, for `pipeline`; timm's students have it in their config.

    Raises:
        OSError: the student came from a folder without an image processor.
    """
    if not isinstance(student, TimmWrapperForImageClassification):
        load_image_processor(student).save_pretrained(folder)


def save_student(
    student: PreTrainedModel, folder: str, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
) -> None:
    """Writes a student so that transformers and, if it is a timm model, timm open the folder with equal logits.

    ONNX files in the folder are removed if they belong to other weights.

    Args:
        student: any `*ForImageClassification`.
        folder: the folder of `model.safetensors` and `config.json`.
        state_dict: the student's gathered weights, if it is sharded.
        **kwargs: passed to `PreTrainedModel.save_pretrained`.

    Raises:
        ValueError: `config.id2label` does not name the classes 0..n-1 of the student's classifier.
    """
    state_dict = student.state_dict() if state_dict is None else state_dict
    # timm's wrapper writes the names in the order of the dict, not of the classes.
    student.config.id2label = read_class_names(student, state_dict)
    student.config.label2id = invert_labels(student.config.id2label)
    if isinstance(student, TimmWrapperForImageClassification):
        # timm knows only its own keys; transformers opens both kinds.
        state_dict = rename_keys("timm_model.", state_dict)
        # An opened config has its file's label_names, which would be written in place of the names in id2label.
        student.config.__dict__.pop("label_names", None)
        if student.config.model_args is None:
            # timm 1.0.31 can't open a folder whose model_args are null (AttributeError in _parse_model_cfg).
            student.config.model_args = {}
    # A bar of one file would break the training's own bar.
    with hidden_progress_bars(), removed_onnx_of_other_weights(folder):
        student.save_pretrained(folder, state_dict=state_dict, **kwargs)


def read_class_names(student: PreTrainedModel, state_dict: dict[str, Tensor] | None = None) -> dict[int, str]:
    """Reads the names of a student's classes in their normal form.

    `config.num_labels` is only the number of names; the classifier has one row for each class.

    Args:
        student: any `*ForImageClassification`.
        state_dict: the student's gathered weights, if it is sharded.

    Raises:
        ValueError: the names do not name the classes 0..n-1 of the student's classifier.
    """
    rows = [f"{name}.weight" for name in classifier_layers(student)]
    state_dict = student.state_dict() if state_dict is None else state_dict
    num_classes = len(state_dict[rows[-1]]) if rows and rows[-1] in state_dict else None
    return normalize_id2label(student.config.id2label, num_classes, of="the student's id2label")


@contextlib.contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Hides the progress bars of transformers when it reads or writes weights."""
    before = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **(kwargs | {"disable": True})))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@contextlib.contextmanager
def removed_onnx_of_other_weights(folder: str) -> Iterator[None]:
    """Removes the ONNX files of a student's folder if the weights beside them change within the `with` block."""
    files = [Path(folder, name) for name in (ONNX_FILE, INT8_FILE)]
    if not any(file.exists() for file in files):
        yield
        return
    before = _hash_weights(folder)
    yield
    if _hash_weights(folder) != before:
        for file in files:
            file.unlink(missing_ok=True)


def _hash_weights(folder: str) -> dict[str, str]:
    hashes = {}
    for path in Path(folder).glob("model*.safetensors"):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def rename_keys(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
