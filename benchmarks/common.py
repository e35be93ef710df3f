"""What the benchmarks share: options, a clock, memory, and a report that is printed and written as JSON."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs each start and stop otherwise; read at its import
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of memory that is older than the profile
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import importlib.metadata
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from scipy.stats import quantile_test
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nkd_hf.files import write_whole

WINDOW_MS = 20
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "datasets", "pillow", "numpy", "scikit-learn")


def make_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="measured turns of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line, and sets this process up for measuring."""
    import transformers

    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return options


def keep_freed_memory() -> None:
    # glibc keeps freed memory in the process once a large block has been freed, as in any training step; before that it
    # gives small matrices back to the kernel over and over, and a table would measure page faults
    torch.empty(24 * 2**20, dtype=torch.uint8)


def make_clock(device: str) -> Callable[[], float]:
    """Seconds: on a GPU, of the wall clock, when its work is done; on the CPU, of the process if it has one thread.

    Other programs on the machine do not count in a process's CPU time; but PyTorch's threads wait for each other there.
    """
    if torch.device(device).type == "cuda":

        def read() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return read
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def clock_name(options: argparse.Namespace) -> str:
    return "CPU time" if options.device == "cpu" and options.threads == 1 else "wall clock"


def measure_times(
    rows: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float], warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of one call, by row and round; the rows take turns, and one repeats for about 20 ms in its turn."""
    repeats = dict.fromkeys(rows, 1)
    times = {name: [] for name in rows}
    for round_index in range(-warmup, rounds):  # to warm up, to compile and to learn how often 20 ms hold a call
        for name, run in rows.items():
            start = clock()
            for _ in range(repeats[name]):
                run()
            elapsed_ms = 1e3 * (clock() - start) / repeats[name]
            if round_index < 0:
                repeats[name] = max(1, round(WINDOW_MS / elapsed_ms))
            else:
                times[name].append(elapsed_ms)
    return times


def ratio(values: Iterable[float], others: Iterable[float]) -> tuple[float, float, float]:
    """Median of the ratios within each round, and its 95% interval; below six rounds, which have none, their range.

    The interval is that of the sign test, from order statistics: it asks nothing of the ratios' distribution.
    """
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    low, high = quantile_test(ratios, p=0.5).confidence_interval() if len(ratios) > 5 else (min(ratios), max(ratios))
    return statistics.median(ratios), float(low), float(high)


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, pair by pair, and its standard error."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return statistics.mean(differences), error


def measure_memory(run: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """Bytes above those allocated before the call: at its peak, and at its end.

    On the CPU, the allocations and frees that PyTorch's allocator reports to `torch.profiler`, added up in order; on a
    GPU, those of its caching allocator.
    """
    gc.collect()  # or garbage of before would be freed in between
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        current += change.nbytes()
        peak = max(peak, current)
    return peak, current


def measure_peak(run: Callable[[], object], device: str = "cpu") -> int:
    """Peak bytes above those allocated before the call."""
    return measure_memory(run, device)[0]


def measure_device_ms(run: Callable[[], object], device: str) -> float | None:
    """Milliseconds that a GPU's kernels take in one call, without their launch from the host; None on the CPU."""
    if torch.device(device).type == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    kernels = [event for event in profiler.events() if event.device_type != DeviceType.CPU]
    return sum(event.time_range.elapsed_us() for event in kernels) / 1e3


def show_ms(ms: float) -> str:
    """With two decimals, below a millisecond with three."""
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def describe_machine() -> dict[str, object]:
    """Where the figures come from."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory_kb = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory_kb[0] / 1e6) if memory_kb else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


class Report:
    """Prints tables and aims, and writes them with the raw figures; tables.py makes a page of that."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        command = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        if "--json" in command:
            place = command.index("--json")
            del command[place : place + 2]
        self.result = {
            "command": shlex.join(command), "clock": clock_name(options), "settings": settings,
            "machine": describe_machine(), "tables": [], "aims": [], "raw": {},
        }  # fmt: skip

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Prints a table of texts, of which the first column is the rows' names."""
        self.result["tables"].append({"title": title, "columns": columns, "rows": rows})
        widths = [max(map(len, column)) + 2 for column in zip(columns, *rows, strict=True)]
        print(f"\n{title}\n")
        for first, *others in [columns, *rows]:
            cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            print(f"{first:{widths[0]}}{''.join(cells)}", flush=True)

    def aim(
        self,
        what: str,
        value: float,
        bound: float,
        *,
        at_least: bool = False,
        spread: tuple[float, float] | None = None,
    ) -> None:
        """Judges a figure, with the interval of [`ratio`]."""
        met = value >= bound if at_least else value <= bound
        aim = {"what": what, "value": value, "bound": bound, "at_least": at_least, "spread": spread, "met": met}
        self.result["aims"].append(aim)
        print(f"\n{describe_aim(aim)}", flush=True)

    def write(self, is_partial: bool = False) -> None:
        """Writes the file of `--json`; `is_partial` if more follows, so that what stops the script leaves what is done."""
        if self.options.json:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            result = self.result | ({"is_partial": True} if is_partial else {})
            write_whole(self.options.json, json.dumps(result, indent=1, default=str) + "\n")
            if not is_partial:
                print(f"\nwrote {self.options.json}")


def describe_aim(aim: dict) -> str:
    spread = "" if aim["spread"] is None else " ({:.3f} to {:.3f})".format(*aim["spread"])
    verdict = "met" if aim["met"] else "NOT MET"
    if aim["spread"] is not None and aim["spread"][0] <= aim["bound"] <= aim["spread"][1]:
        verdict = "within noise"  # the bound lies in the interval
    kind = "at least" if aim["at_least"] else "at most"
    return f"{aim['what']}: {aim['value']:.4g}{spread}, aim {kind} {aim['bound']:g}: {verdict}"
