"""Counts the costs of a model: multiplications, and bytes on disk and on a GPU. Models may be on the meta device."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer

from ..errors import reason
from ..models.meta_device import OnlyShapes
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.distillation_model import DistillationModel
from ..trainer.optimization import decayed_parameters

# Milliseconds of a core for each decoded image, for each sample, and in addition for each sample with auto_augment.
# They were measured on JPEGs of 500 x 375 to 224 pixels (benchmarks/input.py --crops).
_DECODE_MS, _SAMPLE_MS, _AUTO_AUGMENT_MS = 2.3, 1.3, 2.5


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Counts the numbers in parameters."""
    return sum(parameter.numel() for parameter in parameters)


def forward_gmacs(model: nn.Module, size: tuple[int, int]) -> float:
    """Counts the multiply-adds of one image's forward pass, in 1e9: convolutions, matrix products, attention."""
    # Without gradients, FlopCounterMode fails on modules that get a parameter as input (timm's CaiT, PiT).
    with FlopCounterMode(display=False) as counter, OnlyShapes():
        model.eval()(torch.empty(1, 3, *size, device=next(model.parameters()).device))
    return counter.get_total_flops() / 2e9


def list_optimizer_groups(model: DistillationModel, training: DistillationTrainingArguments) -> list[dict[str, Any]]:
    """Lists the optimiser's groups as the trainer makes them: with and without weight decay, of student and losses."""
    if training.no_weight_decay is None:
        decayed = Trainer.get_decay_parameter_names(None, model)  # the method does not use self
    else:
        decayed = decayed_parameters(model, training.no_weight_decay)
    groups = []
    for weight_decay, wanted in ((training.weight_decay, True), (0.0, False)):
        parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (name in decayed) == wanted
        }
        groups.append(
            {
                "weight_decay": weight_decay,
                "tensors": len(parameters),
                "parameters": count_parameters(parameters.values()),
                "loss_parameters": count_parameters(p for name, p in parameters.items() if name.startswith("losses.")),
            }
        )
    return groups


def count_state_bytes(model: nn.Module, training: DistillationTrainingArguments, notes: list[str]) -> int | None:
    """Counts the bytes of the optimiser's state after a step on the meta device; None and a note if the step fails."""
    parameters = [nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(training, model)
        # The fused kernels would need a GPU, and have the same state.
        optimizer = optimizer_class(parameters, **{key: value for key, value in kwargs.items() if key != "fused"})
        optimizer.step()
    except Exception as error:  # a library of optimisers, or its absence, may raise anything
        note = f"the state of optim={training.optim.value} is not counted: {reason(error)}"
        if note not in notes:
            notes.append(note)
        return None
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def count_input(samples: float, decoded_images: float, with_auto_augment: bool) -> dict[str, float]:
    """Counts the costs of a training's images: `samples`, `decoded_images` and `core_hours` for JPEGs of 500 x 375."""
    each = _SAMPLE_MS + (_AUTO_AUGMENT_MS if with_auto_augment else 0)
    hours = (decoded_images * _DECODE_MS + samples * each) / 3_600_000
    return {"samples": round(samples), "decoded_images": round(decoded_images), "core_hours": hours}


def count_checkpoints(training: DistillationTrainingArguments, num_steps: int, epochs: float) -> tuple[int, int]:
    """Counts the checkpoints that a training keeps to its end, and the most that are on disk at once."""
    strategy, interval = training.save_strategy.value, training.save_steps
    if strategy == "steps":
        saved = math.ceil(num_steps / (interval if interval >= 1 else math.ceil(interval * num_steps)))
    else:
        saved = {"no": 0, "epoch": math.ceil(epochs - 1e-9), "best": 1}[strategy]
    limit = training.save_total_limit or saved  # None and 0 keep all
    if training.load_best_model_at_end:
        limit = max(limit, 2)  # the best one beside the last one
    # Trainer writes a new checkpoint before it deletes the oldest one.
    return min(saved, limit), min(saved, limit + 1)


def count_checkpoint_bytes(
    model: DistillationModel, optimizer_state: int | None, training: DistillationTrainingArguments
) -> int:
    """Counts the bytes of a checkpoint: the student, its moving average, losses and the optimiser's state."""
    num_students = 1 if training.ema_decay is None else 2
    state = 0 if training.save_only_model else optimizer_state or 0
    return num_students * count_model_bytes(model.student) + count_model_bytes(model.losses) + state


def count_disk_bytes(
    runs: dict[str, DistillationModel],
    optimizer_states: dict[str, int | None],
    steps: dict[str, Any],
    training: DistillationTrainingArguments,
    teacher: nn.Module | None,
) -> dict[str, int]:
    """Counts the bytes that runs write, each into a folder of its own, and the teacher's weights, but not the dataset.

    Args:
        runs: the model of each run; the last one is the result.
        optimizer_states: the bytes of each run's optimiser state.
        steps: `num_steps` and `epochs` of each run.
        training: sets when checkpoints are written, and how many are kept.
        teacher: a teacher that is not one of the runs.

    Returns:
        `dict`: `checkpoint` (one of the last run), `num_checkpoints` (of a run, at once), `checkpoints`, `models`,
        `teacher` and `total`.
    """
    kept, at_once = count_checkpoints(training, steps["num_steps"], steps["epochs"])
    checkpoints = {
        name: count_checkpoint_bytes(model, optimizer_states[name], training) for name, model in runs.items()
    }
    sizes = {
        "checkpoints": kept * sum(checkpoints.values()) + (at_once - kept) * max(checkpoints.values()),
        "models": sum(count_model_bytes(model.student) for model in runs.values()),
        "teacher": 0 if teacher is None else count_model_bytes(teacher),
    }
    return {
        "total": sum(sizes.values()),
        **sizes,
        "checkpoint": checkpoints[[*runs][-1]],
        "num_checkpoints": at_once,
    }


def count_memory_bytes(
    model: DistillationModel,
    size: tuple[int, int],
    teacher: nn.Module | None,
    optimizer_state: int | None,
    batch_size: int,
    training: DistillationTrainingArguments,
    with_activations: bool = True,
) -> dict[str, int | None]:
    """Counts the bytes of a GPU's tensors between forward and backward pass, without the workspaces of kernels.

    Args:
        model: on the meta device, for the activations.
        size: height and width of the images.
        teacher: in float32; it is counted in `training.teacher_dtype`.
        optimizer_state: bytes.
        batch_size: images of one batch of a GPU.
        training: sets the precision and the moving average.
        with_activations: whether the student's tensors that autograd keeps are counted, with 2 bytes a value under
            bf16 and fp16, which is a lower bound.

    Returns:
        `dict`: the parts and `total`.
    """
    pixel_values = torch.empty(batch_size, 3, *size, device="meta")
    activations = None
    if with_activations:
        activations = count_activation_bytes(model.student, pixel_values, 2 if training.bf16 or training.fp16 else 4)
    teacher_bytes = 0 if teacher is None else count_model_bytes(teacher)
    sizes = {
        "weights": count_model_bytes(model),
        "gradients": sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        "optimizer_state": optimizer_state,
        "moving_average": 0 if training.ema_decay is None else count_model_bytes(model.student),
        "teacher": teacher_bytes // 2 if training.teacher_dtype in ("bf16", "fp16") else teacher_bytes,
        "pixels": pixel_values.nbytes,
        "activations": activations,
    }
    return {"total": sum(value or 0 for value in sizes.values()), **sizes}


class _KeptTensors(TorchFunctionMode):
    """Collects the tensors that autograd keeps of a forward pass.

    Attention is the exception: on the meta device its plain form runs, which keeps more than the fused kernels of a
    GPU. Query, key and value are counted in its place, which these kernels keep at least.
    """

    def __init__(self):
        super().__init__()
        self.kept: dict[int, tuple[torch.UntypedStorage, bool]] = {}
        self._in_attention = False

    def keep(self, tensor: Tensor) -> Tensor:
        if not self._in_attention:
            storage = tensor.untyped_storage()
            self.kept[id(storage)] = storage, tensor.is_floating_point()
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        for tensor in args[:3]:
            self.keep(tensor)
        self._in_attention = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._in_attention = False


def count_activation_bytes(student: nn.Module, pixel_values: Tensor, bytes_per_value: int) -> int:
    """Counts the bytes that a training step's forward pass keeps, without the weights and the pixels.

    Args:
        student: on the meta device.
        pixel_values: of a batch.
        bytes_per_value: 4, or 2 under autocast, which keeps at least 2 bytes.
    """
    mode = _KeptTensors()
    with torch.autograd.graph.saved_tensors_hooks(mode.keep, lambda tensor: tensor), mode:
        student.train()(pixel_values)
    for tensor in (*student.parameters(), *student.buffers(), pixel_values):
        mode.kept.pop(id(tensor.untyped_storage()), None)
    return sum(
        storage.nbytes() * bytes_per_value // 4 if is_float else storage.nbytes()
        for storage, is_float in mode.kept.values()
    )


def count_model_bytes(module: nn.Module) -> int:
    """Counts the bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
