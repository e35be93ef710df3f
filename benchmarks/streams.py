"""Images per second of a stream on several processes: `python benchmarks/streams.py`.

The JPEGs of input.py in parquet files are streamed, decoded and cropped to 224 by 1, 2 and 3 processes on the CPU, each
without DataLoader workers. Two loaders of a `DistillationTrainer` take turns in the same processes:

- dispatched: `dispatch_batches=True`. The first process reads for all and sends each its batch, as accelerate does with
  streams unless told otherwise.
- divided: every process reads its own part of each pass, as `DistillationTrainer` does unless told otherwise.

The wall clock depends on how many cores are free. The CPU time of the process that works most is what bounds a step where
each process has a core.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import common
import datasets
from accelerate.utils import gather_object
from input import CLASSES, MEAN, SIZE, STD, write_images

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    create_student,
    load_image_dataset,
    train_transform,
)
from nkd_hf.data.image_datasets import StreamingImageDataset

SIDES = {"dispatched": True, "divided": None}


def make_loader(data_files: str, batch_size: int, dispatch_batches: bool | None, folder: str):
    data = DataArguments(dataset_name=data_files, validation_split="train", streaming=True)
    trainer = DistillationTrainer(
        create_student("resnet18", num_labels=len(CLASSES), image_size=SIZE),
        DistillationTrainingArguments(
            folder, per_device_train_batch_size=batch_size, max_steps=1, use_cpu=True, report_to="none",
            accelerator_config={"dispatch_batches": dispatch_batches},
        ),
        data_collator=ImageCollator(len(CLASSES)),
        train_dataset=StreamingImageDataset(
            load_image_dataset(data)["train"], train_transform(data, SIZE, MEAN, STD, "bilinear")
        ),
    )  # fmt: skip
    return trainer.accelerator, iter(trainer.get_train_dataloader())


def measure(options, data_files: str, out: Path) -> None:
    """One of the processes: turns of both sides, with the seconds of the wall and of each process's CPU."""
    loaders = {}
    for side, dispatch_batches in SIDES.items():
        accelerator, loaders[side] = make_loader(data_files, options.batch, dispatch_batches, str(out.parent / side))
    figures = {side: [] for side in SIDES}
    for turn in range(-1, options.rounds):
        for side, batches in loaders.items():
            accelerator.wait_for_everyone()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(options.steps):
                next(batches)
            cpu = time.process_time() - cpu
            accelerator.wait_for_everyone()
            cpus = gather_object([cpu])
            if turn >= 0:
                figures[side].append([time.perf_counter() - wall, max(cpus)])
    if accelerator.is_main_process:
        out.write_text(json.dumps(figures))


def main() -> None:
    parser = common.make_parser(__doc__, rounds=7)
    parser.add_argument("--images", type=int, default=400, help="how many are made (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images of a process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="batches of a turn (default: %(default)s)")
    parser.add_argument("--measure", nargs=2, metavar=("FILES", "OUT"), help="be one of the processes")
    parser.set_defaults(device="cpu")
    options = common.parse(parser)
    if options.measure:
        measure(options, options.measure[0], Path(options.measure[1]))
        return

    report, rows = common.Report(options), []
    with tempfile.TemporaryDirectory() as folder:
        datasets.disable_progress_bars()
        write_images(Path(folder), options.images)
        data = datasets.Dataset.from_parquet(f"{folder}/parquet/train.parquet", cache_dir=f"{folder}/cache")
        for shard in range(4):
            data.shard(4, shard).to_parquet(Path(folder) / f"part-{shard}.parquet")
        for num_processes in (1, 2, 3):
            out = Path(folder) / "figures.json"
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes),
                 __file__, "--measure", f"{folder}/part-*.parquet", str(out), "--rounds", str(options.rounds),
                 "--batch", str(options.batch), "--steps", str(options.steps)],
                check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": f"{folder}/cache"},
            )  # fmt: skip
            figures = json.loads(out.read_text())
            report.result["raw"][str(num_processes)] = figures
            num_images = num_processes * options.batch * options.steps
            for side in SIDES:
                wall, cpu = ([num_images / turn[kind] for turn in figures[side]] for kind in (0, 1))
                rows.append([str(num_processes), side, f"{median(wall):.0f}", f"{median(cpu):.0f}"])
            gain = [common.ratio(*([turn[kind] for turn in figures[side]] for side in SIDES)) for kind in (0, 1)]
            rows.append([str(num_processes), "divided / dispatched", *(f"{value[0]:.2f}" for value in gain)])
    report.table(
        f"Streamed images at {SIZE}, batches of {options.batch}, one thread a process",
        ["processes", "loader", "images/s, wall clock", "images/s by the busiest process's CPU time"],
        rows,
    )
    report.write()


if __name__ == "__main__":
    main()
