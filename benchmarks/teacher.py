"""What the settings of a teacher do to its time and its logits: `python benchmarks/teacher.py`.

One forward pass of [`nkd_hf.models.teacher.Teacher`] under each setting, in turns, on the same images: `teacher_dtype`
float32, bf16 and fp16, for CNNs with `teacher_channels_last`, and `teacher_compile`. `bf16, autocast` is what no
setting gives in a run with `bf16`: weights in float32, which are cast in each step. Beside them stands the student's
step (forward and backward in float32), so that `step` is how long the two take together, of the float32 teacher's.

Floor: the model's multiplications at the rate at which this machine multiplies two large matrices of that dtype; on a
GPU those of a CNN in float32 at the rate of TF32, in which PyTorch convolves there.

On a CPU, a setting that takes ten times as long as float32, as half precision does without instructions for it, is
timed in one call alone, and not compiled.

The logits are compared with those in float32: the greatest difference, and how many images get another first class.
Weights are random, so that logits are small and close to each other: a trained teacher's first class changes more
rarely.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from statistics import median

import common
import torch
from torch import Tensor
from turns import PAIRS

from nkd_hf import create_student, load_teacher
from nkd_hf.recipe.plan_costs import forward_gmacs

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Times as long as float32.
TOO_LONG = 10


def make_settings(is_cnn: bool, compiled: bool) -> dict[str, dict]:
    """The rows: arguments of [`nkd_hf.models.teacher.Teacher.for_inference`]; None is a teacher under autocast."""
    settings = {}
    for dtype in DTYPES:
        for channels_last in (False, True) if is_cnn else (False,):
            name = dtype + (", channels_last" if channels_last else "")
            settings[name] = {"dtype": dtype, "channels_last": channels_last}
            if compiled:
                settings[f"{name}, compiled"] = settings[name] | {"compile": True}
    return settings | {"bf16, autocast": None}


def multiplication_rate(dtype: torch.dtype, device: str, clock: Callable[[], float], is_cnn: bool) -> float:
    """GMACs a millisecond of a product of two square matrices, the best of five."""
    size = 512 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # By PyTorch's defaults a GPU convolves float32 in TF32, and multiplies matrices of float32 in full.
    torch.set_float32_matmul_precision("high" if is_cnn and device != "cpu" else "highest")
    rate = size**3 / 1e9 / min(call_ms(lambda: left @ right, clock)[0] for _ in range(5))
    torch.set_float32_matmul_precision("highest")
    return rate


def call_ms(run: Callable[[], Tensor], clock: Callable[[], float]) -> tuple[float, Tensor]:
    start = clock()
    result = run()
    return 1e3 * (clock() - start), result


def measure(pair: str, options: argparse.Namespace, report: common.Report) -> None:
    torch.compiler.reset()
    clock = common.make_clock(options.device)
    teacher_name, student_name, _ = PAIRS[pair]
    model = create_student(teacher_name, num_labels=1000).to(options.device)
    student = create_student(student_name, num_labels=1000).to(options.device).train()
    pixel_values = torch.randn(options.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    pixel_values = pixel_values.to(options.device)

    def under_autocast(teacher: torch.nn.Module) -> Tensor:
        with torch.autocast(options.device, torch.bfloat16):
            return teacher(pixel_values)

    def student_step() -> None:
        student(pixel_values).logits.square().mean().backward()
        student.zero_grad()

    rows, single, first, logits = {}, {}, {}, {}
    is_cnn = "resnet" in teacher_name
    for name, arguments in make_settings(is_cnn, not options.no_compile).items():
        if name.removesuffix(", compiled") in single:
            continue
        teacher = load_teacher(copy.deepcopy(model))
        run = partial(under_autocast, teacher)
        if arguments is not None:
            run = partial(teacher.for_inference(**arguments), pixel_values)
        first[name], logits[name] = call_ms(run, clock)
        # On a GPU a first call loads its kernels, and says nothing of the next.
        may_be_long = options.device == "cpu" and rows and "compiled" not in name
        if may_be_long and first[name] > TOO_LONG * call_ms(rows["float32"], clock)[0]:
            single[name] = first[name]
        else:
            rows[name] = run
    times = common.measure_times({**rows, "student's step": student_step}, options.rounds, clock, warmup=1)

    gmacs = options.batch * forward_gmacs(model, (224, 224))
    floors = {
        name: gmacs / multiplication_rate(dtype, options.device, clock, is_cnn) for name, dtype in DTYPES.items()
    }
    step, plain = times["student's step"], times["float32"]
    table = []
    for name in logits:
        values = times.get(name, [single.get(name)] * options.rounds)
        both = [[teacher + other for teacher, other in zip(side, step, strict=True)] for side in (values, plain)]
        difference = (logits[name].float() - logits["float32"]).abs().max().item()
        changed = (logits[name].argmax(-1) != logits["float32"].argmax(-1)).sum().item()
        table.append(
            [
                name,
                f"{median(values):.1f}",
                f"{common.ratio(values, plain)[0]:.2f}",
                f"{median(values) / floors[name.partition(',')[0]]:.1f}",
                f"{common.ratio(*both)[0]:.2f}",
                f"{difference:.1e}",
                f"{changed} of {options.batch}",
                f"{first[name] / 1e3:.0f}" if "compiled" in name else "",
            ]
        )
    table.append(["student's step", f"{median(step):.1f}", f"{common.ratio(step, plain)[0]:.2f}", *[""] * 5])
    title = f"Teacher of {pair}, batch {options.batch} at 224; logits up to {logits['float32'].abs().max():.2f}"
    columns = ["", "ms", "x float32", "x floor", "step", "logits off by", "other class", "s to compile"]
    report.table(title, columns, table)
    report.result["raw"][pair] = {"ms": times, "single_ms": single, "floors_ms": floors, "first_call_ms": first}


def main() -> None:
    parser = common.make_parser(__doc__, rounds=9)
    parser.add_argument("--pair", choices=PAIRS, action="append", help="default: the first two")
    parser.add_argument("--batch", type=int, help="images (default: 2 on the CPU, else 16)")
    parser.add_argument("--no_compile", action="store_true", help="omit torch.compile")
    options = common.parse(parser)
    options.batch = options.batch or (2 if options.device == "cpu" else 16)

    report = common.Report(options)
    for pair in options.pair or list(PAIRS)[:2]:
        measure(pair, options, report)
        report.write(is_partial=True)
    report.write()


if __name__ == "__main__":
    main()
