"""Checks that a training can learn from images without labels."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..data.collator import ImageCollator
from ..data.unlabeled_images import JoinedImageDataset, UnlabeledImageDataset
from ..losses.base import teacher_inputs

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def check_losses(losses: Mapping[str, nn.Module | type[nn.Module]]) -> None:
    """Raises ValueError where losses cannot learn from images without labels: each needs a teacher, and there must be one.

    Args:
        losses: the losses or their classes, by name.
    """
    if not losses:
        raise ValueError(
            "images without labels need a distillation loss with a teacher, got none. Set distillation_loss, or omit the images"
        )
    if alone := [name for name, loss in losses.items() if not teacher_inputs(loss)]:
        raise ValueError(
            f"images without labels need a teacher, and the distillation loss {', '.join(alone)} has none. Name a loss with a "
            "teacher such as nkd, or omit the images"
        )


def check_unlabeled(trainer: "DistillationTrainer") -> None:
    """Raises ValueError where a trainer cannot learn from the images without labels of its training data."""
    if not isinstance(trainer.train_dataset, JoinedImageDataset | UnlabeledImageDataset):
        return
    check_losses(trainer.distillation_losses)
    args, collator = trainer.args, trainer.data_collator
    if not isinstance(collator, ImageCollator):
        raise ValueError(
            f"data_collator must be an ImageCollator with images without labels, got {type(collator).__name__}. Take that of "
            "make_datasets"
        )
    if collator.teacher_logits is not None and isinstance(trainer.train_dataset, JoinedImageDataset):
        raise ValueError(
            f"teacher_logits has the logits of labelled images alone, got {collator.teacher_logits.folder}. Set a teacher, or "
            "omit the images without labels"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) cannot divide a batch with images without labels: start the "
            "script with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if trainer.accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches of accelerator_config must be false with images without labels, got true: each process reads "
            "its own"
        )
