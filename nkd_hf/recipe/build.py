"""Builds the parts of a run from its arguments: the process, the models, the loss, and the steps of a stream."""

import math

import datasets
import torch
from torch import nn
from transformers import IntervalStrategy, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from ..data.arguments import DataArguments, streaming_max_steps
from ..data.loading import load_image_dataset
from ..models.architectures import is_architecture
from ..models.preprocessing import load_image_processor, read_preprocessing
from ..models.students import create_student
from ..models.teacher import Teacher
from ..models.teacher_loading import load_teacher, takes_prompts
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments
from .loss_shapes import loss_shapes
from .progress import shows_bars


def set_up_process(training: DistillationTrainingArguments) -> None:
    """Switches progress bars off unless `shows_bars`, and sets the number of PyTorch's threads on the CPU."""
    if not shows_bars(training):
        datasets.disable_progress_bars()
        disable_progress_bar()
    if training.device.type == "cpu":
        # Workers and PyTorch's threads share the cores; threads that wait for each other make steps several times
        # slower than fewer of them.
        torch.set_num_threads(max(1, torch.get_num_threads() - training.dataloader_num_workers))


def open_data(
    data: DataArguments, training: DistillationTrainingArguments
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Sets the process up and loads the data of a run, in the first process before the others."""
    set_up_process(training)
    with training.main_process_first(desc="loading the data"):
        return load_image_dataset(data, training.seed)


def runs_teacher(recipe: RecipeArguments) -> bool:
    """Whether a teacher computes in this run: the loss has a teacher, and the teacher's logits are not stored."""
    return recipe.needs_teacher and recipe.teacher_logits is None


def create_model(
    recipe: RecipeArguments, name: str, model_args: dict | None, id2label: dict[int, str], seed: int
) -> PreTrainedModel:
    """Builds a student or teacher by its name; the seed makes the weights of baseline and student the same."""
    set_seed(seed)
    return recipe.create(name, model_args, id2label=id2label)


def create_teacher(recipe: RecipeArguments, id2label: dict[int, str], seed: int) -> PreTrainedModel:
    """Builds a teacher to train: an architecture has the student's preprocessing, a pretrained teacher its own."""
    if is_architecture(recipe.teacher):
        return create_model(recipe, recipe.teacher, recipe.teacher_args, id2label, seed)
    set_seed(seed)
    return create_student(
        recipe.teacher,
        id2label=id2label,
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )


def open_teacher(recipe: RecipeArguments, teacher: str | list[str], id2label: dict[int, str] | None = None) -> Teacher:
    """Opens a pretrained teacher by its name, or several as one teacher.

    Args:
        recipe: the arguments of the run.
        teacher: one name of the recipe's teachers, or all of them.
        id2label: the classes of the data, for `teacher_prompts`.

    Raises:
        ValueError: see [`~nkd_hf.models.teacher_loading.load_teacher`].
    """
    prompts = recipe.teacher_prompts
    is_one_of_several = len(recipe.teachers) > 1 and isinstance(teacher, str)
    if prompts is not None and is_one_of_several and not takes_prompts(teacher, recipe.trust_remote_code):
        prompts = None  # the prompts are for the other teachers
    return load_teacher(
        teacher,
        weights=recipe.teacher_weights if isinstance(teacher, list) else None,
        prompts=prompts,
        class_names=None if prompts is None else list(id2label.values()),
        allow_pickle=recipe.allow_pickle,
        trust_remote_code=recipe.trust_remote_code,
    )


def build_loss(
    recipe: RecipeArguments,
    training: DistillationTrainingArguments,
    student: PreTrainedModel,
    teacher: Teacher | None = None,
) -> nn.Module | dict[str, nn.Module] | None:
    """Builds the distillation loss, or several losses by name, for the layers of these models.

    Raises:
        ValueError: the loss does not fit the models; see [`~nkd_hf.recipe.loss_shapes.loss_shapes`].
    """
    size = read_preprocessing(student, load_image_processor(student)).size
    model = teacher_size = None
    if recipe.needs_teacher_layers:
        model, teacher_size = teacher.model, teacher.preprocessing and teacher.preprocessing.size
    return recipe.build_loss(
        **loss_shapes(recipe.losses.values(), student, size, model, training.feature_layer, teacher_size)
    )


def count_epochs(training: DistillationTrainingArguments, num_images: int) -> int:
    """Counts the epochs of a training on a number of images. The last epoch may end early."""
    if training.max_steps <= 0:
        return math.ceil(training.num_train_epochs)
    steps_per_epoch = math.ceil(num_images / training.global_batch_size())
    return math.ceil(training.max_steps / max(1, steps_per_epoch))


def count_steps(
    data: DataArguments, training: DistillationTrainingArguments, train: datasets.Dataset | datasets.IterableDataset
) -> tuple[int, float]:
    """Counts the steps and the epochs of a training. A stream, whose `max_steps` are set, counts as one epoch."""
    if data.streaming:
        return training.max_steps, 1
    steps_per_epoch = max(1, math.ceil(len(train) / training.global_batch_size()))
    if training.max_steps > 0:
        return training.max_steps, training.max_steps / steps_per_epoch
    return math.ceil(training.num_train_epochs * steps_per_epoch), training.num_train_epochs


def images_per_epoch(data: DataArguments) -> int | None:
    """Returns the number of images in one pass through a stream, or None if it is unknown."""
    images, limit = data.num_train_images, data.max_train_samples
    return min(images, limit) if images is not None and limit is not None else images


def set_stream_steps(data: DataArguments, training: DistillationTrainingArguments) -> int | None:
    """Sets the steps of a training from a stream, which has no length: settings in epochs become steps.

    Returns:
        The steps of an epoch; None where the number of images is unknown.

    Raises:
        ValueError: something is set in epochs, and the number of images is unknown.
    """
    batch, images = training.global_batch_size(), images_per_epoch(data)
    if training.max_steps <= 0:
        training.max_steps = streaming_max_steps(images, training.num_train_epochs, batch)
    for kind in ("eval", "save", "logging"):
        if getattr(training, f"{kind}_strategy") == IntervalStrategy.EPOCH:
            setattr(training, f"{kind}_strategy", IntervalStrategy.STEPS)
            setattr(training, f"{kind}_steps", streaming_max_steps(images, 1, batch))
    return None if images is None else streaming_max_steps(images, 1, batch)


def passed_epochs(entry: dict[str, float], data: DataArguments, training: DistillationTrainingArguments) -> float:
    """Returns the epoch of an entry of the log, or its step in a stream with an unknown number of images."""
    if not data.streaming:
        return entry["epoch"]
    # Trainer counts a stream as one epoch.
    images = images_per_epoch(data)
    return entry["step"] if images is None else entry["step"] * training.global_batch_size() / images
