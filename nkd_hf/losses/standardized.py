"""Standardises logits, so that a student matches the shape of a teacher's logits and not their size."""

import torch
from torch import Tensor


def standardize_logits(logits: Tensor) -> Tensor:
    r"""Standardised logits of "Logit Standardization in Knowledge Distillation" (CVPR 2024,
    https://arxiv.org/abs/2403.01427), algorithm 1: :math:`(z - \bar z) / (10^{-7} + \sigma)` of each row.

    :math:`\bar z` is the mean over the classes and :math:`\sigma` the unbiased standard deviation, as in the official code
    (github.com/sunshangquan/logit-standardization-KD).
    Differs from the official code: equal logits have no gradient. There it is a finite number times 1e7.

    Args:
        logits: [B, C] float.

    Returns:
        [B, C], in the dtype of `logits`.
    """
    deviation = logits.std(-1, keepdim=True)
    scale = torch.where(deviation > 0, 1 / (1e-7 + deviation), 0 * deviation)
    return (logits - logits.mean(-1, keepdim=True)) * scale


def describe_standardize(standardize: bool) -> str:
    """Ends the `extra_repr` of a loss, which the model card prints: nothing is said of the default."""
    return ", standardize=True" if standardize else ""
