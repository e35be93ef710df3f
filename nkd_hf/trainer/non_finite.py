"""Finds a loss that is not finite without waiting for the device, and stops the run or skips the step."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NonFiniteLossError
from .agreement import any_process
from .loss_log import LossLog

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)

# Number of skipped steps in a row after which the run stops, since a single batch is not the cause.
MAX_SKIPPED = 10


@dataclass
class _MicroBatch:
    step: int
    learning_rate: float
    losses: dict[str, Tensor]
    # [B], not finite where a row of the logits is not finite; None where the logits are not known.
    student_rows: Tensor | None
    teacher_rows: Tensor | None
    index: Tensor | None
    grad_norm: Tensor | float | None = None


class LossWatch:
    """Keeps the losses of steps whose results have not come back from the device yet.

    Args:
        world_size: number of processes that train together.

    Example:

    ```python
    >>> watch = LossWatch()
    >>> logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    >>> watch.add(7, 0.1, {"task": logits.mean()}, logits, None, torch.tensor([4, 2]))
    >>> watch.close_step(grad_norm=float("nan"), scaled=False)
    >>> print(watch.fault())
    the loss of step 7 is not finite (task=nan, learning_rate=0.1, grad_norm=nan). The student's logits are not finite \
for 1 of 2 samples (2): the student diverges: lower learning_rate, warm up for longer, or clip with max_grad_norm. \
Samples of the batch, by their index in the data: 4, 2

    ```
    """

    def __init__(self, world_size: int = 1):
        self._world_size = world_size
        self._open: list[_MicroBatch] = []
        self._closed: list[tuple[list[_MicroBatch], Tensor, torch.cuda.Event | None]] = []

    def add(
        self,
        step: int,
        learning_rate: float,
        losses: Mapping[str, Tensor],
        student_logits: Tensor | None,
        teacher_logits: Tensor | None,
        index: Tensor | None,
    ) -> None:
        """Adds a micro-batch: scalars `losses`, and logits [B, C] and the samples' `index` [B] where they are known."""
        # The sum of a row is finite if the whole row is, so that [B] sums are kept in place of the logits.
        rows = [
            None if logits is None else logits.detach().sum(-1, dtype=torch.float32)
            for logits in (student_logits, teacher_logits)
        ]
        losses = {name: value.detach() for name, value in losses.items()}
        self._open.append(_MicroBatch(step, learning_rate, losses, *rows, index))

    def close_step(self, grad_norm: Tensor | float | None, scaled: bool) -> None:
        """Ends an optimiser step.

        Args:
            grad_norm: the norm of the gradients of all processes together.
            scaled: whether the gradients are scaled (fp16): infinite gradients are then no fault.
        """
        if not self._open:
            return
        values = [value for batch in self._open for value in batch.losses.values()]
        if grad_norm is not None and not scaled:
            # torch.full makes the number on the device, since copying a number there would wait.
            values.append(
                grad_norm if isinstance(grad_norm, Tensor) else torch.full((), grad_norm, device=values[0].device)
            )
        finite, event = torch.stack([value.float() for value in values]).isfinite().all(), None
        if finite.is_cuda:
            finite, event = (
                torch.empty_like(finite, device="cpu", pin_memory=True).copy_(finite, non_blocking=True),
                (torch.cuda.Event()),
            )
            event.record()
        for batch in self._open:
            batch.grad_norm = grad_norm
        self._closed.append((self._open, finite, event))
        self._open = []

    def fault(self, wait: bool = False) -> str | None:
        """Describes the first step that is not finite, among those whose results have arrived, or returns None.

        Args:
            wait: whether to wait for the results of all steps.
        """
        while self._closed:
            batches, finite, event = self._closed[0]
            if event is not None:
                if wait:
                    event.synchronize()
                if not event.query():
                    return None
            self._closed.pop(0)
            if not finite:
                return _message(batches, self._world_size)
        return None


class StepGuard:
    """Stops the run at a step that is not finite, or skips the step, as `on_non_finite_loss` says.

    With `error` the host does not wait for the device in each step: on a GPU some more steps may run, but none of them
    is saved.

    Args:
        skips: whether such a step is skipped.
        world_size: number of processes that train together.
        last_good_checkpoint: the checkpoint that the run was resumed from.
    """

    def __init__(self, skips: bool, world_size: int = 1, last_good_checkpoint: str | None = None):
        self.last_good_checkpoint = last_good_checkpoint
        self._skips = skips
        self._watch = LossWatch(world_size)
        self._noted: dict[str, Any] | None = None
        self._before_step: Any = None
        self._skipped_in_a_row = 0

    @property
    def step_was_skipped(self) -> bool:
        """Whether the current step is skipped."""
        return self._skipped_in_a_row > 0

    def note(self, losses: Mapping[str, Tensor], student_logits: Tensor, teacher_logits: Tensor | None) -> None:
        """Keeps the losses and logits of a micro-batch from `compute_loss` until [`~StepGuard.add`]."""
        self._noted = {"losses": losses, "student_logits": student_logits, "teacher_logits": teacher_logits}

    def take_note(self) -> dict[str, Any] | None:
        """Returns the last note, or None, and forgets it."""
        noted, self._noted = self._noted, None
        return noted

    def begin(self, read_state: Callable[[], Any]) -> None:
        """Reads the state that undoes a skipped step; with accumulation, only before the first micro-batch."""
        if self._skips and self._before_step is None:
            self._before_step = read_state()

    def add(self, step: int, learning_rate: float, loss: Tensor, index: Tensor | None) -> None:
        """Adds a micro-batch to the step.

        Args:
            step: number of the optimiser step.
            learning_rate: the learning rate of the step.
            loss: the scalar that `compute_loss` returned. An overridden compute_loss may note nothing, or change the sum.
            index: [B] integers of the samples, where they are known.
        """
        noted = self.take_note() or {"losses": {}, "student_logits": None, "teacher_logits": None}
        noted["losses"] = {**noted["losses"], "loss": loss}
        self._watch.add(step, learning_rate, index=index, **noted)

    def close_step(self, step: int, grad_norm: Tensor | float | None, scaled: bool) -> Any:
        """Ends a step before the optimiser uses its gradient. Where steps are skipped, all processes must call this.

        Args:
            step: number of the optimiser step.
            grad_norm: the norm of the gradients of all processes together.
            scaled: whether the gradients are scaled (fp16): infinite gradients are then no fault.

        Returns:
            The state that [`~StepGuard.begin`] read, if the step must be skipped, or None.

        Raises:
            NonFiniteLossError: a step is not finite and none is skipped, or too many were skipped in a row.
        """
        self._watch.close_step(grad_norm, scaled)
        if not self._skips:
            self.check()
            return None
        fault = self._watch.fault(wait=True)
        before, self._before_step = self._before_step, None
        if not any_process(fault is not None):
            self._skipped_in_a_row = 0
            return None
        self._skipped_in_a_row += 1
        fault = fault or f"the loss of step {step} is not finite in another process"
        if self._skipped_in_a_row == MAX_SKIPPED:
            self._stop(f"{fault}. It is the last of {MAX_SKIPPED} steps in a row")
        logger.warning("%s. The step is skipped.", fault)
        return before

    def check(self, wait: bool = False) -> None:
        """Raises NonFiniteLossError if a step that has ended is not finite.

        Args:
            wait: whether to wait for the results of all steps.
        """
        if fault := self._watch.fault(wait):
            self._stop(fault)

    def _stop(self, fault: str) -> None:
        saved = self.last_good_checkpoint
        kept = f"The last good checkpoint is {saved}" if saved else "No checkpoint was saved before"
        advice = "" if self._skips else ". on_non_finite_loss=skip skips such steps"
        raise NonFiniteLossError(f"{fault}. {kept}{advice}")


class StepState(NamedTuple):
    """The state that a skipped step must not change, beside weights and optimiser."""

    loss: Tensor
    log: LossLog
    buffers: list[Tensor]

    @classmethod
    def read(cls, trainer: "DistillationTrainer") -> "StepState":
        """Copies the state of a trainer."""
        buffers = [buffer.clone() for buffer in trainer.model.buffers()]
        return cls(trainer._tr_loss.clone(), trainer.loss_log.copy(), buffers)

    def restore(self, trainer: "DistillationTrainer") -> None:
        """Restores this state in a trainer, and counts the step as skipped."""
        trainer._tr_loss.copy_(self.loss)
        skipped_steps = trainer.loss_log.skipped_steps + 1
        trainer.loss_log = self.log.copy()
        trainer.loss_log.skipped_steps = skipped_steps
        # Trainer averages the loss over the steps since _globalstep_last_logged; the skipped step must not count.
        trainer._globalstep_last_logged += 1
        for buffer, value in zip(trainer.model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)


def _message(batches: list[_MicroBatch], world_size: int) -> str:
    bad = [batch for batch in batches if not all(math.isfinite(value) for value in _numbers(batch.losses.values()))]
    batch = bad[0] if bad else batches[-1]
    known = dict(zip(batch.losses, _numbers(batch.losses.values()), strict=True))
    known["learning_rate"] = batch.learning_rate
    if batch.grad_norm is not None:
        known["grad_norm"] = float(batch.grad_norm)
    what = "loss" if bad else "gradient norm"
    parts = [
        f"the {what} of step {batch.step} is not finite ({', '.join(f'{name}={value:g}' for name, value in known.items())})"
    ]
    if bad:
        parts.append(_cause(batch))
    elif world_size > 1:
        parts.append(
            "The losses of this process are finite: read the messages of the other processes. If their losses are finite, "
            "too, the gradient overflows"
        )
    else:
        parts.append(
            "The loss is finite, so that its gradient overflows: look for a root, a logarithm or a division near 0 in it"
        )
    if batch.index is not None:
        parts.append(f"Samples of the batch, by their index in the data: {_name_samples(batch.index)}")
    return ". ".join(parts)


def _cause(batch: _MicroBatch) -> str:
    if batch.student_rows is None:
        return "The loss came from an overridden compute_loss or compute_loss_func, so its components are unknown"
    student = ~batch.student_rows.isfinite()
    teacher = torch.zeros_like(student) if batch.teacher_rows is None else ~batch.teacher_rows.isfinite()
    if teacher.any() and student.any():
        return (
            f"Neither the teacher's logits nor the student's are finite, for {_count(teacher, batch)} and "
            f"{_count(student, batch)}: check these images, and whether their pixel values are finite"
        )
    if teacher.any():
        return (
            f"The teacher's logits are not finite for {_count(teacher, batch)}, while the student's are: check the "
            "teacher's weights, and its precision (fp16 overflows where bf16 and float32 do not)"
        )
    if student.any():
        of_teacher = "" if batch.teacher_rows is None else ", while the teacher's are"
        return (
            f"The student's logits are not finite for {_count(student, batch)}{of_teacher}: the student diverges: lower "
            "learning_rate, warm up for longer, or clip with max_grad_norm"
        )
    return "The logits are finite, so that the loss itself overflows: lower its weight or its temperature"


def _count(rows: Tensor, batch: _MicroBatch) -> str:
    which = "" if batch.index is None else f" ({_name_samples(batch.index[rows])})"
    return f"{int(rows.sum())} of {len(rows)} samples{which}"


def _name_samples(index: Tensor) -> str:
    # ImageCollator gives images without labels the index -1 - row.
    return ", ".join(str(row) if row >= 0 else f"unlabelled {-1 - row}" for row in index.tolist())


def _numbers(values) -> list[float]:
    return [float(value) for value in values]
