"""Skips PyTorch's Python code, which takes milliseconds a call, for meta tensors, which have no values."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWS = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_}
_ACTIVATIONS = {F.gelu, F.silu, F.hardtanh, F.hardswish}


class OnlyShapes(TorchFunctionMode):
    """Returns tensors of the right shape for draws, activations and norms on the meta device; their inputs need no gradients.

    Example:

    ```python
    >>> import torch
    >>> from nkd_hf.models.meta_device import OnlyShapes
    >>> with torch.device("meta"), OnlyShapes():
    ...     torch.nn.LayerNorm(8)(torch.zeros(2, 8)).shape
    torch.Size([2, 8])

    ```
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in _DRAWS:
                return args[0]
            if func in _ACTIVATIONS or (func in _FITS and _FITS[func](*args, **kwargs)):
                return torch.empty_like(args[0])
        return func(*args, **kwargs)


def _fits_batch_norm(pixels: Tensor, running_mean: Tensor | None, *args, **kwargs) -> bool:
    return running_mean is not None and pixels.dim() > 1 and pixels.shape[1] == running_mean.numel()


def _fits_layer_norm(tokens: Tensor, normalized_shape, *args, **kwargs) -> bool:
    return tokens.shape[-len(normalized_shape) :] == tuple(normalized_shape)


# A norm whose weights do not fit its input raises PyTorch's own error.
_FITS = {F.batch_norm: _fits_batch_norm, F.layer_norm: _fits_layer_norm}
