"""Checks a command line's options and their values before PyTorch and transformers are imported, which takes seconds.

Names, types and choices are read from the source of the dataclasses and of the commands. Where they cannot be read for
certain, this check passes, and the parser of the command decides.
"""

import argparse
import ast
import functools
import gc
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import suggest

_PACKAGE = Path(__file__).parents[1]
# Dataclass -> the package and the file that define it, in the order of inheritance.
_TRAINING = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "DistillationTrainingArguments": ("nkd_hf", "trainer/arguments.py"),
}
RECIPE = _TRAINING | {
    "RecipeArguments": ("nkd_hf", "recipe/arguments.py"),
    "DataArguments": ("nkd_hf", "data/arguments.py"),
}
PLAN = RECIPE | {"PlanArguments": ("nkd_hf", "cli/plan.py")}
DISTILL = RECIPE | {"ExportArguments": ("nkd_hf", "recipe/distill.py")}
# Enum or constant with the choices of a field -> the package and the file that define it, if the field's own file does
# not.
_CHOICES = dict.fromkeys(
    ("IntervalStrategy", "SaveStrategy", "HubStrategy", "SchedulerType"), ("transformers", "trainer_utils.py")
)
_CHOICES |= {
    "OptimizerNames": ("transformers", "training_args.py"),
    "SCHEDULES": ("nkd_hf", "trainer/optimization.py"),
}


def start_recipe() -> None:
    """Starts the script of a recipe: refuses an unknown option at once, then prints a message and loads the libraries.

    Call it before the first use of another name of this package, which imports PyTorch and transformers.

    Raises:
        SystemExit: with code 2, after a message on stderr, for an option that no recipe has.

    Example:

    ```python
    >>> import nkd_hf
    >>> nkd_hf.start_recipe()  # doctest: +SKIP

    ```
    """
    prog = os.path.basename(sys.argv[0])
    check_options(prog, sys.argv[1:], read_fields(RECIPE))
    check_values(prog, sys.argv[1:], RECIPE)
    load(prog, "nkd_hf.recipe.recipe")


def load(prog: str, module: str) -> ModuleType:
    """Imports a module. If PyTorch is not loaded yet, the first process of a run prints a message on stderr first.

    Almost all objects of these imports stay until the end of the process, so the garbage collector ignores them. To
    scan a million objects would take a fifth of the imports' time, and a quarter of a second at the start of each
    training.
    """
    if "torch" in sys.modules:
        return importlib.import_module(module)
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: loading PyTorch and transformers ...", file=sys.stderr, flush=True)
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def check_options(prog: str, args: Sequence[str], known: set[str] | None) -> None:
    """Ends the process if a command line has an unknown option.

    Args:
        prog: the command, for the message.
        args: the command line.
        known: the options; None checks nothing.

    Raises:
        SystemExit: with code 2, after the message of the full parser on stderr.
    """
    if known is None or not {"-h", "--help"}.isdisjoint(args):
        return
    for token in args:
        if token == "--":
            return
        option = token.partition("=")[0]
        # argparse reads a token with a space as a value.
        if option.startswith("--") and " " not in token and option not in known:
            hint = suggest(option, known)
            print(f"{prog}: error: unknown argument {option}{hint} (--help lists the arguments)", file=sys.stderr)
            sys.exit(2)


def check_values(prog: str, args: Sequence[str], classes: dict[str, tuple[str, str]], file: str | None = None) -> None:
    """Ends the process if an option for a number, a bool or a choice has a value of another kind, or a required one is missing.

    The full parser checks options of other types, and options whose definition cannot be read for certain.

    Args:
        prog: the command, for the message.
        args: the command line, whose options are known.
        classes: dataclass -> the package and the file that define it.
        file: of `nkd_hf/cli`, whose options are checked, too. A field of the same name is another option, and ignored.

    Raises:
        SystemExit: with code 2, after the message of the full parser on stderr.
    """
    if not {"-h", "--help"}.isdisjoint(args):
        return
    parser = _ValueParser(prog=prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    for call in _find_options(_parse("nkd_hf", f"cli/{file}") if file else None):
        _add_option(parser, call)
    own = (read_command(file) if file else None) or ()
    for node, tree in _read_definitions(classes) or ():
        if f"--{node.target.id}" not in own:
            _add_field(parser, node, tree)
    if classes:
        parser.add_argument("--config")
    parser.parse_known_args(args)


class _ValueParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")


def _add_option(parser: argparse.ArgumentParser, call: ast.Call) -> None:
    """Adds the option of a call of `add_argument`; with any values, if a setting of the call is no literal."""
    settings: dict[str, Any] = {}
    try:
        for word in call.keywords:
            if word.arg == "type":
                settings["type"] = _TYPES[ast.unparse(word.value)]
            elif word.arg not in ("help", "default"):
                settings[word.arg] = ast.literal_eval(word.value)
        parser.add_argument(*map(ast.literal_eval, call.args), **settings)
    except (KeyError, TypeError, ValueError):
        parser.add_argument(*map(ast.literal_eval, call.args), nargs="*")


def _add_field(parser: argparse.ArgumentParser, node: ast.AnnAssign, tree: ast.Module) -> None:
    """Adds the option of a simple field as `HfArgumentParser` does, or an option with any values for another field."""
    name, default = node.target.id, _read_default(node.value)
    options = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    annotation = ast.unparse(node.annotation)
    base, takes_none = annotation.removesuffix(" | None"), annotation.endswith(" | None")
    metadata = next((word.value for word in getattr(node.value, "keywords", ()) if word.arg == "metadata"), None)
    keys = metadata.keys if isinstance(metadata, ast.Dict) else []
    entries = {ast.literal_eval(key): value for key, value in zip(keys, getattr(metadata, "values", []), strict=True)}
    settings: dict[str, Any] = {"nargs": "*"}
    if annotation.removesuffix(" | str") in _CHOICES and not entries.keys() - {"help"}:
        settings = {"type": str, "choices": _read_named(annotation.removesuffix(" | str"), tree)}
    elif base in _TYPES and not entries.keys() - {"help", "choices"}:
        settings = {"type": _TYPES[base], "choices": _read_choices(entries.get("choices"), tree)}
        if base == "bool" and (not takes_none or default not in ("", "None")):
            settings |= {"nargs": "?", "const": True}
    parser.add_argument(*options, dest=name, **settings)
    if base == "bool" and default == "True":
        parser.add_argument(f"--no_{name}", f"--no-{name.replace('_', '-')}", dest=name, action="store_false")


def _read_bool(text: str) -> bool:
    # The values and the message are those of transformers.hf_argparser.string_to_bool.
    if text.lower() not in _BOOLS:
        raise argparse.ArgumentTypeError(
            f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
        )
    return text.lower() in _BOOLS[:5]


_BOOLS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")
_TYPES = {"int": int, "float": float, "bool": _read_bool, "str": str}


def _read_choices(node: ast.expr | None, tree: ast.Module) -> list[str] | None:
    """Reads choices: a list of literals, `list(NAME)`, the values of an enum, or a sum of these; None for others."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _read_choices(node.left, tree), _read_choices(node.right, tree)
        return None if left is None or right is None else left + right
    if node is not None and (named := _NAMED.fullmatch(ast.unparse(node))):
        return _read_named(named[1] or named[3], tree)
    return _read_literals(node)


_NAMED = re.compile(r"list\((\w+)\)|\[(\w+)\.value for \2 in (\w+)\]")


def _read_named(name: str, tree: ast.Module) -> list[str] | None:
    """Reads the literals of a constant, the keys of a dict or the values of an enum; None where they are uncertain."""
    if name in _CHOICES:
        tree = _parse(*_CHOICES[name])
    for node in tree.body if tree else []:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _read_enum(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            value = node.value
            return _read_literals(ast.List(value.keys) if isinstance(value, ast.Dict) else value)
    return None


def _read_enum(node: ast.ClassDef) -> list[str] | None:
    """Reads the values of an enum that has only texts and a docstring; None for others."""
    values = []
    for member in node.body[ast.get_docstring(node) is not None :]:
        is_value = isinstance(member, ast.Assign) and isinstance(member.value, ast.Constant)
        if not is_value or not isinstance(member.value.value, str):
            return None
        values.append(member.value.value)
    is_plain = [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"] and not node.decorator_list
    return values if is_plain and values else None


def _read_literals(node: ast.expr | None) -> list[str] | None:
    try:
        return None if node is None else list(ast.literal_eval(node))
    except (TypeError, ValueError):
        return None


def read_fields(classes: dict[str, tuple[str, str]]) -> set[str] | None:
    """Reads the options that `HfArgumentParser` makes of dataclasses, with `--config`; None where they are uncertain.

    Args:
        classes: dataclass -> the package and the file that define it.
    """
    definitions = _read_definitions(classes)
    if definitions is None:
        return None
    names = [node.target.id for node, _ in definitions]
    # HfArgumentParser adds `--no_NAME` for a bool that is true by default.
    names += [
        f"no_{node.target.id}"
        for node, _ in definitions
        if "bool" in ast.unparse(node.annotation) and _read_default(node.value) == "True"
    ]
    options = {f"--{name}" for name in names}
    return options | {f"--{name.replace('_', '-')}" for name in names} | {"-h", "--help", "--config"}


def _read_definitions(classes: dict[str, tuple[str, str]]) -> list[tuple[ast.AnnAssign, ast.Module]] | None:
    """Reads the definitions of the fields of dataclasses, each with its file; None where they are uncertain."""
    definitions: dict[str, tuple[ast.AnnAssign, ast.Module]] = {}
    for name, (package, file) in classes.items():
        tree = _parse(package, file)
        found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name] if tree else []
        if len(found) != 1 or any(ast.unparse(base) not in classes for base in found[0].bases):
            return None
        for node in found[0].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                definition = ast.unparse(node)
                if "aliases" in definition or "init=" in definition or "ClassVar" in definition:
                    return None
                definitions[node.target.id] = node, tree
    return [*definitions.values()]


def read_command(file: str) -> set[str] | None:
    """Reads the options that a file of `nkd_hf/cli` passes to argparse; None if one of them is no literal."""
    tree, options = _parse("nkd_hf", f"cli/{file}"), {"-h", "--help"}
    for call in _find_options(tree):
        if not all(isinstance(argument, ast.Constant) for argument in call.args):
            return None
        options |= {argument.value for argument in call.args}
    return options if tree else None


def _find_options(tree: ast.Module | None) -> list[ast.Call]:
    """Finds the calls of `add_argument` in a file."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree else []
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]


def _read_default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    return "" if value is None else ast.unparse(value)


def _parse(package: str, file: str) -> ast.Module | None:
    folder = _PACKAGE
    if package != "nkd_hf":
        spec = importlib.util.find_spec(package)  # find_spec does not import the package
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
    try:
        return _parse_text((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, SystemError):  # Python 3.11 may raise SystemError deep in a stack
        return None


_parse_text = functools.cache(ast.parse)  # check_options and check_values read the same files
