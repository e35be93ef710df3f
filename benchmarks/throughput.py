"""Images a second of a whole recipe, from JPEG files to the optimiser's step: `python benchmarks/throughput.py`.

`recipes/configs/nkd_resnet34_resnet18.yaml` on one device: ResNet-34 teaches ResNet-18 by NKD at 224 pixels, with its
augmentation, data loaders and optimiser. The files are JPEGs of ImageNet's usual size (500 x 375, quality 92) of crops of
scikit-learn's photographs, in a folder for each of 1000 classes; 256 of them differ, and the others are links to them.

- recipe: the student's training. The clock runs after the warm-up, from one synchronisation with the device to
  another, so that loading, host and device overlap as in any run.
- loader alone: the same loader, with nobody who trains on its batches. A floor of the recipe's time.
- compute alone: the same models and loss, with one random batch that lies in the device's memory. The other floor.

Each of the loader's processes loads one batch in advance, and the processes deliver in bursts. So warm-up and measured steps
should be many times the number of processes: else the clock measures batches that were loaded before it ran.

Aim: the recipe is at least 90% as fast as the slower of the two. With random weights; a trained teacher takes as long.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

import common
import PIL.Image
import torch
from sklearn.datasets import load_sample_images
from transformers import TrainerCallback
from turns import Data, Images, training_arguments

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    NKDLoss,
    Recipe,
    RecipeArguments,
    create_student,
    parse_args,
)
from nkd_hf.models.saving import save_student

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "nkd_resnet34_resnet18.yaml"
NUM_DIFFERENT, AIM = 256, 0.9


def write_images(folder: Path, num_images: int, num_classes: int) -> None:
    """Writes JPEGs as `train/CLASS/IMAGE.jpg`, and one of each class as `validation/CLASS/IMAGE.jpg`."""
    draws = random.Random(0)
    photographs = [PIL.Image.fromarray(array) for array in load_sample_images().images]
    files: list[Path] = []
    for index in range(num_images + num_classes):
        split = "train" if index < num_images else "validation"
        path = folder / split / f"{index % num_classes:04d}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(files) < NUM_DIFFERENT:
            photograph = photographs[index % 2]
            width = draws.uniform(250, min(photograph.width, photograph.height * 4 / 3))
            left, top = draws.uniform(0, photograph.width - width), draws.uniform(0, photograph.height - width * 3 / 4)
            box = (left, top, left + width, top + width * 3 / 4)
            photograph.resize((500, 375), PIL.Image.Resampling.BICUBIC, box=box).save(path, quality=92)
            files.append(path)
        else:
            os.link(files[index % NUM_DIFFERENT], path)


def open_recipe(folder: Path, options: argparse.Namespace) -> Recipe:
    num_steps = options.warmup + options.rounds
    write_images(folder / "images", num_steps * options.batch, options.classes)
    names = {index: f"{index:04d}" for index in range(options.classes)}
    save_student(create_student(options.teacher, id2label=names, image_size=options.size), str(folder / "teacher"))
    settings = {
        "config": CONFIG, "student": options.student, "teacher": folder / "teacher", "dataset_name": folder / "images",
        "image_size": options.size, "output_dir": folder / "run", "max_steps": num_steps, "num_processes": 1,
        "per_device_train_batch_size": options.batch, "bf16": options.bf16, "use_cpu": options.device == "cpu",
        "dataloader_num_workers": options.workers, "dataloader_persistent_workers": options.workers > 0,
        **({"dataloader_prefetch_factor": 1} if options.workers else {}),
        "save_strategy": "no", "eval_strategy": "no", "logging_steps": 10**6, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    kinds = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    args = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    recipe = Recipe(*parse_args(kinds, args=args))
    recipe.open_teacher()
    return recipe


class Clock(TrainerCallback):
    """Reads the clock after the warm-up and after the last step, when the device's work is done."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.times = options, []

    def tick(self, step: int) -> None:
        if step in (self.options.warmup, self.options.warmup + self.options.rounds):
            if self.options.device != "cpu":
                torch.cuda.synchronize(self.options.device)
            self.times.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.tick(state.global_step)

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.options.rounds * self.options.batch / (self.times[1] - self.times[0])


def measure_training(trainer: DistillationTrainer, options: argparse.Namespace) -> float:
    clock = Clock(options)
    trainer.add_callback(clock)
    trainer.train()
    return clock.rate


def measure_loader(trainer: DistillationTrainer, options: argparse.Namespace) -> float:
    clock = Clock(options)
    for step, _ in enumerate(trainer.get_train_dataloader(), 1):
        clock.tick(step)
    return clock.rate


def measure_compute(folder: Path, options: argparse.Namespace) -> float:
    student, teacher = (
        create_student(name, num_labels=options.classes, image_size=options.size)
        for name in (options.student, options.teacher)
    )
    num_steps = options.warmup + options.rounds
    shape = (options.batch, 3, options.size, options.size)
    batch = {
        "pixel_values": torch.randn(shape, device=options.device),
        "labels": torch.randint(options.classes, (options.batch,), device=options.device),
    }
    data = Data(Images(num_steps * options.batch, options.classes, size=1))  # their number alone counts
    args = training_arguments(
        DistillationTrainingArguments, str(folder), options.batch, num_steps, options.device, bf16=options.bf16,
        logging_steps=10**6, optim_args="momentum=0.9", max_grad_norm=0.0,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, args, lambda samples: dict(batch), data, teacher=teacher, distillation_loss=NKDLoss()
    )
    return measure_training(trainer, options)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = common.make_parser(__doc__, rounds=96)
    parser.add_argument("--warmup", type=int, default=48, help="steps before those that are measured (default: 48)")
    parser.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=cores, help="of the loader (default: one for each core)")
    parser.add_argument("--student", default="resnet18", help="(default: %(default)s)")
    parser.add_argument("--teacher", default="resnet34", help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    options = common.parse(parser)

    report = common.Report(options)
    report.result["clock"] = "wall clock"
    with tempfile.TemporaryDirectory() as folder:
        recipe = open_recipe(Path(folder), options)
        rates = {
            "recipe": measure_training(recipe.make_stage("student"), options),
            "loader alone": measure_loader(recipe.make_stage("student"), options),
            "compute alone": measure_compute(Path(folder) / "compute", options),
        }
    rows = [[name, f"{rate:,.0f}", f"{1e3 * options.batch / rate:.1f}"] for name, rate in rates.items()]
    precision = "bf16 autocast" if options.bf16 else "float32"
    title = f"{options.teacher} -> {options.student}, batch {options.batch} at {options.size}, {precision}"
    report.table(f"{title}, {options.workers} loader processes", ["", "images/s", "ms a batch"], rows)
    floor = min(rates["loader alone"], rates["compute alone"])
    report.aim("images/s of the recipe / those of the slower of the two", rates["recipe"] / floor, AIM, at_least=True)
    report.result["raw"] = rates
    report.write()


if __name__ == "__main__":
    main()
