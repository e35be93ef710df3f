"""Reads the shapes of the models' features, from which a loss with parameters of its own is built."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..losses.base import DistillationLoss, loss_inputs
from ..models.features import (
    STUDENT_HEAD,
    TEACHER_HEAD,
    check_pooled_head,
    check_token_grids,
    feature_shape,
    token_shape,
)


def loss_shapes(
    losses: Iterable[type[DistillationLoss]],
    student: nn.Module,
    image_size: tuple[int, int],
    teacher: nn.Module | None = None,
    feature_layer: str | None = None,
    teacher_image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Reads the shapes that [`~nkd_hf.RecipeArguments.build_loss`] needs from the models.

    Args:
        losses: the losses of the recipe.
        student: a `*ForImageClassification`.
        image_size: height and width of the student's input.
        teacher: the model, where a loss reads more than the teacher's logits.
        feature_layer: see [`~nkd_hf.models.features.FeatureTap`].
        teacher_image_size: height and width of the teacher's input. Default: the student's.

    Raises:
        ValueError: a loss needs a feature that is not known for the model, or the features of student and teacher
            cannot be compared.
    """
    shapes: dict[str, Any] = {}
    losses, teacher_image_size = list(losses), teacher_image_size or image_size
    inputs = {name for loss in losses for name in loss_inputs(loss)}
    sides = {"student": (student, image_size), "teacher": (teacher, teacher_image_size)}
    if any("num_classes" in inspect.signature(loss).parameters for loss in losses):
        shapes["num_classes"] = student.config.num_labels
    if "mid_feature" in inputs:
        feature = feature_shape(student, torch.zeros(2, 3, *image_size), feature_layer)
        shapes["in_features"] = feature[-1]
        # Tokens come from Swin, whose official stages end in a LayerNorm that timm's and transformers' models lack.
        shapes["feature_norm"] = nn.LayerNorm(feature[-1]) if len(feature) == 3 else None
    for side, (model, _) in sides.items():
        if not inputs.isdisjoint({f"{side}_low", f"{side}_high"}):
            shapes[f"{side}_dim"] = token_shape(model)[1]
    if {"student_dim", "teacher_dim"} <= shapes.keys():
        check_token_grids(student, teacher, image_size, teacher_image_size)
    if not inputs.isdisjoint(TEACHER_HEAD):
        check_pooled_head(teacher, teacher_image_size)
    if not inputs.isdisjoint(STUDENT_HEAD):
        check_pooled_head(student, image_size, role="student")
    maps = {side: _map_shape(*sides[side]) for side in sides if f"{side}_map" in inputs}
    for loss in losses:
        if {"student_map", "teacher_map"} <= set(loss_inputs(loss)):
            loss.check_map_sizes(maps["student"][2:], maps["teacher"][2:])
    return shapes | {f"{side}_channels": shape[1] for side, shape in maps.items()}


def _map_shape(model: nn.Module, image_size: tuple[int, int]) -> torch.Size:
    parameter = next(model.parameters())
    pixel_values = torch.zeros(1, 3, *image_size, device=parameter.device, dtype=parameter.dtype)
    return feature_shape(model, pixel_values, kind="map")
