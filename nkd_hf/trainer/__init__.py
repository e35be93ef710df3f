"""DistillationTrainer and its parts."""

from .trainer import DistillationTrainer

__all__ = ["DistillationTrainer"]
