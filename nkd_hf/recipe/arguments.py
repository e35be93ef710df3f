"""Defines the arguments of a recipe: teacher, student, loss and preprocessing."""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..losses.base import SHAPES, DistillationLoss, teacher_inputs
from ..losses.registry import LOSSES, build_losses, find_losses
from ..losses.top_k import TopKView, read_top_k_view
from ..models.architectures import is_architecture, with_start
from ..models.repo_ids import read_repo_id
from ..models.student_preprocessing import check_preprocessing
from ..models.students import create_student
from ..models.zero_shot import check_prompts
from .duration import parse_duration
from .teacher_checks import check_ensemble, check_zero_shot

FINETUNE = ("auto", "always", "never")
# The names of the losses with and without a teacher, for the help.
_WITH_TEACHER = ", ".join(f"`{name}`" for name, loss in LOSSES.items() if teacher_inputs(loss))
_WITHOUT_TEACHER = ", ".join(f"`{name}`" for name, loss in LOSSES.items() if not teacher_inputs(loss))
# These values replace the shapes of the models where a loss is built only to check its arguments.
_ANY_SHAPES = dict.fromkeys(SHAPES, 2) | {"feature_norm": None}


@dataclass
class RecipeArguments:
    """Arguments of a recipe: teacher, student, loss and preprocessing.

    Raises:
        ValueError: the loss is unknown, or its arguments do not fit it.
    """

    student: str = field(
        metadata={"help": "timm architecture (starts from random weights), Hub id or folder (starts from its own)."}
    )
    student_args: dict | None = field(
        default=None,
        metadata={"help": "Arguments of timm's architecture, such as drop_path_rate; saved with the student."},
    )
    teacher: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder; or a timm architecture, which is trained first on the same data. Several Hub ids or "
            "folders are one teacher: the mean of their probabilities.",
            "nargs": "+",
        },
    )
    teacher_weights: list[float] | None = field(
        default=None,
        metadata={"help": "How much each of several teachers counts, such as 3 1. Default: all the same."},
    )
    teacher_prompts: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "For a CLIP or SigLIP model as teacher, which is not trained: texts with {} for the name of a class, such as "
            "'a photo of a {}.'; the embeddings of several are averaged. Among several teachers, they are for such models.",
            "nargs": "+",
        },
    )
    teacher_args: dict | None = field(
        default=None, metadata={"help": "Arguments of timm's architecture, for a teacher that is trained first."}
    )
    teacher_logits: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub dataset that `nkd-hf teacher-logits` wrote: the teacher is not run, and may be omitted; "
            "images are mixed in pairs."
        },
    )
    teacher_init: str | None = field(
        default=None,
        metadata={
            "help": "`random`: the teacher's architecture with random weights, which are trained first; `pretrained`: timm's "
            "weights. Default: random for the bare name of an architecture, pretrained for a Hub id or a folder.",
            "choices": ["pretrained", "random"],
        },
    )
    finetune_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Train a pretrained teacher on the data first: `auto` does so, with a new head, where its classes are "
            "not the data's or it has no classifier; `always`; `never`. Default: auto for `nkd-hf distill`, never for a recipe.",
            "choices": list(FINETUNE),
        },
    )
    teacher_epochs: float | None = field(
        default=None,
        metadata={"help": "Epochs of a teacher that is trained or fine-tuned. Default: num_train_epochs."},
    )
    teacher_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of a teacher that is trained or fine-tuned. Default: learning_rate."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop a training whose metric_for_best_model has not improved in so many evaluations; needs "
            "load_best_model_at_end. Default: no early stopping."
        },
    )
    time_budget: str | None = field(
        default=None,
        metadata={
            "help": "Time for all trainings with start and report, such as 30m or 2h: their epochs are chosen from the measured "
            "speed, in proportion to their epochs without a budget."
        },
    )
    ignore_label_names: bool = field(
        default=False,
        metadata={
            "help": "Match the teacher's classes by their numbers, where it has other names for the same classes."
        },
    )
    distillation_loss: str = field(
        default="nkd",
        metadata={
            "help": f"{_WITH_TEACHER} (need a teacher), {_WITHOUT_TEACHER} (has none), a loss of your own by module and class "
            "(`my_losses.MyLoss`, which is imported), several joined by + (`nkd+vitkd`), or `none`: the same recipe's baseline. "
            "docs/which-loss.md compares them, and says what to try first: `dkd` or `nkd` for a CNN student, `wttm` or `nkd` for a DeiT student."
        },
    )
    loss_args: dict | None = field(
        default=None,
        metadata={
            "help": "Arguments of the loss, such as {gamma: 1.0} (the error for a wrong one lists the arguments); for "
            "several losses by their names, {nkd: {gamma: 1.0}, vitkd: {alpha: 3.0e-5}}."
        },
    )
    class_weights: str | None = field(
        default=None,
        metadata={
            "help": "`balanced` weights the task loss of each class by images / (classes * images of the class), as scikit-learn "
            "does. Default: all classes weigh the same.",
            "choices": ["balanced"],
        },
    )
    compare_with_baseline: bool = field(
        default=False,
        metadata={"help": "First train the same student from the same seed without the distillation loss."},
    )
    num_processes: int | None = field(
        default=None,
        metadata={
            "help": "Processes (GPUs) that the settings are meant for: `nkd-hf plan` uses the number; `accelerate launch` "
            "decides how many run."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width of the student's input, in pixels. Default: the architecture's own where timm fixes "
            "it, else 224; 32 for *_cifar; its own for a student that is opened from a folder or the Hub. In `nkd-hf distill`, a "
            "pretrained teacher's where that is smaller than the default of an architecture whose size timm doesn't fix."
        },
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Mean of the input, per channel in [0, 1]. Default: ImageNet's; CIFAR-100's for *_cifar; its own for "
            "a student that is opened."
        },
    )
    image_std: list[float] | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of the input, per channel in [0, 1]. Default: ImageNet's; CIFAR-100's for *_cifar; its own for "
            "a student that is opened."
        },
    )
    crop_pct: float | None = field(
        default=None,
        metadata={
            "help": "Evaluation resizes the short side to image_size / crop_pct, then crops. Default: 0.875; 1 for *_cifar; its "
            "own for a student that is opened."
        },
    )
    interpolation: str | None = field(
        default=None,
        metadata={
            "help": "bilinear or bicubic. Default: bicubic for DeiT, ViT and Swin, bilinear for CNNs; its own for a student that "
            "is opened."
        },
    )

    allow_pickle: bool = field(
        default=False,
        metadata={
            "help": "Open weights of student and teacher that are a pickle (pytorch_model.bin), of which tensors alone are read."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that lies beside the weights of student and teacher."}
    )

    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the student's weights for its model card, as the Hub spells it: `apache-2.0`."},
    )

    def __post_init__(self):
        if isinstance(self.teacher, list | tuple):
            self.teacher = list(self.teacher) if len(self.teacher) > 1 else next(iter(self.teacher), "")
        if self.teacher_logits is not None and (not self.needs_teacher or self.needs_teacher_layers):
            raise ValueError(
                f"distillation_loss={self.distillation_loss} "
                + ("reads layers of the teacher" if self.needs_teacher else "has no teacher")
                + ", and teacher_logits has its logits alone: omit teacher_logits"
            )
        if self.needs_teacher and self.teacher is None and self.teacher_logits is None:
            raise ValueError(
                f"distillation_loss={self.distillation_loss} needs a teacher: set teacher to a Hub id, a folder or an "
                "architecture, or distillation_loss to uskd or tfkd, which have none"
            )
        if self.losses and not self.needs_teacher and self.teacher is not None:
            raise ValueError(
                f"distillation_loss={self.distillation_loss} has no teacher, got teacher={self.teacher!r}: omit it"
            )
        # The parser of the command line checks these, but Python's callers may pass any value.
        _check_choice("finetune_teacher", self.finetune_teacher, ("auto", "always", "never"))
        _check_choice("teacher_init", self.teacher_init, ("pretrained", "random"))
        self.student = _read_name(self.student, "student")
        names = [_read_name(name, "teacher") for name in self.teachers]
        self.teacher_logits = read_repo_id(self.teacher_logits, "teacher_logits", "dataset")
        try:
            names = [with_start(name, self.teacher_init) for name in names]
        except ValueError as error:
            raise ValueError(f"teacher_init is {self.teacher_init}: {error}") from error
        if isinstance(self.teacher, list):
            self.teacher = names
            check_ensemble(self)
        elif self.teacher_weights is not None:
            raise ValueError(
                f"teacher_weights must be omitted for one teacher, got {self.teacher_weights}. Name several teachers"
            )
        elif names:
            self.teacher = names[0]
        if self.teacher_prompts is not None:
            self.teacher_prompts = check_prompts(self.teacher_prompts, "teacher_prompts")
            check_zero_shot(self)
        for name in ("teacher_epochs", "teacher_learning_rate", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}: omit it for its default")
        if self.time_budget is not None:
            parse_duration(self.time_budget)
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes must be positive, got {self.num_processes}: omit it if it is not known")
        if self.class_weights not in (None, "balanced"):
            raise ValueError(f"class_weights must be balanced, got {self.class_weights!r}: omit it to switch it off")
        check_preprocessing(self.image_size, self.image_mean, self.image_std, self.crop_pct, self.interpolation)
        # Building the loss here raises its errors before a teacher is trained.
        self.build_loss(**_ANY_SHAPES)

    @property
    def teachers(self) -> list[str]:
        """The names of the teachers; empty without a teacher."""
        if self.teacher is None:
            return []
        return self.teacher if isinstance(self.teacher, list) else [self.teacher]

    @property
    def names_new_teacher(self) -> bool:
        """Whether the teacher is named by its architecture, so that it starts from random weights and is trained first."""
        return len(self.teachers) == 1 and is_architecture(self.teacher)

    @property
    def losses(self) -> dict[str, type[DistillationLoss]]:
        """The losses that `distillation_loss` names."""
        return find_losses(self.distillation_loss)

    @property
    def needs_teacher(self) -> bool:
        """Whether one of the losses has a teacher."""
        return any(map(teacher_inputs, self.losses.values()))

    @property
    def needs_teacher_layers(self) -> bool:
        """Whether one of the losses reads more of a teacher than its logits."""
        return any(set(teacher_inputs(loss)) - {"teacher_logits"} for loss in self.losses.values())

    @property
    def top_k_views(self) -> dict[str, TopKView | None]:
        """The part of the teacher's logits that each loss with a teacher reads; None where it needs all classes."""
        losses = build_losses(self.losses, self.loss_args or {}, _ANY_SHAPES)
        views = {name: read_top_k_view(loss) for name, loss in zip(self.losses, losses.values(), strict=True)}
        return {name: view for name, view in views.items() if teacher_inputs(self.losses[name])}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The arguments of [`create_student`] that set the student's preprocessing."""
        names = ("image_size", "image_mean", "image_std", "crop_pct", "interpolation")
        return {name: getattr(self, name) for name in names}

    def create(self, name: str, model_args: dict[str, Any] | None = None, **labels) -> PreTrainedModel:
        """Builds a student or teacher by its name, with this recipe's preprocessing; see [`create_student`].

        Args:
            name: an architecture, a Hub id or a folder.
            model_args: `student_args` or `teacher_args`.
            **labels: `id2label` or `num_labels`.
        """
        return create_student(
            name,
            model_args=model_args,
            **self.preprocessing,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            **labels,
        )

    def build_loss(self, **shape) -> nn.Module | dict[str, nn.Module] | None:
        """Builds the distillation loss, or several losses by name.

        Args:
            **shape: shapes for losses with parameters of their own; see [`~nkd_hf.recipe.loss_shapes.loss_shapes`].

        Raises:
            ValueError: `loss_args` do not fit the loss.
        """
        losses = build_losses(self.losses, self.loss_args or {}, shape)
        return losses if len(losses) > 1 else next(iter(losses.values()), None)


def _check_choice(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        *others, last = choices
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}: omit it for its default")


def _read_name(name: str, argument: str) -> str:
    if name == "":
        raise ValueError(f"{argument} has no name: set it to a Hub id, a folder or an architecture")
    return read_repo_id(name, argument)
