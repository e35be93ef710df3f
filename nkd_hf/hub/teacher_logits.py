"""Finds a store of teacher logits on the Hub, and pushes a store as a dataset."""

import os
import shlex
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import explain_gated_repo, reason
from ..files import path_fault
from ..models.repo_ids import read_repo_id
from ..teacher_logits.info import STORE, StoreInfo, TeacherDescription, list_teachers
from ..teacher_logits.store import TeacherLogits, unfinished
from .failures import explain_failures
from .push import PushApi

_CARD = "README.md"


def find_store(name: str, epochs: int) -> Path:
    """Returns the folder of a store; of a Hub dataset, it downloads the needed epochs.

    Args:
        name: a folder, or the Hub id of a dataset or the address of its page.
        epochs: number of epochs that are needed.

    Raises:
        ValueError: there is no such folder and no such dataset.
    """
    name = read_repo_id(name, "teacher_logits", "dataset")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if fault := path_fault(name):
        raise ValueError(f"teacher_logits={name!r} cannot be opened: {fault}")
    patterns = [STORE, *(f"epoch-{epoch:04d}/*" for epoch in range(epochs))]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        how = explain_gated_repo(error, name, "dataset") or (
            f"it is no folder, and no dataset of the Hub that could be reached ({type(error).__name__}: {reason(error)}). Is there a network, and is HF_HUB_OFFLINE unset?"
        )
        raise ValueError(f"teacher_logits={name!r} cannot be opened: {how}") from error


def push_store(folder: Path, repo_id: str, private: bool | None = None) -> str:
    """Puts a finished store on the Hub, one commit per epoch, `store.json` last: before it, the store cannot be
    opened.

    Files that an earlier attempt uploaded are not sent again.

    Args:
        folder: the folder of the store.
        repo_id: `owner/name`, or the address of its page, or `name` for the token's owner; the repo is made if it does
            not exist.
        private: whether a new repo is private; None uses the owner's default.

    Returns:
        The address of the dataset.

    Raises:
        ValueError: the store is not finished, or a shard does not match its checksum; all shards are read.
        PushError: the Hub was not reached, or refused the push.
    """
    repo_id = read_repo_id(repo_id, "repo_id", "dataset")
    info = StoreInfo.read(folder)
    if missing := unfinished(folder, info, info.epochs):
        raise ValueError(f"{folder} lacks {len(missing)} shards: it is pushed when it is finished")
    TeacherLogits(folder).verify()
    (folder / _CARD).write_text(store_card(info, repo_id.split("/")[-1]), encoding="utf-8")
    again = shlex.join(["hf", "upload", "--repo-type", "dataset", repo_id, str(folder)])
    with explain_failures(folder, repo_id, None, None, again):
        api = PushApi()
        repo = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        repo_id, where = repo.repo_id, {"repo_id": repo.repo_id, "repo_type": "dataset"}
        for epoch in range(info.epochs):
            path = f"epoch-{epoch:04d}"
            api.upload_folder(
                folder_path=folder / path, path_in_repo=path, allow_patterns="shard-*", commit_message=path, **where
            )
        api.upload_folder(folder_path=folder, allow_patterns=[STORE, _CARD], commit_message="Teacher logits", **where)
        return f"{api.endpoint}/datasets/{repo_id}"


def store_card(info: StoreInfo, name: str) -> str:
    """Returns the text of the dataset's card.

    Args:
        info: the content of the store's `store.json`.
        name: the name of the dataset.
    """
    teachers = list_teachers(info.teacher)
    of_one = "teacher" if len(teachers) == 1 else "teachers, whose mean probabilities these are"
    measured = {
        "with its own preprocessing": info.teacher_own_accuracy,
        "on the student's pixels": info.teacher_accuracy,
    }
    measured = [f"{100 * value:.2f} % {where}" for where, value in measured.items() if value is not None]
    accuracy = f", top-1 on the validation split {' and '.join(measured)}" if measured else ""
    repeated = "" if info.cycle is None else ", which a longer training repeats"
    kept = "all logits, float32" if info.top_k is None else _describe_top_k(info)
    return f"""\
---
tags:
- knowledge-distillation
- teacher-logits
- nkd_hf
---

# {name}

The logits of a teacher on augmented training images, to distil students from without running it.

- {of_one}: {"; ".join(map(_describe, teachers))}{accuracy}
- images: {info.num_samples} in each of {info.epochs} epochs{repeated}, {info.num_classes} classes
- stored of each: {kept}

The same images, augmented in the same way, come with the recipe that this was written for, and
`--teacher_logits {os.path.basename(name)}` with the owner's name before it: a run with another seed, other data or another
augmentation is refused.
"""


def _describe_top_k(info: StoreInfo) -> str:
    text = f"the {info.top_k} largest logits but the target's, float16"
    text += f", for losses at temperature {_list_numbers(info.temperatures)}"
    if info.standardized_temperatures:
        text += f", of standardised logits at {_list_numbers(info.standardized_temperatures)}"
    return text


def _list_numbers(values: list[float]) -> str:
    return " or ".join(f"{value:g}" for value in values)


def _describe(teacher: TeacherDescription) -> str:
    name = f"`{teacher.name}`, " if teacher.name else ""
    weight = "" if teacher.weight is None else f", weight {teacher.weight:.3g}"
    return f"{name}`{teacher.architecture}`, {teacher.num_parameters / 1e6:.1f} M parameters{weight}"
