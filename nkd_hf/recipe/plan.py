"""Plans a run from its arguments alone, for `nkd-hf plan`.

Models are built on torch's meta device, which has shapes and no values; those of folders and Hub ids have the
configurations on this machine. The arguments set the numbers of GPUs and images. The plan does not depend on this machine's
hardware, on the launcher's environment variables, on the network or on the dataset.
"""

import math
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.arguments import DataArguments
from ..models.preprocessing import Preprocessing
from ..models.teacher_ensemble import normalize_weights
from ..models.zero_shot import ZeroShotClassifier
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.distillation_model import DistillationModel
from .arguments import RecipeArguments
from .class_sizes import check_class_balance
from .crops import note_crops
from .plan_costs import (
    count_disk_bytes,
    count_input,
    count_memory_bytes,
    count_parameters,
    count_state_bytes,
    forward_gmacs,
    list_optimizer_groups,
)
from .plan_models import PlannedModels, open_models
from .plan_steps import count_steps, plan_learning_rates
from .store_size import plan_store, read_top_k
from .unlabeled import check_unlabeled, describe_unlabeled, refuse_training_of_teacher


class PlannedTrainingArguments(DistillationTrainingArguments):
    """Training arguments of a run on another machine, which do not depend on this machine.

    Settings that this machine may not support, and that do not change a plan, are removed: tf32, `torch.compile`, FSDP
    and DeepSpeed.
    """

    # TrainingArguments has properties of these names, which look for devices and join the launcher's process group.
    device = torch.device("cpu")
    n_gpu = 1

    def __post_init__(self):
        self.is_sharded = bool(self.fsdp or self.deepspeed)
        self.is_compiled = self.torch_compile or bool(self.torch_compile_backend or self.torch_compile_mode)
        self.use_cpu = True  # TrainingArguments refuses half precision on a machine without GPU, but not with use_cpu
        self.tf32 = self.fsdp = self.deepspeed = None
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        launched = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        try:
            super().__post_init__()
        finally:
            if launched is not None:
                os.environ["ACCELERATE_USE_DEEPSPEED"] = launched

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass recomputes activations."""
        return self.activation_checkpointing or self.is_compiled


def make_plan(
    recipe: RecipeArguments,
    data: DataArguments,
    training: PlannedTrainingArguments,
    top_k: str | None = None,
    cycle: int | None = None,
) -> dict[str, Any]:
    """Plans a run: its models, steps, learning rates, disk and memory.

    Args:
        recipe: `num_processes` must be set.
        data: `num_train_images` must be set; `num_classes` where it is not the architecture's own (1000, or CIFAR's 100).
        training: the other arguments.
        top_k, cycle: arguments of a store of the teacher's logits, see [`~nkd_hf.cli.teacher_logits`]; without both,
            no store is planned.

    Returns:
        `dict`, fit for JSON. Models: `student` and `teacher` (None without a teacher) with `parameters` and `gmacs` of
        one image's forward pass, None for a teacher that is not known here. Several teachers have their sums, and each
        teacher is in `members`. `tap` is the input of USKD's auxiliary head: `module`, `channels` and the feature that
        it `reads` (class token, ...), or None. Steps: `lr_by_epoch`, the rate of the first step of each epoch (None
        where it depends on the evaluations); `steps_per_epoch`; `global_batch_size`. Images: `decoded_images` of an
        epoch, with the images without labels; `input`, the `samples`, `decoded_images` and `core_hours` of the
        student's training; `unlabeled`, the part of images without labels, in words. Costs: `store` of the teacher's
        logits, or None; `disk` and `memory`, the least bytes. `decayed_parameters` and `undecayed_parameters` are of
        student and losses together. The other keys are named as the arguments.

    Raises:
        ValueError: the arguments do not say enough, or do not fit the models.
    """
    _check_arguments(recipe, data)
    notes: list[str] = []
    steps = count_steps(recipe, data, training)
    models = open_models(recipe, data, training, notes)
    student, taps = _describe_student(recipe, models)
    teachers = _describe_teachers(recipe, models)
    runs = _list_runs(recipe, data, models, teachers, notes)
    stages = runs if recipe.time_budget is None else ()
    notes += note_crops(recipe, data, training, stages, steps["num_train_images"], steps["global_batch_size"])
    states = {name: count_state_bytes(trained, training, notes) for name, trained in runs.items()}
    notes += _note_settings(training, steps)
    notes += filter(None, (loss.describe_misfit(student["num_classes"]) for loss in models.trained.losses.values()))
    store = None
    if top_k is not None or cycle is not None:
        of_epochs = steps["num_train_images"], math.ceil(steps["epochs"] - 1e-9)
        store = plan_store(recipe, data, student["num_classes"], *of_epochs, read_top_k(top_k or "all"), cycle)
    return {
        "student": student,
        "teacher": _join(teachers, recipe.teacher_weights),
        "distillation_loss": recipe.distillation_loss,
        "loss_args": recipe.loss_args or {},
        "loss_parameters": count_parameters(models.trained.losses.parameters()),
        "tap": taps.get("mid_feature"),
        "taps": taps,
        "runs": list(runs),
        **steps,
        **_plan_input(data, steps),
        "store": store,
        "unlabeled": describe_unlabeled(data),
        **_plan_optimization(models.trained, training, steps, notes),
        "augmentation": _describe_augmentation(recipe, data, training, models.pixels),
        **_count_bytes(models, runs, states, steps, data, training),
        "notes": notes,
    }


def _check_arguments(recipe: RecipeArguments, data: DataArguments) -> None:
    for name, value in (("num_processes", recipe.num_processes), ("num_train_images", data.num_train_images)):
        if value is None or value < 1:
            raise ValueError(f"the plan needs {name}, got {value}: set it in the config, or give --{name}")
    check_class_balance(recipe, data)
    check_unlabeled(recipe, data)


def _describe_student(recipe: RecipeArguments, models: PlannedModels) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describes the student, and the taps that its losses read."""
    taps = models.trained.taps
    for tap in taps.values():
        tap.listen()
    student = _describe(recipe.student, models.trained.student, models.pixels)  # its forward pass fills the taps
    features = {
        name: {
            "module": tap.layer,
            "channels": tap.take().shape[1 if name == "student_map" else -1],
            "reads": tap.text,
        }
        for name, tap in taps.items()
    }
    for tap in taps.values():
        tap.listen(False)
    return student, features


def _describe_teachers(recipe: RecipeArguments, models: PlannedModels) -> list[dict[str, Any]]:
    names = recipe.teachers if models.teachers else []
    return [_describe(name, *opened) for name, opened in zip(names, models.teachers, strict=True)]


def _describe(name: str, model: nn.Module | None, pixels: Preprocessing | None) -> dict[str, Any]:
    if model is None:
        return {"name": name} | dict.fromkeys(("parameters", "gmacs", "image_size", "num_classes"))
    return {
        "name": name,
        "parameters": count_parameters(model.parameters()),
        "gmacs": forward_gmacs(model, pixels.size),
        "image_size": list(pixels.size),
        "num_classes": model.config.num_labels
        if isinstance(model, PreTrainedModel | ZeroShotClassifier)
        else model.num_classes,
    }


def _join(teachers: list[dict[str, Any]], weights: list[float] | None) -> dict[str, Any] | None:
    """Returns the plan of one teacher, or the sums of several with each plan and weight in `members`."""
    if len(teachers) < 2:
        return teachers[0] if teachers else None
    sums = {}
    for name in ("parameters", "gmacs"):
        values = [teacher[name] for teacher in teachers]
        sums[name] = None if None in values else sum(values)
    shares = normalize_weights(weights, len(teachers))
    members = [teacher | {"weight": share} for teacher, share in zip(teachers, shares, strict=True)]
    return {"name": ", ".join(teacher["name"] for teacher in teachers), **sums, "members": members}


def _note_classes(teachers: list[dict[str, Any]], num_classes: int, by_name: bool) -> list[str]:
    """Notes the teachers that have another number of classes than the student."""
    notes = []
    for teacher in teachers:
        which = f"the teacher {teacher['name']}" if len(teachers) > 1 else "the teacher"
        if teacher["num_classes"] not in (None, num_classes):
            # A teacher with more classes selects the data's, whose names a plan does not know.
            may_select = by_name and teacher["num_classes"] > num_classes
            notes.append(
                f"{which} has {teacher['num_classes']} classes and the student is planned with {num_classes}: the run stops "
                "unless the dataset has as many as the teacher (set num_classes)"
                + (", or the teacher's include the dataset's by name" if may_select else "")
            )
    return notes


def _list_runs(
    recipe: RecipeArguments, data: DataArguments, models: PlannedModels, teachers: list[dict], notes: list[str]
) -> dict[str, DistillationModel]:
    """Lists the trainings by name, in their order; the last one is the result."""
    finetunes = _plan_finetuning(recipe, data, models, teachers, notes)
    trains_teacher = bool(teachers) and (recipe.names_new_teacher or finetunes)
    runs = {"teacher": DistillationModel(models.teacher, {})} if trains_teacher else {}
    if recipe.compare_with_baseline or not models.trained.losses:
        runs["baseline"] = DistillationModel(models.trained.student, {})
    if models.trained.losses:
        runs["student"] = models.trained
    return runs


def _plan_finetuning(
    recipe: RecipeArguments, data: DataArguments, models: PlannedModels, teachers: list[dict], notes: list[str]
) -> bool:
    """Decides whether a pretrained teacher is trained first, and notes it, or the classes that do not fit."""
    num_classes = models.trained.student.config.num_labels
    finetunes = False
    if models.teacher is not None and not recipe.names_new_teacher:
        differ = teachers[0]["num_classes"] != num_classes
        new_head = differ or getattr(models.teacher, "starts_with_new_head", False)
        finetunes = recipe.finetune_teacher == "always" or (new_head and recipe.finetune_teacher == "auto")
    if not finetunes:
        notes += _note_classes(teachers, num_classes, by_name=not recipe.ignore_label_names)
        return False
    if data.trains_without_labels:
        refuse_training_of_teacher(recipe)
    head = f"gets a new head of {num_classes} classes, and " if new_head else ""
    notes.append(f"the teacher {head}is fine-tuned on the data first (finetune_teacher)")
    return True


def _note_settings(training: PlannedTrainingArguments, steps: dict[str, Any]) -> list[str]:
    """Notes a scaled learning rate, and the settings that the counted memory leaves out."""
    notes = []
    learning_rate = training.scaled_learning_rate(steps["global_batch_size"])
    if learning_rate != training.learning_rate:
        notes.append(
            f"learning_rate {training.learning_rate:g} is meant for a global batch of {training.base_batch_size} "
            f"(base_batch_size), and this run's is {steps['global_batch_size']}: it is scaled to {learning_rate:g}"
        )
    if training.is_sharded:
        notes.append("the memory is that of a run without FSDP or DeepSpeed, which divide the weights among the GPUs")
    if training.recomputes:
        notes.append(
            "activation checkpointing and torch.compile keep some activations and recompute others: they are not counted"
        )
    return notes


def _plan_input(data: DataArguments, steps: dict[str, Any]) -> dict[str, Any]:
    epochs, images = steps["epochs"], steps["num_train_images"]
    unlabeled = _count_unlabeled(data, images)
    decoded = steps["decoded_images"] + unlabeled
    cost = count_input(epochs * (images + unlabeled), epochs * decoded, data.auto_augment is not None)
    return {"decoded_images": decoded, "input": cost}


def _count_unlabeled(data: DataArguments, num_labelled: int) -> int:
    """Counts the images without labels that join so many labelled images."""
    joins = data.unlabeled_dataset is not None and not data.trains_without_labels
    return math.ceil(data.unlabeled_ratio * num_labelled) if joins else 0


def _plan_optimization(
    model: DistillationModel, training: PlannedTrainingArguments, steps: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    groups = list_optimizer_groups(model, training)
    learning_rate = training.scaled_learning_rate(steps["global_batch_size"])
    return {
        "precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "float32",
        "teacher_dtype": training.teacher_dtype or "float32",
        "optimizer": training.optim.value,
        "optimizer_args": training.optim_args,
        "optimizer_groups": groups,
        "decayed_parameters": groups[0]["parameters"],
        "undecayed_parameters": groups[1]["parameters"],
        "max_grad_norm": training.max_grad_norm,
        "ema_decay": training.ema_decay,
        "precise_bn_images": training.precise_bn_images,
        "learning_rate": learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type.value,
        "lr_scheduler_kwargs": training.lr_scheduler_kwargs or {},
        "lr_by_epoch": plan_learning_rates(steps, training, learning_rate, notes),
    }


def _describe_augmentation(
    recipe: RecipeArguments, data: DataArguments, training: PlannedTrainingArguments, pixels: Preprocessing
) -> list[str]:
    height, width = pixels.size
    smallest, largest = data.random_resized_crop
    crop = f"random resized crop {height}x{width}, {smallest:g} to {largest:g} of the area, {pixels.interpolation}"
    if data.random_crop_padding is not None:
        crop = f"random crop {height}x{width}, padded by {data.random_crop_padding}"
    mixing = [
        f"{name} {alpha:g}" for name, alpha in (("mixup", data.mixup_alpha), ("cutmix", data.cutmix_alpha)) if alpha
    ]
    smoothing = 0 if data.trains_without_labels else training.label_smoothing_factor  # only the task loss reads it
    lines = {
        crop: True,
        f"horizontal flip {data.horizontal_flip:g}": data.horizontal_flip,
        f"auto_augment {data.auto_augment}": data.auto_augment,
        f"random erasing {data.random_erasing:g}": data.random_erasing,
        f"PCA lighting {data.pca_lighting:g}": data.pca_lighting,
        f"{'one of ' * (len(mixing) - 1)}{' and '.join(mixing)} a {'pair' if data.mix_pairs else 'batch'}": mixing,
        "balanced sampling": data.balanced_sampling,
        f"{data.crops_per_image} crops of each decoded image": data.crops_per_image > 1,
        f"class weights {recipe.class_weights}": recipe.class_weights,
        f"label smoothing {smoothing:g}": smoothing,
    }
    return [line for line, is_on in lines.items() if is_on]


def _count_bytes(
    models: PlannedModels,
    runs: dict[str, DistillationModel],
    states: dict[str, int | None],
    steps: dict[str, Any],
    data: DataArguments,
    training: PlannedTrainingArguments,
) -> dict[str, Any]:
    """Counts the bytes on disk and on a GPU; `states` are the bytes of each run's optimiser state."""
    teachers = nn.ModuleList(model for model, _ in models.teachers if model is not None)
    state, size = states[[*runs][-1]], models.pixels.size
    batch_size = steps["per_device_train_batch_size"]
    batch_size += _count_unlabeled(data, batch_size)
    disk = count_disk_bytes(runs, states, steps, training, None if "teacher" in runs else teachers)
    memory = count_memory_bytes(models.trained, size, teachers, state, batch_size, training, not training.recomputes)
    return {"disk": disk, "memory": memory}
