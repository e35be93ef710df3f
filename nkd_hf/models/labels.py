"""Brings the names of classes (`id2label`) into one normal form, and matches the names of two models."""

import json
import logging
import operator
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def normalize_id2label(
    id2label: Mapping[Any, str] | Sequence[str], num_labels: int | None = None, *, of: str = "id2label"
) -> dict[int, str]:
    """Brings class names into the form that is compared and saved: the numbers 0..n-1 in order, each with its text.

    Args:
        id2label: names by number. A number is an integer (also numpy's, or a tensor of one), or its text, as in JSON. A list
            or a tuple names the classes in order.
        num_labels: the number of classes that there must be.
        of: the name of `id2label` in messages.

    Returns:
        `dict[int, str]`: a new dict. Two classes may have one name: ImageNet has two classes `crane`.

    Raises:
        ValueError: the numbers are not 0..n-1, each once; a name is not text; there are no classes, or not `num_labels`.

    Example:

    ```python
    >>> from nkd_hf.models.labels import normalize_id2label
    >>> normalize_id2label({"1": "dog", "0": "cat"})
    {0: 'cat', 1: 'dog'}

    ```
    """
    if isinstance(id2label, Mapping):
        items = [(_number(key, of), name) for key, name in id2label.items()]
    elif isinstance(id2label, Sequence) and not isinstance(id2label, str | bytes):
        items = list(enumerate(id2label))
    else:
        raise ValueError(
            f"{of} must be a dict of class names by number or a list of them, got {_short(id2label)}. "
            'Write {0: "cat", 1: "dog"}'
        )
    names = dict(items)
    if len(names) < len(items):
        twice = next(number for number, count in Counter(number for number, _ in items).items() if count > 1)
        raise ValueError(f"{of} must name each class once, got class {twice} twice. Remove one of its two keys")
    if not names:
        raise ValueError(f"{of} must name at least one class, got {_short(id2label)}. List the classes")
    if names.keys() != set(range(len(names))):
        wrong = next(number for number in sorted(names) if not 0 <= number < len(names))
        raise ValueError(
            f"{of} must number its {len(names)} classes from 0 to {len(names) - 1}, got the number {wrong}. "
            "Number the classes by the position of their logits"
        )
    for number, name in names.items():
        if not isinstance(name, str):
            raise ValueError(f"{of} must hold text, got {_short(name)} for class {number}. Convert names with str()")
    if num_labels is not None and len(names) != num_labels:
        raise ValueError(f"{of} must name {num_labels} classes, got {len(names)}. Give each class one name")
    return {number: str(names[number]) for number in range(len(names))}


def check_classifier(config: Any, of: str) -> None:
    """Checks that a model has a softmax over two or more classes, which every loss of nkd_hf needs.

    Args:
        config: the model's configuration; an object without `problem_type` and `num_labels`, or None, passes the
            check.
        of: the name of the model in messages.

    Raises:
        ValueError: the model has one class, or its `problem_type` is regression or several labels an image.
    """
    problem_type = getattr(config, "problem_type", None)
    if problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"the problem_type of {of} must be single_label_classification, got {problem_type!r}. Distillation compares "
            "softmaxes over classes: take a model that gives each image one class, or set config.problem_type if this is one"
        )
    if getattr(config, "num_labels", None) == 1:
        raise ValueError(f"{of} must have two classes or more, got 1. A binary classifier has num_labels=2")


def invert_labels(id2label: Mapping[int, str]) -> dict[str, int]:
    """Returns the `label2id` of an `id2label`; of classes with one name, the last one counts, as in transformers."""
    return {name: number for number, name in id2label.items()}


def check_class_order(folder: str | Path, id2label: Mapping[Any, str] | Sequence[str]) -> None:
    """Checks that a saved model, from which training continues, has its logits in the order of the run's classes.

    Args:
        folder: the folder of the saved model. A folder without a `config.json`, or without names in it, passes the
            check.
        id2label: the run's classes.

    Raises:
        ValueError: the names are the same in another order.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = isinstance(config, dict) and (config.get("id2label") or config.get("label_names"))
    if not names:
        return
    saved, now = (list(normalize_id2label(each).values()) for each in (names, id2label))
    if saved != now and sorted(saved) == sorted(now):
        first = next(i for i, (a, b) in enumerate(zip(saved, now, strict=True)) if a != b)
        raise ValueError(
            f"the classes must stand in the order in which {folder} was saved, got {now[first]!r} for class {first}, which "
            f"is {saved[first]!r} there. Start this training from the beginning, in a new folder"
        )


def reorder(names: Sequence[str], saved: Sequence[str]) -> list[int] | None:
    """Finds the positions of `names` in a saved model that has the same names in another order.

    Returns:
        `list[int]` or None: `logits[:, order]` is in the order of `names`. None if the order is the same, if the names
        differ, or if one side's names are generic (`LABEL_0`).

    Raises:
        ValueError: the names are the same in another order, and two of them are equal.

    Example:
        >>> reorder(["owl", "cat", "dog"], ["cat", "dog", "owl"])
        [2, 0, 1]
    """
    if is_generic(names) or is_generic(saved):
        return None
    numbers = whole_numbers(names), whole_numbers(saved)
    now, then = (names, saved) if None in numbers else numbers
    if list(now) == list(then) or Counter(now) != Counter(then):
        return None
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"classes in another order must have names that differ, got {repeated[0]!r} twice. Name them in the order in "
            "which the model was saved"
        )
    return _order(now, then)


def match_labels(
    student_id2label: Mapping[Any, str] | Sequence[str],
    teacher_id2label: Mapping[Any, str] | Sequence[str],
    teacher_name: str = "teacher",
    *,
    roles: tuple[str, str] = ("student", "teacher"),
    advice: str | None = None,
    allow_more: bool = False,
) -> list[int] | None:
    """Finds the positions of the student's classes in the teacher's logits.

    For other pairs than student and teacher, `roles` has their names in messages, and `advice` has the advice. With
    `allow_more`, a teacher may have other classes beside the student's, which it must name as the student does.

    Equal lists match by position, even if names repeat (ImageNet has two classes `crane`), or if one list alone tells
    repeated names apart by text after the name (the Hub's ImageNet has `crane` and `crane2`). Lists of the same
    unique names in another order match by name. Names that are whole numbers match as numbers (`007` and `7`). A generic
    name (`LABEL_0`) matches by its number: the same position in the other list, or the same number if the other list's
    names are whole numbers; a warning says so.

    Returns:
        `list[int]` or None: `teacher_logits[:, order]` is in the student's order; None if the orders are equal.

    Raises:
        ValueError: the label spaces differ; the message lists the first differences. Or one side is no `id2label`; see
            [`normalize_id2label`].

    Example:

    ```python
    >>> from nkd_hf.models.labels import match_labels
    >>> match_labels({0: "cat", 1: "dog"}, {0: "dog", 1: "cat"})
    [1, 0]

    ```
    """
    student = list(normalize_id2label(student_id2label, of=f"the {roles[0]}'s id2label").values())
    teacher = list(normalize_id2label(teacher_id2label, of=f"{teacher_name}'s id2label").values())
    if allow_more and len(teacher) > len(student) and names_all(teacher, student):
        return _order(student, teacher)
    if len(student) != len(teacher):
        raise ValueError(
            f"{teacher_name} has {len(teacher)} classes and the {roles[0]} {len(student)}; the first that only one of "
            f"them has: {_differences(student, teacher, roles)}. {advice or f'Load a teacher of {len(student)} classes'}"
        )
    in_student, in_teacher = Counter(student), Counter(teacher)
    if all(
        a == b
        or (in_teacher[b] > 1 and a not in in_teacher and _tells_apart(a, b))
        or (in_student[a] > 1 and b not in in_student and _tells_apart(b, a))
        for a, b in zip(student, teacher, strict=True)
    ):
        return None
    if is_generic(student) or is_generic(teacher):
        which = f"the {roles[0]}'s" if is_generic(student) else f"{teacher_name}'s"
        logger.warning(
            "%s class names are generic (LABEL_0, ...): its %d classes are matched with the other's by their numbers. "
            "Set id2label to be sure.",
            which,
            len(student),
        )
        return _order(class_numbers(student, len(student)), class_numbers(teacher, len(student)))
    if in_student == in_teacher and len(in_student) == len(student):
        return _order(student, teacher)
    numbers = whole_numbers(student), whole_numbers(teacher)
    if None not in numbers and set(numbers[0]) == set(numbers[1]):
        return _order(*numbers)
    advice = advice or (
        "Load a teacher of the same classes, or, if they are the same under other names, set the teacher's id2label "
        "to the student's names (in a recipe: --ignore_label_names true)"
    )
    raise ValueError(
        f"{teacher_name} and the {roles[0]} name their classes differently: {_differences(student, teacher, roles)}. "
        f"{advice}"
    )


def names_all(teacher: Sequence[str], student: Sequence[str]) -> bool:
    """Whether a teacher's class names contain each of the student's once, and the names are not generic or numbers.

    Example:
        >>> names_all(["owl", "cat", "dog"], ["dog", "cat"]), names_all(["owl", "cat"], ["dog", "cat"])
        (True, False)
    """
    count = Counter(teacher)
    is_unique = len(set(student)) == len(student) and all(count[name] == 1 for name in student)
    # Numbers and generic names of fewer classes are other classes: digit 3 is not class 3 of ImageNet.
    return is_unique and whole_numbers(student) is None


def is_generic(names: Sequence[str]) -> bool:
    """Whether the names are the ones that transformers gives classes without names: `LABEL_0`, `LABEL_1`, ..."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def whole_numbers(names: Sequence[str]) -> list[int] | None:
    """Reads names that are whole numbers: `3`, `003` or `LABEL_3`. None unless all have one form, and no number
    repeats.

    Example:
        >>> whole_numbers(["0", "1", "10", "2"]), whole_numbers(["3", "three"]), whole_numbers(["1", "01"])
        ([0, 1, 10, 2], None, None)
    """
    for prefix in ("", "LABEL_"):
        matches = [re.fullmatch(prefix + r"([0-9]+)", name) for name in names]
        if all(matches):
            # Python refuses to read a number of more than 4300 digits.
            numbers = [int(match[1]) if len(match[1]) <= 4300 else None for match in matches]
            return numbers if None not in numbers and len(set(numbers)) == len(numbers) else None
    return None


def sort_by_number(names: Sequence[str]) -> list[str]:
    """Sorts names by number if all are [`whole_numbers`]; other names keep their order.

    Example:
        >>> sort_by_number(["0", "1", "10", "2"]), sort_by_number(["dog", "cat"])
        (['0', '1', '2', '10'], ['dog', 'cat'])
    """
    numbers = whole_numbers(names)
    return list(names) if numbers is None else [name for _, name in sorted(zip(numbers, names, strict=True))]


def class_numbers(names: Sequence[str], num_labels: int) -> list[int]:
    """Finds the numbers of named classes in a model of `num_labels` classes, without the model's own names.

    A name that is a whole number (`003`, `LABEL_3`) is the number of its class. Other names are numbered by position.
    So are numbers beyond the model's classes, if their order as numbers is their order as text: `001` to `012`.

    Raises:
        ValueError: the names are whole numbers beyond the model's classes, and their order as text is another one (`1`
            to `12`), so that the name of the model's first class is unknown.

    Example:
        >>> class_numbers(["0", "10", "2"], 11), class_numbers(["cat", "dog"], 2)
        ([0, 10, 2], [0, 1])
    """
    numbers = whole_numbers(names)
    positions = list(range(len(names)))
    if numbers is None or numbers == positions:
        return positions
    if max(numbers) < num_labels:
        return numbers
    if sorted(numbers) == numbers and sorted(names) == list(names):
        return positions
    raise ValueError(
        f"class names that are numbers must be from 0 to {num_labels - 1} to be taken as the numbers of "
        f"{num_labels} classes, got {min(numbers)} to {max(numbers)}. Rename the classes to the numbers of the model, or "
        "give the model's id2label the names that the dataset has"
    )


def _number(key: Any, of: str) -> int:
    if isinstance(key, str) and re.fullmatch(r"[0-9]{1,18}", key):
        return int(key)
    is_bool = isinstance(key, bool) or "bool" in str(getattr(key, "dtype", ""))
    try:
        if not is_bool:
            return operator.index(key)
    except (TypeError, ValueError):  # a tensor of several numbers raises ValueError
        pass
    raise ValueError(
        f"the keys of {of} must be the numbers of the classes, got {_short(key)}. Number them from 0, as integers"
    )


def _tells_apart(name: str, repeated: str) -> bool:
    """Whether a name is a repeated name with text added: `crane2` or `crane, bird`, not `craned`."""
    return re.match(re.escape(repeated) + r"(?![^\W\d_])", name) is not None


def _order(student: Sequence[Any], teacher: Sequence[Any]) -> list[int] | None:
    position = {name: i for i, name in enumerate(teacher)}
    order = [position[name] for name in student]
    return None if order == list(range(len(order))) else order


def _short(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def _differences(student: list[str], teacher: list[str], roles: tuple[str, str], most: int = 3) -> str:
    if len(student) != len(teacher):
        in_student, in_teacher = set(student), set(teacher)
        only = [f"{name!r} ({roles[0]})" for name in student if name not in in_teacher]
        only += [f"{name!r} ({roles[1]})" for name in teacher if name not in in_student]
        return ", ".join(only[:most]) or "none, but names repeat"
    differ = [(i, a, b) for i, (a, b) in enumerate(zip(student, teacher, strict=True)) if a != b]
    return ", ".join(
        f"class {i} is {a!r} for the {roles[0]} and {b!r} for the {roles[1]}" for i, a, b in differ[:most]
    )
