"""Runs the command line: `nkd-hf COMMAND ...`, or `python -m nkd_hf.cli COMMAND ...`."""

import functools
import sys

from .. import __version__
from ..errors import one_line_errors, suggest
from .options import DISTILL, PLAN, RECIPE, check_options, check_values, load, read_command, read_fields

# Command -> the module whose `main` runs it, and its purpose. The module is imported when the command is called.
_COMMANDS = {
    "distill": ("distill", "own images and a pretrained teacher become a small model, its ONNX files and a report"),
    "plan": ("plan", "what a recipe would do, and what it costs, without doing it"),
    "evaluate": ("evaluate", "top-1, top-5 and throughput of a model on a dataset's split"),
    "export": ("export", "the plain student out of a training checkpoint; ONNX and int8 of a saved one"),
    "push": ("push", "puts a saved student on the Hub"),
    "teacher-logits": ("teacher_logits", "runs the teacher ahead of time, for training that reads its logits"),
    "convert": ("convert", "an official checkpoint of cls_KD becomes a transformers folder"),
}

# The commands whose options are all fields of dataclasses, and the command that has a recipe's options beside its own.
_FIELDS = {"plan": PLAN, "distill": DISTILL}
_STORE = "teacher-logits"
# A shell reports this exit code for a process that Ctrl-C has ended.
_INTERRUPTED = 130


def main(args: list[str] | None = None) -> None:
    """Runs a command.

    Wrong input ends in one line, without a traceback (see [`~nkd_hf.errors.one_line_errors`]).

    Args:
        args: the command and its arguments; None means `sys.argv[1:]`.

    Raises:
        SystemExit: with code 2, after a message on stderr, for an unknown command or wrong input; with 130 after Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    command = f" {args[0]}" if args and args[0] in _COMMANDS else ""
    try:
        with one_line_errors(f"nkd-hf{command}: ", code=2):
            _run(args)
    except KeyboardInterrupt:
        hint = ": the same command continues from the last checkpoint" if command == " distill" else ""
        print(f"nkd-hf{command}: interrupted{hint}", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print("usage: nkd-hf COMMAND [--NAME VALUE ...]\n")
        print("\n".join(f"  {name:14} {purpose}" for name, (_, purpose) in _COMMANDS.items()))
        print("\n`nkd-hf COMMAND --help` lists the arguments of a command, `nkd-hf --version` says the version.")
        return
    if args[0] == "--version":
        print(f"nkd_hf {__version__}")
        return
    command, *args = args
    if command not in _COMMANDS:
        hint = suggest(command, _COMMANDS)
        _exit(f"nkd-hf: error: unknown command {command!r}{hint} (nkd-hf --help lists the commands)")
    check_options(f"nkd-hf {command}", args, _known_options(command))
    if command in _FIELDS:
        check_values(f"nkd-hf {command}", args, _FIELDS[command])
    elif _known_options(command) is not None:
        check_values(f"nkd-hf {command}", args, RECIPE if command == _STORE else {}, f"{_COMMANDS[command][0]}.py")
    load(f"nkd-hf {command}", f"nkd_hf.cli.{_COMMANDS[command][0]}").main(args)


@functools.cache  # a process may call `main` again
def _known_options(command: str) -> set[str] | None:
    """Reads the options of a command without importing it; None where they are uncertain."""
    if command in _FIELDS:
        return read_fields(_FIELDS[command])
    options = read_command(f"{_COMMANDS[command][0]}.py")
    if command != _STORE or options is None:
        return options
    recipe = read_fields(RECIPE)
    return None if recipe is None else options | recipe


def _exit(message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(2)
