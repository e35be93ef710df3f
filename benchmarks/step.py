"""What a step of `DistillationTrainer` costs: `python benchmarks/step.py`.

Six loops take turns, a step of each (see turns.py), over the same images in the device's memory with the same student,
optimiser, batch and precision:

- NKD, loop: a hand-written loop of teacher, student, cross-entropy and `nkd_loss`: nothing but what must be done, so
  the floor of NKD's step.
- NKD, trainer: `DistillationTrainer` with teacher and `NKDLoss`. Aim: at most 1.03 times the loop.
- KD, timm: timm's `LogitDistillationTask` in the same loop, with the settings that `KDLoss` has.
- KD, trainer: `DistillationTrainer` with teacher and `KDLoss`. Aim: at most 1.03 times timm's.
- CE, trainer: transformers' own `Trainer` on the student alone, the floor of any training with it.
- USKD, trainer: `DistillationTrainer` with `USKDLoss`, which has no teacher. Aim: at most 1.03 times CE.

Ratios are taken within each round, and their median and its 95% interval shown.

Memory: the peak of two further steps above what is allocated before them, the weights (see common.py). Aim for USKD:
at most 1.02 times CE.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from statistics import median

import common
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from turns import PAIRS, Data, Images, Loop, Turns, trainer_loop, training_arguments

from nkd_hf import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    KDLoss,
    NKDLoss,
    USKDLoss,
    create_student,
    nkd_loss,
)

AIMS = [("NKD, trainer", "NKD, loop", 1.03), ("KD, trainer", "KD, timm", 1.03), ("USKD, trainer", "CE, trainer", 1.03)]
MEMORY_AIM = 1.02
CLASSES = 1000


# From pixels and labels.
LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def nkd_of(student: nn.Module, teacher: nn.Module, options: argparse.Namespace) -> LossFunction:
    """What a user would write: cross-entropy and `nkd_loss`."""
    student.to(options.device).train()
    teacher.to(options.device).eval().requires_grad_(False)

    def compute(pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            with torch.no_grad():
                teacher_logits = teacher(pixel_values).logits
            logits = student(pixel_values).logits
        return F.cross_entropy(logits.float(), labels) + nkd_loss(logits, teacher_logits, labels)

    return compute


def kd_of_timm(student: nn.Module, teacher: nn.Module, options: argparse.Namespace) -> LossFunction:
    """timm's task, with the weight and the temperature of `KDLoss`."""
    defaults = KDLoss()
    task = LogitDistillationTask(
        student.timm_model, teacher.timm_model, nn.CrossEntropyLoss(), task_loss_weight=1 - defaults.alpha,
        temperature=defaults.temperature, device=torch.device(options.device), verbose=False,
    )  # fmt: skip
    task.to(options.device).train()

    def compute(pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            return task(pixel_values, labels)["loss"]

    return compute


def handwritten(compute: LossFunction, student: nn.Module, data: Data, options: argparse.Namespace) -> Loop:
    """The loop around a loss."""

    def run(over: Callable[[], None]) -> None:
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
        loader = DataLoader(data, options.batch, shuffle=True, collate_fn=ImageCollator(CLASSES))
        for batch in loader:
            pixel_values, labels = batch["pixel_values"].to(options.device), batch["labels"].to(options.device)
            compute(pixel_values, labels).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            over()

    return run


def make_loops(pair: str, options: argparse.Namespace, steps: int, folder: str) -> dict[str, Loop]:
    teacher_name, name, width = PAIRS[pair]
    data = Data(Images(steps * options.batch, CLASSES, device=options.device))
    student = create_student(name, num_labels=CLASSES)
    teacher = create_student(teacher_name, num_labels=CLASSES)

    def trained(kind: type, arguments_kind: type, **kwargs) -> Loop:
        args = training_arguments(arguments_kind, folder, options.batch, steps, options.device, bf16=options.bf16)
        collator = ImageCollator(CLASSES)
        return trainer_loop(kind(copy.deepcopy(student), args, data_collator=collator, train_dataset=data, **kwargs))

    def written(make: Callable[..., LossFunction]) -> Loop:
        own = copy.deepcopy(student)
        return handwritten(make(own, copy.deepcopy(teacher), options), own, data, options)

    ours = DistillationTrainer, DistillationTrainingArguments
    return {
        "NKD, loop": written(nkd_of),
        "NKD, trainer": trained(*ours, teacher=copy.deepcopy(teacher), distillation_loss=NKDLoss()),
        "KD, timm": written(kd_of_timm),
        "KD, trainer": trained(*ours, teacher=copy.deepcopy(teacher), distillation_loss=KDLoss()),
        "CE, trainer": trained(Trainer, TrainingArguments),
        "USKD, trainer": trained(*ours, distillation_loss=USKDLoss(width, CLASSES)),
    }


def main() -> None:
    parser = common.make_parser(__doc__, rounds=9)
    parser.add_argument("--pair", choices=PAIRS, action="append", help="default: the first two")
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    options = common.parse(parser)

    report = common.Report(options)
    for pair in options.pair or list(PAIRS)[:2]:
        turns = Turns(options.rounds, device=options.device)
        with tempfile.TemporaryDirectory() as folder:
            times = turns.run(make_loops(pair, options, turns.steps, folder))
            short = make_loops(pair, options, 2, folder)
            peaks = {
                side: common.measure_peak(lambda run=run: run(lambda: None), options.device)
                for side, run in short.items()
            }
        rows = [[side, f"{median(values):.1f}", f"{peaks[side] / 1e6:.1f}"] for side, values in times.items()]
        precision = "bf16 autocast" if options.bf16 else "float32"
        report.table(f"{pair}, batch {options.batch} at 224, {precision}", ["", "ms", "peak MB"], rows)
        for side, against, aim in AIMS:
            value, *spread = common.ratio(times[side], times[against])
            report.aim(f"{pair}: time of {side} / {against}", value, aim, spread=spread)
        value = peaks["USKD, trainer"] / peaks["CE, trainer"]
        report.aim(f"{pair}: peak memory of USKD / CE", value, MEMORY_AIM)
        report.result["raw"][pair] = {"ms": times, "peak_bytes": peaks}
        report.write(is_partial=True)
    report.write()


if __name__ == "__main__":
    main()
