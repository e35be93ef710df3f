"""Computes the loss of an evaluation as a mean over images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses.checks import check_labels
from .task_loss import IGNORE_INDEX, cross_entropy


def evaluation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of a batch, a float32 scalar, without label smoothing.

    Args:
        logits: [B, C] float.
        labels: [B] integers, of which -100 marks an image without a class, or [B, C] float.

    Raises:
        ValueError: a label is not one of the C classes.
    """
    check_labels(labels, logits.shape, IGNORE_INDEX)
    return cross_entropy(logits, labels)


class ImageLosses:
    """Collects the cross-entropy of each evaluated image, so that the mean counts every image once.

    `Trainer.evaluation_loop` takes the mean over batches. The last batch may be smaller, or filled up with images that
    other batches have.
    """

    def __init__(self):
        self._losses: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Adds the images of a batch.

        Args:
            logits: [B, C] float.
            labels: [B] integers, of which -100 marks an image without a class, or [B, C] float.
            gather: returns a tensor's rows from all processes, one row for each image.
        """
        targets = labels if labels.is_floating_point() else labels.long()
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if not labels.is_floating_point():
            # No cross-entropy is -inf, so `mean` ignores this mark, while a loss of NaN counts.
            losses = torch.where(targets == -100, -torch.inf, losses)
        self._losses.append(gather(losses))

    def mean(self) -> float | None:
        """Returns the mean over the images, or None if there are none, and forgets them."""
        losses, self._losses = self._losses, []
        losses = torch.cat(losses) if losses else torch.empty(0)
        losses = losses[losses != -torch.inf]
        return losses.mean().item() if len(losses) else None
