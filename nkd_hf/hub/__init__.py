"""Publishes students, checkpoints and stores of teacher logits on the Hub."""

from ..errors import PushError
from .push import create_repo, push_checkpoint, push_student

__all__ = ["PushError", "create_repo", "push_checkpoint", "push_student"]
