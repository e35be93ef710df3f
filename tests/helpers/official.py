"""Official weights and images: made from names and seeds, as when `data/mmcls_*` was written by the official code."""

import json
import math
import zlib
from pathlib import Path

import torch

DATA = Path(__file__).parents[1] / "fixtures"


def official_tensor(key: str, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if not like.is_floating_point():
        return torch.zeros_like(like)
    if key.endswith("running_var"):
        return 0.5 + torch.rand(like.shape, generator=generator)
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim == 1:
        return 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise
    return noise / math.sqrt(like[0].numel())


def official_state_dict(architecture: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The official state dict of an architecture of `data/mmcls_keys.json`.

    Args:
        architecture: such as `resnet18`.
        prefix: of the names that the weights are made from, `teacher.` for a teacher; the keys do not have it.
    """
    keys = json.loads((DATA / "mmcls_keys.json").read_text())[architecture]
    return {
        key: official_tensor(prefix + key, torch.empty(shape, dtype=getattr(torch, dtype)))
        for key, (dtype, shape) in keys.items()
    }


def official_images(number: int, size: int = 224) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))
