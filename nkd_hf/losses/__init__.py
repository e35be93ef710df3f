"""Distillation losses: for each a module that stores its scalars and what it trains, and a pure function.

ViTKD, which computes with trained parts from end to end, is a module alone.

They need torch alone. A function takes student tensors, teacher tensors, labels; hyper-parameters are keyword-only. A
module returns its weighted components by name; their sum is the loss.
"""

from .nkd import NKDLoss, nkd_loss
from .uskd import USKDLoss, uskd_loss
from .vitkd import ViTKDLoss

__all__ = ["NKDLoss", "USKDLoss", "ViTKDLoss", "nkd_loss", "uskd_loss"]
