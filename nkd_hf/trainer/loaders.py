"""Makes the trainer's samplers and data loaders, divides streams among processes, checks labels, and ends workers."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import ConcatDataset, DataLoader, Sampler, Subset

from ..data.collator import ImageCollator, without_mixing
from ..data.dataset_classes import check_dataset_classes
from ..data.image_datasets import StreamingImageDataset
from ..data.label_check import LabelCheck
from ..data.sampler import EpochDataset, EpochIndices, EpochSampler, training_sampler
from ..data.seeding import derived_seeds
from ..data.unlabeled_images import UNLABELED, JoinedImageDataset
from .arguments import DistillationTrainingArguments
from .callbacks import SetEpoch
from .sigterm import shield_worker
from .task_loss import IGNORE_INDEX

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


# Columns of a sample or a batch beside pixels and labels.
OWN_COLUMNS = ("epoch", "index", "position", "teacher_logits", "unlabeled", UNLABELED)


def configure_loaders(accelerator: Accelerator, args: DistillationTrainingArguments) -> None:
    """Sets how accelerate's loaders seed a RandomSampler in several processes, and how they copy batches to a GPU.

    Without a seed, accelerate uses torch's initial seed, which differs between processes once a trainer has trained.
    Without non-blocking copies, each step would wait until the GPU has finished all earlier steps and has the batch. A
    copy from pinned memory is queued on the GPU.
    """
    config = accelerator.dataloader_config
    if args.world_size > 1 and config.data_seed is None:
        config.data_seed = args.seed
    if args.dataloader_pin_memory and accelerator.device.type == "cuda":
        config.non_blocking = True


def make_epoch_sampler(dataset: EpochDataset, args: DistillationTrainingArguments, collator: Callable) -> EpochSampler:
    """Returns the sampler of an image dataset.

    Raises:
        ValueError: `train_sampling_strategy` is neither random nor sequential, or is sequential where classes are drawn
            equally often.
    """
    check_sampling(args.train_sampling_strategy, is_balanced=dataset.sampling_labels is not None)
    is_own = isinstance(collator, ImageCollator)
    store = collator.teacher_logits if is_own else None
    return EpochSampler(
        len(dataset),
        read_data_seed(args),
        shuffle=args.train_sampling_strategy == "random",
        positions=_needs_positions(collator) or dataset.needs_positions,
        pairs=is_own and collator.mix_pairs,
        labels=dataset.sampling_labels,
        crops=dataset.crops_per_image,
        cycle=None if store is None else store.info.cycle,
        # Between two crops lie steps of the optimiser, of which each may have several batches.
        batch=args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
    )


def check_sampling(strategy: str, is_balanced: bool) -> None:
    """Raises ValueError for a `train_sampling_strategy` that does not fit an image dataset."""
    if strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy must be random or sequential, got {strategy}. Images have no length: set one of the two"
        )
    if is_balanced and strategy == "sequential":
        raise ValueError(
            "train_sampling_strategy must be random with balanced_sampling, which draws the images, got sequential. Set one "
            "of the two"
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
    trainer: "DistillationTrainer", sampler_fn: Callable[[Any], Sampler | None], dataset: Any
) -> Sampler | None:
    """Returns the sampler that `sampler_fn` makes for a dataset, with the epoch beside the indices of images.

    Raises:
        ValueError: the collator needs positions, which the sampler does not give.
    """
    args, collator = trainer.args, trainer.data_collator
    sampler = training_sampler(sampler_fn(dataset), dataset, read_data_seed(args), args.world_size)
    has_positions = getattr(sampler, "positions", False)
    needs_positions = isinstance(dataset, EpochDataset) and (_needs_positions(collator) or dataset.needs_positions)
    if needs_positions and not has_positions:
        given = sampler.sampler if isinstance(sampler, EpochIndices) else sampler
        raise ValueError(
            "mixing in pairs, stored teacher logits and images without labels need the order of EpochSampler with positions, "
            f"got {type(given).__name__}. Do not override _get_train_sampler, or omit these features"
        )
    trainer.pop_callback(SetEpoch)
    if isinstance(sampler, EpochSampler | EpochIndices):
        trainer.add_callback(SetEpoch(sampler))
    return sampler


def read_data_seed(args: DistillationTrainingArguments) -> int:
    """Returns the seed of the order of images."""
    return args.seed if args.data_seed is None else args.data_seed


@contextlib.contextmanager
def loader_settings(
    trainer: "DistillationTrainer", dataset: Any, description: str, is_training: bool
) -> Iterator[Any]:
    """Sets the trainer's attributes that `Trainer._get_dataloader` reads, for one loader.

    In evaluation, no images are mixed and none are dropped. The collator checks labels, unless the user's own code computes
    the loss. In several processes, each reads its own part of a stream of training images, unless dispatch_batches makes
    the first process read for all. The order of images without labels depends on the seed of the labelled images'
    order.

    Yields:
        The dataset, this process' part of it, or a copy of it with this seed.

    Raises:
        ValueError: the classes of an evaluation dataset are not the student's.
    """
    args, collator, config = trainer.args, trainer.data_collator, trainer.accelerator.dataloader_config
    dispatch_batches = config.dispatch_batches
    if is_training and _is_divided(trainer, dataset):
        dataset = dataset.for_process(args.process_index, args.world_size)
        config.dispatch_batches = False
    elif is_training and isinstance(dataset, JoinedImageDataset):
        dataset = dataset.in_order_of(read_data_seed(args))
    elif not is_training:
        name = "test_dataset" if description == "test" else "eval_dataset"
        check_dataset_classes(trainer.student.config.id2label, {name: dataset})
        # With None, accelerate dispatches the batches of a stream. Only then does each image count once.
        config.dispatch_batches = None
        trainer.args = copy.copy(args)
        trainer.args.dataloader_drop_last = False
    trainer.data_collator = _check_labels_in(trainer, is_training)
    try:
        yield dataset
    finally:
        trainer.args, trainer.data_collator, config.dispatch_batches = args, collator, dispatch_batches


def prepare_loader(trainer: "DistillationTrainer", loader: DataLoader) -> DataLoader:
    """Completes a loader that `Trainer._get_dataloader` has made, and returns the `DataLoader` inside it."""
    args, own = trainer.args, loader.base_dataloader
    if isinstance(own.dataset, IterableDatasetShard) and getattr(own.dataset.dataset, "is_part", False):
        # The stream has only this process' part, which accelerate's wrapper must not divide again.
        own.dataset.num_processes, own.dataset.process_index = 1, 0
    if args.dataloader_persistent_workers:
        # The loader gets its own generator: a new iterator draws from it, and a resumed process makes more iterators than
        # one with persistent workers. Drop path and masks draw from torch's default generator.
        own.generator = torch.Generator().manual_seed(derived_seeds(args.seed, args.process_index)[0])
    own.worker_init_fn = functools.partial(shield_worker, own.worker_init_fn)
    return own


def end_workers(loaders: list[DataLoader]) -> None:
    """Ends persistent workers, which would live as long as the trainer.

    Garbage collection may close a worker's queue before it tells the worker to end, and then waits five seconds for
    each worker.
    """
    for loader in loaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
            loader._iterator = None


def _is_divided(trainer: "DistillationTrainer", dataset: Any) -> bool:
    is_stream = isinstance(dataset, StreamingImageDataset)
    return is_stream and trainer.args.world_size > 1 and not trainer.accelerator.dispatch_batches


def _check_labels_in(trainer: "DistillationTrainer", is_training: bool) -> Callable:
    """Returns the trainer's collator with a check of its labels. ImageCollator checks them itself."""
    collator = trainer.data_collator if is_training else without_mixing(trainer.data_collator)
    is_own = trainer.has_own("compute_loss", *([] if is_training else ["prediction_step"]))
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
