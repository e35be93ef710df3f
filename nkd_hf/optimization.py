"""Learning rate schedules and weight decay groups of the paper's tables.

The schedules count in epochs, as the official configurations do, and are evaluated at every optimiser step. Each is a closed
form of the step, so that a run that is resumed, and a plan that trains nothing, read the same rates.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch import nn
from transformers import SchedulerType
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.utils import ExplicitEnum


class _Run(NamedTuple):
    num_steps: int
    steps_per_epoch: float
    learning_rate: float


def multistep(
    step: int,
    run: _Run,
    *,
    milestones: Sequence[float],
    gamma: float = 0.1,
) -> float:
    """Multiplied by `gamma` at each of the `milestones`, in epochs."""
    epoch = _epoch(step, run)
    return gamma ** sum(epoch >= milestone for milestone in milestones)


def exponential_by_epoch(step: int, run: _Run, *, gamma: float) -> float:
    """Multiplied by `gamma` after each epoch."""
    return gamma ** _epoch(step, run)


def constant_then_linear(
    step: int,
    run: _Run,
    *,
    constant_steps: int,
    constant_factor: float = 0.1,
) -> float:
    """`constant_factor` for `constant_steps` steps, then a line from 1 to 0 at the end."""
    if step < constant_steps:
        return constant_factor
    return max(0.0, 1 - (step - constant_steps) / max(1, run.num_steps - constant_steps))


def cosine_by_epoch(
    step: int,
    run: _Run,
    *,
    warmup_epochs: int = 0,
    warmup_factor: float = 0.0,
    warmup_by: str = "step",
    min_lr: float = 0.0,
) -> float:
    """A line from `warmup_factor` to 1 over `warmup_epochs`, then a cosine that falls to `min_lr` with each epoch.

    The line reaches 1 at the last step (`warmup_by="step"`) or in the last epoch (`"epoch"`) of the warm-up, as mmengine's
    LinearLR does.
    """
    epoch = _epoch(step, run)
    if epoch < warmup_epochs:
        position, last = (
            (epoch, warmup_epochs - 1)
            if warmup_by == "epoch"
            else (step, math.ceil(warmup_epochs * run.steps_per_epoch - 1e-9) - 1)
        )
        return warmup_factor + (1 - warmup_factor) * min(1.0, position / max(1, last))
    num_epochs = max(1.0, run.num_steps / run.steps_per_epoch - warmup_epochs)
    cosine = (1 + math.cos(math.pi * min(1.0, (epoch - warmup_epochs) / num_epochs))) / 2
    floor = min_lr / run.learning_rate if run.learning_rate else 0.0
    return floor + (1 - floor) * cosine


SCHEDULES = {
    schedule.__name__: schedule
    for schedule in (multistep, exponential_by_epoch, constant_then_linear, cosine_by_epoch)
}
EpochSchedule = ExplicitEnum("EpochSchedule", {name.upper(): name for name in SCHEDULES})

# What may be kept from weight decay. The official configurations name these embeddings (DeiT, Swin).
NO_DECAY_KINDS = ("norm", "bias", "embedding")
_EMBEDDING = re.compile(
    r"(^|\.)(cls_token|dist_token|distillation_token|pos_embed|position_embeddings|relative_position_bias_table)$"
)


def decayed_parameters(model: nn.Module, no_weight_decay: Collection[str]) -> list[str]:
    """Names of the parameters that decay.

    Args:
        model (`nn.Module`)
        no_weight_decay (`Collection[str]`): some of `norm` (all parameters of normalisation layers), `bias`, and
            `embedding` (class and distillation tokens, position embeddings, relative position biases).

    Example:

    ```python
    >>> from nkd_hf.optimization import decayed_parameters
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    >>> decayed_parameters(model, ["norm"]), decayed_parameters(model, ["norm", "bias"])
    (['0.weight', '0.bias'], ['0.weight'])

    ```
    """
    names = []
    for module_name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(module_name, recurse=False):
            kinds = {"norm": is_norm, "bias": name.endswith("bias"), "embedding": bool(_EMBEDDING.search(name))}
            if not any(kinds[kind] for kind in no_weight_decay):
                names.append(name)
    return names


def lr_factor(
    name: str, num_steps: int, num_epochs: float, learning_rate: float, arguments: dict | None = None
) -> Callable[[int], float]:
    """A schedule as `torch.optim.lr_scheduler.LambdaLR` wants it.

    Epochs are spread evenly over `num_steps`, so that a run of `max_steps` goes through the whole schedule.

    Args:
        name (`str`): one of `SCHEDULES`.
        num_steps (`int`): optimiser steps of the run.
        num_epochs (`float`): epochs of the run.
        learning_rate (`float`): what `min_lr` is a part of; a rate that is scaled to the global batch scales both.
        arguments (`dict`, *optional*): keyword arguments of the schedule.

    Returns:
        A function of the optimiser step (from 0) that gives the factor.

    Raises:
        ValueError: `arguments` are not the schedule's.

    Example:

    ```python
    >>> from nkd_hf.optimization import lr_factor
    >>> factor = lr_factor("multistep", 1000, 100, 0.1, {"milestones": [30, 60, 90]})
    >>> [round(factor(step), 6) for step in (0, 299, 300, 600, 999)]
    [1.0, 1.0, 0.1, 0.01, 0.001]

    ```
    """
    arguments = arguments or {}
    check_arguments(name, arguments, learning_rate)
    if num_epochs <= 0:
        raise ValueError(f"num_train_epochs must be positive for lr_scheduler_type={name}, got {num_epochs}")
    run = _Run(num_steps, num_steps / num_epochs, learning_rate)
    return lambda step: SCHEDULES[name](step, run, **arguments)


def check_arguments(name: str, arguments: dict, learning_rate: float) -> None:
    """Raises ValueError where `arguments` are not those of the schedule, or out of range."""
    if name not in SCHEDULES:
        parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
        if unknown := [key for key in arguments if key not in parameters]:
            raise ValueError(
                f"lr_scheduler_kwargs of another schedule: {', '.join(map(str, unknown))} are not read by lr_scheduler_type={name}. "
                "Set them too (none: --lr_scheduler_kwargs '{}')"
            )
        for key, value in arguments.items():
            is_number = type(value) in (int, float) and _is_finite(value)
            if re.search("int|float", str(parameters[key].annotation)) and not (is_number or value is None):
                raise ValueError(f"lr_scheduler_kwargs: {key} must be a finite number, got {str(value)!r:.60}")
        return
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    required = {p.name for p in known.values() if p.default is p.empty}
    if not required <= set(arguments) <= set(known):
        raise ValueError(
            f"lr_scheduler_kwargs of lr_scheduler_type={name} are {', '.join(known)}, of which these must be set: "
            f"{', '.join(sorted(required)) or 'none'}; got {', '.join(map(str, arguments)) or 'none'}"
        )
    for key, value in arguments.items():
        values = value if key == "milestones" else [value]
        if key == "warmup_by":
            if value not in ("step", "epoch"):
                raise ValueError(f"lr_scheduler_kwargs: warmup_by must be step or epoch, got {value!r}")
        elif not isinstance(values, list | tuple) or not all(
            type(v) in (int, float) and _is_finite(v) and v >= 0 for v in values
        ):
            expected = "a list of epochs" if key == "milestones" else "a finite number"
            raise ValueError(f"lr_scheduler_kwargs: {key} must be {expected} >= 0, got {value!r:.60}")
    if arguments.get("min_lr", 0.0) > learning_rate > 0:
        raise ValueError(
            f"lr_scheduler_kwargs: min_lr={arguments['min_lr']} is the rate's floor, and learning_rate={learning_rate} lies "
            "below it: set min_lr too"
        )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float reaches
        return False


def _epoch(step: int, run: _Run) -> int:
    # A whole number of steps per epoch may be off by one bit after the division.
    return math.floor(step / run.steps_per_epoch + 1e-9)
