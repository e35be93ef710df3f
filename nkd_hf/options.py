"""Checks the names of a command line's options before PyTorch and transformers are imported, which takes seconds.

The names are read from the source of the dataclasses and of the commands. Where they cannot be read for certain, this check
passes, and the parser of the command decides.
"""

import ast
import difflib
import gc
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent
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


def start_recipe() -> None:
    """Starts the script of a recipe: refuses an unknown option at once, then says that libraries are loaded and loads them.

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
    load(prog, "nkd_hf.recipe.recipe")


def load(prog: str, module: str) -> ModuleType:
    """Imports a module; the first process of a run says on stderr that PyTorch and transformers are loaded, if they are not.

    Almost all that their imports make stays until the end of the process. Its garbage collector sees nothing of it: its looks
    through a million objects would take a fifth of the imports' time, and a quarter of a second at each training's start.
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


def suggest(name: str, names: Iterable[str]) -> str:
    """Names the nearest of some names in a message; an empty text if none is near.

    Example:

    ```python
    >>> suggest("gama", ["alpha", "gamma"])
    ": did you mean 'gamma'?"

    ```
    """
    names = list(names)
    # Of `dataset` and `dataset_config_name`, the first is nearer to `dataset_name`.
    shorter = sorted((known for known in names if name.startswith(f"{known}_")), key=len, reverse=True)
    near = difflib.get_close_matches
    matches = near(name, names, n=1, cutoff=0.8) or shorter or near(name, names, n=1)
    return f": did you mean {matches[0]!r}?" if matches else ""


def read_fields(classes: dict[str, tuple[str, str]]) -> set[str] | None:
    """Reads the options that `HfArgumentParser` makes of dataclasses, with `--config`; None where that is uncertain.

    Args:
        classes: dataclass -> the package and the file that define it.
    """
    defaults: dict[str, str] = {}
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
                is_bool = "bool" in ast.unparse(node.annotation)
                defaults[node.target.id] = _read_default(node.value) if is_bool else ""
    # HfArgumentParser adds `--no_NAME` for a bool that is true by default.
    names = [*defaults, *(f"no_{name}" for name, default in defaults.items() if default == "True")]
    options = {f"--{name}" for name in names}
    return options | {f"--{name.replace('_', '-')}" for name in names} | {"-h", "--help", "--config"}


def read_command(file: str) -> set[str] | None:
    """Reads the options that a file of `nkd_hf/cli` gives to argparse; None where one of them is no literal."""
    tree, options = _parse("nkd_hf", f"cli/{file}"), {"-h", "--help"}
    for node in ast.walk(tree) if tree else []:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            if not all(isinstance(argument, ast.Constant) for argument in node.args):
                return None
            options |= {argument.value for argument in node.args}
    return options if tree else None


def _read_default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):
        value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
    return "" if value is None else ast.unparse(value)


def _parse(package: str, file: str) -> ast.Module | None:
    folder = _PACKAGE
    if package != "nkd_hf":
        spec = importlib.util.find_spec(package)  # which does not import it
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(spec.submodule_search_locations[0])
    try:
        return ast.parse((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, SystemError):  # Python 3.11 may raise SystemError deep in a stack
        return None
