"""What a loss reads of a teacher's logits, which decides how they are rebuilt from a store of the largest of them."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TopKView:
    """The part of a teacher's logits that a loss reads.

    Args:
        temperature (`float`): of the teacher's softmax.
        with_target (`bool`): whether the softmax is over all classes. Otherwise it is over the classes but the target, whose
            own probability is read at temperature 1, as NKD does.
        standardized (`bool`): whether the loss standardises the logits first.
    """

    temperature: float
    with_target: bool = True
    standardized: bool = False


def read_top_k_view(loss: nn.Module) -> TopKView | None:
    """Returns the part of a teacher's logits that a loss reads; None if it needs all of them as they are.

    Args:
        loss: with the attributes that [`DistillationLoss`] lists, or any other module.

    Example:
        >>> from nkd_hf.losses import KDLoss
        >>> read_top_k_view(KDLoss(temperature=2.0))
        TopKView(temperature=2.0, with_target=True, standardized=False)
    """
    if getattr(loss, "works_from_top_k", False):
        return TopKView(float(loss.temperature), with_target=False)
    temperature = getattr(loss, "soft_temperature", None)
    return (
        None if temperature is None else TopKView(float(temperature), standardized=getattr(loss, "standardize", False))
    )
