"""Distillation losses: for each a module that stores its scalars and what it trains, and a pure function.

MGD, SRRL and ViTKD, which compute with trained parts from end to end, are modules alone.

They need torch alone. A function takes student tensors, teacher tensors, labels; hyper-parameters are keyword-only. A
module returns its weighted components by name; their sum is the loss.
"""

from .dist import DISTLoss, dist_loss
from .dkd import DKDLoss, dkd_loss
from .kd import KDLoss, kd_loss
from .mgd import MGDLoss
from .nkd import NKDLoss, nkd_loss
from .srrl import SRRLLoss
from .uskd import USKDLoss, uskd_loss
from .vitkd import ViTKDLoss
from .wsld import WSLDLoss, wsld_loss
from .wttm import WTTMLoss, wttm_loss

__all__ = [
    "DISTLoss",
    "DKDLoss",
    "KDLoss",
    "MGDLoss",
    "NKDLoss",
    "SRRLLoss",
    "USKDLoss",
    "ViTKDLoss",
    "WSLDLoss",
    "WTTMLoss",
    "dist_loss",
    "dkd_loss",
    "kd_loss",
    "nkd_loss",
    "uskd_loss",
    "wsld_loss",
    "wttm_loss",
]
