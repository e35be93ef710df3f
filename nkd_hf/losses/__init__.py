"""Distillation losses: for each a pure function, and a module that stores its scalars and what it trains.

They need torch alone. A function takes student tensors, teacher tensors, labels; hyper-parameters are keyword-only. A
module returns its weighted components by name; their sum is the loss.
"""

from .nkd import NKDLoss, nkd_loss
from .uskd import USKDLoss, uskd_loss

__all__ = ["NKDLoss", "USKDLoss", "nkd_loss", "uskd_loss"]
