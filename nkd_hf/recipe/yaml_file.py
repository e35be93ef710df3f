"""Reads the YAML files that hold the arguments of a recipe."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

_MOST_VALUES = 10_000  # in a file, with each alias counted as the values that it stands for


def read_config(path: Path, below: tuple[Path, ...] = ()) -> dict[Any, tuple[Any, Path]]:
    """Reads a YAML file, the file that its `base` names, and so on.

    Args:
        path: the file.
        below: the files whose `base` led to this one.

    Returns:
        The value of each key, and the file that contains it.

    Raises:
        ConfigError: a file cannot be read or is no mapping. The message names the file and, if it is no YAML, the
            line.
    """
    try:
        path = path.expanduser()
        is_own_base = path.resolve() in [file.resolve() for file in below]
        content = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: no such user's home
        named = f", the base of {below[-1]}" if below else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the config {path}{named}: {reason}") from error
    if is_own_base:
        chain = " -> ".join(str(file) for file in (*below, path))
        raise ConfigError(f"{chain}: a file cannot be its own base: remove one `base`")
    try:
        config = yaml.load(content.decode("utf-8"), Loader=Loader)
    except UnicodeDecodeError as error:
        where = f"{path}, line {content[: error.start].count(10) + 1}"
        raise ConfigError(f"{where}: not valid YAML: not UTF-8 ({error.reason}): save it as UTF-8 text") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a control character
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a mapping such as `gamma: 1.5`, got {describe_value(config)}")

    base = config.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name of a YAML file, got {describe_value(base)}")
    inherited = {}
    if base is not None:
        inherited = read_config(Path(base) if base.startswith("~") else path.parent / base, (*below, path))
    return inherited | {key: (value, path) for key, value in config.items()}


class Loader(yaml.SafeLoader):
    """Loads YAML with the numbers and booleans of YAML 1.2, and refuses a key that occurs twice.

    For such a key or value it raises `MarkedYAMLError`, which has the line.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} occurs twice: keep one", problem_mark=key.start_mark
                )
            keys.add(key.value)
        return node

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a date such as 2024-02-31, an integer of 5000 digits, !!bool abc
            problem = str(error) if isinstance(error, ValueError) else f"no {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error
        if type(value) in (int, float):
            text = node.value.lower()
            fault = find_fault(value)
            if ":" in text or (isinstance(value, int) and re.match(r"[-+]?0[0-7_]", text)):
                fault = f"{node.value} is {value} in YAML 1.1 and something else in YAML 1.2: write {value}, or put it in quotes"
            elif isinstance(value, float) and math.isinf(value) and "inf" not in text:
                fault = f"{node.value} is too large for a number (at most 1.8e308)"
            if fault:
                raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.start_mark)
        return value


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int | None]) -> int:
    """Counts the values of a node, and refuses too many: a few lines of nested aliases can stand for millions."""
    if node in counts:
        if counts[node] is None:
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark)
        return counts[node]
    counts[node] = None
    below = [] if isinstance(node, yaml.ScalarNode) else node.value
    below = [item for pair in below for item in pair] if isinstance(node, yaml.MappingNode) else below
    counts[node] = 1 + sum(_count_values(item, counts) for item in below)
    if counts[node] > _MOST_VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {_MOST_VALUES} values", problem_mark=node.start_mark)
    return counts[node]


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


def find_fault(value: Any) -> str | None:
    """Returns the reason why no run can use a value, or a value in it; None where nothing is wrong."""
    if isinstance(value, float) and math.isnan(value):
        return "expected a number, got nan: no run can use it"
    if type(value) is int and not -(2**63) <= value < 2**63:
        return "expected an integer of at most 64 bits, got a larger one"
    if isinstance(value, list | dict):
        return next(filter(None, map(find_fault, value.values() if isinstance(value, dict) else value)), None)
    return None


def describe_value(value: Any) -> str:
    """Describes a value for a message."""
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    names = {str: "the string", int: "the number", float: "the number", list: "the list", dict: "the mapping"}
    return f"{names.get(type(value), f'the {type(value).__name__}')} {text}"
