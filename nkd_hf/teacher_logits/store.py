"""A store of a teacher's logits on the training images, which `nkd-hf teacher-logits` writes and training reads.

    store.json                            the description of the store; see [`StoreInfo`]
    epoch-0000/shard-00000.safetensors    the positions 0 .. shard_size - 1 of the permutation of epoch 0
    epoch-0000/shard-00000.json           the shard's SHA-256 and size, written last: a shard without it is not finished

A shard has one row for each sample. With all classes: `target` [n] and `logits` [n, C] float32. With the K largest logits
but the target's, which give NKD's target term exactly and its other term approximately:

    target              [n] int    the heaviest class of the label; "others" are all classes but the target
    target_logit        [n] float32
    peak_logit          [n] float32, the largest logit of the others
    log_odds            [n] float32, of the target against all others together at temperature 1
    classes             [n, K] int, the K others with the largest logits, the largest first
    values              [n, K] float16, logits of `classes` less the peak, so that large probabilities have small errors
    rest_logsumexp      [n, T] float32, logsumexp((logits - peak) / temperature) of the others not in `classes`

A class is an int16, or an int32 where there are more than 32768.
"""

import dataclasses
import hashlib
import json
import math
import os
import reprlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..errors import failed_write
from ..files import write_whole
from .compression import dense_logits

FORMAT = 1
STORE = "store.json"
# Number of shards that stay open: a batch lies in one or two of them.
_NUM_OPEN = 4


class TeacherDescription(NamedTuple):
    """Facts about the teacher of a store, for a model card.

    Attributes:
        name (`str` or None): Hub id or folder; None for a teacher that was trained for the store.
        architecture (`str`)
        num_parameters (`int`)
        weight (`float`, *optional*): its share in an ensemble; None for a teacher alone.
    """

    name: str | None
    architecture: str
    num_parameters: int
    weight: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes by name, without a weight that is None."""
        return {name: value for name, value in self._asdict().items() if (name, value) != ("weight", None)}


@dataclass
class StoreInfo:
    """The content of `store.json`.

    Args:
        num_classes (`int`): C.
        num_samples (`int`): number of samples of an epoch.
        epochs (`int`): number of epochs.
        top_k (`int`, *optional*): K; None means all classes, exactly.
        temperatures (`list[float]`): T temperatures of `rest_logsumexp`, 1 among them.
        shard_size (`int`): number of samples in a shard; the last shard of an epoch may have fewer.
        fingerprint (`dict`): the settings that the logits depend on; a run must have the same.
        teacher (`TeacherDescription` or a list of them): of an ensemble, each member.
        teacher_accuracy (`float`, *optional*): the teacher's top-1 on the student's pixels of the validation split; None
            until it is measured.
        versions (`dict[str, str]`): versions of the libraries that made the pixels.
        format (`int`): version of the files' format.
        teacher_own_accuracy (`float`, *optional*): the teacher's top-1 with its own preprocessing; None in older stores.
    """

    num_classes: int
    num_samples: int
    epochs: int
    top_k: int | None
    temperatures: list[float]
    shard_size: int
    fingerprint: dict[str, Any]
    teacher: TeacherDescription | list[TeacherDescription]
    teacher_accuracy: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    teacher_own_accuracy: float | None = None

    @property
    def num_shards(self) -> int:
        """Number of shards of one epoch."""
        return math.ceil(self.num_samples / self.shard_size)

    def write(self, folder: Path) -> None:
        """Writes `store.json` completely or not at all."""
        teachers = [teacher.to_json() for teacher in list_teachers(self.teacher)]
        values = dataclasses.asdict(self) | {"teacher": teachers if isinstance(self.teacher, list) else teachers[0]}
        write_whole(folder / STORE, (json.dumps(values, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "StoreInfo":
        """Reads `store.json`.

        Raises:
            ValueError: there is no such file, or it is damaged or of another format.
        """
        advice = "write a store with `nkd-hf teacher-logits --config FILE --output DIR --epochs N`"
        try:
            values = json.loads((folder / STORE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} is no store of teacher logits, it has no {STORE}: {advice}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / STORE} cannot be read ({error}): {_again(folder)}") from error
        known = {name.name for name in dataclasses.fields(cls)}
        if isinstance(values, dict):
            values.setdefault("teacher_own_accuracy", None)  # missing in older stores
        if not isinstance(values, dict) or values.get("format") != FORMAT or set(values) != known:
            found = values.get("format") if isinstance(values, dict) else None
            raise ValueError(f"{folder} is a store of format {found}, expected {FORMAT}: {advice}")
        if fault := _find_fault(values):
            raise ValueError(f"{folder / STORE} is damaged, {fault}: {_again(folder)}")
        teachers = [TeacherDescription(**teacher) for teacher in list_teachers(values["teacher"])]
        return cls(**values | {"teacher": teachers if isinstance(values["teacher"], list) else teachers[0]})


def list_teachers(teacher: Any) -> list[Any]:
    """Returns one teacher, or the members of an ensemble, as a list."""
    return teacher if isinstance(teacher, list) else [teacher]


def _again(folder: Path) -> str:
    return f"remove {folder} and write it again with `nkd-hf teacher-logits`, or download it again"


def _find_fault(values: dict[str, Any]) -> str | None:
    """Describes the first field of a `store.json` with an impossible value; None if there is none."""
    teachers = list_teachers(values["teacher"])
    is_right = {
        **{name: _is_count(values[name]) for name in ("num_classes", "num_samples", "epochs", "shard_size")},
        "top_k": values["top_k"] is None or _is_count(values["top_k"]),
        "temperatures": isinstance(values["temperatures"], list)
        and all(isinstance(each, int | float) and each > 0 for each in values["temperatures"]),
        "fingerprint": isinstance(values["fingerprint"], dict),
        "versions": isinstance(values["versions"], dict),
        "teacher": bool(teachers) and all(map(_is_teacher, teachers)),
        **{name: isinstance(values[name], float | None) for name in ("teacher_accuracy", "teacher_own_accuracy")},
    }
    wrong = next((name for name, right in is_right.items() if not right), None)
    return wrong and f"its {wrong} is {reprlib.repr(values[wrong])}"


def _is_teacher(value: Any) -> bool:
    kinds = {"name": str | None, "architecture": str, "num_parameters": int, "weight": float | None}
    if not isinstance(value, dict) or {*value, "weight"} != set(kinds):
        return False
    return _is_count(value["num_parameters"]) and all(isinstance(value.get(name), kinds[name]) for name in kinds)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


class TeacherLogits:
    """Reads a store of teacher logits.

    Files are memory-mapped; each file's checksum is verified once per process, when the file is first opened. A reader works
    in the workers of a data loader, forked or spawned: pass it to [`~nkd_hf.data.collator.ImageCollator`].

    Args:
        folder: of the store.

    Raises:
        ValueError: the folder is no store; on reading, a shard is missing or damaged.

    Example:

    ```python
    store = TeacherLogits("resnet34-logits")
    collator = ImageCollator(store.info.num_classes, teacher_logits=store)
    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.info = StoreInfo.read(self.folder)
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._verified: set[Path] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_verified": set()}

    def check_complete(self, epochs: int) -> None:
        """Checks that the shards of the first epochs are there.

        Raises:
            ValueError: the store has fewer epochs, or some shards are missing.
        """
        if epochs > self.info.epochs:
            raise ValueError(
                f"{self.folder} has the logits of {self.info.epochs} epochs, and the run takes {epochs}: run `nkd-hf "
                f"teacher-logits` again with --epochs {epochs}, which adds to it, or set num_train_epochs"
            )
        missing = unfinished(self.folder, self.info, epochs)
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {epochs * self.info.num_shards} shards, the first of them "
                f"{shard_path(self.folder, *missing[0])}: run `nkd-hf teacher-logits` again, which goes on where it stopped"
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
            positions: of the samples in the permutation of that epoch.

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
        # The positions of a batch follow each other, except where the batch reaches the next shard or wraps around.
        runs: list[tuple[int, list[int]]] = []
        for position in positions:
            shard, row = divmod(position, info.shard_size)
            if runs and runs[-1][0] == shard:
                runs[-1][1].append(row)
            else:
                runs.append((shard, [row]))
        parts: dict[str, list[Tensor]] = {}
        for shard, rows in runs:
            file, first = self._shard(epoch, shard), min(rows)
            for name in file.keys():  # noqa: SIM118 (safetensors' file is no mapping)
                values = file.get_slice(name)[first : max(rows) + 1]
                parts.setdefault(name, []).append(values[[row - first for row in rows]])
        return {name: torch.cat(values) for name, values in parts.items()}

    def _shard(self, epoch: int, shard: int) -> Any:
        path = shard_path(self.folder, epoch, shard)
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        again = "remove it and run `nkd-hf teacher-logits` again, which writes what is missing, or download it again"
        try:
            is_damaged = path not in self._verified and read_record(path)["sha256"] != _sha256(path)
            file = None if is_damaged else safetensors.safe_open(path, "pt")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}): {again}") from error
        if is_damaged:
            raise ValueError(f"{path} is damaged, its SHA-256 is not that of {_record_path(path).name}: {again}")
        self._open[path] = file
        self._verified.add(path)
        if len(self._open) > _NUM_OPEN:
            self._open.popitem(last=False)
        return self._open[path]

    def dense(self, rows: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
        """[`dense_logits`] of the rows from [`read`], which may be on another device now."""
        return dense_logits(rows, self.info.num_classes, self.info.temperatures, temperature)


def shard_path(folder: Path, epoch: int, shard: int) -> Path:
    """The path of a shard."""
    return folder / f"epoch-{epoch:04d}" / f"shard-{shard:05d}.safetensors"


def write_shard(path: Path, rows: dict[str, Tensor]) -> None:
    """Writes a shard and then its record, each completely or not at all.

    Raises:
        OSError: they cannot be written; the message says what to do.
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
            f"{advice}, and run `nkd-hf teacher-logits` again, which goes on where it stopped"
        ) from error


def unfinished(folder: Path, info: StoreInfo, epochs: int) -> list[tuple[int, int]]:
    """Epoch and number of the missing or partial shards. Compares sizes, since reading all files would take long."""
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
