"""The losses by the names that a recipe calls them."""

import importlib
import inspect
import os
import sys
from typing import Any

from .base import SHAPES, DistillationLoss
from .dist import DISTLoss
from .dkd import DKDLoss
from .kd import KDLoss
from .mgd import MGDLoss
from .nkd import NKDLoss
from .rld import RLDLoss
from .sd_nkd import SDNKDLoss
from .srrl import SRRLLoss
from .tfkd import TfKDLoss
from .uskd import USKDLoss
from .vitkd import ViTKDLoss
from .wsld import WSLDLoss
from .wttm import WTTMLoss

LOSSES: dict[str, type[DistillationLoss]] = {
    loss.name.lower().replace("-", ""): loss
    for loss in (
        NKDLoss, USKDLoss, TfKDLoss, ViTKDLoss, KDLoss, DKDLoss, WSLDLoss, DISTLoss, WTTMLoss, RLDLoss, SDNKDLoss, MGDLoss, SRRLLoss,
    )
}  # fmt: skip


def find_losses(names: str) -> dict[str, type[DistillationLoss]]:
    """The losses of a recipe.

    Args:
        names: `none`, or names joined by +: keys of `LOSSES`, or `module.Class` for a subclass of `DistillationLoss` in a
            module that Python finds, at last in the working directory. The module is imported.

    Returns:
        The classes, by the parts of `names`.

    Raises:
        ValueError: there is no such loss, or one stands twice.

    Example:
        >>> find_losses("nkd+nkd_hf.losses.KDLoss")
        {'nkd': <class 'nkd_hf.losses.nkd.NKDLoss'>, 'nkd_hf.losses.KDLoss': <class 'nkd_hf.losses.kd.KDLoss'>}
    """
    parts = [] if names == "none" else names.split("+")
    if not all(part in LOSSES or _is_path(part) for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(
            f"distillation_loss must be {', '.join(LOSSES)}, several of them joined by +, or none, got {names!r}. "
            "A loss of your own is called by its module and class, such as my_losses.MyLoss"
        )
    return {part: LOSSES[part] if part in LOSSES else _import_loss(part) for part in parts}


def build_losses(
    losses: dict[str, type[DistillationLoss]], loss_args: dict[str, Any], shapes: dict[str, Any]
) -> dict[str, DistillationLoss]:
    """Builds the losses of a recipe.

    Args:
        losses: as [`find_losses`] returns them.
        loss_args: arguments of the loss; of several losses, such arguments by the names of the losses.
        shapes: those of `SHAPES` that are known.

    Returns:
        The losses by names without a dot.

    Raises:
        ValueError: `loss_args` do not fit the losses.
    """
    if len(losses) == 1:
        args_of = dict.fromkeys(losses, loss_args)
    else:
        args_of = loss_args
        wrong = [name for name, args in loss_args.items() if name not in losses or not isinstance(args, dict)]
        if losses and wrong:
            raise ValueError(
                f"loss_args of distillation_loss={'+'.join(losses)} are by the names of the losses, such as "
                f"{{{next(iter(losses))}: {{...}}}}, got {', '.join(map(str, wrong))}"
            )
    return {name.replace(".", "_"): _build(name, loss, args_of.get(name, {}), shapes) for name, loss in losses.items()}


def _build(
    name: str, loss: type[DistillationLoss], loss_args: dict[str, Any], shapes: dict[str, Any]
) -> DistillationLoss:
    parameters = inspect.signature(loss).parameters.values()
    parameters = {each.name: each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    known = [key for key in parameters if key not in SHAPES]
    if unknown := [key for key in loss_args if key not in known]:
        raise ValueError(
            f"loss_args of distillation_loss={name} are {', '.join(known) or 'none'}, got {', '.join(map(str, unknown))}"
        )
    given = {key: value for key, value in shapes.items() if key in parameters} | loss_args
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in given]
    if missing:
        raise ValueError(f"loss_args of distillation_loss={name} must hold {', '.join(missing)}, got {loss_args}")
    return loss(**given)


def _is_path(name: str) -> bool:
    """Whether it is written as `module.Class`."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def _import_loss(path: str) -> type[DistillationLoss]:
    module_name, _, class_name = path.rpartition(".")
    # A command's first entry is the folder of its script. At the end, so that no file here takes the place of another module.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        first = module_name.partition(".")[0]
        advice = (
            f"Start the command in the folder of {first}, or install it" if is_missing else f"Correct {module_name}"
        )
        raise ValueError(
            f"distillation_loss={path} must name a class of a module that Python can import, got "
            f"{type(error).__name__}: {' '.join(str(error).split())}. {advice}"
        ) from error
    loss = getattr(module, class_name, None)
    if not (isinstance(loss, type) and issubclass(loss, DistillationLoss)):
        raise ValueError(
            f"distillation_loss={path} must be a subclass of nkd_hf.DistillationLoss, got {loss!r:.80}. Name a class of "
            f"{module_name} that is one"
        )
    return loss
