"""The memory of a training step, part by part: `python benchmarks/memory.py`.

The parts of a step of NKD run one after the other, as `DistillationTrainer` runs them, and each is measured on its
own (see common.py): how much more than at its start is allocated at its peak, and how much of that stays. What is
there all the time is counted from the tensors: weights of student and teacher, gradients, the optimiser's state.

Floor: the same step of the student alone with cross-entropy. `peak` is the most that is allocated at any moment: what
stays of all parts before, and the part's own peak. The last rows are `DistillationTrainer`'s own training, of NKD and
of USKD, and `Trainer`'s: their peaks above the weights, which say whether the parts add up.
"""

import argparse
import copy
import tempfile

import common
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments
from turns import PAIRS, Data, Images, trainer_loop, training_arguments

from nkd_hf import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    NKDLoss,
    USKDLoss,
    create_student,
    load_teacher,
)

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
}


def num_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def measure_parts(
    student: nn.Module, teacher: nn.Module | None, batch: int, num_classes: int, options: argparse.Namespace
) -> dict[str, int]:
    """Bytes by part, of a step with the optimiser's state there already, as in all steps but the first."""
    optimizer = OPTIMIZERS[options.optim](student.parameters())
    images = Images(batch, num_classes, device=options.device)
    pixel_values = images.pixels[torch.arange(batch) % len(images.pixels)]
    labels = torch.tensor(images.labels, device=options.device)
    state: dict[str, torch.Tensor] = {}

    def autocast() -> torch.autocast:
        return torch.autocast(options.device, torch.bfloat16, enabled=options.bf16)

    def run_teacher() -> None:
        with autocast():
            state["teacher_logits"] = teacher(pixel_values)

    def run_student() -> None:
        with autocast():
            state["logits"] = student(pixel_values).logits

    def run_loss() -> None:
        logits = state["logits"]
        if teacher is None:
            state["loss"] = F.cross_entropy(logits.float(), labels)
        else:
            components = NKDLoss()(logits, state["teacher_logits"], labels, label_smoothing=0.0)
            state["loss"] = sum(components.values())

    def run_backward() -> None:
        state.pop("loss").backward()
        state.clear()

    def run_optimizer() -> None:
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    steps = {"teacher": run_teacher} if teacher is not None else {}
    steps |= {"student": run_student, "loss": run_loss, "backward": run_backward, "optimiser": run_optimizer}
    for run in steps.values():
        run()
    optimizer.zero_grad(set_to_none=True)  # as the Trainer does
    bytes_of = {
        "weights, student": num_bytes([*student.parameters(), *student.buffers()]),
        "weights, teacher": 0 if teacher is None else num_bytes([*teacher.parameters(), *teacher.buffers()]),
        "optimiser's state": num_bytes(
            value for slot in optimizer.state.values() for value in slot.values() if isinstance(value, torch.Tensor)
        ),
        "pixels": pixel_values.nbytes,
    }
    held = peak = sum(bytes_of.values())
    for name, run in steps.items():
        above, stays = common.measure_memory(run, options.device)
        bytes_of |= {f"{name}, at its peak": above, f"{name}, stays": stays}
        peak = max(peak, held + above)
        held += stays
    optimizer.zero_grad(set_to_none=True)
    return bytes_of | {"peak": peak}


def measure_trainers(
    student: nn.Module, teacher: nn.Module, width: int, batch: int, num_classes: int, options: argparse.Namespace
) -> dict[str, int]:
    """Peaks of two steps above what is there before them, the weights."""
    data, steps = Data(Images(2 * batch, num_classes, device=options.device)), 2
    peaks = {}
    ours = DistillationTrainer, DistillationTrainingArguments
    for name, (kind, arguments_kind), kwargs in (
        ("NKD, DistillationTrainer", ours, {"teacher": teacher, "distillation_loss": NKDLoss()}),
        ("USKD, DistillationTrainer", ours, {"distillation_loss": USKDLoss(width, num_classes)}),
        ("cross-entropy, Trainer", (Trainer, TrainingArguments), {}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            args = training_arguments(
                arguments_kind, folder, batch, steps, options.device, bf16=options.bf16,
                optim="sgd" if options.optim == "sgd" else "adamw_torch",
                optim_args="momentum=0.9" if options.optim == "sgd" else None,
            )  # fmt: skip
            trainer = kind(
                copy.deepcopy(student), args, data_collator=ImageCollator(num_classes), train_dataset=data, **kwargs
            )
            loop = trainer_loop(trainer)
            peaks[name] = common.measure_peak(lambda loop=loop: loop(lambda: None), options.device)
            del trainer, loop
    return peaks


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1)
    parser.add_argument("--pair", choices=PAIRS, action="append", help="default: the first two")
    parser.add_argument("--batch", type=int, nargs="+", help="images (default: 8 32; on a GPU 16 128)")
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 21841], help="default: 1000 21841")
    parser.add_argument("--optim", choices=OPTIMIZERS, help="default: sgd with momentum for CNNs, else adamw")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    options = common.parse(parser)
    batches = options.batch or ([8, 32] if options.device == "cpu" else [16, 128])

    report, wanted = common.Report(options), options.optim
    for pair in options.pair or list(PAIRS)[:2]:
        teacher_name, student_name, width = PAIRS[pair]
        options.optim = wanted or ("sgd" if "resnet" in student_name else "adamw")
        columns, figures = [], []
        for num_classes in options.classes:
            student = create_student(student_name, num_labels=num_classes).to(options.device).train()
            teacher = load_teacher(create_student(teacher_name, num_labels=num_classes)).to(options.device)
            for batch in batches:
                columns.append(f"{batch} x {num_classes}")
                nkd = measure_parts(student, teacher, batch, num_classes, options)
                alone = measure_parts(student, None, batch, num_classes, options)
                own = {
                    "peak of the student alone": alone["peak"],
                    **measure_trainers(student, teacher, width, batch, num_classes, options),
                }
                figures.append(nkd | own)
        rows = [[name, *(f"{column[name] / 1e6:.1f}" for column in figures)] for name in figures[0]]
        ratios = [f"{column['peak'] / column['peak of the student alone']:.3f}" for column in figures]
        rows.append(["peak / that of the student alone", *ratios])
        title = f"{pair}, {options.optim}, {'bf16 autocast' if options.bf16 else 'float32'}: MB, by batch x classes"
        report.table(title, ["", *columns], rows)
        report.result["raw"][pair] = dict(zip(columns, figures, strict=True))
        report.write(is_partial=True)
    report.write()


if __name__ == "__main__":
    main()
