"""What a step of `DistillationTrainer` costs: `python benchmarks/step.py`.

Four loops take turns, a step of each (see turns.py), over the same images in memory with the same student, optimiser,
batch and precision:

- NKD, loop: a hand-written loop of teacher, student, cross-entropy and `nkd_loss`: nothing but what must be done.
- NKD, trainer: `DistillationTrainer` with teacher and `NKDLoss`. Aim: at most 1.03 times the loop.
- CE, trainer: transformers' own `Trainer` on the student alone, the floor of any training with it.
- USKD, trainer: `DistillationTrainer` with `USKDLoss`, which has no teacher. Aim: at most 1.03 times CE.

Ratios are taken within each round, and their median and quartiles shown. With one thread on the CPU the clock is the
process's CPU time; otherwise it is the wall clock.

Memory: the peak of two further steps above what is allocated before them: on the CPU what `torch.profiler` sees of the
allocator, on a GPU `torch.cuda.max_memory_allocated`. Aim for USKD: at most 1.02 times CE.
"""

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs each start and stop otherwise; read at its import
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from losses import measure_peak
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from turns import Turns, ratio

from nkd_hf import DistillationTrainer, DistillationTrainingArguments, NKDLoss, USKDLoss, create_student, nkd_loss

# Student, teacher, and the width of the student's mid feature.
PAIRS = {
    "resnet34 -> resnet18": ("resnet18", "resnet34", 256),
    "deit3_small -> deit_tiny": ("deit_tiny_patch16_224", "deit3_small_patch16_224", 192),
}
AIMS = [("NKD, trainer", "NKD, loop", 1.03), ("USKD, trainer", "CE, trainer", 1.03)]
MEMORY_AIM = 1.02


class StepIsOver(TrainerCallback):
    def __init__(self, over: Callable[[], None]):
        self.over = over

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.over()


def images(num: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 224, 224, generator=generator),
            "labels": int(torch.randint(1000, (1,), generator=generator)),
        }
        for _ in range(num)
    ]


def arguments(
    folder: str, options: argparse.Namespace, steps: int, kind: type = TrainingArguments
) -> TrainingArguments:
    return kind(
        folder, per_device_train_batch_size=options.batch, max_steps=steps, optim="sgd", learning_rate=1e-4,
        max_grad_norm=1.0, bf16=options.bf16, logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=options.device == "cpu", dataloader_pin_memory=False,
    )  # fmt: skip


def handwritten(student: nn.Module, teacher: nn.Module, data: list[dict], options: argparse.Namespace, steps: int):
    """The loop that a user would write."""

    def run(over: Callable[[], None]) -> None:
        student.to(options.device).train()
        teacher.to(options.device).eval().requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
        loader = DataLoader(data, options.batch, shuffle=True)
        batches = iter(loader)
        for _ in range(steps):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            pixel_values, labels = batch["pixel_values"].to(options.device), batch["labels"].to(options.device)
            with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
                with torch.no_grad():
                    teacher_logits = teacher(pixel_values).logits
                logits = student(pixel_values).logits
            loss = F.cross_entropy(logits.float(), labels) + nkd_loss(logits, teacher_logits, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            over()

    return run


def loops(pair: str, options: argparse.Namespace, steps: int, folder: str) -> dict[str, Callable]:
    name, teacher_name, width = PAIRS[pair]
    data = images(4 * options.batch)
    student = create_student(name, num_labels=1000)
    teacher = create_student(teacher_name, num_labels=1000)

    def trained(kind: type, arguments_kind: type, **kwargs) -> Callable:
        args = arguments(folder, options, steps, arguments_kind)
        trainer = kind(copy.deepcopy(student), args, train_dataset=data, **kwargs)

        def run(over: Callable[[], None]) -> None:
            trainer.add_callback(StepIsOver(over))
            trainer.train()

        return run

    ours = DistillationTrainer, DistillationTrainingArguments
    return {
        "NKD, loop": handwritten(copy.deepcopy(student), copy.deepcopy(teacher), data, options, steps),
        "NKD, trainer": trained(*ours, teacher=copy.deepcopy(teacher), distillation_loss=NKDLoss()),
        "CE, trainer": trained(Trainer, TrainingArguments),
        "USKD, trainer": trained(*ours, distillation_loss=USKDLoss(width, 1000)),
    }


def peak_of_steps(run: Callable[[Callable[[], None]], None], device: str) -> int:
    """Peak bytes of a short training above those allocated before it."""
    if device == "cpu":
        return measure_peak(lambda: run(lambda: None))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(lambda: None)
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A step of DistillationTrainer against a hand-written loop and Trainer."
    )
    parser.add_argument("--pair", choices=PAIRS, action="append", help="default: all")
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()

    results = {}
    for pair in options.pair or PAIRS:
        turns = Turns(options.rounds, device=options.device)
        with tempfile.TemporaryDirectory() as folder:
            times = turns.run(loops(pair, options, turns.steps, folder))
            short = loops(pair, options, 2, folder)
            peaks = {side: peak_of_steps(run, options.device) for side, run in short.items()}
        clock = "CPU time" if turns.on_cpu_clock else "wall clock"
        print(
            f"\n{pair}, batch {options.batch} at 224, {'bf16' if options.bf16 else 'float32'}, {options.device}, ",
            end="",
        )
        print(f"threads: {options.threads}, {clock}, median of {options.rounds} rounds, torch {torch.__version__}\n")
        print(f"{'':15}{'ms':>9}{'peak MB':>10}")
        for side, values in times.items():
            print(f"{side:15}{1e3 * sorted(values)[len(values) // 2]:9.1f}{peaks[side] / 1e6:10.1f}")
        print()
        results[pair] = {"times": times, "peak_bytes": peaks, "ratios": {}}
        for side, against, aim in AIMS:
            value, low, high = ratio(times, side, against)
            verdict = "met" if value <= aim else "NOT MET"
            print(f"{side} / {against}: {value:.3f} ({low:.3f} to {high:.3f}), aim {aim}: {verdict}")
            results[pair]["ratios"][f"{side} / {against}"] = {"median": value, "quartiles": [low, high], "aim": aim}
        value = peaks["USKD, trainer"] / peaks["CE, trainer"]
        print(f"peak of USKD / CE: {value:.3f}, aim {MEMORY_AIM}: {'met' if value <= MEMORY_AIM else 'NOT MET'}")
        results[pair]["memory_ratio"] = {"value": value, "aim": MEMORY_AIM}
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "pair")}
        options.json.write_text(
            json.dumps({"settings": settings, "torch": torch.__version__, "pairs": results}, indent=2)
        )
        print(f"\nwrote {options.json}")


if __name__ == "__main__":
    main()
