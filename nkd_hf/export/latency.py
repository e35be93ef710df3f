"""Measures how fast classifiers are on the CPU, in PyTorch and in onnxruntime."""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .runtime import check_extra, open_session, run_session

# Runs before each timed series: caches and the CPU's clock settle, and the threads of the previous model fall asleep.
_WARM_UP = 2


def measure_latency(
    models: Mapping[str, tuple[nn.Module | str | os.PathLike, Tensor]],
    threads: int = 1,
    rounds: int = 5,
    images_per_round: int = 20,
) -> dict[str, dict[str, Any]]:
    """Measures the latency of single images and the throughput of a batch on the CPU.

    The models take turns: in each round, each model is timed on `images_per_round` single images and on one batch, after
    runs that do not count. So a machine that is slow for some time slows all models.

    Args:
        models: by name, a classifier of PyTorch or the path of an ONNX file, with its preprocessed images [B, 3, H, W]
            float32: B is the batch of the throughput. The classifiers stay as they are, on their devices.
        threads: number of threads of PyTorch and of onnxruntime.
        rounds: number of times that each model is timed.
        images_per_round: number of single images in a round.

    Returns:
        `dict`: by the names of `models`, `size_bytes` (of the ONNX file, or of the classifier's weights in memory),
        `latency_ms` (`p50` and `p95` of all single images, in milliseconds) and `images_per_second` (of the median round).

    Raises:
        ValueError: a number is below 1.
        MissingExtraError: a model is an ONNX file, and onnx, onnxscript or onnxruntime is missing.

    Example:

    ```python
    >>> import torch
    >>> from nkd_hf import create_student
    >>> from nkd_hf.export.latency import measure_latency
    >>> student = create_student("resnet18_cifar", num_labels=10, model_args={"layers": [1, 1, 1, 1]})
    >>> speed = measure_latency({"student": (student, torch.zeros(2, 3, 32, 32))}, rounds=1, images_per_round=3)
    >>> sorted(speed["student"])
    ['images_per_second', 'latency_ms', 'size_bytes']

    ```
    """
    for name, number in (("threads", threads), ("rounds", rounds), ("images_per_round", images_per_round)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}.")
    runners = {name: _make_runner(model, images, threads) for name, (model, images) in models.items()}
    singles = {name: [] for name in models}
    batches = {name: [] for name in models}
    with _torch_threads(threads), torch.inference_mode():
        for _ in range(rounds):
            for name, run in runners.items():
                images = models[name][1]
                singles[name] += _time(run, images[:1], images_per_round)
                batches[name] += _time(run, images, 1)
    return {
        name: {
            "size_bytes": _count_bytes(model),
            "latency_ms": {f"p{part}": float(np.percentile(singles[name], part)) * 1000 for part in (50, 95)},
            "images_per_second": len(images) / float(np.median(batches[name])),
        }
        for name, (model, images) in models.items()
    }


def _make_runner(model: nn.Module | str | os.PathLike, images: Tensor, threads: int) -> Callable[[Tensor], Any]:
    if isinstance(model, nn.Module):
        return copy.deepcopy(model).to("cpu", torch.float32).eval()
    check_extra()
    session = open_session(Path(model), threads)
    return lambda pixel_values: run_session(session, pixel_values)


def _time(run: Callable[[Tensor], Any], images: Tensor, repeats: int) -> list[float]:
    """Measures the seconds of each of `repeats` runs, after runs that do not count."""
    images = images.to("cpu", torch.float32).contiguous()
    for _ in range(_WARM_UP):
        run(images)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - start)
    return seconds


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _count_bytes(model: nn.Module | str | os.PathLike) -> int:
    if isinstance(model, nn.Module):
        return sum(tensor.nbytes for tensor in model.state_dict().values())
    return os.path.getsize(model)
