"""The arguments of a recipe: what is distilled into what."""

import inspect
from dataclasses import dataclass, field

from torch import nn

from .losses import NKDLoss, USKDLoss

_LOSSES = {"nkd": NKDLoss, "uskd": USKDLoss}


@dataclass
class RecipeArguments:
    """What is distilled into what.

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
    teacher: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder; or a timm architecture, which is trained first on the same data."},
    )
    teacher_args: dict | None = field(
        default=None, metadata={"help": "Arguments of timm's architecture, for a teacher that is trained first."}
    )
    distillation_loss: str = field(
        default="nkd",
        metadata={"help": "`nkd` (needs a teacher), `uskd` (has none), or `none`: the same recipe's baseline."},
    )
    loss_args: dict | None = field(
        default=None,
        metadata={"help": "Arguments of the loss, such as gamma and temperature (nkd), alpha, beta and mu (uskd)."},
    )
    compare_with_baseline: bool = field(
        default=False,
        metadata={"help": "First train the same student from the same seed without the distillation loss."},
    )
    image_size: int = field(default=224, metadata={"help": "Height and width of a timm student's input, in pixels."})
    image_mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406],
        metadata={"help": "Of a timm student's input, per channel in [0, 1]. Default: ImageNet's."},
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225],
        metadata={"help": "Of a timm student's input, per channel in [0, 1]. Default: ImageNet's."},
    )
    crop_pct: float = field(
        default=0.875, metadata={"help": "Evaluation resizes the short side to image_size / crop_pct, then crops."}
    )
    interpolation: str | None = field(
        default=None,
        metadata={"help": "bilinear or bicubic. Default: bicubic for DeiT, ViT and Swin, bilinear for CNNs."},
    )

    def __post_init__(self):
        if self.distillation_loss not in ("none", *_LOSSES):
            raise ValueError(f"distillation_loss must be nkd, uskd or none, got {self.distillation_loss!r}")
        if self.distillation_loss == "nkd" and self.teacher is None:
            raise ValueError(
                "distillation_loss=nkd needs a teacher: set teacher to a Hub id, a folder or an architecture"
            )
        if self.distillation_loss == "uskd" and self.teacher is not None:
            raise ValueError(f"distillation_loss=uskd has no teacher, got teacher={self.teacher!r}: leave it out")
        # Built once for its errors, which should come before a teacher is trained.
        self.build_loss(in_features=2, num_classes=2)

    def build_loss(self, **shape) -> nn.Module | None:
        """The distillation loss; `shape` is for those that have parameters of their own.

        Raises:
            ValueError: `loss_args` do not fit the loss.
        """
        if self.distillation_loss == "none":
            return None
        loss = _LOSSES[self.distillation_loss]
        parameters = inspect.signature(loss).parameters
        known = [name for name in parameters if name not in ("in_features", "num_classes", "feature_norm")]
        if unknown := [name for name in self.loss_args or {} if name not in known]:
            raise ValueError(
                f"loss_args of distillation_loss={self.distillation_loss} are {', '.join(known)}, got {', '.join(unknown)}"
            )
        shape = {name: value for name, value in shape.items() if name in parameters}
        return loss(**shape, **self.loss_args or {})
