"""Finds the input sizes that a model takes, by runs on the meta device, which computes no values."""

from collections.abc import Callable, Iterator

import timm
import torch
from torch import nn
from transformers import PreTrainedModel

from .meta_device import OnlyShapes

# The patch sizes and strides of most architectures divide these numbers.
_STEPS = (32, 14, 48)


def own_image_size(architecture: str, otherwise: int = 224) -> int:
    """Returns height and width of one of timm's architectures; `otherwise` where timm doesn't fix the size."""
    cfg = timm.get_pretrained_cfg(architecture)
    return cfg.input_size[-1] if cfg is not None and cfg.fixed_input_size else otherwise


def takes_img_size(architecture: str) -> bool:
    """Whether one of timm's architectures has an argument `img_size`, which is saved with its student.

    timm passes `img_size` itself to architectures of a fixed input size (`_update_default_model_kwargs` of
    timm/models/_builder.py).
    """
    cfg = timm.get_pretrained_cfg(architecture)
    return cfg is not None and bool(cfg.fixed_input_size)


def try_image_size(
    build: Callable[[int], PreTrainedModel], image_size: int
) -> tuple[PreTrainedModel | None, Exception | None]:
    """Builds a model and runs it on one image, without weights or pixels.

    Args:
        build: builds the model for an input size.
        image_size: height and width.

    Returns:
        The model on the meta device, or None if it couldn't be built; and its exception, or None if it returned its logits.
    """
    model = None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), OnlyShapes():
            model = build(image_size)
            return model, run_fault(model, image_size)
    except Exception as error:  # from anywhere in timm or in a model's own code
        return model, error


def run_fault(model: PreTrainedModel, image_size: int) -> Exception | None:
    """Returns the exception of a model on one image of this size, or None if it returns its logits; keeps modules'
    modes.

    A size whose last pixels are in no patch is a fault, unless the architecture was designed for it.
    """
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    rests: list[tuple[int, int]] = []
    hooks = [
        module.register_forward_pre_hook(lambda conv, inputs: rests.append(_rest_of_patches(conv, inputs[0])))
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), OnlyShapes():
            output = model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
            logits = output if isinstance(output, torch.Tensor) else output.logits
            if tuple(logits.shape) != (1, model.config.num_labels):
                return ValueError(f"its output is {list(logits.shape)}, not [1, {model.config.num_labels}]")
            if rests and max(rests[0]) and image_size != _designed_size(model):
                return ValueError(f"its patches leave {max(rests[0])} of {image_size} pixels unseen")
    except Exception as error:
        return error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return None


def _rest_of_patches(conv: nn.Conv2d, pixels: torch.Tensor) -> tuple[int, int]:
    """Counts the rows and columns that are left when a convolution cuts the pixels into patches."""
    if conv.kernel_size != conv.stride or conv.padding not in (0, (0, 0), "valid"):
        return 0, 0
    return tuple(length % patch for length, patch in zip(pixels.shape[-2:], conv.stride, strict=True))


def _designed_size(model: PreTrainedModel) -> int | None:
    architecture = getattr(model.config, "architecture", None)
    return getattr(model.config, "image_size", None) if architecture is None else own_image_size(architecture)


def is_of_the_meta_device(error: Exception) -> bool:
    """Whether the meta device is the cause of an error, and not the model."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


def image_size_advice(build: Callable[[int], PreTrainedModel], image_size: int, own: int) -> str:
    """Returns advice with up to three sizes that a model takes, its own and the nearest ones, or an empty text."""
    fits = []
    for size in _near(image_size, own):
        if try_image_size(build, size)[1] is None:
            fits.append(size)
        if len(fits) == 3:
            break
    return f"Set image_size to {' or '.join(map(str, sorted(fits)))}" if fits else ""


def _near(image_size: int, own: int) -> Iterator[int]:
    sizes = {own, 224, 256}
    for step in _STEPS:
        below = image_size - image_size % step
        sizes |= {below, below + step}
    yield from sorted(sizes - {0, image_size}, key=lambda size: (size != own, abs(size - image_size)))


def describe_fault(error: Exception) -> str:
    """Returns the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
