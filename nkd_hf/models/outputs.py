"""Checks that a model needs only pixels, and that it returns logits."""

import inspect
from typing import Any

from torch import Tensor, nn

# These arguments have a default of None in transformers, but their models fail without them: Siglip2 (NaFlex),
# ImageGPT, ShieldGemma2.
_NOT_PIXELS = ("input_ids", "spatial_shapes", "num_crops")


def check_inputs(model: nn.Module, of: str) -> None:
    """Checks that a model classifies pixels and needs nothing else.

    Args:
        model: a student or teacher.
        of: the name of the model in messages.

    Raises:
        ValueError: its forward needs more arguments.

    Example:

    ```python
    >>> from torch import nn
    >>> from nkd_hf.models.outputs import check_inputs
    >>> check_inputs(nn.Bilinear(2, 3, 4), "the teacher")
    Traceback (most recent call last):
    ValueError: the forward of the teacher must need pixel_values alone, got Bilinear, which also needs input2. Take another
    model, or wrap it in a module that computes the rest from pixel_values

    ```
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except ValueError:  # a forward that TorchScript traced has no signature
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter.name for parameter in parameters if parameter.kind in kinds]
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.name in _NOT_PIXELS
        or (parameter.default is parameter.empty and parameter.kind in (*kinds, inspect.Parameter.KEYWORD_ONLY))
    ]
    # The first argument takes the pixels, whatever its name is.
    if needed := [name for name in needed if name in _NOT_PIXELS or name not in positional[:1]]:
        raise ValueError(
            f"the forward of {of} must need pixel_values alone, got {type(model).__name__}, which also needs "
            f"{', '.join(needed)}. Take another model, or wrap it in a module that computes the rest from pixel_values"
        )


def read_logits(output: Any, of: str, num_images: int, num_classes: int | None = None) -> Tensor:
    """Reads the logits from a model's output.

    Args:
        output: a tensor, or an object that has the tensor as `.logits` or `["logits"]`.
        of: the name of the model in messages.
        num_images: B, the size of the model's batch.
        num_classes: C; None if it is not known.

    Returns:
        `Tensor`: [B, C] logits.

    Raises:
        ValueError: there are no logits of this shape.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{of} must return logits as a tensor or as an output with .logits, got {type(output).__name__}. Set "
            "return_dict of its config to True, or wrap the model in a module that returns its logits"
        )
    if logits.ndim != 2 or len(logits) != num_images or num_classes not in (None, logits.shape[1]):
        wanted = f"[{num_images}, {'C' if num_classes is None else num_classes}]"
        raise ValueError(
            f"{of} must return logits {wanted} for {num_images} images, got {list(logits.shape)}. Take an image classifier "
            "whose config counts its classes"
        )
    return logits
