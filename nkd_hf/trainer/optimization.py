"""Computes the learning rate schedules and weight decay groups of the paper's tables.

The schedules count in epochs, as the official configurations do, and are evaluated at every optimiser step. Each
schedule is a closed form of the step, so that a resumed run and `nkd-hf plan` read the same rates.
"""

import inspect
import logging
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.utils import ExplicitEnum

logger = logging.getLogger(__name__)

# Arguments that `get_scheduler` itself passes to the schedules of transformers.
_PASSED = ("optimizer", "num_warmup_steps", "num_training_steps")
# `get_scheduler` ignores the kwargs of _WITHOUT_KWARGS, and passes those of _CLASSES to the class.
_WITHOUT_KWARGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
_CLASSES = {SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau, SchedulerType.GREEDY: GreedyLR}


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
    """Multiplies by `gamma` at each of the `milestones`, in epochs (fractions are allowed)."""
    epochs = _epochs(step, run)
    return gamma ** sum(epochs >= milestone for milestone in milestones)


def exponential_by_epoch(step: int, run: _Run, *, gamma: float) -> float:
    """Multiplies by `gamma` after each epoch."""
    return gamma ** _epoch(step, run)


def constant_then_linear(
    step: int,
    run: _Run,
    *,
    constant_steps: int,
    constant_factor: float = 0.1,
) -> float:
    """Returns `constant_factor` for `constant_steps` steps, then falls in a line from 1 to 0 at the end."""
    if step < constant_steps:
        return constant_factor
    return max(0.0, 1 - (step - constant_steps) / max(1, run.num_steps - constant_steps))


def cosine_by_epoch(
    step: int,
    run: _Run,
    *,
    warmup_epochs: float = 0,
    warmup_factor: float = 0.0,
    warmup_by: str = "step",
    min_lr: float = 0.0,
) -> float:
    """Rises in a line from `warmup_factor` to 1 over `warmup_epochs`, then falls in a cosine, epoch by epoch, to
    `min_lr`.

    The line reaches 1 at the last step (`warmup_by="step"`) or in the last epoch (`"epoch"`) of the warm-up, as mmengine's
    LinearLR does. A warm-up of one epoch by epoch is an epoch at `warmup_factor`, as in mmengine. There, unlike here, the
    rate stays at that factor afterwards: `LinearParamScheduler` of mmengine 0.10 multiplies nothing once its `end` is
    reached.
    """
    epoch = _epoch(step, run)
    if _epochs(step, run) < warmup_epochs:
        position, last = (
            (epoch, warmup_epochs - 1)
            if warmup_by == "epoch"
            else (step, math.ceil(warmup_epochs * run.steps_per_epoch - 1e-9) - 1)
        )
        return warmup_factor + (1 - warmup_factor) * min(1.0, position / max(1, last))
    num_epochs = max(1.0, run.num_steps / run.steps_per_epoch - warmup_epochs)
    progress = min(1.0, max(0.0, epoch - warmup_epochs) / num_epochs)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    floor = min_lr / run.learning_rate if run.learning_rate else 0.0
    return floor + (1 - floor) * cosine


# nkd_hf/cli/options.py reads the names from this source.
SCHEDULES = {
    "multistep": multistep,
    "exponential_by_epoch": exponential_by_epoch,
    "constant_then_linear": constant_then_linear,
    "cosine_by_epoch": cosine_by_epoch,
}
EpochSchedule = ExplicitEnum("EpochSchedule", {name.upper(): name for name in SCHEDULES})

# Kinds of parameters without weight decay. The official configurations name these embeddings (DeiT, Swin).
NO_DECAY_KINDS = ("norm", "bias", "embedding")
# Names of parameters, after the last dot, in timm and transformers: cls_token_0, reg_token, class_embedding, pos_embed1,
# position_embeddings, rel_pos_h, patch_pos, height_rel, relative_position_bias_table, attention_biases, probe.
_EMBEDDING = re.compile(
    r"""(^|_)tokens?(_?\d+)?$
    | ^class_embeddings?$
    | ^(\w+_)?pos(ition|itional)?(_?(emb|enc)\w*)?(_?\d+|_[a-z])?$
    | ^(height|width)_rel$
    | ^(rel(ative)?_pos(ition)?_bias_table|relative_position_bias|attention_bias(es)?)$
    | ^(probe|latents?|query_tokens|queries)$""",
    re.VERBOSE,
)
# bias, q_bias, in_proj_bias, bias_hh_l0.
_BIAS = re.compile(r"bias$|^bias_")
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd)


def decayed_parameters(model: nn.Module, no_weight_decay: Collection[str]) -> list[str]:
    """Returns the names of the parameters that decay.

    Args:
        model (`nn.Module`)
        no_weight_decay (`Collection[str]`): some of `norm` (all parameters of normalisation layers, and scales such as
            LayerScale's: parameters with one dimension that are no bias), `bias`, and `embedding` (class and
            distillation tokens, position embeddings, relative position biases, and the parameters in
            `no_weight_decay()` of timm's model).

    Example:

    ```python
    >>> from nkd_hf.trainer.optimization import decayed_parameters
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    >>> decayed_parameters(model, ["norm"]), decayed_parameters(model, ["norm", "bias"])
    (['0.weight', '0.bias'], ['0.weight'])

    ```
    """
    kept = _kept_by_the_model(model)
    names = []
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            kinds = {"embedding"} if name in kept else _kinds(module, name.rpartition(".")[2], parameter)
            if not kinds & set(no_weight_decay):
                names.append(name)
    return names


def _kept_by_the_model(model: nn.Module) -> set[str]:
    """Returns the full names of the parameters in the `no_weight_decay()` of timm models in `model`."""
    kept = set()
    for prefix, module in model.named_modules():
        if callable(getattr(module, "no_weight_decay", None)):
            kept |= {f"{prefix}.{name}".lstrip(".") for name in module.no_weight_decay()}
    return kept


def _kinds(module: nn.Module, name: str, parameter: nn.Parameter) -> set[str]:
    """Returns the kinds of a parameter that the module itself owns."""
    if name in getattr(module, "always_decays", ()):  # see DistillationLoss
        return set()
    is_norm = "norm" in type(module).__name__.lower()
    if isinstance(module, nn.Embedding) or _EMBEDDING.search(name):
        return {"embedding"}
    if _BIAS.search(name):
        return {"bias", "norm"} if is_norm else {"bias"}
    # Shapes [C], [C, 1, 1] and the like, except the weights of convolutions.
    is_scale = parameter.ndim < 2 or (
        parameter.ndim > 2 and parameter.numel() == max(parameter.shape) and not isinstance(module, _MATRICES)
    )
    return {"norm"} if is_norm or is_scale else set()


def check_optimizer(optimizer: torch.optim.Optimizer, student: nn.Module, losses: nn.Module) -> None:
    """Raises ValueError where an optimiser does not train the layers of a loss, or no parameter of the student."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # Layer-wise optimisers such as GaLore have an optimiser for each parameter.
    trained |= {id(parameter) for parameter in getattr(optimizer, "optimizer_dict", {})}
    left_out = [
        name for name, p in losses.named_parameters(prefix="losses") if p.requires_grad and id(p) not in trained
    ]
    advice = "Build it over the parameters of student and losses, or set optim, optim_args and learning_rate instead"
    if left_out:
        names = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        raise ValueError(f"the optimizer must train the loss's own layers, got one without {names}. {advice}")
    of_student = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if of_student and not any(id(parameter) in trained for parameter in of_student):
        raise ValueError(f"the optimizer must train the student, got one with parameters of another model. {advice}")


def lr_factor(
    name: str,
    num_steps: int,
    num_epochs: float,
    learning_rate: float,
    arguments: dict | None = None,
    *,
    max_steps: int = -1,
) -> Callable[[int], float]:
    """Returns a schedule as a function for `torch.optim.lr_scheduler.LambdaLR`.

    With `max_steps`, epochs are spread evenly over the steps, so that the run passes through the whole schedule.
    Without it, an epoch of the schedule begins with an epoch of the data; the last one may be a part of an epoch
    (`num_train_epochs=2.5`).

    Args:
        name (`str`): one of `SCHEDULES`.
        num_steps (`int`): optimiser steps of the run.
        num_epochs (`float`): epochs of the run.
        learning_rate (`float`): `min_lr` is a fraction of this rate; scaling to the global batch scales both.
        arguments (`dict`, *optional*): keyword arguments of the schedule.
        max_steps (`int`, defaults to -1): the training argument; positive where it sets `num_steps`.

    Returns:
        A function of the optimiser step (from 0) that returns the factor.

    Raises:
        ValueError: `arguments` are not the schedule's.

    Example:

    ```python
    >>> from nkd_hf.trainer.optimization import lr_factor
    >>> factor = lr_factor("multistep", 1000, 100, 0.1, {"milestones": [30, 60, 90]})
    >>> [round(factor(step), 6) for step in (0, 299, 300, 600, 999)]
    [1.0, 1.0, 0.1, 0.01, 0.001]

    ```
    """
    arguments = arguments or {}
    check_arguments(name, arguments, learning_rate)
    if num_epochs <= 0:
        raise ValueError(f"num_train_epochs must be positive for lr_scheduler_type={name}, got {num_epochs}")
    steps_per_epoch = num_steps / num_epochs
    if max_steps <= 0:
        # The Trainer runs ceil(num_epochs * steps_per_epoch) steps.
        steps_per_epoch = math.floor(steps_per_epoch + 1e-9) or steps_per_epoch
    for key in ("milestones", "warmup_epochs", "constant_steps"):
        values = arguments.get(key, ())
        length, unit = (num_steps, "steps") if key == "constant_steps" else (num_epochs, "epochs")
        late = [value for value in (values if isinstance(values, list | tuple) else [values]) if value >= length]
        if late:
            logger.warning(
                "lr_scheduler_kwargs: %s=%s is not reached in a run of %g %s.", key, arguments[key], length, unit
            )
    run = _Run(num_steps, steps_per_epoch, learning_rate)
    return lambda step: SCHEDULES[name](step, run, **arguments)


def check_arguments(name: str, arguments: dict, learning_rate: float) -> None:
    """Raises ValueError where `arguments` do not belong to the schedule, or are out of range."""
    if name not in SCHEDULES:
        _check_arguments_of_transformers(SchedulerType(name), arguments, learning_rate)
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
    warms_up_by_epoch = arguments.get("warmup_by") == "epoch" and arguments.get("warmup_epochs")
    if warms_up_by_epoch and not arguments.get("warmup_factor"):
        raise ValueError(
            "lr_scheduler_kwargs: warmup_factor must be above 0 with warmup_by=epoch, got "
            f"{arguments.get('warmup_factor', 0.0)}. The first epoch would be trained at a rate of 0: set it, such as to "
            "0.1, or warmup_by to step"
        )
    if "constant_steps" in arguments and arguments["constant_steps"] != int(arguments["constant_steps"]):
        raise ValueError(
            f"lr_scheduler_kwargs: constant_steps must be a whole number, got {arguments['constant_steps']}. It counts "
            "optimiser steps, not a part of the run"
        )
    _check_floor(arguments, learning_rate)


def _check_arguments_of_transformers(schedule: SchedulerType, arguments: dict, learning_rate: float) -> None:
    function = _CLASSES.get(schedule, TYPE_TO_SCHEDULER_FUNCTION[schedule])
    parameters = {} if schedule in _WITHOUT_KWARGS else dict(inspect.signature(function).parameters)
    known = {key: parameter for key, parameter in parameters.items() if key not in _PASSED}
    if unknown := [key for key in arguments if key not in known]:
        raise ValueError(
            f"lr_scheduler_kwargs of another schedule: {', '.join(map(str, unknown))} are not read by "
            f"lr_scheduler_type={schedule.value}. It reads {', '.join(known) or 'none'}: set these "
            "(none: --lr_scheduler_kwargs '{}')"
        )
    for key, value in arguments.items():
        annotation = str(known[key].annotation)
        values = value if isinstance(value, list) and "list" in annotation else [value]
        are_numbers = all(type(v) in (int, float) and _is_finite(v) for v in values)
        if re.search("int|float", annotation) and not (are_numbers or value is None):
            raise ValueError(f"lr_scheduler_kwargs: {key} must be a finite number, got {str(value)!r:.60}")
    _check_floor(arguments, learning_rate)
    # This scheduler needs the same arguments as Trainer's; lists have an entry for each of Trainer's two groups.
    groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}]
    optimizer = torch.optim.SGD(groups, learning_rate or 1.0)
    try:
        get_scheduler(schedule, optimizer, 1, 2, scheduler_specific_kwargs=arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs do not fit lr_scheduler_type={schedule.value}, got {arguments}: {error}"
        ) from error


def _check_floor(arguments: dict, learning_rate: float) -> None:
    floor = arguments.get("min_lr") or 0.0
    if not isinstance(floor, list) and floor > learning_rate > 0:
        raise ValueError(
            f"lr_scheduler_kwargs: min_lr={floor} is the rate's floor, and learning_rate={learning_rate} lies "
            "below it: set min_lr too"
        )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _epochs(step: int, run: _Run) -> float:
    # A whole number of epochs may be off by one bit after the division.
    return step / run.steps_per_epoch + 1e-9


def _epoch(step: int, run: _Run) -> int:
    return math.floor(_epochs(step, run))
