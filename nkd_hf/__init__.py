"""Knowledge distillation of image classifiers for the Hugging Face ecosystem: NKD and USKD (arXiv 2303.13005)."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .cli.options import start_recipe
    from .data.arguments import DataArguments
    from .data.bad_images import BadImageReport
    from .data.collator import ImageCollator
    from .data.image_datasets import ImageDataset, StreamingImageDataset
    from .data.loading import load_image_dataset
    from .data.student_datasets import make_datasets
    from .data.transforms import processor_transform, train_transform
    from .errors import CheckpointError, NonFiniteLossError, PushError, one_line_errors
    from .hub.model_card import CardInfo
    from .hub.push import push_student
    from .losses import (
        DistillationLoss,
        DISTLoss,
        DKDLoss,
        KDLoss,
        MGDLoss,
        NKDLoss,
        RLDLoss,
        SDNKDLoss,
        SRRLLoss,
        TfKDLoss,
        USKDLoss,
        ViTKDLoss,
        WSLDLoss,
        WTTMLoss,
        dist_loss,
        dkd_loss,
        kd_loss,
        nkd_loss,
        rld_loss,
        sd_nkd_loss,
        tfkd_loss,
        uskd_loss,
        wsld_loss,
        wttm_loss,
    )
    from .metrics import TopKAccuracy
    from .models.features import token_shape
    from .models.preprocessing import load_image_processor
    from .models.students import create_student
    from .models.teacher_loading import load_teacher
    from .recipe.arguments import RecipeArguments
    from .recipe.distill import distill
    from .recipe.parser import parse_args
    from .recipe.recipe import Recipe
    from .trainer.arguments import DistillationTrainingArguments
    from .trainer.trainer import DistillationTrainer

# Names are imported on first use, so that `from nkd_hf.losses import nkd_loss` and `import nkd_hf` load torch at most.
_NAMES = {
    "errors": (
        "CheckpointError",
        "NonFiniteLossError",
        "PushError",
        "one_line_errors",
    ),
    "metrics": ("TopKAccuracy",),
    "losses": (
        "DistillationLoss",
        "DISTLoss",
        "DKDLoss",
        "KDLoss",
        "MGDLoss",
        "NKDLoss",
        "RLDLoss",
        "SDNKDLoss",
        "SRRLLoss",
        "TfKDLoss",
        "USKDLoss",
        "ViTKDLoss",
        "WSLDLoss",
        "WTTMLoss",
        "dist_loss",
        "dkd_loss",
        "kd_loss",
        "nkd_loss",
        "rld_loss",
        "sd_nkd_loss",
        "tfkd_loss",
        "uskd_loss",
        "wsld_loss",
        "wttm_loss",
    ),
    "cli.options": ("start_recipe",),
    "models.features": ("token_shape",),
    "models.preprocessing": ("load_image_processor",),
    "models.students": ("create_student",),
    "models.teacher_loading": ("load_teacher",),
    "data.arguments": ("DataArguments",),
    "data.bad_images": ("BadImageReport",),
    "data.collator": ("ImageCollator",),
    "data.image_datasets": (
        "ImageDataset",
        "StreamingImageDataset",
    ),
    "data.loading": ("load_image_dataset",),
    "data.student_datasets": ("make_datasets",),
    "data.transforms": (
        "processor_transform",
        "train_transform",
    ),
    "hub.model_card": ("CardInfo",),
    "hub.push": ("push_student",),
    "trainer.arguments": ("DistillationTrainingArguments",),
    "trainer.trainer": ("DistillationTrainer",),
    "recipe.arguments": ("RecipeArguments",),
    "recipe.distill": ("distill",),
    "recipe.parser": ("parse_args",),
    "recipe.recipe": ("Recipe",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
