"""The ablations of evidence.py: NKD and USKD with one thing changed each."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nkd_hf import NKDLoss, USKDLoss


def uskd_labels(
    mid_logits: Tensor, student_logits: Tensor, labels: Tensor, smoothed: bool, zipf: bool, rank: str
) -> tuple[Tensor, Tensor]:
    """USKD's soft labels, [B] of the target and [B, C] of the others, written out for class indices.

    Args:
        mid_logits: [B, C], of the auxiliary head.
        student_logits: [B, C].
        labels: [B] int64.
        smoothed: whether the target's label varies with the student's probability, else it is 1.
        zipf: whether the others' follow Zipf's law, else they are uniform.
        rank: `official` (as in cls_KD: the student's log-probabilities), `probabilities` (its probabilities), or
            `student` (without the auxiliary head).
    """
    index = labels[:, None]
    log_prob, weak_prob = student_logits.float().log_softmax(-1), mid_logits.float().softmax(-1)

    def normalized(values: Tensor) -> Tensor:
        return values / (1 - values.gather(1, index) + 1e-6)

    squared = (2 * log_prob.gather(1, index)[:, 0]).exp()
    target_label = squared + 1 - squared.mean() if smoothed else torch.ones_like(squared)
    ranked = normalized(log_prob if rank == "official" else log_prob.exp())
    if rank != "student":
        ranked = ranked + normalized(weak_prob)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    places = 1 / torch.arange(1, ranked.shape[1] + 1) if zipf else torch.ones(ranked.shape[1])
    others = torch.empty_like(ranked).scatter_(1, order, places.expand_as(ranked)).scatter_(1, index, 0)
    return target_label, others / others.sum(1, keepdim=True)


class NKDOthersLoss(NKDLoss):
    """NKD's non-target term alone."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"nkd_non_target": super().forward(student_logits, teacher_logits, labels)["nkd_non_target"]}


class USKDVariantLoss(USKDLoss):
    """USKD with other soft labels; see [`uskd_labels`]."""

    def __init__(self, smoothed: bool = True, zipf: bool = True, rank: str = "official", **kwargs):
        super().__init__(**kwargs)
        self.kind = {"smoothed": smoothed, "zipf": zipf, "rank": rank}

    def forward(self, mid_feature: Tensor, student_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mid_logits, index = self.head(mid_feature), labels[:, None]
        with torch.no_grad():
            target_label, others = uskd_labels(mid_logits, student_logits, labels, **self.kind)
        target_log_prob = student_logits.log_softmax(-1).gather(1, index)[:, 0]
        # A large number, where -inf would make 0 * -inf of the target's label.
        rest_log_prob = student_logits.scatter(1, index, -1e9).log_softmax(-1).scatter(1, index, 0)
        return {
            "uskd_target": -self.alpha * (target_label * target_log_prob).mean(),
            "uskd_non_target": -self.beta * (others * rest_log_prob).sum(1).mean(),
            "uskd_weak": self.mu * nn.functional.cross_entropy(mid_logits, labels, label_smoothing=0.1),
        }


class Ablation(NamedTuple):
    """A method with something changed: arguments of its loss, or a loss of this file with arguments of its own."""

    method: str
    text: str
    loss_args: dict[str, float] = {}  # noqa: RUF012 (it is not changed)
    loss: Callable[..., nn.Module] | None = None


ABLATIONS = {
    "nkd-target": Ablation("nkd", "target term alone", {"gamma": 0.0}),
    "nkd-non-target": Ablation("nkd", "non-target term alone", {}, NKDOthersLoss),
    "nkd-gamma-0.5": Ablation("nkd", "gamma 0.5", {"gamma": 0.5}),
    "nkd-gamma-1.5": Ablation("nkd", "gamma 1.5", {"gamma": 1.5}),
    "nkd-gamma-4.5": Ablation("nkd", "gamma 4.5", {"gamma": 4.5}),
    "nkd-temperature-2": Ablation("nkd", "temperature 2", {"temperature": 2.0}),
    "nkd-temperature-4": Ablation("nkd", "temperature 4", {"temperature": 4.0}),
    "uskd-target": Ablation("uskd", "target term alone", {"beta": 0.0, "mu": 0.0}),
    "uskd-non-target": Ablation(
        "uskd", "non-target term alone, ranked by the student", {"alpha": 0.0, "mu": 0.0},
        functools.partial(USKDVariantLoss, rank="student"),
    ),
    "uskd-weak": Ablation("uskd", "weak term alone", {"alpha": 0.0, "beta": 0.0}),
    "uskd-plain-target": Ablation(
        "uskd", "plain target in place of the smoothed one", {}, functools.partial(USKDVariantLoss, smoothed=False)
    ),
    "uskd-uniform": Ablation(
        "uskd", "uniform in place of Zipf", {}, functools.partial(USKDVariantLoss, zipf=False)
    ),
    "uskd-no-weak": Ablation(
        "uskd", "no weak logit", {"mu": 0.0}, functools.partial(USKDVariantLoss, rank="student")
    ),
    "uskd-rank": Ablation(
        "uskd", "rank of probabilities", {}, functools.partial(USKDVariantLoss, rank="probabilities")
    ),
}  # fmt: skip
