"""What a distillation loss says of itself, and what it may ask for."""

import inspect
from typing import Any

from torch import Tensor, nn

# Arguments of a loss's constructor that a recipe reads from student and teacher; see `DistillationLoss`.
SHAPES = (
    "num_classes",
    "in_features",
    "feature_norm",
    "student_dim",
    "teacher_dim",
    "student_channels",
    "teacher_channels",
)


class DistillationLoss(nn.Module):
    """A loss that is added to the task loss, the student's cross-entropy with the labels.

    `forward` returns the loss's weighted components, scalars by name: the loss is their sum. It asks for what it needs by
    the names of its arguments:

    | argument | what it is |
    |---|---|
    | `student_logits` | [B, C] float |
    | `teacher_logits` | [B, C] float |
    | `labels` | [B] int64 classes, or [B, C] float rows that sum to one (mixup, cutmix); of an image without a label, the class that the teacher gives the largest logit |
    | `mid_feature` | [B, D] of a middle layer of the student; [B, N, D] tokens of a Swin |
    | `student_low`, `teacher_low` | [B, 2, P, D] patch tokens of a ViT after its first and its second block |
    | `student_high`, `teacher_high` | [B, P, D] patch tokens of a ViT after its last block and its final norm |
    | `token_grid` | height and width of the images of the student, in patches: their product is P |
    | `student_map`, `teacher_map` | [B, D, H, W] last feature map |
    | `student_head_weight`, `student_head_bias` | [C, D] and [C] of the classifier that reads the average of `student_map` |
    | `teacher_head_weight`, `teacher_head_bias` | [C, D] and [C] of the classifier that reads the average of `teacher_map` |
    | `label_smoothing` | a float, which asks for the task loss, or None |
    | `logit_moments` | [B, 2] mean and unbiased standard deviation over all classes of the logits that a store has the largest of, which `teacher_logits` are rebuilt from; else None |

    A loss that asks for one of `teacher_*` has a teacher, and a loss that asks for none of them has no teacher. The
    teacher's tensors have no gradient. What the loss trains trains with the student, and is in the checkpoints alone.

    A loss that computes the student's log-softmax anyway may ask for `label_smoothing`, and so spare a second one. If it is a
    float, the loss puts the task loss with this smoothing among its components, under the name `task`. It is None where
    another loss does so, and where classes have weights, with which the trainer computes the task loss.

    A recipe passes the items of `loss_args` to the constructor, and these arguments, if the constructor names them:
    `num_classes` of the student, `in_features` of `mid_feature`, `feature_norm` (an `nn.LayerNorm` for the tokens of a Swin,
    else None), `student_dim` and `teacher_dim` of the patch tokens, `student_channels` and `teacher_channels` of the maps. Those
    of a feature are known where `forward` asks for the feature.

    The trainer takes any `nn.Module` with such a `forward`, a recipe only subclasses of this class.

    Attributes:
        name (`str`): of the method, in the model card; in lower case its tag. The card reads name, paper and citation from the
            class itself, since a subclass is another method: without a name it is called by the name of the class.
        paper (`str`): the address of the paper.
        citation (`str`): the BibTeX entry of the paper.
        task_weight (`float`): what the task loss is multiplied with.
        works_from_top_k (`bool`): whether the largest logits of the teacher suffice. Such a loss reads two things of the
            teacher: the target's probability, and the probabilities of the other classes among themselves at its
            `temperature`, an attribute; the smallest of them may be replaced by their mean.
        soft_temperature (`float`, *optional*): the temperature at which the loss reads the teacher's softmax over all classes,
            where the smallest probabilities may be replaced by their mean: a store of the largest logits then serves the
            loss. None needs the logits of all classes, unless `works_from_top_k` is set.
        standardize (`bool`): whether the loss standardises the logits first. For a store of the largest logits it then takes
            `logit_moments` in place of their own mean and deviation.
        always_decays (`tuple[str, ...]`): names of the loss's own parameters that weight decay shrinks even where it spares
            parameters of such names (`no_weight_decay`).

    Example:
        >>> import torch
        >>> from nkd_hf.losses import DistillationLoss
        >>> class MimicLoss(DistillationLoss):
        ...     def forward(self, student_logits, teacher_logits):
        ...         return {"mimic": (student_logits - teacher_logits).square().mean()}
        >>> MimicLoss()(torch.zeros(2, 10), torch.ones(2, 10))
        {'mimic': tensor(1.)}
    """

    name: str = ""
    paper: str = ""
    citation: str = ""
    task_weight: float = 1.0
    works_from_top_k: bool = False
    soft_temperature: float | None = None
    standardize: bool = False
    always_decays: tuple[str, ...] = ()

    @staticmethod
    def check_map_sizes(student_size: tuple[int, int], teacher_size: tuple[int, int]) -> None:
        """Raises ValueError where the loss cannot compare maps of these heights and widths; a recipe calls it first."""

    def describe_misfit(self, num_classes: int) -> str | None:
        """Says which settings of the loss do not suit so many classes, or None; the trainer warns of it, a plan notes it."""
        return None


def loss_inputs(loss: nn.Module | type[nn.Module]) -> list[str]:
    """The names of the arguments of a loss's forward: what it asks for."""
    return [name for name in inspect.signature(loss.forward).parameters if name != "self"]


def teacher_inputs(loss: nn.Module | type[nn.Module]) -> list[str]:
    """What a loss asks of a teacher."""
    return [name for name in loss_inputs(loss) if name.startswith("teacher_")]


def check_components(components: Any, loss: nn.Module, with_task: bool) -> dict[str, Tensor]:
    """Returns the result of a loss's forward if it is what [`DistillationLoss`] asks for.

    Args:
        components: what forward returned.
        loss: the module, which the message names.
        with_task: whether the loss was asked for the task loss.

    Raises:
        TypeError: the result is not a dictionary of scalar tensors.
        ValueError: the task loss was asked for and is missing.
    """
    name = type(loss).__name__
    if not isinstance(components, dict) or not components:
        raise TypeError(
            f"the forward of {name} must return a dictionary of scalar tensors by name, got "
            f"{type(components).__name__ if components != {} else 'an empty one'}. Return, for example, {{'mimic': loss}}"
        )
    for component, value in components.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{component!r}, which the forward of {name} returned, must be a scalar tensor, got {type(value).__name__}"
            )
    if with_task and "task" not in components:
        raise ValueError(
            f"the forward of {name} takes label_smoothing, so it must return the task loss as 'task', got "
            f"{', '.join(components)}. Return it, or remove the argument"
        )
    return components
