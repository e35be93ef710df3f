"""Runs a model on random images to find the meaning of the axes of a layer's output."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .feature_layers import (
    Grid,
    Reading,
    describe,
    keep_tokens,
    known_reading,
    pool_places,
    prefix_tokens,
    read_tokens,
    timm_model,
)

# Two images reveal a layer whose first axis is not the batch (Swin's windows, a table of positions).
_BATCH_SIZE = 2


class Output:
    """Keeps the last output of one module, or `read(output)`."""

    def __init__(self, module: nn.Module, read: Callable[[Tensor], Any] | None = None):
        self.listening = True
        self._read = read
        self._value: Any = None
        # timm's gradient checkpointing calls the parts of a Sequential and never the Sequential itself.
        while isinstance(module, nn.Sequential) and len(module):
            module = module[-1]
        self.hook = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor | tuple | dict) -> None:
        if self.listening:
            if not isinstance(output, Tensor):
                output = next(iter(output.values())) if isinstance(output, dict) else output[0]
            self._value = output if self._read is None else self._read(output)

    def take(self) -> Any:
        """Returns the output and forgets it."""
        value, self._value = self._value, None
        return value


def input_size(model: nn.Module) -> tuple[int, int]:
    """Returns height and width of the images that a model was built for; 224 x 224 if its settings have no size."""
    timm, config = timm_model(model), getattr(model, "config", None)
    size = getattr(getattr(timm, "patch_embed", None), "img_size", None)
    if size is None:
        cfg = getattr(config, "pretrained_cfg", None) or getattr(timm, "pretrained_cfg", None) or {}
        size = cfg["input_size"][-2:] if cfg.get("input_size") else getattr(config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else tuple(size)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode without gradient, and restores each module's mode and the random state afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_once(model: nn.Module, size: tuple[int, int]) -> Any:
    """Returns a model's output for two random images, the same ones in each call.

    Args:
        model: a `*ForImageClassification`, or a bare timm model.
        size: height and width in pixels.
    """
    with unchanged(model):
        # Module.compile compiles __call__, whose graph lacks hooks that are registered later.
        return model.forward(_random_images(model, size))


def find_reading(model: nn.Module, layer: str) -> Reading:
    """Finds the reading of `mid` from the output of a submodule.

    The model runs on images of two sizes, on the meta device if it can. The axes that change with the size are places,
    and the axis that does not change has the channels. If the model takes only one size, the two equal axes of a
    square image's map are places, or the axis as long as one of the model's norms has the channels.

    Raises:
        ValueError: the output is no tensor of the batch, or its shape does not show the axis of the channels.
    """
    patches = known_reading(model, "low") if prefix_tokens(model) is not None else None
    size = input_size(model)
    shape, *grid = _shapes(model, [layer] + ([patches.grid_layer] if patches else []), size)
    if len(shape) == 2:
        return Reading((layer,), _as_it_is, "output")
    if patches and len(shape) == 3:
        num_patches = grid[0][-2] * grid[0][-1]
        if shape[1] == num_patches + prefix_tokens(model):
            return Reading((layer,), *read_tokens(model))
        if shape[1] == num_patches:
            return Reading((layer,), _mean_of_tokens, "mean of the patch tokens")
    axis = _channel_axis(model, layer, shape, size)
    if axis == 1:
        return Reading((layer,), pool_places, "average over the places")
    return Reading((layer,), keep_tokens, "tokens")


def _as_it_is(output: Tensor, grid: Grid | None) -> Tensor:
    return output


def _mean_of_tokens(output: Tensor, grid: Grid | None) -> Tensor:
    return output.mean(1)


def _random_images(model: nn.Module, size: tuple[int, int]) -> Tensor:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH_SIZE, 3, *size, generator=generator, device="cpu")
    return images.to(parameter.device, parameter.dtype)


def _shapes(model: nn.Module, layers: list[str], size: tuple[int, int]) -> list[torch.Size]:
    """Returns the shapes of the outputs of submodules; the user named the first submodule.

    Raises:
        ValueError: the model does not run, or the output of the first submodule is no tensor of the batch.
    """
    try:
        values = _run_on_meta(model, layers, size)
    except Exception:  # an operation that needs values, or a tensor that is neither parameter nor buffer
        try:
            values = _run(model, layers, size)
        except Exception as error:
            raise ValueError(
                f"feature_layer {layers[0]!r} is tried on two images of {size[0]}x{size[1]}, and {describe(model)} "
                f"does not run: {error}. Choose another layer"
            ) from error
    value = values[0]
    if value is None:
        raise ValueError(f"feature_layer {layers[0]!r} takes no part in the forward pass of {describe(model)}")
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or not 2 <= value.ndim <= 4 or len(value) != _BATCH_SIZE:
        raise ValueError(
            f"feature_layer must name a submodule whose output is [B, D], [B, N, D] or a map of the batch, got "
            f"{got} for {_BATCH_SIZE} images from {layers[0]!r}. Choose another layer, such as a block or a stage"
        )
    return [value.shape for value in values]


def _run(model: nn.Module, layers: list[str], size: tuple[int, int]) -> list[Any]:
    """Returns the outputs of submodules, None for a submodule that did not run."""
    outputs = [Output(model.get_submodule(name)) for name in layers]
    try:
        run_once(model, size)
        return [output.take() for output in outputs]
    finally:
        for output in outputs:
            output.hook.remove()


def _run_on_meta(model: nn.Module, layers: list[str], size: tuple[int, int]) -> list[Any]:
    """Does the same as `_run` on the meta device, which computes only shapes."""
    tensors = {
        name: tensor.to("meta") for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
    }
    outputs = [Output(model.get_submodule(name)) for name in layers]
    try:
        with unchanged(model):
            torch.func.functional_call(model, tensors, (_random_images(model, size).to("meta"),))
        return [output.take() for output in outputs]
    finally:
        for output in outputs:
            output.hook.remove()


def _channel_axis(model: nn.Module, layer: str, shape: torch.Size, size: tuple[int, int]) -> int:
    axes = range(1, len(shape))
    fits = [axis for axis in axes if shape[axis] > 1]
    if len(fits) > 1:
        # This runs only on the meta device: on a GPU, an index beyond a table of positions would end the process.
        with contextlib.suppress(Exception):
            other = _run_on_meta(model, [layer], (2 * size[0], 2 * size[1]))[0].shape
            fits = [axis for axis in axes if len(other) == len(shape) and other[axis] == shape[axis]]
    if len(fits) != 1 and len(shape) == 4 and size[0] == size[1]:
        fits = [axis for axis, places in ((1, shape[2:]), (3, shape[1:3])) if places[0] == places[1] != shape[axis]]
    if len(fits) != 1:
        widths = {len(p) for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 1}
        fits = [axis for axis in axes if shape[axis] in widths]
    if len(fits) != 1 or fits[0] not in (1, len(shape) - 1):
        raise ValueError(
            f"feature_layer must name a submodule whose output shows which axis has the channels, got {list(shape)} for "
            f"images of {size[0]}x{size[1]} from {layer!r} of {describe(model)}. Choose another layer"
        )
    return fits[0]
