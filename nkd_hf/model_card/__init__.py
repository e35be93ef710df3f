"""The model card of a student, made of what is known of its run and of nothing else."""

from .card import create_card, is_generated, with_repo_id, write_card
from .curves import plot_curves
from .facts import CardInfo
from .licences import check_license
from .text import launch_line

__all__ = [
    "CardInfo",
    "check_license",
    "create_card",
    "is_generated",
    "launch_line",
    "plot_curves",
    "with_repo_id",
    "write_card",
]
