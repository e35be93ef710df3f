"""Reports the bad images of a run at the end of each epoch."""

import logging

from accelerate import PartialState
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import gather_object
from transformers import TrainerCallback

from .image_datasets import NUM_NAMED, ImageDataset, StreamingImageDataset

logger = logging.getLogger(__name__)


class BadImageReport(TrainerCallback):
    """Counts and lists bad images: of the training data after each epoch, of the evaluation data after each
    evaluation.

    It reports on [`ImageDataset`] and [`StreamingImageDataset`] with `on_bad_image="skip"`, and only when an image was bad:
    once, in the main process, for the workers of all processes.

    Args:
        steps_per_epoch (`int`, *optional*): number of optimiser steps after which to report as well. Trainer counts a
            stream as one epoch, which lasts as long as the training.

    Example:

    ```python
    trainer = DistillationTrainer(..., train_dataset=ImageDataset(..., on_bad_image="skip"), callbacks=[BadImageReport()])
    ```
    """

    def __init__(self, steps_per_epoch: int | None = None):
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be positive, got {steps_per_epoch}: omit it without a stream")
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        # The last step is skipped here, since on_epoch_end follows.
        if (
            self.steps_per_epoch
            and state.global_step % self.steps_per_epoch == 0 < state.max_steps - state.global_step
        ):
            _report(train_dataloader)

    def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        _report(train_dataloader)

    def on_evaluate(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        _report(eval_dataloader)


def describe_bad_images(dataset: ImageDataset | StreamingImageDataset) -> str | None:
    """Counts the images that were bad so far, and names at most 20 of them; None if no image was bad.

    With several processes, all must call this: each process knows only the bad images that it has read itself.
    """
    if isinstance(dataset, StreamingImageDataset):
        kind = "training" if dataset.training else "evaluation"
        count = sum(gather_object([dataset.num_bad_images]))
        names = sorted(set(gather_object(dataset.bad_names)))[:NUM_NAMED]
        text = f"{count} bad images were met in the {kind} stream so far (once more in each pass) and skipped"
        rest = f"at most {NUM_NAMED} different ones are named" if count > NUM_NAMED <= len(names) else None
    else:
        rows = sorted(set(gather_object(dataset.bad_rows)))
        count = len(rows)
        names = [dataset.describe_row(row) for row in rows[:NUM_NAMED]]
        text = (
            f"{count} of {len(dataset)} {dataset.kind} images were bad so far, and the next good rows took their place"
        )
        if not dataset.training:
            text += f" and count twice: accuracy is off by at most {count / len(dataset):.2%}"
        rest = f"and {count - NUM_NAMED} more" if count > NUM_NAMED else None
    if not count:
        return None
    return "\n  ".join([f"{text}:", *names, *([rest] if rest else [])])


def _report(dataloader) -> None:
    dataset = None if dataloader is None else dataloader.dataset
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    for each in (dataset, getattr(dataset, "unlabeled", None)):
        if isinstance(each, ImageDataset | StreamingImageDataset) and each.on_bad_image == "skip":
            text = describe_bad_images(each)
            if text is not None and PartialState().is_main_process:
                logger.warning("%s", text)
