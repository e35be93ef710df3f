"""Builds a student: a timm architecture from scratch, or a model from the Hub or a folder."""

import difflib
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)

# DeiT and Swin are evaluated with bicubic resizing in the paper's tables, CNNs with bilinear.
_BICUBIC_FAMILIES = ("deit", "vit", "swin")


def create_student(
    name: str,
    *,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    model_args: dict[str, Any] | None = None,
    image_size: int = 224,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 0.875,
    interpolation: str | None = None,
) -> PreTrainedModel:
    """Builds a student that `DistillationTrainer` trains and `AutoModelForImageClassification` opens afterwards.

    Args:
        name (`str`): the name of a timm architecture (`"deit_tiny_patch16_224"`), which starts from random weights; or
            a Hub id or a folder (`"microsoft/resnet-18"`), which starts from its own weights and keeps its own
            preprocessing, so that all arguments but the labels are for timm architectures only.
        num_labels (`int`, *optional*): number of classes C; None means 1000 (ImageNet-1k) for a timm architecture, and
            else the model's own. A model that has another number gets a new head.
        id2label (`dict[int, str]`, *optional*): class names; they are saved with the student. Their number replaces
            `num_labels`.
        model_args (`dict`, *optional*): handed to `timm.create_model`, and saved: `{"drop_path_rate": 0.1}`.
        image_size (`int`, defaults to 224): height and width of the input in pixels.
        image_mean, image_std (`Sequence[float]`): per channel, in units of [0, 1]; ImageNet's by default.
        crop_pct (`float`, defaults to 0.875): evaluation resizes the short side to `image_size / crop_pct` before the
            central crop. This is the paper's preprocessing (cls_KD), not that of timm's pretrained weights.
        interpolation (`str`, *optional*): `bilinear` or `bicubic`; None takes the paper's, which is bicubic for DeiT,
            ViT and Swin and bilinear for CNNs.

    Returns:
        `PreTrainedModel`: its forward maps `pixel_values` [B, 3, H, W] to `.logits` [B, C].

    Raises:
        ValueError: `name` is neither a timm architecture nor a model that can be opened, or has no use for model_args.

    Example:

    ```python
    >>> from nkd_hf import create_student
    >>> student = create_student("resnet18", num_labels=10, image_size=32)
    >>> student.config.num_labels
    10

    ```
    """
    if id2label is not None:
        num_labels = len(id2label)
    if timm.is_model(name) and "." in name:
        raise ValueError(
            f"{name!r} names pretrained weights by its tag: write 'timm/{name}' for those, or "
            f"{name.partition('.')[0]!r} for the architecture with random weights"
        )
    if not timm.is_model(name):
        return _open_student(name, num_labels, id2label, model_args)
    if not 0 < crop_pct <= 1 or len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
        raise ValueError(
            f"expected 0 < crop_pct <= 1, and three values each of image_mean and image_std, of which the latter are > 0; "
            f"got crop_pct={crop_pct}, image_mean={list(image_mean)}, image_std={list(image_std)}"
        )
    if interpolation not in (None, "bilinear", "bicubic"):
        raise ValueError(f"interpolation must be bilinear or bicubic, got {interpolation!r}")
    model_args = dict(model_args or {})
    if interpolation is None:
        interpolation = "bicubic" if name.startswith(_BICUBIC_FAMILIES) else "bilinear"
    # Transformers are built for one input size; CNNs do not know the argument.
    if name.startswith(_BICUBIC_FAMILIES):
        model_args.setdefault("img_size", image_size)
    config = TimmWrapperConfig(
        architecture=name,
        num_labels=num_labels or 1000,
        id2label=id2label,
        label2id=None if id2label is None else {label: i for i, label in id2label.items()},
        model_args=model_args or None,
        pretrained_cfg={
            "input_size": [3, image_size, image_size],
            "mean": list(image_mean),
            "std": list(image_std),
            "crop_pct": crop_pct,
            "interpolation": interpolation,
        },
    )
    try:
        return TimmWrapperForImageClassification(config)
    except TypeError as error:
        raise ValueError(f"timm's {name} does not take model_args={model_args}: {error}") from error


def _open_student(
    name: str, num_labels: int | None, id2label: dict[int, str] | None, model_args: dict[str, Any] | None
) -> PreTrainedModel:
    if "/" not in name and not os.path.isdir(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise ValueError(
            f"{name!r} is neither a timm architecture (near: {near}) nor a folder, and a Hub id has a slash (owner/name)"
        )
    if model_args:
        raise ValueError(f"model_args are for timm architectures, but {name!r} is opened as it is: leave them out")
    if id2label is not None:
        num_labels = len(id2label)
    labels = {} if num_labels is None else {"num_labels": num_labels}
    try:
        # In float32 whatever the file has: half precision is autocast's business, not that of the weights that train.
        student = AutoModelForImageClassification.from_pretrained(
            name, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"student {name!r} could not be opened as a Hub id or a folder: {error}") from error
    if id2label is not None:
        student.config.id2label = dict(id2label)
        student.config.label2id = {label: i for i, label in id2label.items()}
    return student


def load_image_processor(student: PreTrainedModel) -> BaseImageProcessor:
    """Gives the image processor that belongs to a student: what `pipeline("image-classification")` will use.

    Evaluation calls the same processor, so that what was measured is what a user of the student gets.

    Args:
        student: what [`create_student`] returned.

    Returns:
        `BaseImageProcessor`: `processor(image, return_tensors="pt")["pixel_values"]` is [1, 3, H, W] float32.
    """
    if isinstance(student, TimmWrapperForImageClassification):
        return TimmWrapperImageProcessor(student.config.pretrained_cfg, architecture=student.config.architecture)
    return AutoImageProcessor.from_pretrained(student.name_or_path)
