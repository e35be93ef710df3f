"""What a step of training costs from JPEG files on: plain, with a teacher, and from a store: `python benchmarks/crops_cost.py`.

The images are those of input.py: JPEGs of 500 x 375, cropped at random, flipped, resized to 224. Decoding, augmentation,
batch, forward and backward pass and the optimiser's step all count. The trainers take turns, a step of each, on one thread
without workers, with CPU time as the clock; a round is an epoch, since its first steps decode all of its images:

- plain: the student alone with cross-entropy.
- live: with a teacher and NKD.
- stored: NKD from a store of the 10 largest logits of 1000 classes.
- stored, 4 crops: the same with `crops_per_image: 4`.

On a CPU a step of ResNet-18 takes so much longer than its input that the input hardly shows. `input` has no model at all:
what the CPUs of a machine pay whose GPU waits for them.

Aim: a step from a store with 4 crops costs less than a plain one.
"""

import argparse
import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import common
import datasets
from input import CLASSES, our_dataset, write_images
from teacher_store import write_store
from torch.utils.data import DataLoader
from turns import Loop, Turns, trainer_loop, training_arguments

from nkd_hf import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    ImageDataset,
    NKDLoss,
    create_student,
    load_teacher,
)
from nkd_hf.data.sampler import EpochSampler

NUM_CLASSES, TOP_K, SEED = 1000, 10, 0
# Student and teacher.
MODELS = {"input": None, "resnet18": ("resnet18", "resnet34")}
PLAIN, STORED = "plain", "stored"


def make_loops(name: str, options: argparse.Namespace, steps: int, folder: Path) -> dict[str, Loop]:
    """The sides of a student as loops of as many steps."""
    images = str(folder / "images")
    plain, crops = (our_dataset(images, {}, "bilinear", crops) for crops in (1, options.crops))
    alone = ImageCollator(NUM_CLASSES)
    sides: dict[str, tuple[ImageDataset, ImageCollator, bool]] = {
        PLAIN: (plain, alone, False),
        "live": (plain, alone, True),
        STORED: (plain, read_store(plain, folder / "store"), False),
        f"{STORED}, {options.crops} crops": (crops, read_store(crops, folder / "store-crops"), False),
    }
    models = MODELS[name]
    if models is None:
        return {
            side: make_input_loop(data, collator, options.batch, steps)
            for side, (data, collator, runs_teacher) in sides.items()
            if not runs_teacher
        }
    student, teacher = (create_student(model, num_labels=NUM_CLASSES) for model in models)
    loops = {}
    for side, (data, collator, runs_teacher) in sides.items():
        args = training_arguments(
            DistillationTrainingArguments, str(folder / "run"), options.batch, steps, "cpu", seed=SEED
        )
        trainer = DistillationTrainer(
            copy.deepcopy(student), args, data_collator=collator, train_dataset=data,
            teacher=load_teacher(teacher) if runs_teacher else None,
            distillation_loss=None if side == PLAIN else NKDLoss(),
        )  # fmt: skip
        loops[side] = trainer_loop(trainer)
    return loops


def read_store(data: ImageDataset, folder: Path) -> ImageCollator:
    """A collator of the logits of one epoch of the images, which is repeated."""
    labels = data.dataset["label"]
    store = write_store(folder, [labels[row] for _, row, *_ in make_sampler(data)], TOP_K, NUM_CLASSES, cycle=1)
    return ImageCollator(NUM_CLASSES, teacher_logits=store)


def make_sampler(data: ImageDataset, batch: int | None = None) -> EpochSampler:
    return EpochSampler(len(data), SEED, positions=True, crops=data.crops_per_image, cycle=1, batch=batch)


def make_input_loop(data: ImageDataset, collator: ImageCollator, batch: int, steps: int) -> Loop:
    """A loop of batches that no model takes."""

    def run(over: Callable[[], None]) -> None:
        loader = DataLoader(data, batch, sampler=make_sampler(data, batch), collate_fn=collator)
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        for _ in itertools.islice(epochs, steps):
            over()

    return run


def main() -> None:
    parser = common.make_parser(__doc__, rounds=9)
    parser.add_argument(
        "--images", type=int, default=64, help="a multiple of --batch times --crops (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--crops", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="(default: all)")
    options = common.parse(parser)
    if options.images % (options.batch * options.crops):
        parser.error("--images must be a multiple of --batch times --crops")

    report = common.Report(options)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as root:
        datasets.config.HF_DATASETS_CACHE = Path(root) / "cache"
        write_images(Path(root), options.images)
        for name in options.models:
            steps = options.images // options.batch
            turns = Turns(options.rounds * steps, warmup=steps)
            times = turns.run(make_loops(name, options, turns.steps, Path(root)))
            starts = range(0, options.rounds * steps, steps)
            epochs = {side: [sum(values[at : at + steps]) for at in starts] for side, values in times.items()}
            measure(name, epochs, options, report)
    report.write()


def measure(name: str, times: dict[str, list[float]], options: argparse.Namespace, report: common.Report) -> None:
    plain = times[PLAIN]
    rows = [
        [side, f"{median(values) / options.images:.2f}", f"{common.ratio(values, plain)[0]:.3f}"]
        for side, values in times.items()
    ]
    report.table(
        f"{name}, batch {options.batch} at 224, {len(CLASSES)} photographs", ["", "ms a sample", "x plain"], rows
    )
    report.result["raw"][name] = times
    side = f"{STORED}, {options.crops} crops"
    value, *spread = common.ratio(times[side], plain)
    report.aim(f"{name}: time of {side} / plain", value, 1.0, spread=spread)


if __name__ == "__main__":
    main()
