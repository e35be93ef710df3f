"""Builds a student: an architecture from scratch, or a model from the Hub or a folder."""

import contextlib
import difflib
import logging
import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification

from ..errors import RefusedError
from .architectures import ARCHITECTURES, is_architecture
from .feature_layers import classifier_layers
from .feature_layout import input_size, run_once
from .image_sizes import (
    describe_fault,
    image_size_advice,
    is_of_the_meta_device,
    own_image_size,
    run_fault,
    takes_img_size,
    try_image_size,
)
from .labels import invert_labels, is_generic, normalize_id2label, reorder
from .loading import open_pretrained
from .model_config import check_model_args
from .repo_ids import read_repo_id
from .student_preprocessing import change_preprocessing, check_opened_size, check_preprocessing

logger = logging.getLogger(__name__)

# timm raises these exceptions for arguments or sizes that an architecture doesn't take.
_BUILD_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError)
# DeiT and Swin are evaluated with bicubic resizing in the paper's tables, CNNs with bilinear.
_BICUBIC_FAMILIES = ("deit", "vit", "swin")
# Architectures, with arguments and size, that have passed their trial: a recipe builds the same student several times.
_WORKING: set[str] = set()


def create_student(
    name: str,
    *,
    num_labels: int | None = None,
    id2label: dict[int, str] | Sequence[str] | None = None,
    model_args: dict[str, Any] | None = None,
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Builds a student that `DistillationTrainer` trains and `AutoModelForImageClassification` opens afterwards.

    Args:
        name (`str`): the name of an architecture, which starts from random weights: one of timm's
            (`"deit_tiny_patch16_224"`), `"shufflenet_v2_x1_0"`, `"resnet18_cifar"` or `"resnet34_cifar"`; or a Hub id or
            a folder (`"microsoft/resnet-18"`), which starts from its own weights, and keeps its own preprocessing where
            the arguments from `image_size` to `interpolation` are None.
        num_labels (`int`, *optional*): number of classes C; None means 1000 (ImageNet-1k) for an architecture, 100
            (CIFAR-100) for `*_cifar`, and else the model's own number. A model with another number gets a new head.
        id2label (`dict[int, str]` or a list, *optional*): class names; they are saved with the student. Their number
            replaces `num_labels`. Numbers may be text, as in JSON; see [`normalize_id2label`]. If a Hub id or a folder
            has the same names in another order, the rows of its classifier are put in this order. If it has as many
            classes under other names, its classifier does not change, and its classes get these names.
        model_args (`dict`, *optional*): passed to `timm.create_model`, and saved: `{"drop_path_rate": 0.1}`. For the
            three others: `stages_repeats` and `stages_out_channels`, or `layers`.
        image_size (`int`, *optional*): height and width of the input in pixels; None means the
            architecture's own where timm fixes it (336 for `eva_large_patch14_336`), 32 for `*_cifar`, and else 224.
        image_mean, image_std (`Sequence[float]`, *optional*): per channel, in units of [0, 1]; None means ImageNet's,
            or CIFAR-100's for `*_cifar`.
        crop_pct (`float`, *optional*): evaluation resizes the short side to `image_size / crop_pct` before the central
            crop; None means 0.875, or 1.0 for `*_cifar`. This is the paper's preprocessing (cls_KD); timm's pretrained
            weights have another one.
        interpolation (`str`, *optional*): `bilinear` or `bicubic`; None means the paper's, which is bicubic for DeiT,
            ViT and Swin and bilinear for CNNs.
        allow_pickle (`bool`): whether a Hub id or folder may have its weights in a pickle (`pytorch_model.bin`); only the
            pickle's tensors are read.
        trust_remote_code (`bool`): whether code that lies beside the weights of a Hub id or folder may run.

    Returns:
        `PreTrainedModel`: its forward maps `pixel_values` [B, 3, H, W] to `.logits` [B, C].

    Raises:
        ValueError: `name` is neither an architecture nor a model that can be opened, or does not take one of the arguments;
            for an `image_size` that it does not take, the message names sizes that it takes. The model's class names,
            or the names in `id2label`, do not name the classes 0..n-1. The classes must be put in another order, and
            their names repeat or the classifier is not known.

    Example:

    ```python
    >>> from nkd_hf import create_student
    >>> student = create_student("resnet18", num_labels=10, image_size=32)
    >>> student.config.num_labels
    10

    ```
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"name must be the name of an architecture, a folder or a Hub id, got {name!r}")
    name = read_repo_id(os.fspath(name), "name")
    if id2label is not None:
        id2label = normalize_id2label(id2label)
        num_labels = len(id2label)
    if timm.is_model(name) and "." in name:
        raise ValueError(
            f"{name!r} names pretrained weights by its tag: write 'timm/{name}' for those, or "
            f"{name.partition('.')[0]!r} for the architecture with random weights"
        )
    preprocessing = {"image_size": image_size, "image_mean": image_mean, "image_std": image_std}
    preprocessing |= {"crop_pct": crop_pct, "interpolation": interpolation}
    if is_architecture(name):
        return _create_from_scratch(name, num_labels, id2label, dict(model_args or {}), preprocessing)
    student = _open_student(name, num_labels, id2label, model_args, allow_pickle, trust_remote_code)
    check_preprocessing(**preprocessing)
    if any(value is not None for value in preprocessing.values()):
        change_preprocessing(student, **preprocessing)
    else:
        check_opened_size(student)
    return student


def _create_from_scratch(
    name: str,
    num_labels: int | None,
    id2label: dict[int, str] | None,
    model_args: dict[str, Any],
    preprocessing: dict[str, Any],
) -> PreTrainedModel:
    """Builds an architecture with random weights; the preprocessing's settings that are None are its own."""
    check_model_args(model_args)
    own = _default_preprocessing(name)
    own_size = own["input_size"][-1]
    size = _square(model_args.get("img_size")) or own_size
    default = own | {"image_size": size, "image_mean": own["mean"], "image_std": own["std"]}
    settings = {key: default[key] if value is None else value for key, value in preprocessing.items()}
    check_preprocessing(**settings)
    image_size = settings["image_size"]
    pretrained_cfg = {
        "input_size": [3, image_size, image_size],
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
        "crop_pct": settings["crop_pct"],
        "interpolation": settings["interpolation"],
    }
    if num_labels is None:
        num_labels = ARCHITECTURES[name].num_labels if name in ARCHITECTURES else 1000
    labels = {"num_labels": num_labels}
    if id2label is not None:
        labels |= {"id2label": id2label, "label2id": invert_labels(id2label)}
    return _build(name, model_args, image_size, own_size, pretrained_cfg=pretrained_cfg, **labels)


def _build(name: str, model_args: dict[str, Any], image_size: int, own_size: int, **config) -> PreTrainedModel:
    """Builds an architecture, after a trial on the meta device of the size and the arguments."""

    def build(size: int) -> PreTrainedModel:
        config["pretrained_cfg"] = config["pretrained_cfg"] | {"input_size": [3, size, size]}
        if name in ARCHITECTURES:
            return _create_from_config(name, model_args, **config)
        args = ({"img_size": size} if takes_img_size(name) else {}) | model_args
        return TimmWrapperForImageClassification(
            # timm can't open a folder whose model_args are null.
            TimmWrapperConfig(architecture=name, model_args=args, **config)
        )

    on_meta = torch.get_default_device().type == "meta"
    tried = repr((name, model_args, image_size, config["num_labels"]))
    if tried in _WORKING and not on_meta:
        return build(image_size)
    student, fault = try_image_size(build, image_size)
    student = student if on_meta else None
    if fault is not None and is_of_the_meta_device(fault):
        with contextlib.suppress(*_BUILD_ERRORS):
            student = build(image_size)
            fault = run_fault(student, image_size)
    if fault is None:
        _WORKING.add(tried)
        return build(image_size) if student is None else student
    if advice := image_size_advice(build, image_size, own_size):
        raise ValueError(
            f"image_size must be a size that {name} takes, got {image_size} ({describe_fault(fault)}). {advice}"
        ) from fault
    if name in ARCHITECTURES:
        raise fault
    if not model_args:
        raise ValueError(
            f"timm's {name} can't be trained here: {describe_fault(fault)}. Take another student"
        ) from fault
    raise ValueError(f"timm's {name} does not take model_args={model_args}: {fault}") from fault


def _square(img_size: Any) -> int | None:
    """Returns the side of timm's `img_size`; None if it is not square."""
    sides = list(img_size) if isinstance(img_size, (tuple, list)) else [img_size]
    return sides[0] if sides and isinstance(sides[0], int) and all(side == sides[0] for side in sides) else None


def _default_preprocessing(name: str) -> dict[str, Any]:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].model_class.config_class().pretrained_cfg
    size = own_image_size(name)
    return {
        "input_size": [3, size, size],
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "crop_pct": 0.875,
        "interpolation": "bicubic" if name.startswith(_BICUBIC_FAMILIES) else "bilinear",
    }


def _create_from_config(name: str, model_args: dict[str, Any], **kwargs) -> PreTrainedModel:
    model_class, _, settings = ARCHITECTURES[name]
    if unknown := sorted(set(model_args) - set(settings)):
        raise ValueError(
            f"{name} does not take model_args={model_args}: expected some of {list(settings)}, got {unknown}"
        )
    try:
        return model_class(model_class.config_class(**(settings | model_args), **kwargs))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} does not take model_args={model_args}: {error}") from error


def check_name(name: str) -> None:
    """Raises ValueError for a name that is no architecture, no folder and no Hub id; the message has similar names."""
    if is_architecture(name) or "/" in name or os.path.exists(name):
        return
    names = [*ARCHITECTURES, *timm.list_models()]
    near = ", ".join(difflib.get_close_matches(name, names, n=5)) or f"see timm.list_models() and {[*ARCHITECTURES]}"
    raise ValueError(
        f"{name!r} is neither a timm architecture (near: {near}) nor a folder, and a Hub id has a slash (owner/name)"
    )


def _open_student(
    name: str,
    num_labels: int | None,
    id2label: dict[int, str] | None,
    model_args: dict[str, Any] | None,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> PreTrainedModel:
    check_name(name)
    if model_args:
        raise ValueError(f"model_args are for timm architectures, but {name!r} is opened as it is: omit them")
    labels = {} if num_labels is None else {"num_labels": num_labels}
    try:
        # The weights are opened in float32, since they train in it; autocast computes in half precision.
        student = open_pretrained(
            name,
            new_head=True,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            dtype=torch.float32,
            **labels,
        )
    except RefusedError as error:
        raise ValueError(f"student {name!r} is not opened: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"student {name!r} could not be opened as a Hub id or a folder: {error}") from error
    if id2label is None:
        names, num_classes = student.config.id2label, student.config.num_labels
        # PVT's configuration has a number of classes beside their names, and may lack names.
        if not names or (num_labels is not None and len(names) != num_classes):
            names = [f"LABEL_{i}" for i in range(num_classes)]
        id2label = normalize_id2label(names, num_classes, of=f"the id2label of student {name!r}")
    elif not student.starts_with_new_head:
        _put_in_order(student, name, list(id2label.values()))
    student.config.id2label, student.config.label2id = id2label, invert_labels(id2label)
    return student


def _put_in_order(student: PreTrainedModel, name: str, names: list[str]) -> None:
    """Puts the rows of an opened student's classifier in the order of `names`, if its names have another order."""
    try:
        saved = list(normalize_id2label(student.config.id2label, len(names)).values())
    except ValueError:  # no names
        return
    try:
        order = reorder(names, saved)
    except ValueError as error:
        raise ValueError(f"the id2label for student {name!r} does not fit it: {error}") from error
    if order is None:
        if names != saved and not is_generic(names) and not is_generic(saved):
            logger.info("The classes of student %s get other names; its classifier is unchanged.", name)
        return
    layers = classifier_layers(student)
    is_meta = student.device.type == "meta"
    before = None if is_meta else run_once(student, input_size(student)).logits
    with torch.no_grad():
        for layer in layers.values():
            for rows in (layer.weight, layer.bias):
                if rows is not None and len(rows) == len(order):
                    rows.copy_(rows[order])
    is_done = is_meta or _is_close(run_once(student, input_size(student)).logits, before[:, order])
    if not layers or not is_done:
        raise ValueError(
            f"id2label must name the classes of student {name!r} in its order, {', '.join(saved[:3])} ..., got another, and "
            f"no classifier whose rows are its classes is known in {type(student).__name__}. Name them in its order"
        )
    logger.info("The rows of the classifier of student %s are put in the order of id2label.", name)


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=1e-3, atol=1e-5, equal_nan=True)


def describe_start(student: PreTrainedModel) -> str:
    """Describes the start of a student: `random weights`, or `pretrained`, maybe with a new head."""
    if not student.name_or_path:
        return "random weights"
    if student.starts_with_new_head:
        return f"pretrained, new head of {student.config.num_labels} classes"
    return "pretrained"
