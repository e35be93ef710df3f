"""Distillation losses: each is a file with its formula, its paper, what it needs and the name that a recipe calls it.

A loss is a module, a subclass of `DistillationLoss`: it stores its hyper-parameters and what it trains, and returns its
weighted components by name; their sum is the loss. All but MGD, SRRL and ViTKD, which compute with trained parts from end
to end, are pure functions too: a function takes student tensors, teacher tensors and labels, its hyper-parameters are
keyword-only, and it documents the arguments of both. The losses need torch alone.
"""

from .base import DistillationLoss
from .dist import DISTLoss, dist_loss
from .dkd import DKDLoss, dkd_loss
from .kd import KDLoss, kd_loss
from .mgd import MGDLoss
from .nkd import NKDLoss, nkd_loss
from .rld import RLDLoss, rld_loss
from .sd_nkd import SDNKDLoss, sd_nkd_loss
from .srrl import SRRLLoss
from .tfkd import TfKDLoss, tfkd_loss
from .uskd import USKDLoss, uskd_loss
from .vitkd import ViTKDLoss
from .wsld import WSLDLoss, wsld_loss
from .wttm import WTTMLoss, wttm_loss

__all__ = [
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
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
]
