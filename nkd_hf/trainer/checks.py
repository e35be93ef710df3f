"""Checks a DistillationTrainer before the first step: arguments, pixels, weights, metrics, batches."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, EarlyStoppingCallback, PreTrainedModel, SchedulerType, TrainerCallback
from transformers.trainer_utils import SaveStrategy, has_length
from transformers.utils import logging

from ..data.collator import ImageCollator
from ..data.dataset_classes import check_dataset_classes
from ..data.sampler import EpochDataset, EpochSampler
from ..data.seeding import seeded
from ..data.transforms import read_transform
from ..losses.base import DistillationLoss
from ..metrics import compute_balanced_metrics, compute_metrics
from ..models.labels import check_classifier
from ..models.preprocessing import read_preprocessing
from ..models.saving import read_class_names
from . import optimization
from .arguments import DistillationTrainingArguments
from .batch_norm import has_batch_norm, smallest_batch, wants_more_values
from .loss_log import LossLog
from .optimizer_groups import check_no_group_is_empty
from .unlabeled_checks import check_unlabeled

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)

_ACCURACIES = ["accuracy", "top5_accuracy"]
# The metrics of the package's own functions.
_METRICS = (
    (None, []), (compute_metrics, _ACCURACIES), (compute_balanced_metrics, [*_ACCURACIES, "balanced_accuracy"]),
)  # fmt: skip


def check_arguments(args: DistillationTrainingArguments) -> None:
    """Raises ValueError for arguments of another trainer, and where the started processes do not form one group."""
    if not isinstance(args, DistillationTrainingArguments):
        raise ValueError(
            f"args must be DistillationTrainingArguments, got {type(args).__name__}. It takes the same arguments"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started, but world_size is {args.world_size}, and each would train alone. On "
            "the CPU, set use_cpu (--use_cpu true)"
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha must be None, got {args.neftune_noise_alpha}. It adds noise to the embeddings of words: omit it"
        )


def read_losses(
    distillation_loss: nn.Module | dict[str, nn.Module] | None, compute_loss_func: Callable | None
) -> dict[str, nn.Module]:
    """Returns the distillation losses by name.

    Raises:
        ValueError: a loss is no module, a name is no text or has a dot, or `compute_loss_func` would replace the losses.
    """
    losses = {} if distillation_loss is None else distillation_loss
    losses = dict(losses) if isinstance(losses, dict) else {"distillation": losses}
    for name, loss in losses.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"the names of distillation_loss must be text without a dot, got {name!r}")
        if not isinstance(loss, nn.Module):
            raise ValueError(
                f"distillation_loss must be a module such as NKDLoss(), or a dict of them by name, got {loss!r}"
            )
    if losses and compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func must be None with a distillation_loss, which it would replace, got "
            f"{compute_loss_func!r}. Pass a module as one more distillation_loss, or override compute_loss and add to "
            "what super().compute_loss returns."
        )
    return losses


def check_student(student: nn.Module) -> None:
    """Raises ValueError for a student that is no image classifier of transformers, or whose classes have no names."""
    if not isinstance(student, PreTrainedModel):
        raise ValueError(
            f"model must be a *ForImageClassification of transformers, got {type(student).__name__}: "
            'for a timm architecture give create_student("<its name>"), and load weights into its timm_model'
        )
    check_classifier(student.config, "the student")
    read_class_names(student)


def check_trainer(trainer: "DistillationTrainer") -> None:
    """Raises ValueError where the labels, pixels, classes or optimiser groups of a trainer do not fit each other."""
    model, datasets = trainer.accelerator.unwrap_model(trainer.model), named_datasets(trainer)
    if trainer.class_weights is not None and trainer.compute_loss_func is not None:
        raise ValueError(
            "class_weights must be None with a compute_loss_func, which takes the place of the task loss, got a tensor. "
            "Read the weights in compute_loss_func"
        )
    check_unlabeled(trainer)
    check_label_names(trainer)
    check_pixels(datasets, model.student, trainer.processing_class)
    check_dataset_classes(model.config.id2label, datasets)
    for loss in model.losses.values():
        if isinstance(loss, DistillationLoss) and (misfit := loss.describe_misfit(model.config.num_labels)):
            # A run makes several trainers of its student, and the warning should come once.
            logger.warning_once("%s.", misfit)
    if trainer.optimizer is not None:
        check_no_group_is_empty(trainer.optimizer)


def named_datasets(trainer: "DistillationTrainer") -> dict[str, Any]:
    """Returns the datasets of training and evaluation, by their names in errors."""
    if not isinstance(trainer.eval_dataset, dict):
        return {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    evaluation = {f"eval_dataset[{name!r}]": dataset for name, dataset in trainer.eval_dataset.items()}
    return {"train_dataset": trainer.train_dataset, **evaluation}


def is_own_dataset(trainer: "DistillationTrainer", dataset: Any) -> bool:
    """Whether the dataset passed to `evaluate` is the trainer's own. None, a name and a dict of datasets count as own."""
    own = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    return isinstance(dataset, str | dict | type(None)) or any(dataset is other for other in own)


def check_label_names(trainer: "DistillationTrainer") -> None:
    """Raises ValueError where Trainer would not find the labels that compute_loss reads."""
    if (
        "labels" in trainer.label_names
        or trainer.compute_loss_func is not None
        or trainer.has_own("compute_loss", "prediction_step")
    ):
        return
    raise ValueError(
        f"label_names must contain 'labels', the column that compute_loss reads, got {trainer.label_names}. Rename the "
        "column, or override compute_loss."
    )


def check_pixels(
    datasets: dict[str, Any], student: PreTrainedModel, processing_class: BaseImageProcessor | None
) -> None:
    """Raises ValueError where training or evaluation don't preprocess as processing_class does.

    Without processing_class, `pipeline` will use the configuration of the saved student.
    """
    known = {
        name: colours
        for name, dataset in datasets.items()
        if (colours := read_transform(getattr(dataset, "transform", None))) is not None
    }
    if processing_class is None and not known:
        return
    pixels = read_preprocessing(student, processing_class)
    if pixels is None:
        return
    is_given = processing_class is not None
    for name, given in known.items():
        differs = next((field for field in ("channel_order", "mean", "std") if not given.is_near(pixels, field)), None)
        if differs is not None:
            message = (
                f"the {differs} of the {name}'s transform must be that of "
                f"{'processing_class' if is_given else 'the student'}, {list(getattr(pixels, differs))}, got "
                f"{list(getattr(given, differs))}. Make it from nkd_hf.models.preprocessing.read_preprocessing(student, "
                "processing_class)"
            )
            if is_given or differs == "channel_order":
                raise ValueError(message)
            logger.warning("pipeline() will give the saved student other pixels than training does: %s.", message)
        elif given.size != pixels.size:
            logger.warning(
                "The images of the %s are %d x %d, and the student's image processor makes %d x %d, which evaluation and "
                "pipeline() will use.",
                name,
                *given.size,
                *pixels.size,
            )


def check_batch(batch: dict[str, Any]) -> None:
    """Raises ValueError for a batch without labels, or without the pixels of preprocessed images."""
    if "labels" not in batch:
        raise ValueError(f"the batch must hold pixel_values and labels, got {', '.join(batch)}: see data_collator")
    pixel_values = batch.get("pixel_values")
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            f"the batch must hold pixel_values, a tensor [B, 3, H, W], got {', '.join(batch)}. Transform the images in "
            "the dataset (ImageDataset), or in data_collator"
        )
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be [B, 3, H, W] of floats, got {list(pixel_values.shape)} of {pixel_values.dtype}. "
            "Normalise the images, channels first"
        )


def check_optimizer(trainer: "DistillationTrainer", optimizer: torch.optim.Optimizer | None) -> None:
    """Raises ValueError for an optimiser that doesn't train student or losses, or a scheduler of another optimiser."""
    if optimizer is None:  # Trainer makes the optimiser when training begins.
        return
    optimizer = _without_accelerate(optimizer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    optimization.check_optimizer(optimizer, model.student, model.losses)
    scheduled = _without_accelerate(getattr(trainer.lr_scheduler, "optimizer", optimizer))
    if scheduled is not optimizer and not trainer._created_lr_scheduler:
        raise ValueError(
            "the scheduler must be one of the optimizer that trains, got one of another optimizer, whose rates it would "
            "set. Pass both in optimizers, or neither"
        )


def _without_accelerate(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def check_weights(student: nn.Module) -> None:
    """Raises ValueError where a weight is NaN or infinite."""
    for name, weight in student.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ValueError(
                f"the student's weights must be finite, got NaN or infinity in {name}. Open another model, or another "
                "checkpoint"
            )


def is_stopped_early(callbacks: list[TrainerCallback]) -> bool:
    """Whether a callback has counted so many evaluations without a gain that the training must end."""
    return any(
        isinstance(callback, EarlyStoppingCallback)
        and callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in callbacks
    )


def check_metric(trainer: "DistillationTrainer") -> None:
    """Raises ValueError where best model, schedule or early stopping read a metric that no evaluation has."""
    args, metric = trainer.args, trainer.args.metric_for_best_model
    is_read = (
        args.load_best_model_at_end
        or args.save_strategy == SaveStrategy.BEST
        or args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        or any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)
    )
    own = trainer.has_own("evaluate", "evaluation_loop")
    computed = next((names for function, names in _METRICS if trainer.compute_metrics == function), None)
    if metric is None or not is_read or own or computed is None:
        return
    known = ["loss", *computed]
    if isinstance(trainer.eval_dataset, dict):
        known = [f"{dataset}_{name}" for dataset in trainer.eval_dataset for name in known]
    if metric.removeprefix("eval_") not in known and not metric.endswith(("_runtime", "_per_second")):
        advice = "Set compute_metrics, or" if trainer.compute_metrics is None else "Set"
        raise ValueError(
            f"metric_for_best_model must be a metric of an evaluation, got {metric!r}. {advice} metric_for_best_model to "
            f"{' or '.join(known)}"
        )


def check_batches(trainer: "DistillationTrainer", loader: DataLoader, max_steps: int) -> None:
    """Raises ValueError where BatchNorm would fail on a batch of one image, or an odd batch can't be paired.

    Args:
        trainer: its model trains on the batches.
        loader: the loader of the training images. A loader without a length is not checked.
        max_steps: optimiser steps of the run.
    """
    args, collator = trainer.args, trainer.data_collator
    batch_size = args.process_batch_size(trainer._train_batch_size)
    if isinstance(collator, ImageCollator) and collator.mix_pairs and batch_size % 2:
        raise ValueError(
            f"per_device_train_batch_size must be even with mix_pairs, got {batch_size} for each process. Two images "
            "that follow each other are mixed: set an even one, or mix_pairs to false"
        )
    if not has_length(loader) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    num_devices = max(1, args.n_gpu)
    every_batch = batch_size <= num_devices
    last_is_reached = max_steps * args.gradient_accumulation_steps >= len(loader)
    if not (every_batch or last_is_reached) or smallest_batch(loader, num_devices) != 1:
        return
    if not has_batch_norm(trainer.model) or not _one_image_fails(trainer, loader):
        return
    if every_batch:
        raise ValueError(
            "per_device_train_batch_size must be at least 2 for this model, got 1. BatchNorm has no statistics of one "
            "value: set a larger one"
        )
    raise ValueError(
        f"the last batch of an epoch must have at least 2 images, got 1: {len(loader.dataset)} images in batches of "
        f"{batch_size}. BatchNorm has no statistics of one value: set dataloader_drop_last "
        "(--dataloader_drop_last true), or another per_device_train_batch_size"
    )


def _one_image_fails(trainer: "DistillationTrainer", loader: DataLoader) -> bool:
    """Whether BatchNorm fails in a step with one image: it works if its feature maps have more than one pixel."""
    sampler = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler).sampler
    key = next(iter(sampler)) if isinstance(sampler, EpochSampler) else 0
    key = (0, key) if isinstance(loader.dataset, EpochDataset) and not isinstance(key, tuple) else key
    try:
        with _without_a_trace(trainer) as model:
            batch = trainer._prepare_inputs(loader.collate_fn([loader.dataset[key]]))
            trainer.compute_loss(model.train(), batch)
    except ValueError as error:
        if wants_more_values(error):
            return True
        raise
    return False


@contextmanager
def _without_a_trace(trainer: "DistillationTrainer") -> Iterator[nn.Module]:
    """Yields the model for a step, and restores buffers, modes, random numbers and log after it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    buffers, modes = [b.clone() for b in model.buffers()], {module: module.training for module in model.modules()}
    log, trainer.loss_log = trainer.loss_log, LossLog()
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    try:
        with seeded(0), torch.random.fork_rng(devices), trainer.compute_loss_context_manager():
            yield model
    finally:
        trainer.loss_log = log
        trainer.step_guard.take_note()
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
