"""Reads and writes `store.json`, the description of a store of teacher logits."""

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_whole

FORMAT = 1
STORE = "store.json"


class TeacherDescription(NamedTuple):
    """Facts about the teacher of a store, for a model card.

    Attributes:
        name (`str` or None): Hub id or folder; None for a teacher that was trained for the store.
        architecture (`str`)
        num_parameters (`int`)
        weight (`float`, *optional*): the teacher's share in an ensemble; None for a single teacher.
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
        fingerprint (`dict`): the settings that the logits depend on; a run must have the same settings.
        teacher (`TeacherDescription` or a list of them): the teacher, or each member of an ensemble.
        teacher_accuracy (`float`, *optional*): the teacher's top-1 on the student's pixels of the validation split; None
            until it is measured.
        versions (`dict[str, str]`): versions of the libraries that made the pixels.
        format (`int`): version of the files' format.
        teacher_own_accuracy (`float`, *optional*): the teacher's top-1 with its own preprocessing; None in older stores.
        standardized_temperatures (`list[float]`): temperatures of `rest_logsumexp_standardized`; `store.json` omits an
            empty list.
        cycle (`int`, *optional*): number of epochs after which training repeats the store, equal to `epochs`; None if
            training must not repeat it. `store.json` omits None.
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
    standardized_temperatures: list[float] = field(default_factory=list)
    cycle: int | None = None

    @property
    def num_shards(self) -> int:
        """Number of shards of one epoch."""
        return math.ceil(self.num_samples / self.shard_size)

    def write(self, folder: Path) -> None:
        """Writes `store.json` completely or not at all."""
        teachers = [teacher.to_json() for teacher in list_teachers(self.teacher)]
        values = dataclasses.asdict(self) | {"teacher": teachers if isinstance(self.teacher, list) else teachers[0]}
        if not self.standardized_temperatures:
            del values["standardized_temperatures"]
        if self.cycle is None:
            del values["cycle"]
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
            values.setdefault("standardized_temperatures", [])
            values.setdefault("cycle", None)
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
        "cycle": values["cycle"] is None or (_is_count(values["cycle"]) and values["cycle"] == values["epochs"]),
        "top_k": values["top_k"] is None or _is_count(values["top_k"]),
        **{name: _are_positive(values[name]) for name in ("temperatures", "standardized_temperatures")},
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


def _are_positive(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, int | float) and each > 0 for each in values)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
