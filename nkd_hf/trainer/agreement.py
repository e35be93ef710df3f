"""Makes all processes of a run decide alike, since each may see other files."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

__all__ = ["any_process", "decide_in_first", "first_fault"]

_Answer = TypeVar("_Answer")


def decide_in_first(decide: Callable[[], _Answer]) -> _Answer:
    """Calls a function in the first process, and returns its result in all of them. All must call this.

    Raises:
        ValueError, OSError: the function's error, in all processes: if one raised it alone, the others would wait.
    """
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [decide(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
    answer, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return answer


def first_fault(fault: str | None) -> str | None:
    """Returns the fault of the first process that has one, in all processes. All must call this.

    Args:
        fault: this process's fault, or None.

    Returns:
        The fault, with the number of the process where there are several, or None where no process has one.
    """
    faults = gather_object([fault])
    found = [(number, text) for number, text in enumerate(faults) if text is not None]
    if not found:
        return None
    number, text = found[0]
    return text if len(faults) == 1 else f"{text} (said by process {number} of {len(faults)})"


def any_process(flag: bool) -> bool:
    """Whether the flag is true in one of the processes. All must call this; it waits for the device."""
    return bool(reduce(torch.tensor(float(flag), device=PartialState().device), reduction="sum").item())
