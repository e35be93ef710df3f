"""Reads a store of a teacher's logits on the training images, which `nkd-hf teacher-logits` writes.

    store.json                            the description of the store; see [`StoreInfo`]
    epoch-0000/shard-00000.safetensors    the positions 0 .. shard_size - 1 of the permutation of epoch 0
    epoch-0000/shard-00000.json           the shard's SHA-256 and size, written last: a shard without it is not finished

A shard has one row for each sample. With all classes, its fields are `target` [n] and `logits` [n, C] float32. With
the K largest logits except the target's, from which [`dense_logits`] and [`softmax_logits`] rebuild the others, its
fields are:

    target              [n] int    the heaviest class of the label; "others" are all classes except the target
    target_logit        [n] float32
    peak_logit          [n] float32, the largest logit of the others
    log_odds            [n] float32, of the target against all others together at temperature 1
    classes             [n, K] int, the K others with the largest logits, the largest first
    values              [n, K] float16, logits of `classes` minus the peak, so that large probabilities have small
    errors rest_logsumexp      [n, T] float32, logsumexp((logits - peak) / temperature) of the others not in `classes`

and where `store.json` has standardized_temperatures, for losses that standardise the logits:

    mean, std           [n] float32, of the logits of all classes minus the peak; the standard deviation is unbiased
    rest_logsumexp_standardized  [n, T] float32, as `rest_logsumexp`, at temperature * (1e-7 + std)

A class is an int16, or an int32 where there are more than 32768.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import failed_write
from ..files import write_whole
from ..losses.top_k import TopKView
from .compression import dense_logits, softmax_logits
from .info import StoreInfo

# Number of shards that stay open: a batch needs one or two of them.
_NUM_OPEN = 4


class TeacherLogits:
    """Reads a store of teacher logits.

    Files are memory-mapped; each file's checksum is verified once per process, when the file is first opened. A reader works
    in the workers of a data loader, forked or spawned: pass it to [`~nkd_hf.data.collator.ImageCollator`].

    Args:
        folder: the folder of the store.

    Raises:
        ValueError: the folder is no store; when it is read, a shard is missing or damaged.

    Example:

    ```python
    store = TeacherLogits("resnet34-logits")
    collator = ImageCollator(store.info.num_classes, teacher_logits=store)
    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.info = StoreInfo.read(self.folder)
        self._open: OrderedDict[Path, dict[str, Tensor]] = OrderedDict()
        self._verified: set[Path] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_verified": set()}

    def check_complete(self, epochs: int) -> None:
        """Checks that the store has the shards of the first epochs, or of the epochs that it repeats in their place.

        Raises:
            ValueError: the store has fewer epochs, or some shards are missing.
        """
        if self.info.cycle is not None:
            epochs = min(epochs, self.info.cycle)
        if epochs > self.info.epochs:
            raise ValueError(
                f"{self.folder} has the logits of {self.info.epochs} epochs, and the run takes {epochs}: run `nkd-hf "
                f"teacher-logits` again with --epochs {epochs}, which adds to it, or set num_train_epochs"
            )
        missing = unfinished(self.folder, self.info, epochs)
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {epochs * self.info.num_shards} shards, the first of them "
                f"{shard_path(self.folder, *missing[0])}: run `nkd-hf teacher-logits` again, which continues where it stopped"
            )

    def verify(self) -> None:
        """Reads all shards and compares them with their checksums.

        Raises:
            ValueError: a shard is missing or damaged.
        """
        for epoch in range(self.info.epochs):
            for shard in range(self.info.num_shards):
                self._shard(epoch, shard)

    def read(self, epoch: int, positions: Sequence[int]) -> dict[str, Tensor]:
        """Reads the rows of some samples.

        Args:
            epoch: counted from 0.
            positions: the samples' positions in the permutation of that epoch.

        Returns:
            The fields of the shards, by name, each with a row for each position.

        Raises:
            ValueError: there is no such sample; a shard is missing or damaged.
        """
        info = self.info
        if not (0 <= epoch < info.epochs and all(0 <= position < info.num_samples for position in positions)):
            raise ValueError(
                f"{self.folder} has {info.epochs} epochs of {info.num_samples} samples, and the run asks for epoch {epoch}, "
                f"positions {min(positions)} to {max(positions)}, counted from 0: write a store of more epochs"
            )
        places: dict[int, list[int]] = {}
        for place, position in enumerate(positions):
            places.setdefault(position // info.shard_size, []).append(place)
        parts: dict[str, list[Tensor]] = {}
        for shard, own in places.items():
            rows = torch.tensor([positions[place] % info.shard_size for place in own])
            for name, values in self._shard(epoch, shard).items():
                parts.setdefault(name, []).append(values[rows])
        if len(places) == 1:
            return {name: values for name, (values,) in parts.items()}
        order = torch.tensor([place for own in places.values() for place in own]).argsort()
        return {name: torch.cat(values)[order] for name, values in parts.items()}

    def _shard(self, epoch: int, shard: int) -> dict[str, Tensor]:
        """Returns the fields of a shard; indexing reads rows from the file."""
        path = shard_path(self.folder, epoch, shard)
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        again = "remove it and run `nkd-hf teacher-logits` again, which writes what is missing, or download it again"
        try:
            is_damaged = path not in self._verified and read_record(path)["sha256"] != _sha256(path)
            fields = {} if is_damaged else _map_file(path)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}): {again}") from error
        if is_damaged:
            raise ValueError(f"{path} is damaged, its SHA-256 is not that of {_record_path(path).name}: {again}")
        self._open[path] = fields
        self._verified.add(path)
        # A batch of a repeated epoch may need all of the epoch's shards.
        num_open = _NUM_OPEN if self.info.cycle is None else max(_NUM_OPEN, self.info.num_shards)
        if len(self._open) > num_open:
            self._open.popitem(last=False)
        return self._open[path]

    def dense(self, rows: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
        """Returns [`dense_logits`] of the rows of [`read`], which may be on another device."""
        return dense_logits(rows, self.info.num_classes, self.info.temperatures, temperature)

    def find_missing(self, view: TopKView) -> str | None:
        """Describes the temperature of `view` that a store of the largest logits lacks, or returns None."""
        name = "standardized_temperatures" if view.standardized else "temperatures"
        known = getattr(self.info, name)
        if view.temperature in known:
            return None
        wanted = "temperature of standardised logits" if view.standardized else "temperature"
        if not known:
            return (
                f"{wanted} must be stored in {self.folder}, which has none, got {view.temperature}: write a store with this "
                "loss"
            )
        return (
            f"{wanted} must be one of {', '.join(map(str, known))}, as stored in {self.folder}, got "
            f"{view.temperature}: write a store with this loss, or with --temperatures"
        )

    def rebuild(self, rows: dict[str, Tensor], view: TopKView) -> dict[str, Tensor]:
        """Returns the inputs of a loss that reads `view`.

        Args:
            rows: the rows of [`read`], on any device. A store of the largest logits must have the temperature of
                `view`, see [`find_missing`].
            view: the view of the loss.

        Returns:
            `teacher_logits` [n, C] float32; for standardised logits, `logit_moments` [n, 2] float32, too.
        """
        info = self.info
        if not view.with_target:
            return {"teacher_logits": self.dense(rows, view.temperature)}
        if not view.standardized:
            return {"teacher_logits": softmax_logits(rows, info.num_classes, info.temperatures, view.temperature)}
        logits = softmax_logits(rows, info.num_classes, info.standardized_temperatures, view.temperature, True)
        return {"teacher_logits": logits, "logit_moments": torch.stack([rows["mean"], rows["std"]], 1)}


def shard_path(folder: Path, epoch: int, shard: int) -> Path:
    """Returns the path of a shard."""
    return folder / f"epoch-{epoch:04d}" / f"shard-{shard:05d}.safetensors"


def write_shard(path: Path, rows: dict[str, Tensor]) -> None:
    """Writes a shard and then its record, each completely or not at all.

    Raises:
        OSError: a file cannot be written; the message says what to do.
    """
    content = safetensors.torch.save({name: value.contiguous() for name, value in rows.items()})
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "samples": len(rows["target"])}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        write_whole(_record_path(path), (json.dumps(record) + "\n").encode())
    except OSError as error:
        cause, advice = failed_write(error, path.parent)
        raise OSError(
            f"{path} of {len(content) / 2**20:.0f} MiB could not be written ({cause}). The shards before it are finished: "
            f"{advice}, and run `nkd-hf teacher-logits` again, which continues where it stopped"
        ) from error


def _map_file(path: Path) -> dict[str, Tensor]:
    """Maps the tensors of a file into memory."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safetensors' file is no mapping)


def unfinished(folder: Path, info: StoreInfo, epochs: int) -> list[tuple[int, int]]:
    """Returns epoch and number of the missing or partial shards, by file size: reading all files would take long."""
    shards = [(epoch, shard) for epoch in range(epochs) for shard in range(info.num_shards)]
    return [key for key in shards if not _is_finished(shard_path(folder, *key))]


def read_record(path: Path) -> dict[str, Any]:
    """Reads the record of a shard: `sha256`, `bytes` and `samples`.

    Raises:
        ValueError: the file is no record.
        OSError: the file cannot be read.
    """
    try:
        record = json.loads(_record_path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{_record_path(path)} is nested too deeply") from error
    if not isinstance(record, dict) or not {"sha256", "bytes"} <= set(record):
        raise ValueError(f"{_record_path(path)} is no record of a shard")
    return record


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _is_finished(path: Path) -> bool:
    try:
        return read_record(path)["bytes"] == path.stat().st_size
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
