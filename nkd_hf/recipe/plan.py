"""Plans a run from its arguments alone, for `nkd-hf plan`.

Models are built on torch's meta device, which has shapes and no values; those of folders and Hub ids have the
configurations on this machine. The arguments set the numbers of GPUs and images. The plan does not depend on this machine's
hardware, on the launcher's environment variables, on the network or on the dataset.
"""

import math
import os
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils.data import BatchSampler
from transformers import PreTrainedModel, get_scheduler

from ..data.arguments import DataArguments, streaming_max_steps
from ..models.meta_device import OnlyShapes
from ..models.preprocessing import Preprocessing
from ..models.teacher_ensemble import normalize_weights
from ..models.zero_shot import ZeroShotClassifier
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.distillation_model import DistillationModel
from ..trainer.optimization import SCHEDULES, lr_factor
from .arguments import RecipeArguments
from .class_sizes import check_class_balance
from .crops import describe_uneven_crops
from .loss_shapes import loss_shapes
from .plan_costs import (
    count_disk_bytes,
    count_input,
    count_memory_bytes,
    count_parameters,
    count_state_bytes,
    forward_gmacs,
    list_optimizer_groups,
)
from .plan_models import open_student, open_teachers
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
    for name, value in (("num_processes", recipe.num_processes), ("num_train_images", data.num_train_images)):
        if value is None or value < 1:
            raise ValueError(f"the plan needs {name}, got {value}: set it in the config, or give --{name}")
    check_class_balance(recipe, data)
    check_unlabeled(recipe, data)
    notes: list[str] = []
    steps = _count_steps(recipe, data, training)
    with torch.device("meta"), OnlyShapes():
        student, pixels = open_student(recipe, data)
        opened = open_teachers(recipe, data, student, pixels, notes)
        # Only a loss with one teacher reads its layers.
        teacher, teacher_pixels = opened[0] if len(opened) == 1 else (None, None)
        if recipe.needs_teacher_layers and teacher is None:
            raise ValueError(f"{recipe.distillation_loss}'s parameters depend on the teacher: {notes[-1]}")
        teacher_size = teacher_pixels and teacher_pixels.size
        shapes = loss_shapes(
            recipe.losses.values(), student, pixels.size, teacher, training.feature_layer, teacher_size
        )
        losses = recipe.build_loss(**shapes) or {}
        losses = losses if isinstance(losses, dict) else {"distillation": losses}
        # The model has no moving average here: count_memory_bytes counts it as a copy of the student.
        model = DistillationModel(student, losses, training.feature_layer, training.label_smoothing_factor)
    for tap in model.taps.values():
        tap.listen()
    student_plan = _describe(recipe.student, student, pixels)
    names = recipe.teachers if opened else []
    teacher_plans = [_describe(name, *each) for name, each in zip(names, opened, strict=True)]
    finetunes = False
    if teacher is not None and not recipe.names_new_teacher:
        differ = teacher_plans[0]["num_classes"] != student_plan["num_classes"]
        new_head = differ or getattr(teacher, "starts_with_new_head", False)
        finetunes = recipe.finetune_teacher == "always" or (new_head and recipe.finetune_teacher == "auto")
    if finetunes and data.trains_without_labels:
        refuse_training_of_teacher(recipe)
    if finetunes:
        head = f"gets a new head of {student_plan['num_classes']} classes, and " if new_head else ""
        notes.append(f"the teacher {head}is fine-tuned on the data first (finetune_teacher)")
    else:
        notes += _note_classes(teacher_plans, student_plan["num_classes"])
    taps = {
        name: {
            "module": tap.layer,
            "channels": tap.take().shape[1 if name == "student_map" else -1],
            "reads": tap.text,
        }
        for name, tap in model.taps.items()
    }
    for tap in model.taps.values():
        tap.listen(False)

    trains_teacher = bool(opened) and (recipe.names_new_teacher or finetunes)
    runs = {"teacher": DistillationModel(teacher, {})} if trains_teacher else {}
    if recipe.compare_with_baseline or not losses:
        runs["baseline"] = DistillationModel(student, {})
    if losses:
        runs["student"] = model
    notes += describe_uneven_crops(recipe, data, training, runs if recipe.time_budget is None else ())
    teachers = nn.ModuleList(model for model, _ in opened if model is not None)
    states = {name: count_state_bytes(trained, training, notes) for name, trained in runs.items()}

    joins = data.unlabeled_dataset is not None and not data.trains_without_labels
    unlabeled = math.ceil(data.unlabeled_ratio * steps["per_device_train_batch_size"]) if joins else 0
    learning_rate = training.scaled_learning_rate(steps["global_batch_size"])
    if learning_rate != training.learning_rate:
        notes.append(
            f"learning_rate {training.learning_rate:g} is meant for a global batch of {training.base_batch_size} "
            f"(base_batch_size), and this run's is {steps['global_batch_size']}: it is scaled to {learning_rate:g}"
        )
    if training.is_sharded:
        notes.append("the memory is that of a run without FSDP or DeepSpeed, which divide the weights among the GPUs")
    recomputes = training.activation_checkpointing or training.is_compiled
    if recomputes:
        notes.append(
            "activation checkpointing and torch.compile keep some activations and recompute others: they are not counted"
        )
    groups = list_optimizer_groups(model, training)
    images = steps["num_train_images"]
    added = math.ceil(data.unlabeled_ratio * images) if joins else 0
    decoded = steps["decoded_images"] + added
    store = None
    if top_k is not None or cycle is not None:
        of_epochs = images, math.ceil(steps["epochs"] - 1e-9)
        store = plan_store(recipe, data, student_plan["num_classes"], *of_epochs, read_top_k(top_k or "all"), cycle)
    return {
        "student": student_plan,
        "teacher": _join(teacher_plans, recipe.teacher_weights),
        "distillation_loss": recipe.distillation_loss,
        "loss_args": recipe.loss_args or {},
        "loss_parameters": count_parameters(model.losses.parameters()),
        "tap": taps.get("mid_feature"),
        "taps": taps,
        "runs": list(runs),
        **steps,
        "decoded_images": decoded,
        "input": count_input(
            steps["epochs"] * (images + added), steps["epochs"] * decoded, data.auto_augment is not None
        ),
        "store": store,
        "unlabeled": describe_unlabeled(data),
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
        "lr_by_epoch": _plan_learning_rates(steps, training, learning_rate, notes),
        "augmentation": _describe_augmentation(recipe, data, training, pixels),
        "disk": count_disk_bytes(runs, states, steps, training, None if trains_teacher else teachers),
        "memory": count_memory_bytes(
            model,
            pixels.size,
            teachers,
            states[[*runs][-1]],
            steps["per_device_train_batch_size"] + unlabeled,
            training,
            not recomputes,
        ),
        "notes": notes,
    }


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


def _note_classes(teachers: list[dict[str, Any]], num_classes: int) -> list[str]:
    """Notes the teachers that have another number of classes than the student."""
    notes = []
    for teacher in teachers:
        which = f"the teacher {teacher['name']}" if len(teachers) > 1 else "the teacher"
        if teacher["num_classes"] not in (None, num_classes):
            notes.append(
                f"{which} has {teacher['num_classes']} classes and the student is planned with {num_classes}: the run stops "
                "unless the dataset has as many as the teacher (set num_classes)"
            )
    return notes


def _count_steps(recipe: RecipeArguments, data: DataArguments, training: PlannedTrainingArguments) -> dict[str, Any]:
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


def _plan_learning_rates(
    steps: dict[str, Any], training: PlannedTrainingArguments, learning_rate: float, notes: list[str]
) -> list[float] | None:
    """Computes the rate of the first step of each epoch; None where it depends on the evaluations."""
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
        f"label smoothing {training.label_smoothing_factor:g}": training.label_smoothing_factor,
    }
    return [line for line, is_on in lines.items() if is_on]
