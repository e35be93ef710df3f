"""Parses the arguments of a recipe: a YAML file gives the defaults, the command line overrides them."""

import dataclasses
import json
import re
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from transformers import HfArgumentParser

from ..errors import ConfigError, suggest
from .yaml_file import find_fault, read_config
from .yaml_values import check_value

_RESERVED = ("config", "base")
# Keys of run.yaml, the record of a run, that are not arguments.
_RECORDED = ("world_size", "stream_workers")


def parse_args(
    dataclass_types: type | Iterable[type],
    *,
    default_config: str | Path | None = None,
    default_config_unless: Sequence[str] = ("dataset_name",),
    default_config_keeps: Sequence[Sequence[str]] = (),
    args: Sequence[str] | None = None,
) -> tuple[Any, ...]:
    """Fills dataclasses from a YAML file (`--config FILE`) and from the command line, which wins.

    A key of the YAML is the name of a field. Its value must have the field's type: nothing is converted but an integer for
    a float field. `null` means `None`, where the field allows it. Lists and mappings replace the
    field's value as a whole. On the command line a list is `--name a b`, a mapping is JSON (`--name '{"a": 1}'`).

    The key `base: other.yaml` names another YAML, relative to the file with the key, whose values this file overrides.

    Two rules of YAML 1.2 are followed where PyYAML keeps those of 1.1: `1e-3` is a number, and a bare `no` is a
    string (`save_strategy: no`), which a bool field still reads as false (so too `yes`, `on` and `off`). A value that the
    two versions read differently (`010`, `1:30`) is an error. So is a value that no run can use, in the file or on the
    command line: NaN, an integer of more than 64 bits, in a mapping a date or bytes.

    Args:
        dataclass_types: one dataclass or several, such as a `transformers.TrainingArguments` and some of your own.
            Fields may be str, int, float, bool, an `Enum`, a `Literal`, `list[...]`, dict, and each of them `| None`.
        default_config: the YAML that is used when the command line names no `--config`.
        default_config_unless: fields that switch `default_config` off when the command line sets them: a run on
            another data set should not inherit the settings of a demo.
        default_config_keeps: keys of `default_config` that hold even then, in groups. If the command line sets the
            first field of a group to another value than the file's, the other keys of the group do not hold: another
            loss does not inherit the arguments of the first one.
        args: the command line; None uses `sys.argv[1:]`.

    Returns:
        One instance of each dataclass, in order.

    Raises:
        SystemExit: with code 2 and a short message on stderr, as argparse does: a key or argument is unknown, a value has
            the wrong type, a YAML cannot be read, has a key twice, is no mapping or is its own base, or a dataclass's
            `__post_init__` refuses its values. The message names the argument.
        ValueError: when two of the dataclasses have a field of the same name, or one has a field `config` or `base`.

    Example:
        >>> import dataclasses, pathlib, tempfile
        >>> @dataclasses.dataclass
        ... class ModelArguments:
        ...     student: str = "resnet18"
        ...     gamma: float = 1.5
        ...     student_args: dict | None = None
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = pathlib.Path(folder, "nkd.yaml")
        ...     _ = config.write_text("gamma: 1\\nstudent_args: {drop_path_rate: 1e-1}")
        ...     parse_args(ModelArguments, args=["--config", str(config), "--student", "deit_tiny_patch16_224"])
        (ModelArguments(student='deit_tiny_patch16_224', gamma=1.0, student_args={'drop_path_rate': 0.1}),)
    """
    parser = _Parser(dataclass_types)
    if default_config is not None:
        parser.describe_default(Path(default_config), default_config_unless, default_config_keeps)
    args = list(sys.argv[1:] if args is None else args)
    try:
        config, given = _read_options(parser.prog, args)
        if config is not None:
            parser.set_config(config)
        elif default_config is not None and not given.keys() & set(default_config_unless):
            parser.set_config(default_config)
        elif default_config is not None:
            values = read_config(Path(default_config))
            kept = set()
            for group in default_config_keeps:
                # The command line may set the value that the file has: the group still holds.
                if group[0] not in given or (group[0] in values and given[group[0]] == str(values[group[0]][0])):
                    kept |= set(group)
            parser.set_config(default_config, kept)
        return parser.parse_into_dataclasses(args)
    except ConfigError as error:
        parser.error(str(error))


def parse_with_defaults(
    dataclass_types: Iterable[type],
    choose_defaults: Callable[[set[str]], dict[str, Any]],
    *,
    prog: str | None = None,
    required: Sequence[str] = (),
    args: Sequence[str] | None = None,
) -> tuple[tuple[Any, ...], set[str]]:
    """Fills dataclasses as [`parse_args`] does, where the fields have other defaults.

    Args:
        dataclass_types: the dataclasses.
        choose_defaults: returns the defaults of some fields, for the names of the fields that the user has set.
        prog: the name of the command in messages.
        required: fields that the user must set, though they have a default.
        args: the command line; None uses `sys.argv[1:]`.

    Returns:
        One instance of each dataclass, and the names of the fields that the user has set.

    Raises:
        SystemExit: as for [`parse_args`].
    """
    parser = _Parser(dataclass_types)
    parser.prog = prog or parser.prog
    args = list(sys.argv[1:] if args is None else args)
    try:
        config, options = _read_options(parser.prog, args)
        given = set(options)
        if config is not None:
            parser.set_config(config)
            given |= set(read_config(Path(config)))
        given &= parser.type_hints.keys()
        defaults = {name: value for name, value in choose_defaults(given).items() if name not in given}
        parser.set_defaults(**defaults)
        for action in parser._actions:
            action.required |= action.dest in required and action.dest not in given
        return parser.parse_into_dataclasses(args), given
    except ConfigError as error:
        parser.error(str(error))


class _Parser(HfArgumentParser):
    def __init__(self, dataclass_types: type | Iterable[type]):
        dataclass_types = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        self.type_hints = _read_type_hints(dataclass_types)
        # A new field can make an abbreviation ambiguous, or change its meaning.
        super().__init__(
            dataclass_types,
            allow_abbrev=False,
            usage="%(prog)s [--config FILE] [--NAME VALUE ...]",  # argparse's default usage lists 150 arguments twice
            description="The values in the YAML of --config are the defaults, the command line overrides them.",
        )
        self.add_argument("--config", metavar="FILE", help="YAML file with the defaults of the other arguments")
        for action in self._actions:
            if action.type is dict or get_origin(action.type) is dict:
                action.type = _json_object
            if action.help is None and action.nargs != 0:
                action.help = "(default: %(default)s)"

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")

    def describe_default(self, path: Path, unless: Sequence[str], keeps: Sequence[Sequence[str]]) -> None:
        """Adds the values that hold without --config to --help."""
        self.description += f" Without --config, those of {path.name} are"
        if unless:
            options = " or ".join(f"--{name}" for name in unless)
            kept = ", ".join(key for group in keeps for key in group)
            self.description += f"; with {options} {f'its {kept} alone' if kept else 'none of them'}"
        self.description += "."

    def set_config(self, path: str | Path, keys: Collection[str] | None = None) -> None:
        """Makes the values of a YAML file, or of some of its keys, the defaults."""
        actions = {action.dest: action for action in self._actions}
        for key, (value, file) in read_config(Path(path)).items():
            if key in _RECORDED or (keys is not None and key not in keys):
                continue
            if key not in self.type_hints:
                raise ConfigError(f"{file}: unknown key {key!r}{suggest(str(key), self.type_hints)}")
            value = check_value(value, self.type_hints[key], actions[key].choices, f"{file}: {key}")
            self.set_defaults(**{key: value})
            actions[key].required = False

    def parse_into_dataclasses(self, args: list[str]) -> tuple[Any, ...]:
        # HfArgumentParser.parse_args_into_dataclasses reads a file `<script>.args` unasked, and constructs the dataclasses
        # (seconds for TrainingArguments) before it looks for unknown arguments.
        namespace, unknown = self.parse_known_args(args)
        if options := [token.split("=", 1)[0] for token in unknown if token.startswith("-")]:
            self.error(f"unknown argument {options[0]}{suggest(options[0], self._option_string_actions)}")
        if unknown:
            self.error(f"unexpected value {unknown[0]!r}: it follows no argument that takes it")
        for name in self.type_hints:
            if fault := find_fault(getattr(namespace, name)):
                self.error(f"argument --{name}: {fault}")
        return tuple(self._build(cls, vars(namespace)) for cls in self.dataclass_types)

    def _build(self, cls: type, namespace: dict[str, Any]) -> Any:
        """Constructs a dataclass. An error that its values raise becomes a message that names an argument."""
        fields = [field for field in dataclasses.fields(cls) if field.init]
        values = {field.name: namespace[field.name] for field in fields}
        try:
            return cls(**values)
        except Exception as error:
            message = " ".join(str(error).split())
            defaults = {
                field.name: _get_default(field) for field in fields if _get_default(field) is not dataclasses.MISSING
            }
            given = {name: default for name, default in defaults.items() if values[name] != default}
            if not isinstance(error, ValueError):
                if _raises(cls, values | given):  # the defaults raise it, too: it is a bug
                    raise
                message = f"{type(error).__name__}: {message}"
            elif any(re.search(rf"\b{name}\b", message) for name in values if name in given or name not in defaults):
                self.error(message)
            # The error names no argument. So the message names each argument whose default alone would prevent the
            # error.
            blamed = [name for name, default in given.items() if not _raises(cls, values | {name: default})] or given
            self.error(f"{', '.join(f'{name}={values[name]!r:.60}' for name in blamed)}: {message}")


def _get_default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _raises(cls: type, values: dict[str, Any]) -> bool:
    try:
        cls(**values)
    except Exception:
        return True
    return False


def _read_type_hints(dataclass_types: list[type]) -> dict[str, Any]:
    """Reads the type of each field, and raises ValueError where two dataclasses have a field of one name."""
    type_hints, owners = {}, {}
    for cls in dataclass_types:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not field.init:
                continue
            if field.name in _RESERVED:
                raise ValueError(
                    f"{cls.__name__}.{field.name} takes the name of a key of the parser: rename the field"
                )
            if field.name in owners:
                raise ValueError(
                    f"{owners[field.name].__name__} and {cls.__name__} both have a field {field.name!r}, and one "
                    "argument cannot set both: rename one"
                )
            type_hints[field.name], owners[field.name] = hints[field.name], cls
    return type_hints


def _read_options(prog: str, args: list[str]) -> tuple[str | None, dict[str, str]]:
    """Reads the file of --config, and each field that the command line sets with the text that follows it."""
    # _Parser would exit for missing required arguments, which may be in the YAML.
    parser = ArgumentParser(prog=prog, usage=SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    config = parser.parse_known_args(args)[0].config
    given = {}
    for token, following in zip(args, [*args, ""][1:], strict=True):
        if token.startswith("--"):
            option, _, value = token.partition("=")
            given[option.lstrip("-").replace("-", "_")] = value or following
    return config, given


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_make_dict)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"expected a mapping in JSON such as '{{\"a\": 1}}', got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"expected a mapping in JSON such as '{{\"a\": 1}}', got {text!r}")
    return value


def _make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for i, (key, _) in enumerate(pairs):
        if any(key == other for other, _ in pairs[:i]):
            raise ValueError(f"the key {key!r} occurs twice: keep one")
    return dict(pairs)
