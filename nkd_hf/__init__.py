"""Knowledge distillation of image classifiers for the Hugging Face ecosystem: NKD and USKD (arXiv 2303.13005)."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from .bad_images import BadImageReport
    from .batches import ImageCollator
    from .checkpoints import CheckpointError
    from .data import DataArguments, load_image_dataset
    from .errors import one_line_errors
    from .features import token_shape
    from .hub import PushError, push_student
    from .images import ImageDataset, StreamingImageDataset
    from .losses import (
        DISTLoss,
        DKDLoss,
        KDLoss,
        MGDLoss,
        NKDLoss,
        SRRLLoss,
        USKDLoss,
        ViTKDLoss,
        WSLDLoss,
        WTTMLoss,
        dist_loss,
        dkd_loss,
        kd_loss,
        nkd_loss,
        uskd_loss,
        wsld_loss,
        wttm_loss,
    )
    from .metrics import TopKAccuracy
    from .model_card import CardInfo
    from .non_finite import NonFiniteLossError
    from .parser import parse_args
    from .recipe import Recipe
    from .recipe_args import RecipeArguments
    from .students import create_student, load_image_processor
    from .teacher import load_teacher
    from .trainer import DistillationTrainer
    from .training_args import DistillationTrainingArguments
    from .transforms import processor_transform, train_transform

# Imported on first use: `from nkd_hf.losses import nkd_loss` and `import nkd_hf` load torch at the most.
_MODULE_OF = {
    "BadImageReport": "bad_images",
    "CardInfo": "model_card",
    "CheckpointError": "checkpoints",
    "DISTLoss": "losses",
    "DKDLoss": "losses",
    "DataArguments": "data",
    "DistillationTrainer": "trainer",
    "DistillationTrainingArguments": "training_args",
    "ImageCollator": "batches",
    "ImageDataset": "images",
    "KDLoss": "losses",
    "MGDLoss": "losses",
    "NKDLoss": "losses",
    "NonFiniteLossError": "non_finite",
    "PushError": "hub",
    "Recipe": "recipe",
    "RecipeArguments": "recipe_args",
    "SRRLLoss": "losses",
    "StreamingImageDataset": "images",
    "TopKAccuracy": "metrics",
    "USKDLoss": "losses",
    "ViTKDLoss": "losses",
    "WSLDLoss": "losses",
    "WTTMLoss": "losses",
    "create_student": "students",
    "dist_loss": "losses",
    "dkd_loss": "losses",
    "kd_loss": "losses",
    "load_image_dataset": "data",
    "load_image_processor": "students",
    "load_teacher": "teacher",
    "nkd_loss": "losses",
    "one_line_errors": "errors",
    "parse_args": "parser",
    "processor_transform": "transforms",
    "push_student": "hub",
    "token_shape": "features",
    "train_transform": "transforms",
    "uskd_loss": "losses",
    "wsld_loss": "losses",
    "wttm_loss": "losses",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
