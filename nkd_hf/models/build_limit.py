"""Stops the construction of a model that is far larger than its files of weights, before it takes memory."""

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from safetensors import safe_open
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import RefusedError

# Modules register some parameters twice (a replaced classifier, tied weights), and buffers that are not saved.
_TIMES = 4
_MORE_TENSORS = 1000
_MORE_PARAMETERS = 2**24
_MORE_IN_BUFFERS = 2**27
# The largest image classifiers have some thousand tensors and some billion parameters.
_LARGEST = (2**12, 2**34)
# A pickle has at least this many bytes for each tensor's name, shape and offset.
_BYTES_OF_A_TENSOR = 64


class WeightsSize(NamedTuple):
    """The size of a model's files of weights.

    Attributes:
        tensors (`int`): number of tensors.
        elements (`int`): number of elements in all tensors together.
    """

    tensors: int
    elements: int


def measure_weights(paths: Sequence[str]) -> WeightsSize:
    """Counts tensors and elements: reads the headers of safetensors, and bounds pickles by their number of bytes.

    Raises:
        SafetensorError: a file is damaged.
    """
    tensors = elements = 0
    for path in paths:
        if not path.endswith(".safetensors"):
            size = os.path.getsize(path)
            tensors, elements = tensors + size // _BYTES_OF_A_TENSOR, elements + size
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                tensors, elements = tensors + 1, elements + math.prod(file.get_slice(key).get_shape())
    return WeightsSize(tensors, elements)


@contextmanager
def build_limit(size: WeightsSize | None = None, num_new_classes: int = 0) -> Iterator[None]:
    """Makes constructors of modules in this thread fail if they register far more than the files of weights contain.

    `from_pretrained` builds models on the meta device, so the counted tensors take no memory yet.

    Args:
        size: the size of the files. None means the size of the largest image classifiers.
        num_new_classes: number of classes of a new classifier that replaces the file's.

    Raises:
        RefusedError: from inside the constructor.
    """
    thread = threading.get_ident()
    size = WeightsSize(*_LARGEST) if size is None else size
    left = {
        "tensors": _TIMES * size.tensors + _MORE_TENSORS,
        "parameters": _TIMES * (size.elements + num_new_classes * 2**14) + _MORE_PARAMETERS,
        "numbers in buffers": _TIMES * size.elements + _MORE_IN_BUFFERS,
    }

    def count(kind: str, tensor) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        left["tensors"] -= 1
        left[kind] -= tensor.numel()
        if spent := [name for name, number in left.items() if number < 0]:
            raise RefusedError(
                f"its config.json describes a model of far more {spent[0]} than expected ({size.tensors} tensors of "
                f"{size.elements} numbers together). Open a folder whose config.json belongs to its weights"
            )

    hooks = [
        register_module_parameter_registration_hook(lambda module, name, tensor: count("parameters", tensor)),
        register_module_buffer_registration_hook(lambda module, name, tensor: count("numbers in buffers", tensor)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
