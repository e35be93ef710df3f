"""Scales the learning rate to the global batch, and makes the schedules that count in epochs."""

import logging

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .arguments import DistillationTrainingArguments
from .optimization import SCHEDULES, lr_factor

logger = logging.getLogger(__name__)


def scale_learning_rate(optimizer: Optimizer, args: DistillationTrainingArguments, batch_size: int) -> None:
    """Sets the rates of an optimiser to its unscaled rates, multiplied by the global batch / `base_batch_size`.

    Args:
        optimizer: its rates may already be scaled to another batch.
        args: the trainer's arguments.
        batch_size: images of one device in this attempt, see `auto_find_batch_size`.
    """
    global_batch_size = args.global_batch_size(batch_size)
    scale = 1.0 if args.base_batch_size is None else global_batch_size / args.base_batch_size
    for group in optimizer.param_groups:
        unscaled = group.setdefault("unscaled_lr", group["lr"])
        group["lr"] = group["initial_lr"] = unscaled * scale
    if scale != 1 and args.process_index == 0:
        logger.warning(
            "learning_rate %g is meant for a global batch of %d (base_batch_size), and this run's is %d: it is scaled to %g.",
            optimizer.param_groups[0]["unscaled_lr"],
            args.base_batch_size,
            global_batch_size,
            optimizer.param_groups[0]["lr"],
        )


def make_schedule(optimizer: Optimizer, args: DistillationTrainingArguments, num_steps: int) -> LambdaLR | None:
    """Returns the scheduler of one of this package's [`SCHEDULES`], or None for a schedule of transformers."""
    name = args.lr_scheduler_type.value
    if name not in SCHEDULES:
        return None
    epochs, rate, kwargs = args.num_train_epochs, args.learning_rate, args.lr_scheduler_kwargs
    return LambdaLR(optimizer, lr_factor(name, num_steps, epochs, rate, kwargs, max_steps=args.max_steps))
