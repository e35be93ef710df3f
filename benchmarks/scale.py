"""How a step of NKD grows with classes, batch and processes: `python benchmarks/scale.py`.

One process and two, each with one thread (on GPUs: each with a GPU), are started in turns by `torchrun`; in each, a
step of `DistillationTrainer` with teacher and `NKDLoss` and one of `Trainer` on the student alone are measured at every
batch (of a process) and number of classes. On the CPU images are 112 pixels wide, so that what does not shrink with
them, the loss and the exchange of gradients, weighs more than at 224.

Floors: of more classes, the step at 1000; of two processes with twice the images, the time of one; of NKD, the
student alone. Processes share memory bandwidth and cache even where they don't exchange anything: `Trainer`'s own
ratio shows it.

The last table is arithmetic, not measured: what is to be expected on 8 GPUs and on 64 in machines of 8. Compute is
batch x (3 x the student's GMACs + the teacher's) at `--rate`; the gradients' ring all-reduce moves 2 (n - 1) / n of
their bytes at `--bandwidth` within a machine and at `--network` between machines. Its efficiency is between that with
no overlap of the two and 100%, as DDP overlaps them. Input is not counted: see input.py for the cores that it needs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import common
import torch
from transformers import Trainer, TrainingArguments
from turns import PAIRS, Data, Images, Turns, trainer_loop, training_arguments

from nkd_hf import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    NKDLoss,
    create_student,
)
from nkd_hf.recipe.plan_costs import forward_gmacs

# Per GPU, of the rows.
ROW_BATCHES = {"resnet34 -> resnet18": 32, "deit3_small -> deit_tiny": 256, "deit3_large -> deit_base": 64}


def work(options: argparse.Namespace) -> None:
    """What each process does; the first one writes the times down."""
    rank, times = int(os.environ["RANK"]), {}
    # To wait for the other process is part of a step, and takes no CPU time.
    clock = time.perf_counter if options.device == "cpu" else None
    teacher_name, student_name, _ = PAIRS[options.pair]
    for num_classes in options.classes:
        for batch in options.batch:
            turns = Turns(options.rounds, warmup=2, device=options.device, clock=clock)
            length = turns.steps * batch * int(os.environ["WORLD_SIZE"])
            data = Data(Images(length, num_classes, options.size, device=options.device))
            sides = {
                "NKD": (
                    DistillationTrainer, DistillationTrainingArguments,
                    {"teacher": _model(teacher_name, num_classes, options), "distillation_loss": NKDLoss()},
                ),
                "student alone": (Trainer, TrainingArguments, {}),
            }  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                # One after the other: processes that take turns by themselves would wait for each other's steps.
                for side, (kind, arguments_kind, kwargs) in sides.items():
                    args = training_arguments(
                        arguments_kind, folder, batch, turns.steps, options.device, bf16=options.bf16
                    )
                    trainer = kind(
                        _model(student_name, num_classes, options), args, data_collator=ImageCollator(num_classes),
                        train_dataset=data, **kwargs,
                    )  # fmt: skip
                    measured = turns.run({side: trainer_loop(trainer)})
                    times[f"{num_classes} {batch} {side}"] = measured[side]
    if rank == 0:
        options.worker.write_text(json.dumps(times))
    torch.distributed.destroy_process_group()


def _model(name: str, num_classes: int, options: argparse.Namespace) -> torch.nn.Module:
    return create_student(name, num_labels=num_classes, image_size=options.size)


def launch(num_processes: int, options: argparse.Namespace) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"),
            "--local-addr=127.0.0.1",  # a machine without a network may not resolve its own name
            *(__file__, f"--worker={result}", f"--pair={options.pair}", f"--rounds={options.rounds}"),
            *("--batch", *map(str, options.batch), "--classes", *map(str, options.classes)),
            *(f"--size={options.size}", f"--threads={options.threads}", f"--device={options.device}"),
            *(["--bf16"] if options.bf16 else []),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment)
        return json.loads(result.read_text())


def measure(options: argparse.Namespace, report: common.Report) -> None:
    times: dict[int, dict[str, list[float]]] = {1: {}, 2: {}}
    for _ in range(options.repeats):
        for num_processes, found in times.items():
            if options.device == "cpu" or num_processes <= torch.cuda.device_count():
                for name, values in launch(num_processes, options).items():
                    found.setdefault(name, []).extend(values)
    rows = []
    for name, values in times[1].items():
        num_classes, batch, side = name.split(maxsplit=2)
        base, alone = (
            times[1][f"{options.classes[0]} {batch} {side}"],
            times[1][f"{num_classes} {batch} student alone"],
        )
        two = times[2].get(name)
        cells = [
            f"{median(values):.0f}",
            f"{median(values) / median(base):.2f}",
            f"{median(values) / median(alone):.2f}",
        ]
        cells += [f"{median(two):.0f}", f"{median(two) / median(values):.2f}"] if two else ["", ""]
        rows.append([f"{side}, {num_classes} classes, batch {batch}", *cells])
    columns = ["", "ms", f"x {options.classes[0]} classes", "x student alone", "ms, 2 processes", "x 1 process"]
    report.table(f"{options.pair} at {options.size} pixels", columns, rows)
    report.result["raw"]["ms"] = times


def expect(options: argparse.Namespace, report: common.Report) -> None:
    rows = []
    for pair, batch in ROW_BATCHES.items():
        with torch.device("meta"):
            teacher, student = (create_student(name, num_labels=1000) for name in PAIRS[pair][:2])
        gmacs = 3 * forward_gmacs(student, (224, 224)) + forward_gmacs(teacher, (224, 224))
        compute_ms = batch * gmacs / options.rate
        gradient_mb = sum(parameter.nbytes for parameter in student.parameters()) / 1e6
        rows.append([pair, f"{batch}", f"{gmacs:.1f}", f"{compute_ms:.1f}", f"{gradient_mb:.0f}"])
        for num_gpus in (8, 64):
            rate = options.bandwidth if num_gpus == 8 else options.network
            exchange_ms = 2 * (num_gpus - 1) / num_gpus * gradient_mb / rate
            efficiency = compute_ms / (compute_ms + exchange_ms)
            images = num_gpus * batch / (compute_ms + exchange_ms) * 1e3
            rows[-1] += [f"{exchange_ms:.2f}", f"{efficiency:.0%}", f"{images:,.0f}"]
    columns = ["", "batch a GPU", "GMACs an image", "compute ms", "gradients MB"]
    for num_gpus in (8, 64):
        columns += [f"exchange ms, {num_gpus}", f"efficiency, {num_gpus}, at least", f"images/s, {num_gpus}"]
    title = (
        f"By arithmetic, not measured: at {options.rate:g} GMACs a ms and GPU, {options.bandwidth:g} GB/s within and "
        f"{options.network:g} GB/s between machines"
    )
    report.table(title, columns, rows)


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1)
    parser.add_argument("--repeats", type=int, default=2, help="launches of each (default: %(default)s)")
    parser.add_argument("--pair", choices=PAIRS, default="resnet34 -> resnet18", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 128], help="of a process (default: 16 128)")
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 21841], help="(default: 1000 21841)")
    parser.add_argument("--size", type=int, help="pixels (default: 112 on the CPU, else 224)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--rate", type=float, default=30.0, help="GMACs a ms of a GPU, an assumption (%(default)s)")
    parser.add_argument("--bandwidth", type=float, default=200.0, help="GB/s within a machine, too (%(default)s)")
    parser.add_argument("--network", type=float, default=20.0, help="GB/s between machines, too (%(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = common.parse(parser)
    options.size = options.size or (112 if options.device == "cpu" else 224)
    if options.worker:
        work(options)
        return
    report = common.Report(options)
    report.result["clock"] = "wall clock"
    measure(options, report)
    expect(options, report)
    report.write()


if __name__ == "__main__":
    main()
