"""Computes the fingerprint of a run: two runs with the same fingerprint give the teacher the same pixels."""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..data.arguments import DataArguments
from ..data.decoding import read_bytes
from ..data.labels import read_labels
from ..data.transforms import PIXELS_VERSION
from ..models.architectures import is_architecture
from ..models.hashing import hash_tensors
from ..models.preprocessing import RGB, Preprocessing
from ..models.teacher import Teacher
from ..models.teacher_ensemble import normalize_weights
from ..teacher_logits.info import StoreInfo
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments
from .build import open_teacher

logger = logging.getLogger(__name__)

_AUGMENTATION = (
    "random_resized_crop", "random_crop_padding", "horizontal_flip", "auto_augment", "random_erasing", "pca_lighting",
    "mixup_alpha", "cutmix_alpha",
)  # fmt: skip
# A field with one of these values is not in a fingerprint, so that stores without the field can be read.
_IF_MISSING = {"channel_order": list(RGB), "balanced_sampling": False, "crops_per_image": 1}
# The decoders and transforms of these libraries make the pixels.
_LIBRARIES = ("pillow", "timm", "torch", "torchcodec", "torchvision")
# The number of images that the fingerprint reads: reading all images would take as long as an epoch.
_NUM_IMAGES = 64


def fingerprint_run(
    data: DataArguments,
    training: DistillationTrainingArguments,
    train: Dataset,
    class_names: list[str],
    pixels: Preprocessing,
) -> dict[str, Any]:
    """Computes the fingerprint of a run without its teacher, fit for JSON; it is the same on every machine.

    The fingerprint holds the content of the dataset, not its name or place: the number of rows, their labels in order, the
    classes, and the bytes of 64 images from the first to the last. [`~nkd_hf.data.transforms.PIXELS_VERSION`] stands
    for the code that makes the pixels.

    Args:
        data: has the augmentation.
        training: has the seeds.
        train: the training split of [`~nkd_hf.data.loading.load_image_dataset`].
        class_names: by label.
        pixels: the student's size, normalisation and interpolation.
    """
    # For images without labels, the hash is that of an empty array.
    labels = read_labels(train) if "label" in train.column_names else np.empty(0)
    optional = {
        "channel_order": list(pixels.channel_order),
        "balanced_sampling": data.balanced_sampling,
        "crops_per_image": data.crops_per_image,
    }
    images = hashlib.sha256()
    for row in np.linspace(0, len(train) - 1, min(_NUM_IMAGES, len(train))).astype(int).tolist():
        images.update(hashlib.sha256(_read_image(train[row]["image"])).digest())
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
        **{name: value for name, value in optional.items() if value != _IF_MISSING[name]},
        **{name: getattr(data, name) for name in _AUGMENTATION},
    }


def fingerprint_teacher(recipe: RecipeArguments, teacher: Teacher, dtype: str | None) -> dict[str, Any]:
    """Computes the teacher's part of a store's fingerprint.

    For several teachers the fingerprint holds lists, sorted by the names, with `teacher_weights` among them: an
    ensemble is the same in any order of its members, each with its weight.

    `teacher_channels_last` and `teacher_compile` are not in the fingerprint: they change the logits only by rounding,
    as another device does.

    Args:
        recipe: names the teacher, or several.
        teacher: with its weights as they were opened.
        dtype: the precision in which the teacher runs; None is float32.
    """
    members = [
        {
            "teacher": hide_path(name),
            "teacher_args": recipe.teacher_args,
            "teacher_revision": read_revision(name),
            "teacher_sha256": hash_weights(member.model),
        }
        for name, member in zip(recipe.teachers, teacher.members, strict=True)
    ]
    found = members[0] if len(members) == 1 else _join_members(members, teacher.weights)
    if recipe.teacher_prompts is not None:
        found["teacher_prompts"] = recipe.teacher_prompts
    return found | {"teacher_dtype": dtype or "float32"}


def check_fingerprint(
    folder: Path,
    info: StoreInfo,
    recipe: RecipeArguments,
    run: dict[str, Any],
    teacher_dtype: str | None = None,
    id2label: dict[int, str] | None = None,
) -> None:
    """Compares the fingerprint of a store with a run, and warns of other versions of libraries.

    The teacher is compared as the run names it: a Hub id by the id, an architecture by its name and arguments, a folder by
    its weights. Several teachers are compared in any order, each with its weight. A run without a teacher or a
    precision uses the store's. If the revision of a Hub id has changed since the store was written, the weights are
    opened and compared, since a new README is a new revision. If one of the two revisions is unknown, as without a
    network or a cache, only the ids are compared.

    Args:
        folder: the store.
        info: the content of its `store.json`.
        recipe: the arguments of the run.
        run: the run's [`fingerprint_run`].
        teacher_dtype: the precision of the run's teacher.
        id2label: the classes of the run, for a teacher with `teacher_prompts`.

    Raises:
        ValueError: the two differ; the message names the fields.
    """
    run = dict(run) if teacher_dtype is None else run | {"teacher_dtype": teacher_dtype}
    members = [_identify_teacher(name, recipe, info, id2label) for name in recipe.teachers]
    if members:
        run["teacher_prompts"] = recipe.teacher_prompts
    if len(members) == 1:
        run |= members[0]
    elif members:
        run |= _match_members(recipe, members, info)
    if differences := compare_fingerprints(info.fingerprint, run):
        raise ValueError(
            f"the teacher logits in {folder} are not of this run: {differences}. Set these fields to the store's values (a "
            "recipe that names no teacher takes the store's; pixels_version comes from nkd_hf's own code), or write a store "
            "for this run with `nkd-hf teacher-logits`"
        )
    for library, version in read_versions().items():
        if info.versions.get(library) != version:
            logger.warning(
                "The teacher logits in %s were made with %s %s, and this run has %s: where they decode or transform "
                "differently, the student gets other pixels than the teacher had.",
                folder,
                library,
                info.versions.get(library),
                version,
            )


def compare_fingerprints(store: dict[str, Any], run: dict[str, Any]) -> str:
    """Describes the fields of `run` that differ from `store`, or returns an empty string."""
    names = dict.fromkeys([*run, *(name for name in _IF_MISSING if name in store)])
    differ = [name for name in names if (_IF_MISSING | store).get(name) != (_IF_MISSING | run).get(name)]
    return "; ".join(f"{name}: store {_shorten(store.get(name))}, run {_shorten(run.get(name))}" for name in differ)


def read_versions() -> dict[str, str]:
    """Reads the installed versions of the libraries that make the pixels. A library that is not installed makes none."""
    versions = {}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    return versions


def hide_path(teacher: str) -> str:
    """Returns a teacher's name, without the path if the name is a folder of this machine."""
    return Path(teacher).resolve().name if os.path.isdir(teacher) else teacher


def read_revision(teacher: str) -> str | None:
    """Reads the commit of a Hub id's `config.json` from the Hub or the cache; None if there is no such file."""
    if is_architecture(teacher) or os.path.isdir(teacher):
        return None
    with contextlib.suppress(OSError, ValueError):
        return extract_commit_hash(cached_file(teacher, CONFIG_NAME), None)
    return None


def hash_weights(model: nn.Module) -> str:
    """Hashes the parameters and buffers of a model with their names; their file does not matter."""
    return hash_tensors(model.state_dict())


def _identify_teacher(
    name: str, recipe: RecipeArguments, info: StoreInfo, id2label: dict[int, str] | None
) -> dict[str, Any]:
    """Returns the fields in which a teacher of a run is compared with the store's: its name, its weights, or both."""
    found = {}
    is_folder = os.path.isdir(name)
    if is_folder or _has_moved(name, info):
        found["teacher_sha256"] = hash_weights(open_teacher(recipe, name, id2label).model)
    if not is_folder:
        found["teacher"] = name
        if is_architecture(name):
            found["teacher_args"] = recipe.teacher_args
    return found


def _has_moved(teacher: str, info: StoreInfo) -> bool:
    """Whether the Hub has another revision of the store's teacher than `store.json` names."""
    stored = {member["teacher_revision"] for member in _split_members(info) if member["teacher"] == teacher} - {None}
    return bool(stored) and read_revision(teacher) not in (None, *stored)


def _join_members(members: list[dict[str, Any]], weights: Sequence[float]) -> dict[str, list]:
    """Joins the fields of several teachers into lists, sorted so that the order of the teachers does not matter."""
    members = [member | {"teacher_weights": round(weight, 9)} for member, weight in zip(members, weights, strict=True)]
    members.sort(key=lambda member: (member["teacher"], member["teacher_sha256"] or "", member["teacher_weights"]))
    return {name: [member[name] for member in members] for name in members[0]}


def _split_members(info: StoreInfo) -> list[dict[str, Any]]:
    """Splits the fields of [`fingerprint_teacher`] by teacher; the weight of a single teacher is None."""
    names = ("teacher", "teacher_revision", "teacher_sha256", "teacher_weights")
    values = [info.fingerprint.get(name) for name in names]
    if not isinstance(values[0], list):
        values = [[value] for value in values]
    return [dict(zip(names, member, strict=True)) for member in zip(*values, strict=True)]


def _match_members(recipe: RecipeArguments, members: list[dict[str, Any]], info: StoreInfo) -> dict[str, list]:
    """Returns the fields of several teachers in which a run differs from the store; none if they are the same teachers."""
    weights = normalize_weights(recipe.teacher_weights, len(members))
    wanted = [member | {"teacher_weights": round(weight, 9)} for member, weight in zip(members, weights, strict=True)]
    left = _split_members(info)
    # Named teachers match first. A folder is compared only by its weights, and could match a named teacher's entry.
    for member in sorted(wanted, key=lambda member: "teacher" not in member):
        found = next((stored for stored in left if member.items() <= stored.items()), None)
        if found is None:
            break
        left.remove(found)
    else:
        if not left:
            return {}
    known = {"teacher_sha256": None}
    named = [
        known | {"teacher": hide_path(name)} | member for name, member in zip(recipe.teachers, members, strict=True)
    ]
    return _join_members(named, weights)


def _read_image(image: dict[str, Any] | None) -> bytes:
    """Reads the bytes of an image, or no bytes for a bad row, which the training reports."""
    try:
        return read_bytes(image or {"bytes": None, "path": None}) or b""
    except (OSError, ValueError):
        return b""


def _shorten(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shorten, value))}]"
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if is_hash else repr(value)
