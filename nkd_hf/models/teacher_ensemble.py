"""Combines several teachers into one."""

import copy
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import TEACHER_FEATURES, TEACHER_HEAD
from .preprocessing import Preprocessing
from .teacher import Teacher


class TeacherEnsemble(Teacher):
    """Several teachers as one, whose logits are the logarithm of the weighted mean of their probabilities.

    Each member has its own preprocessing, precision and order of labels. An ensemble has only logits, no features.

    Args:
        teachers (`Sequence[Teacher]`): the members; an ensemble among them counts as its members.
        weights (`Sequence[float]`, *optional*): the positive weight of each teacher; None gives all teachers the same
        weight.

    Raises:
        ValueError: there is no teacher, or a weight is missing or not positive.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None):
        nn.Module.__init__(self)  # Teacher.__init__ is for one model
        shares = normalize_weights(weights, len(teachers))
        self._members = nn.ModuleList(member for teacher in teachers for member in teacher.members)
        self._weights = [
            share * weight for teacher, share in zip(teachers, shares, strict=True) for weight in teacher.weights
        ]
        self.name = ", ".join(member.name for member in self._members)
        self.eval()

    @property
    def members(self) -> list[Teacher]:
        return list(self._members)

    @property
    def weights(self) -> list[float]:
        return self._weights

    def align(self, preprocessing: Preprocessing | None, id2label: dict[int, str] | None) -> "TeacherEnsemble":
        for member in self.members:
            member.align(preprocessing, id2label)
        return self

    def for_inference(
        self, dtype: str | None = None, *, channels_last: bool = False, compile: bool = False
    ) -> "TeacherEnsemble":
        for member in self.members:
            member.for_inference(dtype, channels_last=channels_last, compile=compile)
        return self

    def tap(self, names: Iterable[str]) -> "TeacherEnsemble":
        if features := [name for name in names if name in (*TEACHER_FEATURES, *TEACHER_HEAD)]:
            raise ValueError(
                f"the distillation losses read {', '.join(features)} of one teacher, got an ensemble of {self.name}. Pass one "
                "teacher, or losses of logits alone"
            )
        return self

    def copy(self) -> "TeacherEnsemble":
        clone = copy.copy(self)
        clone._modules = {"_members": nn.ModuleList(member.copy() for member in self.members)}
        return clone._without_preparation()

    def take_features(self) -> dict[str, Tensor]:
        return {}

    def forward(self, *pixel_values: Tensor) -> Tensor:
        """Classifies the student's pixels.

        Args:
            pixel_values (`Tensor`): [B, 3, H, W] float, one tensor for all members, or one for each member.

        Returns:
            `Tensor`: [B, C] float32, the logarithms of the mean probabilities, without gradient.
        """
        given = pixel_values * len(self.members) if len(pixel_values) == 1 else pixel_values
        return self.combine([member(pixels) for member, pixels in zip(self.members, given, strict=True)])

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """Returns the logarithms [B, C] of the weighted mean of the probabilities.

        Args:
            logits: [B, C] of each member, in one order of labels.

        Raises:
            ValueError: the members have different numbers of classes.
        """
        if len({each.shape[-1] for each in logits}) > 1:
            pairs = zip(self.members, logits, strict=True)
            counts = ", ".join(f"{each.shape[-1]} of {member.name}" for member, each in pairs)
            raise ValueError(
                f"the teachers of an ensemble must have the same classes, got {counts}. Pass teachers of the same classes"
            )
        with torch.no_grad():
            parts = [
                F.log_softmax(each.float(), -1) + math.log(weight)
                for each, weight in zip(logits, self.weights, strict=True)
            ]
            return torch.stack(parts).logsumexp(0)


def normalize_weights(weights: Sequence[float] | None, count: int, name: str = "weights") -> list[float]:
    """Returns the weights of an ensemble's teachers as shares, which add up to 1.

    Args:
        weights: one weight for each teacher; None gives all teachers the same weight.
        count: the number of teachers.
        name: the name of the weights in the message.

    Raises:
        ValueError: there is no teacher, or there are not `count` positive numbers.

    Example:

    ```python
    >>> from nkd_hf.models.teacher_ensemble import normalize_weights
    >>> normalize_weights([3, 1], 2), normalize_weights(None, 2)
    ([0.75, 0.25], [0.5, 0.5])

    ```
    """
    if count < 1:
        raise ValueError("an ensemble must have one teacher at least, got none. Pass a list of teachers")
    weights = [1.0] * count if weights is None else list(weights)
    total = sum(weights)
    # A share is 0 if its weight is too small beside the others, or the sum is infinite.
    shares = [weight / total if weight > 0 else 0.0 for weight in weights]
    if len(shares) != count or not all(share > 0 for share in shares):
        raise ValueError(
            f"{name} must be {count} positive numbers, one for each teacher, got {weights}. Omit it to weigh all the same"
        )
    return shares
