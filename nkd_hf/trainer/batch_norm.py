"""Estimates BatchNorm's statistics before an evaluation, and finds batches of one image, on which it cannot train.

pycls and the official RegNet configs estimate the statistics in this way ("precise BN").
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from ..data.collator import without_mixing
from ..data.image_datasets import StreamingImageDataset
from ..data.sampler import EpochDataset, EpochSampler
from ..data.seeding import seeded
from ..data.unlabeled_images import UNLABELED

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def estimate_batch_norm(
    model: nn.Module,
    dataset: Dataset | IterableDataset,
    num_images: int,
    accelerator: Accelerator,
    *,
    key: tuple[int, int],
    batch_size: int,
    collate_fn: Callable,
    num_workers: int = 0,
) -> None:
    """Replaces running means and variances by their plain average over new training batches of all processes.

    Nothing else changes: parameters, mode and random states stay the same.

    Args:
        model (`nn.Module`): its forward takes `pixel_values` [B, 3, H, W]. Without BatchNorm nothing happens.
        dataset: training samples; of a stream, the first ones are read.
        num_images (`int`): number of images of all processes together; each process reads at least one batch.
        accelerator (`Accelerator`)
        key (`tuple[int, int]`): seed and step, which determine the choice of images.
        batch_size (`int`): images of a batch of one process.
        collate_fn: samples -> a dict with `pixel_values`.
        num_workers (`int`): workers of the data loader.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if isinstance(dataset, StreamingImageDataset):
        dataset, sampler = dataset.for_process(rank, world_size), None
    elif isinstance(dataset, IterableDataset):
        dataset = IterableDatasetShard(dataset, batch_size, num_processes=world_size, process_index=rank)
        sampler = None
    else:
        is_own = isinstance(dataset, EpochDataset)
        order = EpochSampler(len(dataset), key[0], labels=dataset.sampling_labels if is_own else None)
        order.set_epoch(key[1])
        keys = itertools.islice(order, rank, None, world_size)
        sampler = list(keys) if is_own else [index for _, index in keys]
        dataset = dataset.without_crops() if is_own else dataset
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate_fn, num_workers=num_workers)
    num_batches = max(1, num_images // (batch_size * world_size))
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    # Drop path and the loader draw random numbers here. Training's random numbers must not depend on them.
    with seeded(*key), torch.random.fork_rng(devices), accelerator.autocast():
        # Where no image has a label, `pixel_values` is empty.
        names = [UNLABELED, "pixel_values"]
        pixels = (
            next(batch[name] for name in names if name in batch) for batch in itertools.islice(loader, num_batches)
        )
        update_bn(pixels, model, device=accelerator.device)
    if world_size > 1:
        for norm in norms:
            norm.running_mean.copy_(accelerator.reduce(norm.running_mean, "mean"))
            norm.running_var.copy_(accelerator.reduce(norm.running_var, "mean"))


def update_batch_norm(trainer: "DistillationTrainer") -> None:
    """Estimates the student's statistics on `precise_bn_images` training images, once for all evaluations of a step."""
    args, step = trainer.args, trainer.state.global_step
    if args.precise_bn_images is None or trainer.train_dataset is None or trainer.batch_norm_step == step:
        return
    estimate_batch_norm(
        trainer.student,
        trainer.train_dataset,
        args.precise_bn_images,
        trainer.accelerator,
        key=(args.seed, step),
        batch_size=args.process_batch_size(trainer._train_batch_size),
        collate_fn=without_mixing(trainer.data_collator),
        num_workers=args.dataloader_num_workers,
    )
    trainer.batch_norm_step = step


@contextmanager
def explained_single_image(step: int) -> Iterator[None]:
    """Explains BatchNorm's error for a batch of one image, which `check_batches` cannot foresee for a stream."""
    try:
        yield
    except ValueError as error:
        if not wants_more_values(error):
            raise
        raise ValueError(
            f"the batch of step {step} must have at least 2 images, got 1. BatchNorm has no statistics of one "
            "value: set another per_device_train_batch_size. dataloader_drop_last has no effect on streams"
        ) from error


def wants_more_values(error: ValueError) -> bool:
    """Whether BatchNorm raised an error because a channel had one value, which has no variance."""
    return "more than 1 value per channel" in str(error)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a module normalises by the statistics of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def smallest_batch(loader: DataLoader, num_devices: int = 1) -> int | None:
    """Returns the number of images of the smallest batch of an epoch on one device, over all processes.

    Args:
        loader: a loader of accelerate or any other loader.
        num_devices: number of devices among which `DataParallel` divides each batch.

    Returns:
        The number, or None where it is unknown: for a stream or a batch sampler of another class.
    """
    batches = None if isinstance(loader.dataset, IterableDataset) else loader.batch_sampler
    sizes = _batch_sizes(batches)
    # DataParallel gives each device the same number, rounded up, and the last one the rest.
    return min((_smallest_chunk(size, num_devices) for size in sizes), default=None)


def _batch_sizes(batches: BatchSampler | BatchSamplerShard | None) -> set[int]:
    inner = batches.batch_sampler if isinstance(batches, BatchSamplerShard) else batches
    if type(inner) is not BatchSampler:
        return set()
    num_images, size, rest = len(inner.sampler), inner.batch_size, len(inner.sampler) % inner.batch_size
    rest = 0 if inner.drop_last else rest
    if not isinstance(batches, BatchSamplerShard):
        return {size} & {min(size, num_images)} | ({rest} if rest else set())
    share = size // batches.num_processes if batches.split_batches else size
    if batches.even_batches or not rest:  # accelerate fills the last batches up with the first images
        return {share}
    return {share, rest % share or share} if batches.split_batches else {share, rest}


def _smallest_chunk(size: int, num_devices: int) -> int:
    chunk = math.ceil(size / num_devices)
    return size - chunk * (math.ceil(size / chunk) - 1)
