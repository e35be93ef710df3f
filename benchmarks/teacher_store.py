"""What training from a store of teacher logits costs: `python benchmarks/teacher_store.py`.

Loops take turns, a step of each (see turns.py), over the same images in memory with the same student, optimiser and
batch:

- plain: transformers' `Trainer` on the student alone with cross-entropy: the floor. Aim for a store: at most 1.03
  times this.
- teacher: its forward pass alone, which a store saves.
- live: `DistillationTrainer` with teacher and `NKDLoss`.
- stored, K: the same with a store of K logits an image, all or the largest.

The most that a store can gain is (plain + teacher) / plain; aim: live / stored is at least 90% of it. Ratios are
taken within each round. The store lies on this machine's disk, hence in the page cache.

A second table says what a store weighs: bytes of an image are those of the tensors that are written, 300 epochs of
ImageNet's 1 281 167 images are on paper. `read` is what reading an image's row takes, on the CPU, with what follows
it on the device, `check` what the file's checksum does, once in each process. What a store does to accuracy is
store_accuracy.py's.
"""

import argparse
import copy
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import common
import torch
from transformers import Trainer, TrainingArguments
from turns import PAIRS, Data, Images, Loop, Turns, trainer_loop, training_arguments

from nkd_hf import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    NKDLoss,
    create_student,
    load_teacher,
)
from nkd_hf.teacher_logits.compression import sparse_logits
from nkd_hf.teacher_logits.info import StoreInfo, TeacherDescription
from nkd_hf.teacher_logits.store import TeacherLogits, shard_path, write_shard

CLASSES = 1000
NUM_IMAGENET, EPOCHS = 1_281_167, 300
# Of each pair on the CPU, and on a GPU.
BATCHES = {
    "resnet34 -> resnet18": (8, 128),
    "deit3_small -> deit_tiny": (8, 128),
    "deit3_large -> deit_base": (2, 64),
}
TIME_AIM, GAIN_AIM = 1.03, 0.9


def write_store(
    folder: Path, labels: list[int], top_k: int | None, num_classes: int = CLASSES, cycle: int | None = None
) -> TeacherLogits:
    """A store of random logits, of one epoch in the order of the dataset."""
    info = StoreInfo(
        num_classes,
        len(labels),
        1,
        top_k,
        [1.0],
        len(labels),
        fingerprint={},
        teacher=TeacherDescription(None, "random", 1),
        cycle=cycle,
    )
    logits = 3 * torch.randn(len(labels), num_classes, generator=torch.Generator().manual_seed(0))
    write_shard(shard_path(folder, 0, 0), sparse_logits(logits, torch.tensor(labels), top_k, info.temperatures))
    info.write(folder)
    return TeacherLogits(folder)


def make_loops(pair: str, options: argparse.Namespace, batch: int, steps: int, folder: Path) -> dict[str, Loop]:
    teacher_name, name, _ = PAIRS[pair]
    images = Images(steps * batch, CLASSES, with_keys=True, device=options.device)
    student = create_student(name, num_labels=CLASSES)
    model = create_student(teacher_name, num_labels=CLASSES)
    # Shared by two loops of which only one is awake: it never changes.
    teacher = load_teacher(model).to(options.device)

    def trained(kind: type, arguments_kind: type, data, collator: ImageCollator, **kwargs) -> Loop:
        args = training_arguments(
            arguments_kind, str(folder / "run"), batch, steps, options.device, bf16=options.bf16,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        return trainer_loop(kind(copy.deepcopy(student), args, data_collator=collator, train_dataset=data, **kwargs))

    def distilled(collator: ImageCollator, **kwargs) -> Loop:
        return trained(
            DistillationTrainer, DistillationTrainingArguments, images, collator, distillation_loss=NKDLoss(), **kwargs
        )

    def teacher_alone(over: Callable[[], None]) -> None:
        pixel_values = images.pixels[torch.arange(batch) % len(images.pixels)]
        for _ in range(steps):
            with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
                teacher(pixel_values)
            over()

    loops = {
        "plain": trained(Trainer, TrainingArguments, Data(images), ImageCollator(CLASSES)),
        "teacher": teacher_alone,
        "live": distilled(ImageCollator(CLASSES), teacher=teacher),
    }
    for top_k in options.top_k:
        store = write_store(folder / top_k, images.labels, None if top_k == "all" else int(top_k))
        loops[f"stored, {top_k}"] = distilled(ImageCollator(CLASSES, teacher_logits=store))
    return loops


def measure_steps(pair: str, options: argparse.Namespace, report: common.Report) -> None:
    batch = options.batch or BATCHES[pair][options.device != "cpu"]
    turns = Turns(options.rounds, warmup=1 if options.device == "cpu" else 5, device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        times = turns.run(make_loops(pair, options, batch, turns.steps, Path(folder)))
    plain, teacher = times["plain"], times["teacher"]
    rows = [[side, f"{median(values):.1f}", f"{common.ratio(values, plain)[0]:.3f}"] for side, values in times.items()]
    precision = "bf16 autocast" if options.bf16 else "float32"
    report.table(f"{pair}, batch {batch} at 224, {precision}", ["", "ms", "x plain"], rows)
    report.result["raw"][pair] = times
    for top_k in options.top_k:
        stored = times[f"stored, {top_k}"]
        value, *spread = common.ratio(stored, plain)
        report.aim(f"{pair}: time of stored, {top_k} / plain", value, TIME_AIM, spread=spread)
        gain = [live / own for live, own in zip(times["live"], stored, strict=True)]
        most = [(step + forward) / step for step, forward in zip(plain, teacher, strict=True)]
        value, *spread = common.ratio(gain, most)
        what = f"{pair}: gain of stored, {top_k} ({median(gain):.2f}) / the most there is ({median(most):.2f})"
        report.aim(what, value, GAIN_AIM, at_least=True, spread=spread)


def measure_sizes(options: argparse.Namespace, report: common.Report) -> None:
    clock, rows, num_samples, batch = common.make_clock(options.device), [], 1024, 16
    for num_classes in (1000, 21841):
        for top_k in (None, 100, 10):
            with tempfile.TemporaryDirectory() as folder:
                labels = Images(num_samples, num_classes, size=1).labels
                store = write_store(Path(folder), labels, top_k, num_classes)
                tensors = store.read(0, range(num_samples))
                content = shard_path(store.folder, 0, 0).read_bytes()

                def read(store=store) -> None:
                    for start in range(0, num_samples, batch):
                        part = store.read(0, range(start, start + batch))
                        store.dense({name: tensor.to(options.device) for name, tensor in part.items()})

                calls = {"read": read, "check": lambda content=content: hashlib.sha256(content).digest()}
                times = common.measure_times(calls, options.rounds, clock)
            num_bytes = sum(tensor.nbytes for tensor in tensors.values()) / num_samples
            read_us, check_us = (1e3 * median(times[name]) / num_samples for name in calls)
            total_gb = num_bytes * NUM_IMAGENET * EPOCHS / 1e9
            cells = [f"{num_bytes:.0f}", f"{total_gb:,.0f}", f"{read_us:.1f}", f"{check_us:.2f}"]
            rows.append([f"{num_classes} classes, {'all' if top_k is None else top_k}", *cells])
    columns = ["", "bytes an image", "GB for ImageNet x 300 epochs", "us to read an image", "us to check"]
    report.table("What a store weighs", columns, rows)


def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--pair", choices=BATCHES, action="append", help="default: all")
    parser.add_argument("--batch", type=int, help="images (default: 8, of the large pair 2; on a GPU 128 and 64)")
    parser.add_argument("--top_k", nargs="+", default=["all", "10"], help="stores that are trained from: all 10")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    options = common.parse(parser)

    report = common.Report(options)
    measure_sizes(options, report)
    for pair in options.pair or BATCHES:
        report.write(is_partial=True)
        measure_steps(pair, options, report)
    report.write()


if __name__ == "__main__":
    main()
