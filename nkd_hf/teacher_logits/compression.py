"""Reduces a teacher's logits to the K largest of each image, and rebuilds logits for a loss from them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses.standardized import FLOOR


def sparse_logits(
    logits: Tensor,
    target: Tensor,
    top_k: int | None,
    temperatures: Sequence[float],
    standardized_temperatures: Sequence[float] = (),
) -> dict[str, Tensor]:
    """Makes the fields of a shard for some samples.

    Args:
        logits: [n, C] float, of the teacher.
        target: [n] int64, the heaviest classes of the labels.
        top_k: K, at most C - 1; None for all classes.
        temperatures: for `rest_logsumexp`.
        standardized_temperatures: for `rest_logsumexp_standardized`.

    Returns:
        The fields by name; the module docstring of store.py lists them.
    """
    logits = logits.float()
    num_classes = logits.shape[1]
    index_dtype = torch.int16 if num_classes <= 2**15 else torch.int32
    if top_k is None:
        return {"target": target.to(index_dtype), "logits": logits}
    target = target[:, None]
    others = logits.scatter(1, target, -math.inf)
    top, classes = others.topk(top_k)
    peak = top[:, :1]
    peak = peak.masked_fill(peak == -math.inf, 0)  # -inf if the teacher rules out all other classes
    rest = others.scatter(1, classes, -math.inf) - peak
    target_logit = logits.gather(1, target)
    rows = {
        "target": target[:, 0].to(index_dtype),
        "target_logit": target_logit[:, 0],
        "peak_logit": peak[:, 0],
        # In this order, large logits cancel before a small number is subtracted.
        "log_odds": (target_logit - peak - (others - peak).logsumexp(1, keepdim=True))[:, 0],
        "classes": classes.to(index_dtype),
        "values": (top - peak).half(),
        "rest_logsumexp": _sum_rest(rest, temperatures),
    }
    if standardized_temperatures:
        deviation, mean = torch.std_mean(logits - peak, 1, keepdim=True)
        rows |= {
            "mean": mean[:, 0],
            "std": deviation[:, 0],
            "rest_logsumexp_standardized": _sum_rest(rest / (FLOOR + deviation), standardized_temperatures),
        }
    return rows


def _sum_rest(rest: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Returns the logsumexp [n, T] of the rest at each temperature."""
    return torch.stack([(rest / temperature).logsumexp(1) for temperature in temperatures], 1)


def dense_logits(
    rows: dict[str, Tensor], num_classes: int, temperatures: Sequence[float], temperature: float
) -> Tensor:
    """Returns teacher logits for NKD: the stored ones, or logits that approximate them.

    With K of the C classes, all classes that are not stored get the same logit. Their total share among the classes
    except the target is the teacher's at `temperature`. The target's probability at temperature 1 is the teacher's, as
    NKD needs it; at another temperature it is not. The other logits are the teacher's minus its peak, which changes no
    softmax.

    Args:
        rows: the fields of [`sparse_logits`], on any device.
        num_classes: C.
        temperatures: the temperatures of `rest_logsumexp`.
        temperature: the temperature of the loss, one of `temperatures`.

    Returns:
        [n, C] float32.

    Example:
        >>> teacher_logits = torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.0]])
        >>> rows = sparse_logits(teacher_logits, torch.tensor([0]), 2, [1.0])
        >>> for logits in (teacher_logits, dense_logits(rows, 5, [1.0], 1.0)):
        ...     [round(probability, 4) for probability in logits.softmax(1)[0].tolist()]
        [0.8263, 0.1118, 0.0411, 0.0151, 0.0056]
        [0.8263, 0.1118, 0.0411, 0.0104, 0.0104]
    """
    if "logits" in rows:
        return rows["logits"]
    classes, target = rows["classes"].long(), rows["target"].long()[:, None]
    num_rest = num_classes - 1 - classes.shape[1]
    dense = rows["log_odds"].new_full((len(target), num_classes), -math.inf)
    if num_rest:
        mass = rows["rest_logsumexp"][:, list(temperatures).index(temperature), None]
        dense = dense.copy_(temperature * (mass - math.log(num_rest)))
    dense = dense.scatter_(1, classes, rows["values"].float()).scatter_(1, target, -math.inf)
    others = dense.logsumexp(1, keepdim=True)
    return dense.scatter_(1, target, torch.where(others == -math.inf, 0, rows["log_odds"][:, None] + others))


def softmax_logits(
    rows: dict[str, Tensor],
    num_classes: int,
    temperatures: Sequence[float],
    temperature: float,
    standardized: bool = False,
) -> Tensor:
    """Returns teacher logits for a loss that reads their softmax over all classes at one temperature.

    All classes that are not stored get the same logit, so that their total probability at `temperature` is the teacher's. The
    other probabilities at that temperature are then the teacher's, too; at another temperature they are not. The logits are
    the teacher's minus the largest logit of the classes except the target, which changes no softmax.

    Args:
        rows: the fields of [`sparse_logits`], on any device.
        num_classes: C.
        temperatures: the temperatures of `rest_logsumexp`, or of `rest_logsumexp_standardized`.
        temperature: the temperature of the loss, one of `temperatures`.
        standardized: whether the temperature is of the standardised logits. The returned logits are not standardised:
            `mean` and `std` of the rows describe all of the teacher's logits.

    Returns:
        [n, C] float32.

    Example:
        >>> teacher_logits = torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.0]])
        >>> rows = sparse_logits(teacher_logits, torch.tensor([0]), 2, [1.0, 4.0])
        >>> for logits in (teacher_logits, softmax_logits(rows, 5, [1.0, 4.0], 4.0)):
        ...     [round(probability, 4) for probability in (logits / 4).softmax(1)[0].tolist()]
        [0.3659, 0.2219, 0.1728, 0.1346, 0.1048]
        [0.3659, 0.2219, 0.1728, 0.1197, 0.1197]
    """
    if "logits" in rows:
        return rows["logits"]
    classes, target = rows["classes"].long(), rows["target"].long()[:, None]
    target_logit = rows["target_logit"] - rows["peak_logit"]
    num_rest = num_classes - 1 - classes.shape[1]
    dense = target_logit.new_full((len(target), num_classes), -math.inf)
    if num_rest:
        name, scale = "rest_logsumexp", temperature
        if standardized:
            name, scale = "rest_logsumexp_standardized", temperature * (FLOOR + rows["std"][:, None])
        mass = rows[name][:, list(temperatures).index(temperature), None]
        dense = dense.copy_(scale * (mass - math.log(num_rest)))
    return dense.scatter_(1, classes, rows["values"].float()).scatter_(1, target, target_logit[:, None])
