"""Publishing: which files, what the card says, one commit."""

from ..errors import PushError
from .push import create_repo, push_checkpoint, push_student

__all__ = ["PushError", "create_repo", "push_checkpoint", "push_student"]
