"""Reads the student's weights from a checkpoint of mmcls, and runs no code that the file names."""

import io
import os
import pickle
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor


def read_mmcls_checkpoint(path: str) -> dict[str, Tensor]:
    """Reads the student's weights from an official checkpoint.

    From a training checkpoint of the distiller (`student.*`, `teacher.*`, `distill_losses.*`) only the student is
    read. With mmengine's `EMAHook`, the weights are the average: the hook saves the averaged weights as `state_dict`,
    and the trained weights as `ema_state_dict`, which is not read.

    Objects that mmengine pickles beside the weights (`message_hub`, `optimizer`, numpy's arrays) are replaced with objects
    that do nothing, so that mmengine is not needed and no class that the file names is imported or called.

    Args:
        path: a `.pth` file, in torch's zip format or its older one: `{"state_dict": ...}`, or the weights alone.

    Returns:
        `dict[str, Tensor]`: the weights by their official names, `backbone.*` and `head.*`, on the CPU.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is no checkpoint, has no weights, or names a function that no checkpoint needs
            (`os.system`).
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        checkpoint = _load_with_stand_ins(path)
    except OSError:
        raise
    except Exception as error:  # torch's readers raise nearly anything on a broken file
        raise ValueError(f"{path} is no checkpoint that torch can read: {_reason(error)}") from error
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        keys = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} holds no weights: expected state_dict, or tensors by their names, got {keys}")
    weights = {key: value for key, value in weights.items() if isinstance(key, str) and isinstance(value, Tensor)}
    student = {key.removeprefix("student."): value for key, value in weights.items() if key.startswith("student.")}
    return student or weights


class _StandIn(list):
    """Ignores every operation on it. It is a list, since torch appends only to lists."""

    is_mapping = is_list = has_state = False

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def append(self, value):
        type(self).is_list = True

    def extend(self, values):
        type(self).is_list = True

    def __setitem__(self, key, value):
        type(self).is_mapping = True

    @classmethod
    def __setstate__(cls, *args):
        cls.has_state = True


class _MappingStandIn:
    """Replaces a class of mappings, since torch sets only the items of plain mappings."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


class _ListStandIn:
    """Replaces a class of lists, since torch 2.11 appends only to plain lists."""

    def __new__(cls, *args, **kwargs):
        return []


class _Survey(pickle.Unpickler):
    """Reads a pickle with a stand-in for each class and function that the pickle names."""

    def __init__(self, file):
        super().__init__(file)
        self.stand_ins: dict[tuple[str, str], type[_StandIn]] = {}

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        return self.stand_ins.setdefault((module, name), type("StandIn", (_StandIn,), {}))

    def persistent_load(self, pid):
        return None


def _load_with_stand_ins(path: str):
    """Reads a checkpoint with torch's restricted unpickler, in which stand-ins replace all unknown names.

    An unpickler of nkd_hf's own under `weights_only=False` would let torch's loader open TorchScript, tar archives and
    pickled modules, and let the file set attributes on the functions that it may call.
    """
    try:
        stand_ins = []
        for file in _pickles(path):
            survey = _Survey(file)
            survey.load()
            for (module, name), stand_in in survey.stand_ins.items():
                kind = stand_in
                if stand_in.is_mapping:
                    kind = _MappingStandIn
                elif stand_in.is_list and not stand_in.has_state:  # A plain list takes no state.
                    kind = _ListStandIn
                # torch looks up a name of Python 2 under its name in Python 3.
                renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                for module_, name_ in {(module, name), renamed}:
                    stand_ins.append(type("StandIn", (kind,), {"__module__": module_, "__qualname__": name_}))
        # torch looks for a name among its own allowed classes (OrderedDict, tensors) first.
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} was not opened, since it is no plain checkpoint: {_reason(error)}") from error


def _pickles(path: str) -> Iterator[io.BufferedIOBase]:
    """Yields the files with pickled objects; the older format has several pickles one after the other."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if os.path.basename(name) == "data.pkl":
                    yield io.BytesIO(archive.read(name))
    else:
        with open(path, "rb") as file:
            for _ in ("magic number", "version", "system", "checkpoint"):
                yield file


def _reason(error: Exception) -> str:
    message = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    # The reason omits torch's advice to load the file without the restriction.
    lines = [line.strip() for line in message.splitlines() if line.strip() and "weights_only" not in line]
    return f"{type(error).__name__}: {lines[0] if lines else message.partition('. ')[0]}"
