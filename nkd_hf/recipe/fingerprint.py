"""What teacher logits are a function of: two runs of one fingerprint give the teacher the same pixels."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..data.arguments import DataArguments
from ..data.decoding import read_bytes
from ..data.transforms import PIXELS_VERSION
from ..models.architectures import is_architecture
from ..models.preprocessing import RGB, Preprocessing
from ..models.teacher import load_teacher
from ..teacher_logits.store import StoreInfo
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments

logger = logging.getLogger(__name__)

_AUGMENTATION = (
    "random_resized_crop", "random_crop_padding", "horizontal_flip", "auto_augment", "random_erasing", "pca_lighting",
    "mixup_alpha", "cutmix_alpha",
)  # fmt: skip
# Their decoders and transforms make the pixels.
_LIBRARIES = ("pillow", "timm", "torch", "torchcodec", "torchvision")
# How many images are read for the fingerprint: all of them would take as long as an epoch.
_NUM_IMAGES = 64


def run_fingerprint(
    data: DataArguments,
    training: DistillationTrainingArguments,
    train: Dataset,
    class_names: list[str],
    pixels: Preprocessing,
) -> dict[str, Any]:
    """The fingerprint of a run without its teacher, fit for JSON; the same on every machine.

    The data are known by what is in them, not by their name or place: the number of rows, their labels in order, the
    classes, and the bytes of 64 images from the first to the last. The code that makes pixels of them is known by
    [`~nkd_hf.data.transforms.PIXELS_VERSION`].

    Args:
        data: its augmentation.
        training: its seeds.
        train: the training split of [`~nkd_hf.data.loading.load_image_dataset`].
        class_names: by label.
        pixels: what the student expects.
    """
    labels = np.array([-1 if label is None else label for label in train["label"][:]], dtype=np.int64)
    images = hashlib.sha256()
    for row in np.linspace(0, len(train) - 1, min(_NUM_IMAGES, len(train))).astype(int).tolist():
        images.update(hashlib.sha256(_image_bytes(train[row]["image"])).digest())
    return {
        "pixels_version": PIXELS_VERSION,
        "num_samples": len(train),
        "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
        "classes_sha256": hashlib.sha256("\n".join(class_names).encode()).hexdigest(),
        "images_sha256": images.hexdigest(),
        "seed": training.seed,
        "data_seed": training.seed if training.data_seed is None else training.data_seed,
        "shuffle": training.train_sampling_strategy != "sequential",
        "image_size": list(pixels.size),
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "interpolation": pixels.interpolation,
        # Only where it is not RGB, so that stores without the key are still read.
        **({} if pixels.channel_order == RGB else {"channel_order": list(pixels.channel_order)}),
        **{name: getattr(data, name) for name in _AUGMENTATION},
    }


def teacher_fingerprint(recipe: RecipeArguments, model: nn.Module, dtype: str | None) -> dict[str, Any]:
    """The teacher's part of a store's fingerprint.

    `teacher_channels_last` and `teacher_compile` are not in it: as another device does, they change the logits by rounding.

    Args:
        recipe: which names it.
        model: with its weights as they were opened, in whatever precision it will then run.
        dtype: that precision; None is float32.
    """
    return {
        "teacher": public_name(recipe.teacher),
        "teacher_args": recipe.teacher_args,
        "teacher_revision": hub_revision(recipe.teacher),
        "teacher_sha256": weights_sha256(model),
        "teacher_dtype": dtype or "float32",
    }


def check_fingerprint(
    folder: Path, info: StoreInfo, recipe: RecipeArguments, run: dict[str, Any], teacher_dtype: str | None = None
) -> None:
    """Compares a store with a run.

    Of the teacher, what the run says is compared: its Hub id; of an architecture, its name and arguments; of a folder, its
    weights; and its precision. What a run does not name is the store's. Of a Hub id, the weights are opened and compared
    where the repo's revision is no longer that of the store, which a new README is enough for; where either is not known,
    as without a network or a cache, the id alone is compared.

    Args:
        folder: of the store.
        info: of the store.
        recipe: of the run.
        run: its [`run_fingerprint`].
        teacher_dtype: of the run.

    Raises:
        ValueError: they differ; the message says in what.
    """
    run = dict(run) if teacher_dtype is None else run | {"teacher_dtype": teacher_dtype}
    if recipe.teacher is not None and (os.path.isdir(recipe.teacher) or _has_moved(recipe.teacher, info)):
        options = {"allow_pickle": recipe.allow_pickle, "trust_remote_code": recipe.trust_remote_code}
        run["teacher_sha256"] = weights_sha256(load_teacher(recipe.teacher, **options).model)
    if recipe.teacher is not None and not os.path.isdir(recipe.teacher):
        run["teacher"] = recipe.teacher
        if is_architecture(recipe.teacher):
            run["teacher_args"] = recipe.teacher_args
    if differences := fingerprint_differences(info.fingerprint, run):
        raise ValueError(
            f"the teacher logits in {folder} are not of this run: {differences}. Set what differs as it is in the store (a "
            "recipe that names no teacher takes the store's; pixels_version is that of nkd_hf's own code), or write a store "
            "for this run with `nkd-hf teacher-logits`"
        )
    for library, version in library_versions().items():
        if info.versions.get(library) != version:
            logger.warning(
                "The teacher logits in %s were made with %s %s, and this run has %s: where they decode or transform "
                "differently, the student gets other pixels than the teacher had.",
                folder,
                library,
                info.versions.get(library),
                version,
            )


def fingerprint_differences(store: dict[str, Any], run: dict[str, Any]) -> str:
    """What differs of that which the run says; an empty text if nothing does."""
    names = dict.fromkeys([*run, *({"channel_order"} & store.keys())])
    differ = [name for name in names if store.get(name) != run.get(name)]
    return "; ".join(f"{name}: store {_short(store.get(name))}, run {_short(run.get(name))}" for name in differ)


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that make the pixels."""
    return {library: importlib.metadata.version(library) for library in _LIBRARIES}


def public_name(teacher: str) -> str:
    """A teacher's name without the path of this machine."""
    return Path(teacher).resolve().name if os.path.isdir(teacher) else teacher


def hub_revision(teacher: str) -> str | None:
    """The commit of a Hub id's `config.json`, now or in the cache; None for what is no Hub id, or cannot be reached."""
    if is_architecture(teacher) or os.path.isdir(teacher):
        return None
    with contextlib.suppress(OSError, ValueError):
        return extract_commit_hash(cached_file(teacher, CONFIG_NAME), None)
    return None


def weights_sha256(model: nn.Module) -> str:
    """A hash of parameters and buffers with their names, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _has_moved(teacher: str, info: StoreInfo) -> bool:
    """Whether the Hub has another revision of the store's teacher than was stored."""
    stored = info.fingerprint.get("teacher_revision")
    if stored is None or info.fingerprint["teacher"] != teacher:
        return False
    return hub_revision(teacher) not in (None, stored)


def _image_bytes(image: dict[str, Any] | None) -> bytes:
    """The bytes of an image; none for a bad row, of which it is for training to say what is wrong."""
    try:
        return read_bytes(image or {"bytes": None, "path": None}) or b""
    except (OSError, ValueError):
        return b""


def _short(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_hash else repr(value)
