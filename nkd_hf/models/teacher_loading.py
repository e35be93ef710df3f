"""Opens a teacher, or several teachers as one."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import nn
from transformers import BaseImageProcessor

from ..errors import NoClassifierError, RefusedError
from .loading import open_image_processor, open_pretrained
from .preprocessing import read_preprocessing
from .repo_ids import read_repo_id
from .teacher import Teacher
from .teacher_ensemble import TeacherEnsemble
from .zero_shot import check_prompts, is_zero_shot, open_zero_shot


def load_teacher(
    teacher: str | nn.Module | Sequence[str | nn.Module],
    *,
    weights: Sequence[float] | None = None,
    prompts: str | Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    processing_class: BaseImageProcessor | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Teacher:
    """Opens a teacher, or several teachers as one.

    Args:
        teacher (`str`, `nn.Module` or a list of them): a Hub id (`"timm/resnet34.tv_in1k"`), a folder, or a module: any
            `*ForImageClassification` of transformers, or a timm model, also in `DataParallel`,
            `DistributedDataParallel` or `torch.compile`, which are removed. The teacher shares a module's weights and
            does not change its mode and `requires_grad`. A list becomes a [`TeacherEnsemble`]: its logits are the
            logarithm of the weighted mean of its members' probabilities, each with its own preprocessing, precision
            and order of labels.
        weights (`Sequence[float]`, *optional*): the positive weight of each teacher of a list; the weights are divided
            by their sum. None gives all teachers the same weight.
        prompts (`str` or a list of them, *optional*): for the Hub id or folder of a CLIP or SigLIP model, which is used
            zero-shot: texts with one `{}` each, for the name of a class (`"a photo of a {}."`). The embeddings of a
            class's texts are averaged. They are computed here, once, and the model's text side is not kept. In a list,
            the prompts are for the ids and folders of such models, and the others are opened as classifiers.
        class_names (`Sequence[str]`, *optional*): the names that replace `{}`, in the order of the logits; only for
            `prompts`.
        processing_class (`BaseImageProcessor`, *optional*): the image processor of a native transformers module, which
            does not contain its preprocessing. None reads it from the module's folder or repo; if there is none, the
            module gets the student's pixels, with a warning.
        allow_pickle (`bool`): whether a Hub id or folder may have its weights in a pickle (`pytorch_model.bin`); only the
            pickle's tensors are read.
        trust_remote_code (`bool`): whether code that lies beside the weights may run.

    Returns:
        [`Teacher`]

    Raises:
        ValueError: the id or folder cannot be opened, or has only files that are not allowed; the model is for regression or
            for several labels an image (`problem_type`); the weights are not one positive number for each teacher; a CLIP or
            SigLIP model comes without prompts, or prompts come with another model. The error is a
            [`~nkd_hf.errors.NoClassifierError`] if the id or folder lacks only the classifier.

    Example:

    ```python
    >>> from nkd_hf import create_student, load_teacher
    >>> teacher = load_teacher(create_student("resnet18", num_labels=10, image_size=32))
    >>> teacher.training, teacher.preprocessing.size
    (False, (32, 32))

    ```
    """
    if (prompts is None) != (class_names is None):
        raise ValueError("prompts and class_names must come together, got one of them. Pass both, or omit both")
    if prompts is not None and not isinstance(teacher, str | os.PathLike | list | tuple):
        raise ValueError(
            f"prompts must come with the Hub id or folder of a CLIP or SigLIP model, got a {type(teacher).__name__}. Load "
            "each such teacher by load_teacher(name, prompts=..., class_names=...)"
        )
    prompts = None if prompts is None else check_prompts(prompts)
    if isinstance(teacher, list | tuple):
        if processing_class is not None:
            raise ValueError(
                "processing_class must be omitted for a list of teachers, got one. Pass load_teacher(model, "
                "processing_class=its_image_processor) in the list"
            )
        texts = {} if prompts is None else {"prompts": prompts, "class_names": class_names}
        members = _open_members(teacher, texts, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        return TeacherEnsemble(members, weights)
    if weights is not None:
        raise ValueError(f"weights must be omitted for one teacher, got {list(weights)}. Pass a list of teachers")
    if isinstance(teacher, nn.Module):
        teacher = unwrap_module(teacher)
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        config = getattr(teacher, "config", None)
        id2label = getattr(config, "id2label", None)
        return Teacher(teacher, read_preprocessing(teacher, processing_class), id2label, type(teacher).__name__)
    if not isinstance(teacher, str | os.PathLike):
        raise ValueError(f"teacher must be a Hub id, a folder or a module, got a {type(teacher).__name__}")
    options = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    return _open_teacher(os.fspath(teacher), prompts, class_names, processing_class, options)


def open_backbone(name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Teacher:
    """Opens a model without a classifier as a teacher with a new classifier of two classes, which must be trained
    first.

    Args:
        name, allow_pickle, trust_remote_code: see [`load_teacher`].

    Raises:
        ValueError: the id or folder cannot be opened, or lacks other weights, too.
    """
    options = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    return _open_teacher(name, None, None, None, options | {"new_head": True, "num_labels": 2})


def _open_teacher(
    teacher: str,
    prompts: Sequence[str] | None,
    class_names: Sequence[str] | None,
    processing_class: BaseImageProcessor | None,
    options: dict[str, Any],
) -> Teacher:
    """Opens a teacher by its Hub id or folder, with its image processor; `options` are for [`open_pretrained`]."""
    teacher = read_repo_id(teacher, "teacher")
    trust_remote_code = options["trust_remote_code"]
    try:
        model = _open_model(teacher, prompts, class_names, options)
        if processing_class is None and not getattr(model.config, "pretrained_cfg", None):
            try:
                processing_class = open_image_processor(model.name_or_path, trust_remote_code=trust_remote_code)
            except OSError as error:
                raise RefusedError(
                    "it has no image processor (preprocessor_config.json). Save the model's beside it "
                    "(processor.save_pretrained), or pass processing_class to load_teacher"
                ) from error
    except NoClassifierError as error:
        raise NoClassifierError(f"teacher {teacher!r} is not opened: {error}") from error
    except RefusedError as error:
        raise ValueError(f"teacher {teacher!r} is not opened: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher {teacher!r} could not be opened: give the id of an image classifier on the Hub (is there a "
            f"network, is HF_HUB_OFFLINE unset, is the id cached?) or a folder that save_pretrained wrote"
            f"{'' if os.path.isdir(os.path.expanduser(teacher)) else f' (there is no folder {teacher!r} here)'}. {error}"
        ) from error
    return Teacher(model, read_preprocessing(model, processing_class), model.config.id2label, teacher)


def takes_prompts(teacher: str | nn.Module, trust_remote_code: bool = False) -> bool:
    """Whether [`load_teacher`] opens a teacher by `prompts`; also False if its configuration cannot be read."""
    if not isinstance(teacher, str | os.PathLike):
        return False
    with contextlib.suppress(OSError, ValueError):
        return is_zero_shot(read_repo_id(os.fspath(teacher), "teacher"), trust_remote_code)
    return False


def _open_members(
    teachers: Sequence[str | nn.Module], texts: dict[str, Any], *, trust_remote_code: bool, **options: bool
) -> list[Teacher]:
    """Opens each teacher of a list, with the prompts if it takes prompts."""
    by_texts = [bool(texts) and takes_prompts(each, trust_remote_code) for each in teachers]
    members = [
        load_teacher(each, **texts if is_by_texts else {}, trust_remote_code=trust_remote_code, **options)
        for each, is_by_texts in zip(teachers, by_texts, strict=True)
    ]
    if texts and not any(by_texts):
        names = ", ".join(member.name for member in members)
        raise ValueError(
            f"prompts are for a CLIP or SigLIP model, which classifies by texts, got {names}. Omit them (in a recipe: "
            "teacher_prompts)"
        )
    return members


def _open_model(
    name: str, prompts: Sequence[str] | None, class_names: Sequence[str] | None, options: dict[str, Any]
) -> nn.Module:
    """Opens a classifier, or a CLIP or SigLIP model as one."""
    if not is_zero_shot(name, options["trust_remote_code"]):
        model = open_pretrained(name, **options, dtype=torch.float32)
        if prompts is not None:
            raise RefusedError(
                f"prompts are for a CLIP or SigLIP model, which classifies by texts, got {type(model).__name__}. Omit them "
                "(in a recipe: teacher_prompts)"
            )
        return model
    if prompts is None:
        raise RefusedError(
            "it classifies by texts, so it needs prompts with a {} for the name of a class. Set teacher_prompts in a recipe "
            "('a photo of a {}.', for example), or pass prompts and class_names to load_teacher"
        )
    return open_zero_shot(name, prompts, class_names, **options)


def unwrap_module(module: nn.Module) -> nn.Module:
    """Returns the module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`.

    These wrappers have neither the module's configuration, with the names of the classes, nor its preprocessing.
    """
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif is_compiled_module(module):
            module = module._orig_mod
        else:
            return module
