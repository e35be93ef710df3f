"""What the trainer does about a loss that is not finite."""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteLossError
from .batch_norm import wants_more_values
from .checkpoint_trainer import CheckpointTrainer
from .non_finite import LossWatch

logger = logging.getLogger(__name__)

# Steps in a row that are skipped before the run is given up: it is not a batch that is at fault then.
MAX_SKIPPED = 10


class FiniteTrainer(CheckpointTrainer):
    """A `Trainer` that stops at a loss that is not finite, or skips the step, by `on_non_finite_loss`.

    A run that stops does not wait for the device in each step: on a GPU it may run some steps more, of which none is
    saved. A step that is skipped leaves weights, BatchNorm's statistics, the optimiser and the log as they were.
    """

    def __init__(self, *args, **kwargs):
        self._watch = LossWatch()
        self._watched: dict[str, Any] | None = None
        self._before_step: dict[str, Any] | None = None
        self._skipped_in_a_row = 0
        self._last_good_checkpoint: str | None = None
        super().__init__(*args, **kwargs)

    def begin_attempt(self) -> None:
        super().begin_attempt()
        self._watch, self._before_step, self._skipped_in_a_row = LossWatch(self.args.world_size), None, 0
        self._last_good_checkpoint = self._resumed_from

    def end_run(self) -> None:
        super().end_run()
        if fault := self._watch.fault(wait=True):  # of the last steps, if nothing was saved after them
            self._stop(fault)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the step that is under way is left out."""
        return self._skipped_in_a_row > 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_in_train:  # called by hand: there is no step to stop at or to undo
            return super().training_step(model, inputs, *args, **kwargs)
        # In a step of accumulation, the first micro-batch's state is what the step is undone to.
        if self.args.on_non_finite_loss == "skip" and self._before_step is None:
            self._before_step = self._state()
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except ValueError as error:  # check_batches does not see the batches of a stream
            if not wants_more_values(error):
                raise
            raise ValueError(
                f"the batch of step {self.state.global_step + 1} must have at least 2 images, got 1. BatchNorm has no "
                "statistics of one value: set another per_device_train_batch_size. dataloader_drop_last has no effect on "
                "streams"
            ) from error
        # A compute_loss of one's own may tell nothing, or add to what it tells.
        watched = self._watched or {"losses": {}, "student_logits": None, "teacher_logits": None}
        watched["losses"] = watched["losses"] | {"loss": loss * self.current_gradient_accumulation_steps}
        self._watched = None
        step, rate = self.state.global_step + 1, self.optimizer.param_groups[0]["lr"]
        self._watch.add(step, rate, index=inputs.get("index"), **watched)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # The last call before the optimiser's step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._watch.close_step(grad_norm, scaled=self.accelerator.scaler is not None)
        if self.args.on_non_finite_loss == "skip":
            self._skip_if_not_finite(model)
        elif fault := self._watch.fault():
            self._stop(fault)
        return None if self.step_was_skipped else grad_norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint of weights that are not finite would take the place of a good one.
        if fault := self._watch.fault(wait=True):
            self._stop(fault)
        super()._save_checkpoint(model, trial)
        self._last_good_checkpoint = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")

    def _stop(self, fault: str) -> None:
        saved = self._last_good_checkpoint
        kept = f"The last good checkpoint is {saved}" if saved else "No checkpoint was saved before"
        raise NonFiniteLossError(f"{fault}. {kept}; on_non_finite_loss=skip leaves such steps out")

    def _skip_if_not_finite(self, model: nn.Module) -> None:
        fault = self._watch.fault(wait=True)
        found = torch.tensor(float(fault is not None), device=self.args.device)
        before, self._before_step = self._before_step, None
        if not self.accelerator.reduce(found, reduction="sum"):
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        self._skipped_steps += 1
        fault = fault or f"the loss of step {self.state.global_step + 1} is not finite in another process"
        if self._skipped_in_a_row == MAX_SKIPPED:
            self._stop(f"{fault}. It is the last of {MAX_SKIPPED} steps in a row")
        logger.warning("%s. The step is skipped.", fault)
        # Without gradients an optimiser leaves a parameter and its state alone. A gradient scaler needs to see them, and
        # then skips the step by itself.
        if self.accelerator.scaler is None:
            model.zero_grad(set_to_none=True)
        self._undo_to(before)

    def _state(self) -> dict[str, Any]:
        return {
            "loss": self._tr_loss.clone(),
            "component_sums": dict(self._component_sums),
            "component_steps": self._component_steps,
            "buffers": [buffer.clone() for buffer in self.model.buffers()],
        }

    def _undo_to(self, state: dict[str, Any]) -> None:
        self._tr_loss.copy_(state["loss"])
        self._component_sums, self._component_steps = state["component_sums"], state["component_steps"]
        # The mean of the log is over the steps since then.
        self._globalstep_last_logged += 1
        for buffer, value in zip(self.model.buffers(), state["buffers"], strict=True):
            buffer.copy_(value)
