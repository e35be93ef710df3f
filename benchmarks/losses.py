"""Time and peak memory of the losses: `python benchmarks/losses.py`.

Every row is one forward + backward from logits [B, C] in float32 with class indices (the sort: one call):

- cross-entropy: `F.cross_entropy`, the floor of any loss on logits, and so the measure for NKD.
- NKD, literal: `nkd_reference` of tests/losses_reference.py: the paper's formula with boolean masks, in plain autograd.
- NKD: `nkd_hf.losses.nkd_loss`, teacher logits given.
- sort: `torch.sort` of the rank [B, C] that USKD has to sort, and so the measure for USKD.
- USKD, literal: `uskd_reference`: boolean masks, one-hot labels and a double argsort, in plain autograd.
- USKD: `nkd_hf.losses.uskd_loss`, the auxiliary head's logits given.

Time: the rows take turns, once a round, in one process; in its turn a row repeats for about 20 ms. Its ms is the median
of the rounds. A ratio is taken within each round, between neighbours in time, and its median shown. With one thread, the
default, the clock is the process's CPU time, so that the ratios hold on a busy machine; with more it is the wall clock,
and on a busy machine the figures then tell how long PyTorch's threads wait for each other.

Memory: the allocations and frees that PyTorch's CPU allocator reports to `torch.profiler`, added up in order; the peak
is above what is allocated before the call, counts the gradients that the call makes, and sees a kernel's own buffers as
far as they come from that allocator. It doesn't vary. `matrices` is the peak in units of one [B, C] float32 matrix.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs each start and stop otherwise; read at its import
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.nn.functional as F
from losses_reference import nkd_reference, uskd_reference
from torch.profiler import ProfilerActivity, profile

from nkd_hf.losses import nkd_loss, uskd_loss

# row, the row it is held against, what is bounded, the bound
BOUNDS = [
    ("NKD", "NKD, literal", "speed-up at least", 3.0),
    ("NKD", "cross-entropy", "cost at most", 4.0),
    ("USKD", "USKD, literal", "speed-up at least", 2.0),
    ("USKD", "sort", "cost at most", 1.5),
]
WINDOW_MS = 20


def make_rows(batch_size: int, num_classes: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_classes)
    student_logits = (3 * torch.randn(shape, generator=generator)).requires_grad_()
    mid_logits = torch.randn(shape, generator=generator).requires_grad_()
    teacher_logits = 3 * torch.randn(shape, generator=generator)
    labels = torch.randint(num_classes, (batch_size,), generator=generator)
    with torch.no_grad():
        target = labels[:, None]
        mid_prob, log_prob = mid_logits.softmax(1), student_logits.log_softmax(1)
        rank = mid_prob / (1 - mid_prob.gather(1, target) + 1e-6) + log_prob / (1 - log_prob.gather(1, target) + 1e-6)

    def step(loss_function: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss_function(), inputs)

    return {
        "cross-entropy": step(lambda: F.cross_entropy(student_logits, labels), student_logits),
        "NKD, literal": step(lambda: sum(nkd_reference(student_logits, teacher_logits, labels)), student_logits),
        "NKD": step(lambda: nkd_loss(student_logits, teacher_logits, labels), student_logits),
        "sort": lambda: torch.sort(rank, dim=-1, descending=True),
        "USKD, literal": step(
            lambda: sum(uskd_reference(mid_logits, student_logits, labels)), student_logits, mid_logits
        ),
        "USKD": step(lambda: uskd_loss(mid_logits, student_logits, labels), student_logits, mid_logits),
    }


def measure_times(rows: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one call, by row and round."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = dict.fromkeys(rows, 1)
    times = {name: [] for name in rows}
    for round_index in range(-2, rounds):  # two rounds to warm up and to learn how often 20 ms hold a call
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


def measure_peak(run: Callable[[], object]) -> int:
    """Peak bytes above those allocated before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        current += change.nbytes()
        peak = max(peak, current)
    return peak


def ratio(times: dict[str, list[float]], row: str, measure: str) -> float:
    return statistics.median(a / b for a, b in zip(times[row], times[measure], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of the losses, forward + backward, on the CPU.")
    parser.add_argument("--batch", type=int, default=256, help="B (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="C (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # glibc keeps freed memory in the process once a large block has been freed, as in any training step; before that it
    # gives small matrices back to the kernel over and over, and the table would measure page faults
    torch.empty(24 * 2**20, dtype=torch.uint8)

    rows = make_rows(args.batch, args.classes)
    times = measure_times(rows, args.rounds)
    matrix_bytes = 4 * args.batch * args.classes
    table = {}
    for name, run in rows.items():
        peak = measure_peak(run)
        table[name] = {
            "ms": statistics.median(times[name]),
            "x_cross_entropy": ratio(times, name, "cross-entropy"),
            "x_sort": ratio(times, name, "sort"),
            "peak_mb": peak / 1e6,
            "peak_matrices": peak / matrix_bytes,
        }
    bounds = []
    for row, measure, kind, bound in BOUNDS:
        faster = kind.startswith("speed-up")
        value = ratio(times, measure, row) if faster else ratio(times, row, measure)
        met = value >= bound if faster else value <= bound
        bounds.append({"row": row, "measure": measure, "kind": kind, "bound": bound, "value": value, "met": met})

    clock = "CPU time" if args.threads == 1 else "wall clock"
    print(f"\nforward + backward, [{args.batch}, {args.classes}] float32, threads: {args.threads}, {clock}, ", end="")
    print(f"median of {args.rounds} rounds, torch {torch.__version__}\n")
    print(f"{'':15}{'ms':>9}{'x cross-entropy':>17}{'x sort':>9}{'peak MB':>10}{'matrices':>10}")
    for name, figures in table.items():
        print(
            f"{name:15}{figures['ms']:9.2f}{figures['x_cross_entropy']:17.2f}{figures['x_sort']:9.2f}"
            f"{figures['peak_mb']:10.2f}{figures['peak_matrices']:10.1f}"
        )
    print()
    for check in bounds:
        verdict = "met" if check["met"] else "NOT MET"
        against = f"{check['row']} against {check['measure']}"
        print(f"{against:28}{check['kind']:>18} {check['bound']:.1f}x, measured {check['value']:.2f}x: {verdict}")

    if args.json:
        settings = {"batch": args.batch, "classes": args.classes, "rounds": args.rounds, "threads": args.threads}
        args.json.write_text(json.dumps({**settings, "rows": table, "bounds": bounds}, indent=2) + "\n")
        print(f"\nwrote {args.json}")


if __name__ == "__main__":
    main()
