"""Plans the steps of a training and its learning rates."""

import math
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers import get_scheduler

from ..data.arguments import DataArguments, streaming_max_steps
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.optimization import SCHEDULES, lr_factor
from .arguments import RecipeArguments


def count_steps(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments
) -> dict[str, Any]:
    """Counts the images, epochs and steps of a training, as Trainer does."""
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    global_batch_size = training.global_batch_size(batch, recipe.num_processes)
    images = min(data.num_train_images, data.max_train_samples or data.num_train_images)
    epochs = training.num_train_epochs
    if epochs <= 0:
        raise ValueError(f"num_train_epochs must be positive, got {epochs}")
    if data.streaming:
        num_steps = streaming_max_steps(images, epochs, global_batch_size)
        steps_per_epoch = num_steps / epochs
    else:
        # Trainer's data loader counts the batches in this way: it fills the last ones up, or drops them.
        batches = BatchSampler(range(images), batch, training.dataloader_drop_last)
        split = training.accelerator_config.split_batches
        batches = BatchSamplerShard(batches, recipe.num_processes, 0, split_batches=split)
        steps_per_epoch = max(1, math.ceil(len(batches) / accumulation))
        num_steps = math.ceil(epochs * steps_per_epoch)
    if training.max_steps > 0:
        num_steps = training.max_steps
        epochs = num_steps / steps_per_epoch
    return {
        "num_processes": recipe.num_processes,
        "per_device_train_batch_size": training.process_batch_size(batch, recipe.num_processes),
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": global_batch_size,
        "num_train_images": images,
        "decoded_images": math.ceil(images / data.crops_per_image),
        "epochs": epochs,
        "steps_per_epoch": steps_per_epoch,
        "num_steps": num_steps,
    }


def plan_learning_rates(
    steps: dict[str, Any], training: DistillationTrainingArguments, learning_rate: float, notes: list[str]
) -> list[float] | None:
    """Computes the rate of the first step of each epoch; None and a note where it depends on the evaluations."""
    name, num_steps, kwargs = training.lr_scheduler_type.value, steps["num_steps"], training.lr_scheduler_kwargs
    if name in SCHEDULES:
        # For a stream, the recipe sets max_steps.
        is_set = training.max_steps > 0 or steps["num_steps"] == steps["steps_per_epoch"] * training.num_train_epochs
        epochs, rate = training.num_train_epochs, training.learning_rate
        factor = lr_factor(name, num_steps, epochs, rate, kwargs, max_steps=num_steps if is_set else -1)
    else:
        # Trainer's optimiser has the scaled rate in its groups, and learning_rate in its defaults.
        optimizer = torch.optim.SGD([torch.zeros(1)], training.learning_rate)
        optimizer.param_groups[0]["lr"] = learning_rate
        warmup_steps = training.get_warmup_steps(num_steps)
        try:
            scheduler = get_scheduler(name, optimizer, warmup_steps, num_steps, scheduler_specific_kwargs=kwargs)
        except TypeError as error:
            raise ValueError(f"lr_scheduler_kwargs={kwargs} do not fit lr_scheduler_type={name}: {error}") from error
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            notes.append(f"lr_scheduler_type={name} follows the evaluations: its learning rates cannot be planned")
            return None
        factor = scheduler.lr_lambdas[0]
    first_steps = [math.ceil(i * steps["steps_per_epoch"] - 1e-9) for i in range(math.ceil(steps["epochs"] - 1e-9))]
    return [learning_rate * factor(step) for step in first_steps if step < num_steps]
