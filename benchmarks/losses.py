"""Time and peak memory of the losses: `python benchmarks/losses.py` (on the CPU about eight minutes; `--quick`: one).

Every row is one forward + backward from logits [B, C] with class indices (the sorts: one call), at each shape, in float32
and bfloat16, eager and through `torch.compile`:

- cross-entropy: `F.cross_entropy`, the floor of any loss on logits, and so the measure of all rows.
- task + NKD, apart: `F.cross_entropy` of the logits in float32, as the trainer takes it, beside `NKDLoss`; shared:
  `NKDLoss` with a `label_smoothing`, which returns both from one softmax. The same for USKD.
- literal (eager, float32 arithmetic): `nkd_reference` and `uskd_reference` of tests/helpers/losses_reference.py: the paper's
  formulas with boolean masks and a double argsort, in plain autograd.
- torch.sort: of USKD's rank [B, C], float32. packed sort: of the same, as USKD sorts it (always exact and stable).

Time: the rows take turns, once a round, in one process; in its turn a row repeats for about 20 ms. Its ms is the median
of the rounds. A ratio is taken within each round, between neighbours in time, and its median shown; in a compiled table
its cross-entropy is compiled too, and tables.py adds the ratio to the eager one, which is the floor. With one thread, the
default, the clock of the CPU is the process's CPU time, so that the ratios hold on a busy machine; with more it is the wall
clock, and on a busy machine the figures then tell how long PyTorch's threads wait for each other. On a GPU it is the wall
clock, when the work is done.

Memory: of PyTorch's allocator (see common.py). `extra` is the peak above what is allocated before the call (the logits and labels), less the gradients that the call returns, which
are as large as the logits; in units of one matrix of logits, of the logits' own dtype. It doesn't vary.

Floor: two reads of the logits and one write of the gradient, at the rate at which this process copies as much memory; on a
GPU at that of its memory. There the device ms stand beside the ms: what its kernels take without their launch from the host.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import common
import torch
import torch.nn.functional as F
from losses_reference import nkd_reference, uskd_reference

from nkd_hf.losses import NKDLoss, nkd_loss, uskd_loss
from nkd_hf.losses.uskd import _components as uskd_components
from nkd_hf.losses.uskd import _descending_order

SHAPES = [(32, 1000), (256, 1000), (1024, 1000), (256, 21841)]
# row: how many times cross-entropy it may cost eager and compiled (for USKD beside one sort), and how many
# matrices of logits it may take
BOUNDS = {"NKD": (3.0, 2.0, 2.0), "USKD": (6.0, 6.0, 4.0)}


def make_rows(
    batch_size: int, num_classes: int, dtype: torch.dtype, compiled: bool, device: str
) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_classes)
    student_logits = (3 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
    mid_logits = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    teacher_logits = (3 * torch.randn(shape, generator=generator)).to(device, dtype)
    labels = torch.randint(num_classes, (batch_size,), generator=generator).to(device)
    with torch.no_grad():
        target = labels[:, None]
        mid_prob, log_prob = (logits.float().softmax(1) for logits in (mid_logits, student_logits))
        log_prob.log_()
        rank = mid_prob / (1 - mid_prob.gather(1, target) + 1e-6) + log_prob / (1 - log_prob.gather(1, target) + 1e-6)

    def step(loss_function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        function = torch.compile(loss_function, fullgraph=True, dynamic=False) if compiled else loss_function
        return lambda: torch.autograd.grad(function(), inputs)

    def task() -> torch.Tensor:
        return F.cross_entropy(student_logits.float(), labels)

    both = student_logits, mid_logits
    nkd, uskd_weights = NKDLoss(), {"alpha": 1.0, "beta": 0.1, "mu": 0.005}
    rows = {
        "cross-entropy": step(lambda: F.cross_entropy(student_logits, labels), student_logits),
        "NKD": step(lambda: nkd_loss(student_logits, teacher_logits, labels), student_logits),
        "USKD": step(lambda: uskd_loss(mid_logits, student_logits, labels), *both),
        "packed sort": lambda: _descending_order(rank.clone()),
        "task + NKD, apart": step(
            lambda: task() + sum(nkd(student_logits, teacher_logits, labels).values()), student_logits
        ),
        "task + NKD, shared": step(
            lambda: sum(nkd(student_logits, teacher_logits, labels, label_smoothing=0.0).values()), student_logits
        ),
        "task + USKD, apart": step(lambda: task() + uskd_loss(mid_logits, student_logits, labels), *both),
        "task + USKD, shared": step(
            lambda: sum(uskd_components(mid_logits, student_logits, labels, **uskd_weights, label_smoothing=0.0)),
            *both,
        ),
        "torch.sort": lambda: torch.sort(rank, dim=-1, descending=True),
    }
    if not compiled:
        rows |= {
            "NKD, literal": step(
                lambda: sum(nkd_reference(student_logits.float(), teacher_logits.float(), labels)), student_logits
            ),
            "USKD, literal": step(
                lambda: sum(uskd_reference(mid_logits.float(), student_logits.float(), labels)), *both
            ),
        }
    return rows


def copy_rate(num_bytes: int, clock: Callable[[], float], device: str) -> float:
    """Bytes per ms that a copy of this many moves, reads and writes counted; on a GPU, of at least 512 MiB."""
    if device != "cpu":
        num_bytes = max(num_bytes, 2**29)  # far beyond a GPU's cache, and longer than the launch of a kernel
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    repeats = max(3, 2**28 // num_bytes)
    passes = []
    for _ in range(5):
        start = clock()
        for _ in range(repeats):
            target.copy_(source)
        passes.append(1e3 * (clock() - start) / repeats)
    return 2 * num_bytes / min(passes)


def measure(batch_size: int, num_classes: int, dtype: torch.dtype, compiled: bool, args: argparse.Namespace) -> dict:
    """One table: figures by row, and the bounds with what was measured."""
    torch.compiler.reset()
    clock = common.make_clock(args.device)
    rows = make_rows(batch_size, num_classes, dtype, compiled, args.device)
    times = common.measure_times(rows, args.rounds, clock)

    def cost(row: str, *others: str) -> float:
        """A row's time, less that of others in the same round, in units of cross-entropy."""
        table = (times[name] for name in (row, "cross-entropy", *others))
        return statistics.median((value - sum(rest)) / unit for value, unit, *rest in zip(*table, strict=True))

    matrix_bytes = batch_size * num_classes * dtype.itemsize
    floor_ms = 3 * matrix_bytes / copy_rate(matrix_bytes, clock, args.device)
    table = {}
    for name, run in rows.items():
        num_gradients = 0 if "sort" in name else 2 if "USKD" in name else 1
        table[name] = {
            "ms": statistics.median(times[name]),
            "x_cross_entropy": cost(name),
            "x_floor": statistics.median(times[name]) / floor_ms,
            "extra_matrices": common.measure_peak(run, args.device) / matrix_bytes - num_gradients,
            "device_ms": common.measure_device_ms(run, args.device),
        }
    bounds = []
    for row, (eager_bound, compiled_bound, memory_bound) in BOUNDS.items():
        bound = compiled_bound if compiled else eager_bound
        for sort in ("torch.sort", "packed sort") if row == "USKD" else (None,):
            value = cost(row, sort) if sort else cost(row)
            what = f"{row} less one {sort}" if sort else row
            bounds.append({"what": f"{what}, x cross-entropy", "bound": bound, "value": value})
        value = table[row]["extra_matrices"]
        bounds.append({"what": f"{row}, extra matrices of logits", "bound": memory_bound, "value": value})
    for check in bounds:
        # below a tenth of a matrix lie vectors of B and the kernels' own small buffers
        slack = 0.1 if "matrices" in check["what"] else 0
        check["met"] = check["value"] <= check["bound"] + slack
    setting = {"batch": batch_size, "classes": num_classes, "dtype": str(dtype).removeprefix("torch.")}
    return {
        **setting,
        "compiled": compiled,
        "rounds": args.rounds,
        "floor_ms": floor_ms,
        "rows": table,
        "bounds": bounds,
    }


def show(result: dict) -> None:
    mode = "compiled" if result["compiled"] else "eager"
    print(f"\n[{result['batch']}, {result['classes']}] {result['dtype']}, {mode}; floor {result['floor_ms']:.3f} ms\n")
    print(f"{'':22}{'ms':>9}{'x cross-entropy':>17}{'x floor':>9}{'extra matrices':>16}")
    for name, figures in result["rows"].items():
        print(
            f"{name:22}{common.show_ms(figures['ms']):>9}{figures['x_cross_entropy']:17.2f}{figures['x_floor']:9.1f}"
            f"{figures['extra_matrices']:16.1f}"
            + ("" if figures["device_ms"] is None else f"{figures['device_ms']:12.3f} device ms")
        )
    print()
    for check in result["bounds"]:
        verdict = "met" if check["met"] else "NOT MET"
        print(
            f"{check['what']:44} at most {check['bound']:.1f}, measured {check['value']:5.2f}: {verdict}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of the losses, forward + backward.")
    parser.add_argument("--batch", type=int, help="B of a single shape, with --classes")
    parser.add_argument("--classes", type=int, help="C of a single shape, with --batch")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="one of both only")
    parser.add_argument("--mode", choices=["eager", "compiled"], help="one of both only")
    parser.add_argument("--quick", action="store_true", help="[256, 1000] float32 alone")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 9, at 21841 classes 3)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if (args.batch is None) != (args.classes is None):
        parser.error("--batch and --classes go together")
    torch.set_num_threads(args.threads)
    common.keep_freed_memory()

    shapes = [(args.batch, args.classes)] if args.batch else SHAPES[1:2] if args.quick else SHAPES
    dtypes = [args.dtype] if args.dtype else ["float32"] if args.quick else ["float32", "bfloat16"]
    modes = [args.mode] if args.mode else ["eager", "compiled"]
    report = common.Report(args)
    clock = report.result["clock"]
    print(f"forward + backward, threads: {args.threads}, {clock}, medians of rounds, torch {torch.__version__}")
    results, rounds = [], args.rounds
    report.result |= {"threads": args.threads, "tables": results}
    for shape in shapes:
        args.rounds = rounds or (3 if shape[0] * shape[1] > 2**21 else 9)
        for dtype in dtypes:
            for mode in modes:
                results.append(measure(*shape, getattr(torch, dtype), mode == "compiled", args))
                show(results[-1])
                report.write(is_partial=True)
    report.write()


if __name__ == "__main__":
    main()
