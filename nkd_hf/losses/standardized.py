"""Standardises logits, so that a student matches the shape of a teacher's logits and not their size."""

import torch
from torch import Tensor

# Added to the standard deviation, as in the official code.
FLOOR = 1e-7


def standardize_logits(logits: Tensor, moments: Tensor | None = None) -> Tensor:
    r"""Standardised logits of "Logit Standardization in Knowledge Distillation" (CVPR 2024,
    https://arxiv.org/abs/2403.01427), algorithm 1: :math:`(z - \bar z) / (10^{-7} + \sigma)` of each row.

    :math:`\bar z` is the mean over the classes and :math:`\sigma` the unbiased standard deviation, as in the official code
    (github.com/sunshangquan/logit-standardization-KD).
    Differs from the official code: equal logits have no gradient. There it is a finite number times 1e7.

    Args:
        logits: [B, C] float.
        moments: [B, 2] :math:`\bar z` and :math:`\sigma`, where some of the logits are approximations; None computes them.

    Returns:
        [B, C], in the dtype of `logits`.
    """
    if moments is None:
        mean, deviation = logits.mean(-1, keepdim=True), logits.std(-1, keepdim=True)
    else:
        mean, deviation = moments.to(logits.dtype).split(1, dim=-1)
    scale = torch.where(deviation > 0, 1 / (FLOOR + deviation), 0 * deviation)
    return (logits - mean) * scale


def describe_standardize(standardize: bool) -> str:
    """Ends the `extra_repr` of a loss, which the model card prints: nothing is said of the default."""
    return ", standardize=True" if standardize else ""
