"""Joins a batch's images without labels to its labelled images, and adds labels for the losses that read some."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.unlabeled_images import UNLABELED
from .checks import check_batch

# The key of the teacher's most probable classes of images without labels, where they are stored.
TARGET = "stored_target"


def join_batch(batch: dict[str, Any], is_training: bool) -> tuple[dict[str, Any], int]:
    """Puts the images without labels behind the labelled images of a batch.

    Args:
        batch: has `pixel_values` and `labels`, and may have `unlabeled_pixel_values`.
        is_training: whether images without labels are joined. An evaluation ignores them, since it needs labels.

    Returns:
        The batch, and the number of images without a label at the end of its `pixel_values`.

    Raises:
        ValueError: the batch has no labels, or no pixels of preprocessed images.
    """
    check_batch(batch)
    unlabeled = batch.get(UNLABELED) if is_training else None
    if unlabeled is None:
        return batch, 0
    return {**batch, "pixel_values": torch.cat([batch["pixel_values"], unlabeled])}, len(unlabeled)


def add_labels(labels: Tensor, teacher_outputs: dict[str, Tensor], num_unlabeled: int) -> Tensor:
    """Adds the teacher's most probable classes of the images without labels, which are at the end of the batch.

    Args:
        labels: [B - num_unlabeled] int64, or [B - num_unlabeled, C] float rows.
        teacher_outputs: has `teacher_logits` [B, C], and may have the most probable classes [num_unlabeled] of a
            store. The logits that the store rebuilds may have other most probable classes.
        num_unlabeled: number of images without labels.

    Returns:
        [B] int64, or [B, C] float.
    """
    logits = teacher_outputs["teacher_logits"][-num_unlabeled:]
    classes = teacher_outputs[TARGET].long() if TARGET in teacher_outputs else logits.argmax(-1)
    if labels.ndim == 2:
        classes = F.one_hot(classes, logits.shape[1]).to(labels.dtype)
    return torch.cat([labels, classes])
