"""Writes model cards and training curves."""

from .card import create_card, is_generated, with_repo_id, write_card
from .curves import plot_curves
from .facts import CardInfo
from .licences import check_license

__all__ = ["CardInfo", "check_license", "create_card", "is_generated", "plot_curves", "with_repo_id", "write_card"]
