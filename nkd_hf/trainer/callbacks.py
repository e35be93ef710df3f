"""Defines the callbacks of DistillationTrainer for the loop of `Trainer.train`."""

import logging
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed
from transformers import TrainerCallback

from ..data.image_datasets import ImageDataset
from ..data.sampler import EpochIndices, EpochSampler
from ..data.seeding import derived_seeds
from .arguments import DistillationTrainingArguments
from .checkpoints import checkpoints, remove_old
from .checks import check_batches, check_metric, check_optimizer, check_weights, named_datasets
from .optimizer_groups import check_no_group_is_empty
from .sigterm import EXIT_CODE

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)


class KeepPace(TrainerCallback):
    """Begins each attempt of a run, saves at the end of an epoch after its evaluation, and ends the run after a SIGTERM."""

    def __init__(self, trainer: "DistillationTrainer"):
        self.trainer = trainer
        self.save_after_epoch = self.leaving = False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.save_after_epoch = self.leaving = False
        self.trainer.begin_attempt()
        # A process that was killed while it deleted an older checkpoint left a part of that checkpoint.
        last = checkpoints(args.output_dir)[-1:]
        if args.should_save and last and os.path.basename(last[0]) == f"checkpoint-{state.global_step}":
            remove_old(args.output_dir, state.global_step, args.save_total_limit, state.best_model_checkpoint)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.trainer.sigterm.was_received():
            control.should_save = self.leaving = True
        # The checkpoint of an epoch's last step is saved after the log and evaluation of that epoch, and contains
        # them.
        if control.should_save and (state.epoch.is_integer() or state.global_step >= state.max_steps):
            control.should_save, self.save_after_epoch = False, True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        control.should_save = control.should_save or self.save_after_epoch
        self.save_after_epoch = False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        losses = {name: value for name, value in (metrics or {}).items() if name.endswith("_loss")}
        bad = [f"{name}={value:g}" for name, value in losses.items() if not math.isfinite(value)]
        if bad and state.is_world_process_zero:
            logger.warning(
                "the evaluation after step %d is not finite (%s): the student's logits are NaN or infinite for some of "
                "its images, or none of them has a label. Check whether their pixel values are finite; if they are, "
                "the student diverges: lower learning_rate",
                state.global_step,
                ", ".join(bad),
            )

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.leaving:
            if state.is_world_process_zero:
                logger.warning(
                    "SIGTERM was received: the run is saved as %s of %d steps, and the process exits. Resume to continue.",
                    os.path.join(args.output_dir, f"checkpoint-{state.global_step}"),
                    state.max_steps,
                )
            raise SystemExit(EXIT_CODE)


class CheckOwnMethods(TrainerCallback):
    """Checks the optimiser of an overridden create_optimizer, and whether an overridden compute_loss distils."""

    def __init__(self, trainer: "DistillationTrainer"):
        self.trainer = trainer
        self.is_first_step = True

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.is_first_step = True
        # Trainer.create_optimizer may make an empty group of parameters without weight decay.
        if self.trainer.has_own("create_optimizer"):
            check_no_group_is_empty(optimizer)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        is_first_step, self.is_first_step = self.is_first_step, False
        own_loss = trainer.distillation_losses and trainer.has_own("compute_loss")
        if is_first_step and own_loss and not trainer.loss_log.sums and not trainer.step_guard.step_was_skipped:
            logger.warning(
                "compute_loss of %s returned a loss without the distillation losses (%s), which super().compute_loss "
                "computes. Add its result, or pass no distillation_loss.",
                type(trainer).__name__,
                ", ".join(trainer.distillation_losses),
            )


class PrepareTraining(TrainerCallback):
    """Checks model, optimiser and data before the first step of every attempt of `auto_find_batch_size`."""

    def __init__(self, trainer: "DistillationTrainer"):
        self.trainer = trainer

    def on_train_begin(
        self, args, state, control, optimizer: Any = None, train_dataloader: Any = None, **kwargs
    ) -> None:
        trainer = self.trainer
        # FSDP and DeepSpeed replace the model's parameters with their own.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            check_optimizer(trainer, optimizer)
            check_weights(trainer.student)
        check_metric(trainer)
        for dataset in named_datasets(trainer).values():
            if isinstance(dataset, ImageDataset):
                dataset.check_labels()
        check_batches(trainer, train_dataloader, state.max_steps)
        _seed_process(args)


def _seed_process(args: DistillationTrainingArguments) -> None:
    """Seeds every process except the first with a seed of its own.

    Trainer seeds all processes alike, so that they build the same weights. With that seed, all would also draw the same
    masks, dropout and drop path. The common order of images does not depend on this seed: see [`training_sampler`]. A
    resumed run reads the state of its random numbers from its checkpoint.
    """
    if args.process_index > 0:
        common = int(torch.empty((), dtype=torch.int64).random_())
        set_seed(derived_seeds(common, args.process_index)[0] >> 32)


class SetEpoch(TrainerCallback):
    """Sets the sampler's epoch. Trainer's own call does not reach it in a resumed run of several processes."""

    def __init__(self, sampler: EpochSampler | EpochIndices):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch))


class UpdateAverage(TrainerCallback):
    """Updates the moving average of the student's weights after each optimiser step."""

    def __init__(self, trainer: "DistillationTrainer"):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if args.ema_decay is not None and not self.trainer.step_guard.step_was_skipped:
            model.update_average(state.global_step)
