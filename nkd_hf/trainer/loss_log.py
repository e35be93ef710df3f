"""Sums up the components of the loss since the last entry of the log."""

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


class LossLog:
    """Sums up the components of the loss, so that the log shows their means beside `loss`.

    Args:
        skipped_steps: number of skipped optimiser steps of the run so far, which count in no mean.

    Example:

    ```python
    >>> log = LossLog()
    >>> log.add({"task": torch.tensor(2.0)}, share=0.5)
    >>> log.add({"task": torch.tensor(4.0)}, share=0.5)
    >>> log.means(gather=lambda sums: sums)
    {'task': 3.0}
    >>> log.means(gather=lambda sums: sums)
    {}

    ```
    """

    def __init__(self, skipped_steps: int = 0):
        self.skipped_steps = skipped_steps
        self.sums: dict[str, Tensor] = {}
        # Number of optimiser steps; a micro-batch counts as a fraction of a step.
        self.steps = 0.0

    def add(self, components: Mapping[str, Tensor], share: float) -> None:
        """Adds the components (scalars) of a batch, whose share of an optimiser step is `share`."""
        for name, value in components.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach() * share
        self.steps += share

    def means(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the mean of each component over steps and processes, and empties the log.

        Args:
            gather: returns the rows [P, N] of all processes for this process's sums [1, N].
        """
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values()))
        means = gather(sums.unsqueeze(0)).mean(dim=0) / self.steps
        means = dict(zip(self.sums, means.tolist(), strict=True))
        self.sums, self.steps = {}, 0.0
        return means

    def copy(self) -> "LossLog":
        """Returns a log with the same sums, which later calls of `add` do not change."""
        other = copy.copy(self)
        other.sums = dict(self.sums)
        return other

    def state(self) -> dict[str, Any]:
        """Returns the sums and steps that a checkpoint records, in types of JSON."""
        return {
            "components": {name: value.item() for name, value in self.sums.items()},
            "component_steps": self.steps,
            "skipped_steps": self.skipped_steps,
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continues from a [`state`], with float32 sums on a device."""
        self.sums = {
            name: torch.tensor(value, dtype=torch.float32, device=device)
            for name, value in state["components"].items()
        }
        self.steps, self.skipped_steps = state["component_steps"], state.get("skipped_steps", 0)


def read_sums(trainer: "DistillationTrainer") -> dict[str, Any]:
    """Returns the sums of a trainer since its last log, in types of JSON."""
    return {
        "loss": trainer._tr_loss.item(),
        "logged_loss": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
        **trainer.loss_log.state(),
    }


def load_sums(trainer: "DistillationTrainer", sums: Mapping[str, Any]) -> None:
    """Makes a trainer continue from the [`read_sums`] of a checkpoint."""
    trainer._tr_loss += sums["loss"]
    trainer._total_loss_scalar, trainer._globalstep_last_logged = sums["logged_loss"], sums["logged_step"]
    trainer.loss_log.load(sums, trainer._tr_loss.device)
