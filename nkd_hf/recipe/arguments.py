"""The arguments of a recipe: what is distilled into what."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..losses import DISTLoss, DKDLoss, KDLoss, MGDLoss, NKDLoss, SRRLLoss, USKDLoss, ViTKDLoss, WSLDLoss, WTTMLoss
from ..losses.checks import check_map_sizes
from ..models.features import check_pooled_head, check_token_grids, feature_shape, token_shape
from ..models.repo_ids import read_repo_id
from ..models.students import check_preprocessing, create_student

_LOSSES = {
    "nkd": NKDLoss,
    "uskd": USKDLoss,
    "vitkd": ViTKDLoss,
    "kd": KDLoss,
    "dkd": DKDLoss,
    "wsld": WSLDLoss,
    "dist": DISTLoss,
    "wttm": WTTMLoss,
    "mgd": MGDLoss,
    "srrl": SRRLLoss,
}
# Those whose parameters depend on the teacher's layers.
_OF_TEACHER_LAYERS = {"vitkd", "mgd", "srrl"}
# Those of the losses' arguments that the models tell.
_SHAPES = {
    "in_features",
    "num_classes",
    "feature_norm",
    "student_dim",
    "teacher_dim",
    "student_channels",
    "teacher_channels",
}


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
    teacher_logits: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub dataset that `nkd-hf teacher-logits` wrote: the teacher is not run, and may be left out; "
            "images are mixed in pairs."
        },
    )
    ignore_label_names: bool = field(
        default=False,
        metadata={"help": "Take the teacher's classes by their numbers, where it names the same ones differently."},
    )
    distillation_loss: str = field(
        default="nkd",
        metadata={
            "help": "`nkd`, `vitkd`, `kd`, `dkd`, `wsld`, `dist`, `wttm`, `mgd`, `srrl` (need a teacher), `uskd` (has none), "
            "several joined by + (`nkd+vitkd`), or `none`: the same recipe's baseline."
        },
    )
    loss_args: dict | None = field(
        default=None,
        metadata={
            "help": "Arguments of the loss, such as gamma and temperature (nkd), alpha, beta and mu (uskd), alpha, beta and "
            "mask_ratio (vitkd), alpha and temperature (kd, wsld), alpha, beta and temperature (dkd), beta and gamma (dist), "
            "exponent and beta (wttm), alpha and mask_ratio (mgd), alpha and beta (srrl); for several losses by their names, {nkd: {gamma: 1.0}, vitkd: {alpha: 3.0e-5}}."
        },
    )
    compare_with_baseline: bool = field(
        default=False,
        metadata={"help": "First train the same student from the same seed without the distillation loss."},
    )
    num_processes: int | None = field(
        default=None,
        metadata={
            "help": "Processes (GPUs) that the settings are meant for: `nkd-hf plan` reckons with it; `accelerate launch` "
            "decides how many there are."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width of the student's input, in pixels. Default: the architecture's own where timm fixes "
            "it, else 224; 32 for *_cifar; its own for a student that is opened from a folder or the Hub."
        },
    )
    image_mean: list[float] | None = field(
        default=None,
        metadata={
            "help": "Of the input, per channel in [0, 1]. Default: ImageNet's; CIFAR-100's for *_cifar; its own for a student "
            "that is opened."
        },
    )
    image_std: list[float] | None = field(
        default=None,
        metadata={
            "help": "Of the input, per channel in [0, 1]. Default: ImageNet's; CIFAR-100's for *_cifar; its own for a student "
            "that is opened."
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
        losses = self.losses
        if self.distillation_loss != "none" and (not _LOSSES.keys() >= set(losses) or len(set(losses)) < len(losses)):
            raise ValueError(
                f"distillation_loss must be {', '.join(_LOSSES)}, several of them joined by +, or none, "
                f"got {self.distillation_loss!r}"
            )
        if self.teacher_logits is not None and (not self.needs_teacher or self.needs_teacher_layers):
            raise ValueError(
                f"distillation_loss={self.distillation_loss} "
                + ("reads layers of the teacher" if self.needs_teacher else "has no teacher")
                + ", and teacher_logits has its logits alone: leave teacher_logits out"
            )
        if self.needs_teacher and self.teacher is None and self.teacher_logits is None:
            raise ValueError(
                f"distillation_loss={self.distillation_loss} needs a teacher: set teacher to a Hub id, a folder or an "
                "architecture, or distillation_loss to uskd, which has none"
            )
        if losses and not self.needs_teacher and self.teacher is not None:
            raise ValueError(
                f"distillation_loss={self.distillation_loss} has no teacher, got teacher={self.teacher!r}: leave it out"
            )
        for name, repo_type in {"student": "model", "teacher": "model", "teacher_logits": "dataset"}.items():
            value = getattr(self, name)
            if value == "" and repo_type == "model":
                raise ValueError(f"{name} has no name: set it to a Hub id, a folder or an architecture")
            setattr(self, name, read_repo_id(value, name, repo_type))
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(
                f"num_processes must be positive, got {self.num_processes}: leave it out if it is not known"
            )
        check_preprocessing(self.image_size, self.image_mean, self.image_std, self.crop_pct, self.interpolation)
        # Built once for its errors, which should come before a teacher is trained.
        self.build_loss(**dict.fromkeys(_SHAPES - {"feature_norm"}, 2))

    @property
    def losses(self) -> list[str]:
        """The names in `distillation_loss`."""
        return [] if self.distillation_loss == "none" else self.distillation_loss.split("+")

    @property
    def needs_teacher(self) -> bool:
        """Whether one of the losses has a teacher."""
        return any(name != "uskd" for name in self.losses)

    @property
    def needs_teacher_layers(self) -> bool:
        """Whether [`RecipeArguments.loss_shapes`] must be given the teacher."""
        return not _OF_TEACHER_LAYERS.isdisjoint(self.losses)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Those arguments of [`create_student`] that say how its pixels are made."""
        names = ("image_size", "image_mean", "image_std", "crop_pct", "interpolation")
        return {name: getattr(self, name) for name in names}

    def create(self, name: str, model_args: dict[str, Any] | None = None, **labels) -> PreTrainedModel:
        """Builds a student or teacher by its name, with this recipe's preprocessing; see [`create_student`].

        Args:
            name: of an architecture, a Hub id or a folder.
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

    def loss_shapes(
        self,
        student: nn.Module,
        image_size: tuple[int, int],
        teacher: nn.Module | None = None,
        feature_layer: str | None = None,
        teacher_image_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """What the models tell [`RecipeArguments.build_loss`].

        Args:
            student: a `*ForImageClassification`.
            image_size: height and width that it takes.
            teacher: the model, where `needs_teacher_layers`.
            feature_layer: see [`FeatureTap`].
            teacher_image_size: height and width that the teacher takes. Default: the student's.

        Raises:
            ValueError: a loss asks for a feature that is not known for the model, or those of student and teacher cannot be
                compared.
        """
        shapes = {}
        if "uskd" in self.losses:
            pixel_values = torch.zeros(2, 3, *image_size)
            feature = feature_shape(student, pixel_values, feature_layer)
            # Tokens come from Swin, whose official stages end in a LayerNorm that timm's and transformers' models lack.
            feature_norm = nn.LayerNorm(feature[-1]) if len(feature) == 3 else None
            shapes = {
                "in_features": feature[-1],
                "num_classes": student.config.num_labels,
                "feature_norm": feature_norm,
            }
        if "vitkd" in self.losses:
            check_token_grids(student, teacher, image_size, teacher_image_size or image_size)
            shapes |= {"student_dim": token_shape(student)[1], "teacher_dim": token_shape(teacher)[1]}
        if "srrl" in self.losses:
            check_pooled_head(teacher, teacher_image_size or image_size)
        if not {"mgd", "srrl"}.isdisjoint(self.losses):
            student_map = _map_shape(student, image_size)
            teacher_map = _map_shape(teacher, teacher_image_size or image_size)
            if "mgd" in self.losses:
                check_map_sizes(student_map[2:], teacher_map[2:])
            shapes |= {"student_channels": student_map[1], "teacher_channels": teacher_map[1]}
        return shapes

    def build_loss(self, **shape) -> nn.Module | dict[str, nn.Module] | None:
        """The distillation loss, or several by name; `shape` is for those that have parameters of their own.

        Raises:
            ValueError: `loss_args` do not fit the loss.
        """
        losses, loss_args = self.losses, self.loss_args or {}
        if len(losses) < 2:
            return _build(losses[0], loss_args, shape) if losses else None
        if wrong := [name for name, args in loss_args.items() if name not in losses or not isinstance(args, dict)]:
            raise ValueError(
                f"loss_args of distillation_loss={self.distillation_loss} are by the names of the losses, such as "
                f"{{{losses[0]}: {{...}}}}, got {', '.join(map(str, wrong))}"
            )
        return {name: _build(name, loss_args.get(name, {}), shape) for name in losses}


def _map_shape(model: nn.Module, image_size: tuple[int, int]) -> torch.Size:
    parameter = next(model.parameters())
    pixel_values = torch.zeros(1, 3, *image_size, device=parameter.device, dtype=parameter.dtype)
    return feature_shape(model, pixel_values, kind="map")


def _build(name: str, loss_args: dict, shape: dict) -> nn.Module:
    loss = _LOSSES[name]
    parameters = inspect.signature(loss).parameters
    known = [parameter for parameter in parameters if parameter not in _SHAPES]
    if unknown := [key for key in loss_args if key not in known]:
        raise ValueError(
            f"loss_args of distillation_loss={name} are {', '.join(known)}, got {', '.join(map(str, unknown))}"
        )
    return loss(**{key: value for key, value in shape.items() if key in parameters}, **loss_args)
