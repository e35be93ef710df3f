"""Reads the command line of a run, for its model card."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..hub.model_card.text import plain_name


def launch_line(argv: Sequence[str] | None = None) -> str | None:
    """Returns the command that started this process, without paths and tokens; None in a notebook or an interpreter.

    The options of `accelerate launch` are read from the environment variables that it sets: number of processes and machines,
    and mixed precision. Options whose name ends in `token` are omitted.

    Args:
        argv: script and arguments; None uses this process's.
    """
    if argv is None:
        # In a notebook, __main__ has no file. In a tool (`pytest`, `python -m ...`), its file is not the user's script.
        argv = [getattr(sys.modules["__main__"], "__file__", None) or "", *sys.argv[1:]]
    script = Path(argv[0])
    if script.suffix != ".py" or script.name == "__main__.py":
        return None
    is_recipe = script.parent.name == "recipes"
    words = ["recipes/" + script.name if is_recipe else plain_name(script.absolute())]
    arguments = iter(argv[1:])
    for word in arguments:
        option, equals, _ = word.partition("=")
        if option.startswith("--") and option.lower().endswith("token"):
            if not equals:
                next(arguments, None)
        else:
            words.append(plain_name(word))
    return " ".join([*_launcher(is_recipe, on_cpu="--use_cpu" in " ".join(argv)), shlex.join(words)])


def _launcher(is_recipe: bool, on_cpu: bool) -> list[str]:
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    num_machines = num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    machines = [] if num_machines < 2 else ["--nnodes", str(num_machines)]
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and not is_recipe:
        if num_processes == 1:
            return ["python"]
        return ["torchrun", *machines, "--nproc_per_node", str(num_processes // max(1, num_machines))]
    words = ["accelerate", "launch"]
    if is_recipe and num_processes > 1:
        # A recipe that was started with torchrun can be started in this way, too.
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        name = "fsdp2" if sharded else "cpu" if on_cpu else "two_machines" if machines else "eight_gpus"
        words += ["--config_file", f"recipes/accelerate/{name}.yaml"]
    elif num_processes > 1:
        words.append("--multi_gpu")
    if num_processes > 1:
        words += ["--num_processes", str(num_processes)]
    if machines:
        words += ["--num_machines", str(num_machines), "--main_process_ip", "IP", "--machine_rank", "0"]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return words if precision == "no" else [*words, "--mixed_precision", precision]
