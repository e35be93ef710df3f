"""Measures on a GPU what benchmarks/README.md has of the CPU: `make bench-gpu`, in less than six minutes.

Each part is one of the scripts in benchmarks/, in a process of its own, with sizes for a GPU; it writes
benchmarks/results/PART-gpu.json, of which `python benchmarks/tables.py` makes tables. The first parts matter most. One that
does not fit into the time that is left is stopped, and its name stands at the end. Its file has the tables that were done, and
says so; a part without any keeps its earlier file.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
SECONDS = 350
# By the name of the file: the script with its arguments, and the seconds that it may take.
PARTS = {
    "step": ("step.py --batch 256 --bf16 --rounds 15", 90),
    "throughput": ("throughput.py --bf16", 90),
    "losses": ("losses.py --mode eager --rounds 7", 60),
    "loss_costs": ("loss_costs.py --step_batch 256 --rounds 7", 30),
    "memory": ("memory.py --batch 16 256 --bf16", 60),
    "scale": ("scale.py --batch 256 --bf16 --rounds 10 --repeats 1", 60),
    "teacher": ("teacher.py --batch 256 --rounds 7 --no_compile", 60),
    "teacher_store": ("teacher_store.py --pair 'deit3_small -> deit_tiny' --bf16 --rounds 10", 60),
    "losses_compiled": ("losses.py --batch 256 --classes 1000 --dtype float32 --mode compiled --rounds 7", 90),
    "teacher_compiled": ("teacher.py --pair 'deit_small -> deit_tiny' --batch 256 --rounds 7", 90),
}
# Arguments with which the same parts take seconds on a CPU.
TINY = {
    "step": "--pair 'resnet34 -> resnet18' --batch 2 --rounds 1",
    "throughput": "--rounds 1 --warmup 1 --batch 2 --classes 2 --size 32 --workers 0",
    "losses": "--mode eager --dtype float32 --batch 4 --classes 10 --rounds 1",
    "loss_costs": "--batch 4 --classes 10 --step_batch 1 --rounds 1",
    "memory": "--pair 'resnet34 -> resnet18' --batch 4 --classes 10",
    "scale": "--batch 2 --classes 10 --size 32 --rounds 1 --repeats 1",
    "teacher": "--pair 'resnet34 -> resnet18' --batch 1 --rounds 1 --no_compile",
    "teacher_store": "--pair 'deit3_small -> deit_tiny' --batch 2 --top_k 10 --rounds 1",
    "losses_compiled": "--mode compiled --batch 4 --classes 10 --dtype float32 --rounds 1",
    "teacher_compiled": "--pair 'deit_small -> deit_tiny' --batch 1 --rounds 1",
}


def run(script: Path, arguments: list[str], seconds: float) -> str | None:
    """Runs a script of benchmarks/, and says what went wrong, or None."""
    process = subprocess.Popen([sys.executable, script, *arguments], start_new_session=True)
    try:
        code = process.wait(seconds)
    except BaseException as error:  # with the processes that it has started, or they would keep the GPU
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return f"stopped after {seconds:.0f} s"
        raise
    return f"exit code {code}" if code else None


def measure(
    results: Path, device: str, only: list[str], run: Callable[[Path, list[str], float], str | None] = run
) -> list[str]:
    """Runs the parts one after the other, and returns what went wrong, by part."""
    start, faults = time.monotonic(), []
    for part in only:
        command, limit = PARTS[part]
        script, *arguments = shlex.split(command)
        if device == "cpu":
            arguments = shlex.split(TINY[part])
        began = time.monotonic()
        left = SECONDS - (began - start)
        print(f"\n== {part}: {script} {shlex.join(arguments)}", flush=True)
        file = results / f"{part}-gpu.json"
        fault = (
            "no time is left"
            if left < 20
            else run(BENCHMARKS / script, [*arguments, "--device", device, "--json", str(file)], min(limit, left))
        )
        if fault:
            faults.append(f"{part}: {fault}")
        print(f"== {part}: {fault or 'done'}, {time.monotonic() - began:.0f} s", flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts, in this order: all")
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results", help="folder of the files")
    parser.add_argument("--device", default="cuda", help="cpu: with tiny sizes, to try the scripts (default: cuda)")
    options = parser.parse_args()
    faults = measure(options.results, options.device, options.only)
    if faults:
        sys.exit("not measured: " + "; ".join(faults))


if __name__ == "__main__":
    main()
