"""The trainer's samplers and data loaders: epochs, streams divided among processes, checked labels, workers that end."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Sampler, Subset

from ..data.collator import ImageCollator
from ..data.image_datasets import StreamingImageDataset
from ..data.label_check import LabelCheck
from ..data.sampler import EpochDataset, EpochIndices, EpochSampler, training_sampler
from ..data.seeding import derived_seeds
from .arguments import DistillationTrainingArguments
from .distillation_model import IGNORE_INDEX
from .sigterm import shield_worker

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def make_epoch_sampler(dataset: EpochDataset, args: DistillationTrainingArguments, collator: Callable) -> EpochSampler:
    """Returns the sampler of an image dataset.

    Raises:
        ValueError: `train_sampling_strategy` is none for images.
    """
    strategy = args.train_sampling_strategy
    if strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy must be random or sequential, got {strategy}. Images have no length: set one of the two"
        )
    return EpochSampler(
        len(dataset),
        read_data_seed(args),
        shuffle=strategy == "random",
        positions=_needs_positions(collator),
        pairs=isinstance(collator, ImageCollator) and collator.mix_pairs,
    )


def check_holds_no_epoch_dataset(dataset: Any) -> None:
    """Raises ValueError for a `Subset` or `ConcatDataset`, however deep, of an [`EpochDataset`]."""
    if _holds_an_epoch_dataset(dataset):
        raise ValueError(
            f"train_dataset must be an ImageDataset itself, got a {type(dataset).__name__} of one. It passes row "
            "numbers without the epoch, so that a resumed run would see the augmentation of epoch 0 again: select or "
            "concatenate the rows of the datasets.Dataset, and make an ImageDataset of the result"
        )


def make_training_sampler(
    sampler_fn: Callable[[Any], Sampler | None], dataset: Any, args: DistillationTrainingArguments, collator: Callable
) -> Sampler | None:
    """Returns the sampler that `sampler_fn` makes for a dataset, with the epoch beside the indices of images.

    Raises:
        ValueError: the collator needs positions, which the sampler does not give.
    """
    sampler = training_sampler(sampler_fn(dataset), dataset, read_data_seed(args), args.world_size)
    has_positions = getattr(sampler, "positions", False)
    if isinstance(dataset, EpochDataset) and _needs_positions(collator) and not has_positions:
        given = sampler.sampler if isinstance(sampler, EpochIndices) else sampler
        raise ValueError(
            "mixing in pairs and stored teacher logits need the order of EpochSampler with positions, got "
            f"{type(given).__name__}. Leave _get_train_sampler as it is, or set mix_pairs to false and a teacher"
        )
    return sampler


def read_data_seed(args: DistillationTrainingArguments) -> int:
    """Returns the seed of the order of images."""
    return args.seed if args.data_seed is None else args.data_seed


@contextlib.contextmanager
def loader_settings(trainer: "DistillationTrainer", is_training: bool, divided: bool) -> Iterator[None]:
    """Sets what `Trainer._get_dataloader` reads of the trainer, for one loader.

    In evaluation, no images are mixed and none are dropped. Labels are checked by the collator, where the trainer knows
    what they mean.

    Args:
        trainer: as it was before, afterwards.
        is_training: whether the loader is one of training images.
        divided: see [`is_divided`].
    """
    args, collator, config = trainer.args, trainer.data_collator, trainer.accelerator.dataloader_config
    dispatch_batches = config.dispatch_batches
    if divided:
        config.dispatch_batches = False
    if not is_training:
        # accelerate dispatches the batches of a stream, which alone counts each image once, unless it is told not to.
        config.dispatch_batches = None
        trainer.args = copy.copy(args)
        trainer.args.dataloader_drop_last = False
    trainer.data_collator = _check_labels_in(trainer, is_training)
    try:
        yield
    finally:
        trainer.args, trainer.data_collator, config.dispatch_batches = args, collator, dispatch_batches


def is_divided(trainer: "DistillationTrainer", dataset: Any) -> bool:
    """Whether each process reads its own part of a training dataset. With dispatch_batches=True the first one reads all."""
    is_stream = isinstance(dataset, StreamingImageDataset)
    return is_stream and trainer.args.world_size > 1 and not trainer.accelerator.dispatch_batches


def prepare_loader(loader: DataLoader, args: DistillationTrainingArguments, divided: bool) -> DataLoader:
    """Completes a loader that `accelerate` has prepared, and returns the `DataLoader` inside it.

    Args:
        loader: what `Trainer._get_dataloader` returned.
        args: the trainer's.
        divided: whether its dataset holds the batches of this process alone.
    """
    if divided:
        # accelerate's wrapper would pick this process' batches of a stream that holds no others.
        loader.dataset.num_processes, loader.dataset.process_index = 1, 0
    own = loader.base_dataloader
    if args.dataloader_persistent_workers:
        # A generator of its own: a resumed process makes new iterators where persistent workers keep theirs, and each
        # would take a number from the generator that drop path and masks draw from.
        own.generator = torch.Generator().manual_seed(derived_seeds(args.seed, args.process_index)[0])
    own.worker_init_fn = functools.partial(shield_worker, own.worker_init_fn)
    return own


def end_workers(loaders: list[DataLoader]) -> None:
    """Ends persistent workers, which would live as long as the trainer.

    A trainer ends as garbage: the queues of its workers may be closed before it tells them to leave, and it then waits
    for five seconds for each.
    """
    for loader in loaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
            loader._iterator = None


def without_mixing(collator: Callable) -> Callable:
    """Returns a collator that mixes no images."""
    return collator.without_mixing() if isinstance(collator, ImageCollator) else collator


def _check_labels_in(trainer: "DistillationTrainer", is_training: bool) -> Callable:
    """Returns the trainer's collator with a check of its labels, which ImageCollator makes itself."""
    collator = trainer.data_collator if is_training else without_mixing(trainer.data_collator)
    is_own = trainer.has_own("compute_loss") if is_training else trainer.has_own_evaluation
    if is_own or trainer.compute_loss_func is not None or isinstance(collator, ImageCollator):
        return collator
    model = trainer.accelerator.unwrap_model(trainer.model)
    ignore_index = None if is_training and model.needs("labels") else IGNORE_INDEX
    return LabelCheck(collator, model.config.num_labels, ignore_index)


def _needs_positions(collator: Callable) -> bool:
    return isinstance(collator, ImageCollator) and (collator.mix_pairs or collator.teacher_logits is not None)


def _holds_an_epoch_dataset(dataset: Any) -> bool:
    if isinstance(dataset, ConcatDataset):
        return any(isinstance(part, EpochDataset) or _holds_an_epoch_dataset(part) for part in dataset.datasets)
    if isinstance(dataset, Subset):
        return isinstance(dataset.dataset, EpochDataset) or _holds_an_epoch_dataset(dataset.dataset)
    return False
