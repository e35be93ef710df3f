"""Computes the components of a training step's loss: the task loss and the components of the distillation losses."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..losses.base import check_components
from .task_loss import cross_entropy

if TYPE_CHECKING:
    from .distillation_model import DistillationModel


def compute_components(
    model: "DistillationModel", available: dict[str, Any], labels: Tensor, num_labeled: int
) -> dict[str, Tensor]:
    """Computes the task loss and the distillation losses of a batch.

    Args:
        model: has the losses.
        available: the inputs of the losses by name, without `label_smoothing`; the loss `kd` reads `kd.teacher_logits`
            in place of `teacher_logits`.
        labels: labels of the first images, [num_labeled] int64 or [num_labeled, C] float.
        num_labeled: number of images with a label. If it is 0, there is no task loss.

    Returns:
        Scalars by name, `task` first.
    """
    logits, losses = available["student_logits"], {"task": None}
    for name, loss in model.losses.items():
        # The first loss that reads label_smoothing also computes the task loss, from the same softmax. It can do so
        # only without class weights, and if the whole batch has labels.
        shares = losses["task"] is None and model.class_weights is None and num_labeled == len(logits)
        available["label_smoothing"] = model.label_smoothing if shares else None
        with_task = shares and "label_smoothing" in model.inputs_of[name]
        components = loss(**{key: available.get(f"{name}.{key}", available[key]) for key in model.inputs_of[name]})
        components = check_components(components, loss, with_task)
        if with_task:
            losses["task"] = components.pop("task")
        for component, value in components.items():
            losses[component if component not in losses else f"{name}_{component}"] = value
    if not num_labeled:
        del losses["task"]
        return losses
    if losses["task"] is None:
        losses["task"] = cross_entropy(logits[:num_labeled], labels, model.label_smoothing, model.class_weights)
    if model.task_weight != 1:
        losses["task"] = model.task_weight * losses["task"]
    return losses
