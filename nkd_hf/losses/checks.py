"""Checks the arguments of losses."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def check_maps(
    student_map: Tensor, teacher_map: Tensor, student_channels: int, teacher_channels: int, loss: str
) -> None:
    """ValueError unless both are float maps of one batch with these channels; `loss` is the module that says so."""
    for name, feature_map, channels in (
        ("student", student_map, student_channels),
        ("teacher", teacher_map, teacher_channels),
    ):
        check_tensor(f"{name}_map", feature_map)
        got = list(feature_map.shape)
        if len(got) != 4 or 0 in got or got[:2] != [len(student_map), channels]:
            if len(got) != 4 or 0 in got:
                mend = "pass a feature map of at least one image and one place, channels first"
            elif got[1] != channels:
                mend = f"make {loss} with {name}_channels={got[1]}"
            else:
                mend = "pass the map of the same batch"
            batch_size = "B" if name == "student" else len(student_map)
            raise ValueError(f"{name}_map must be [{batch_size}, {channels}, H, W], got {got}: {mend}")
        if not feature_map.is_floating_point():
            raise ValueError(f"{name}_map must be of a float dtype, got {feature_map.dtype}: pass a layer's output")


def compute_dtype(student_logits: Tensor) -> torch.dtype:
    """float32 for half precisions, the logits' own dtype otherwise."""
    return torch.promote_types(student_logits.dtype, torch.float32)


def check_scalar(name: str, value: float, *, positive: bool = False) -> None:
    """ValueError unless `value` is finite and at least zero (`positive`: above zero), and its square a float32."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not (1e-18 < value < 1e18 if positive else 0 <= value < 1e18):
        mend = "1.0 leaves the logits as they are" if positive else "0 switches its term off"
        raise ValueError(
            f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value!s:.60} "
            f"({type(value).__name__}): {mend}, and float32 holds squares of values from 1e-18 to 1e18"
        )


def check_share(name: str, value: float) -> None:
    """ValueError unless `value`, a weight beside a task loss of weight 1 - value, is from 0 to 1."""
    check_scalar(name, value)
    if value > 1:
        raise ValueError(f"{name} must be at most 1, got {value}: 1 - {name} is the weight of the task loss")


def check_flag(name: str, value: bool) -> None:
    """ValueError unless it is True or False: a text such as "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(
            f"{name} must be True or False, got {value!r:.60} ({type(value).__name__}): pass one of the two"
        )


def check_count(name: str, value: int, least: int, mend: str) -> None:
    """ValueError unless `value` is an integer of at least `least`; `mend` ends the message."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!s:.60} ({type(value).__name__}): {mend}")


def check_tensor(name: str, tensor: Tensor) -> None:
    """TypeError unless it is a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(tensor).__name__}: of a model's output pass .logits, of an array "
            "torch.from_numpy(array)"
        )


def check_student_logits(student_logits: Tensor) -> None:
    """ValueError unless [B, C] float with B >= 1 and C >= 2."""
    check_tensor("student_logits", student_logits)
    shape = list(student_logits.shape)
    if len(shape) != 2:
        raise ValueError(
            f"student_logits must be [B, C], got {shape}: pass one row of class logits per image, pooled over space"
        )
    if not student_logits.is_floating_point():
        raise ValueError(
            f"student_logits must be floating point, got {student_logits.dtype}: pass logits, not class indices"
        )
    if shape[0] < 1:
        raise ValueError(f"student_logits must hold at least one image, got {shape}: skip empty batches")
    if shape[1] < 2:
        raise ValueError(
            f"student_logits must be [B, C] with at least two classes, got {shape}: "
            "with fewer there is no non-target class to distill"
        )


def check_other_logits(name: str, logits: Tensor, student_logits: Tensor, mend: str) -> None:
    """ValueError unless `logits` are float and shaped like the student's; `mend` ends the message on class counts."""
    check_tensor(name, logits)
    expected, got = list(student_logits.shape), list(logits.shape)
    if got != expected:
        if len(got) != 2:
            mend = "pass one row of class logits per image"
        elif got[0] != expected[0]:
            mend = "pass the logits of the same batch"
        raise ValueError(f"{name} must be {expected} like student_logits, got {got}: {mend}")
    if not logits.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {logits.dtype}: pass logits, not class indices")


def check_labels(labels: Tensor, shape: Sequence[int], ignore_index: int | None = None) -> None:
    """Checks the labels of a batch, as every loss takes them.

    The values are looked at on the CPU alone, and not in a compiled graph: elsewhere it would make the device wait.

    Args:
        labels: [B] integer classes below C, or [B, C] float mixup labels, whose rows sum to one.
        shape: B and C, the student's logits' shape.
        ignore_index: a class index beyond C that is allowed, too.

    Raises:
        ValueError: they are something else, such as rows in which several classes are 1.
    """
    check_tensor("labels", labels)
    batch_size, num_classes = shape
    got = list(labels.shape)
    are_visible = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if got == [batch_size, num_classes]:
        if not labels.is_floating_point():
            raise ValueError(
                f"labels of shape {got} must be floating point (mixup), got {labels.dtype}: "
                f"pass class indices [{batch_size}], or call .float() on one-hot labels"
            )
        if are_visible:
            smallest, sums = labels.min(), labels.sum(-1, dtype=compute_dtype(labels))
            # written so that nan does not pass; half precision rounds the sum
            if not (smallest >= 0 and ((sums - 1).abs() < 0.02).all()):
                raise ValueError(
                    f"labels of shape {got} must be rows of weights >= 0 that sum to 1, got a smallest weight of "
                    f"{smallest.item():g} and sums from {sums.min().item():g} to {sums.max().item():g}: pass one-hot "
                    "rows, or mixtures of them. Several labels an image can't be distilled with a softmax"
                )
        return
    if got != [batch_size]:
        raise ValueError(
            f"labels must be class indices [{batch_size}] or mixup labels [{batch_size}, {num_classes}], got {got}: "
            "pass one label per image of student_logits"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of shape {got} must be integer class indices, got {labels.dtype}: call .long()")
    if are_visible:
        classes = labels.long()
        if ignore_index is not None:
            classes = classes.where(classes != ignore_index, 0)
        smallest, largest = (int(bound) for bound in classes.aminmax())
        if smallest < 0 or largest >= num_classes:
            raise ValueError(
                f"labels must be in 0..{num_classes - 1}, got {smallest if smallest < 0 else largest}: "
                "give the student as many classes as the dataset has, and omit unlabelled images"
            )
