"""A temperature for NKD by the confidence of its teacher: the rule that comparison.py tests; COMPARISON.md has its reason."""

import math
from typing import Any

import torch
from torch import Tensor

LARGEST = 0.5


def choose_temperature(teacher_logits: Tensor, labels: Tensor, largest: float = LARGEST) -> float:
    """Finds the temperature at which the largest of a teacher's probabilities without the target is `largest` on average.

    The mean falls with the temperature, from 1 to 1 / (classes - 1).

    Args:
        teacher_logits: [N, C] float, on training images; C is more than 1 / `largest` + 1.
        labels: [N] int64.
        largest: between 1 / (C - 1) and 1.

    Returns:
        The temperature, to two decimals, so that it is the same on all machines.
    """
    low, high = 0.01, 1000.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        if _largest_other(teacher_logits, labels, middle) > largest:
            low = middle
        else:
            high = middle
    return round(high, 2)


def describe_confidence(teacher_logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Measures how confident a teacher is on training images, and what temperature follows from that."""
    target = teacher_logits.double().softmax(1).gather(1, labels[:, None])
    return {
        "temperature": choose_temperature(teacher_logits, labels),
        "largest_other": round(_largest_other(teacher_logits, labels, 1.0), 4),
        "target": round(target.mean().item(), 4),
    }


def _largest_other(teacher_logits: Tensor, labels: Tensor, temperature: float) -> float:
    others = teacher_logits.double().scatter(1, labels[:, None], -torch.inf)
    return (others / temperature).softmax(1).amax(1).mean().item()
