"""Reads and writes times for users."""

import math
import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Reads a time such as `90s`, `30m`, `1.5h` or `1h30m`, in seconds.

    Raises:
        ValueError: the text is not such a time.

    Example:
        >>> parse_duration("30m"), parse_duration("1h30m"), parse_duration("0.5h")
        (1800.0, 5400.0, 1800.0)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text) if isinstance(text, str) else []
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < math.inf:
        raise ValueError(
            f"time_budget must be a time such as 30m, 2h or 1h30m, got {text!r}. Write a number and s, m, h or d"
        )
    return seconds


def describe_duration(seconds: float) -> str:
    """Writes a time for readers.

    Example:
        >>> describe_duration(42), describe_duration(200), describe_duration(5400)
        ('42 s', '3 min 20 s', '1 h 30 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min" + (f" {seconds % 60} s" if seconds % 60 and seconds < 600 else "")
    return f"{seconds // 3600} h" + (f" {seconds % 3600 // 60} min" if seconds % 3600 >= 60 else "")
