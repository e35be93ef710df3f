"""Images per second and core, from JPEG files to batches at 224: `python benchmarks/input.py`.

Real JPEGs of ImageNet's usual size (500 x 375, quality 92) are made of scikit-learn's two photographs, each a crop
of its own. Their loaders take turns in one process, one thread, one pass over all images each, with CPU time as the
clock:

- decode: Pillow's decoder alone, from bytes in memory to RGB. The floor of what decodes with it.
- decode, torchcodec: `torchcodec.decoders.decode_jpeg`, the same: what nkd_hf takes for training images.
- example: transformers' examples/pytorch/image-classification: random resized crop, flip, `ToTensor` and `Normalize`
  of torchvision on Pillow images, by `Dataset.set_transform`, and its collate function; from a folder and from
  parquet.
- timm: `create_dataset` and `create_loader`, whose `PrefetchLoader` normalises batch by batch; from a folder.
- nkd_hf: `load_image_dataset`, `ImageDataset`, `train_transform`, `EpochSampler`, `ImageCollator`; from both. Aim: at
  least 1.3 times the example.

`--augment deit` takes the augmentation of the DeiT recipes (bicubic, RandAugment, erasing) in all of them but the
example, which has none of it: there timm is what to compare with, and the aim is to be as fast.

`--crops 4` compares nkd_hf with itself instead: single samples of an image, and so many crops of each decoded one, with
as many samples. Aim: 4 crops are 2 times as fast.

The second table says where nkd_hf's time goes, part by part. The third one compares pixels, in steps of 8 bits: those
of evaluation with transformers' processor on Pillow's image, those of training with the example's for the same crop
and flip.
"""

import argparse
import io
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import common
import datasets
import numpy as np
import PIL.Image
import timm.data
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchcodec.decoders import decode_jpeg
from torchvision import transforms
from transformers import BaseImageProcessor

from nkd_hf import (
    DataArguments,
    ImageCollator,
    ImageDataset,
    create_student,
    load_image_dataset,
    load_image_processor,
    processor_transform,
    train_transform,
)
from nkd_hf.data.decoding import draws_from_torch, read_sample, takes_tensors
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.data.seeding import seeded
from nkd_hf.data.transforms import posterize_to_zero_bits

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ("china", "flower")
AUGMENTS = {
    "crop": {},
    "deit": {"auto_augment": "rand-m9-n2-mstd0.5-inc1", "random_erasing": 0.25},
}
AIM = 1.3


def write_images(folder: Path, num_images: int) -> None:
    """JPEGs as `images/<split>/<class>/<image>`, and the same as `parquet/<split>.parquet`; two are validation."""
    draws = random.Random(0)
    photographs = [PIL.Image.fromarray(array) for array in load_sample_images().images]
    rows = {"train": [], "validation": []}
    for index in range(num_images + 2):
        split = "train" if index < num_images else "validation"
        photograph, name = photographs[index % 2], CLASSES[index % 2]
        width = draws.uniform(250, min(photograph.width, photograph.height * 4 / 3))
        left = draws.uniform(0, photograph.width - width)
        top = draws.uniform(0, photograph.height - width * 3 / 4)
        box = (left, top, left + width, top + width * 3 / 4)
        path = folder / "images" / split / name / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.resize((500, 375), PIL.Image.Resampling.BICUBIC, box=box).save(path, quality=92)
        rows[split].append({"image": {"bytes": path.read_bytes(), "path": path.name}, "label": index % 2})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    (folder / "parquet").mkdir()
    for split, images in rows.items():
        datasets.Dataset.from_list(images, features=features).to_parquet(folder / "parquet" / f"{split}.parquet")


def example_transform() -> Callable[[PIL.Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )


def example_loader(source: str, data_files: str, batch_size: int) -> DataLoader:
    """As run_image_classification.py makes it."""
    dataset = datasets.load_dataset(source, data_files={"train": data_files})["train"]
    transform = example_transform()

    def train_transforms(example_batch: dict) -> dict:
        example_batch["pixel_values"] = [transform(image.convert("RGB")) for image in example_batch["image"]]
        return example_batch

    def collate_fn(examples: list[dict]) -> dict[str, Tensor]:
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        labels = torch.tensor([example["label"] for example in examples])
        return {"pixel_values": pixel_values, "labels": labels}

    dataset.set_transform(train_transforms)
    return DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate_fn)


def timm_loader(folder: Path, batch_size: int, augment: dict, interpolation: str) -> Iterator:
    dataset = timm.data.create_dataset("", root=str(folder), split="train", is_training=True)
    with posterize_to_zero_bits():  # or with Pillow 13 its own RandAugment would end the run
        return timm.data.create_loader(
            dataset, SIZE, batch_size, is_training=True, num_workers=0, device=torch.device("cpu"), pin_memory=False,
            mean=MEAN, std=STD, interpolation=interpolation, color_jitter=None,
            auto_augment=augment.get("auto_augment"), re_prob=augment.get("random_erasing", 0.0), re_mode="pixel",
        )  # fmt: skip


def our_dataset(name: str, augment: dict, interpolation: str, crops: int = 1) -> ImageDataset:
    args = DataArguments(dataset_name=name, **augment)
    transform = train_transform(args, SIZE, MEAN, STD, interpolation)
    return ImageDataset(load_image_dataset(args)["train"], transform, training=True, crops_per_image=crops)


def our_loader(dataset: ImageDataset, batch_size: int) -> DataLoader:
    sampler = EpochSampler(len(dataset), seed=0, positions=True, crops=dataset.crops_per_image, batch=batch_size)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=ImageCollator(len(CLASSES)))


def decode_with_pillow(content: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(content)).convert("RGB")


def decode_with_torchcodec(content: bytes) -> Tensor:
    return decode_jpeg(content, mode="RGB")


def exhaust(iterable) -> None:
    for _ in iterable:
        pass


def against_example(name: str, times: dict[str, list[float]]) -> float:
    source = name.split(", ")[1]
    return common.ratio(times[f"example, {source}"], times[name])[0]


def compare_loaders(folder: Path, options: argparse.Namespace, report: common.Report) -> None:
    augment, interpolation = AUGMENTS[options.augment], "bilinear" if options.augment == "crop" else "bicubic"
    images, parquet = folder / "images", folder / "parquet"
    contents = [path.read_bytes() for path in sorted(images.glob("train/*/*.jpg"))]
    loaders = {
        "example, folder": example_loader("imagefolder", f"{images}/train/**", options.batch),
        "example, parquet": example_loader("parquet", f"{parquet}/train.parquet", options.batch),
        "timm, folder": timm_loader(images, options.batch, augment, interpolation),
        "nkd_hf, folder": our_loader(our_dataset(str(images), augment, interpolation), options.batch),
        "nkd_hf, parquet": our_loader(our_dataset(str(parquet), augment, interpolation), options.batch),
    }
    rows = {
        "decode": lambda: exhaust(map(decode_with_pillow, contents)),
        "decode, torchcodec": lambda: exhaust(map(decode_with_torchcodec, contents)),
        **{name: lambda loader=loader: exhaust(loader) for name, loader in loaders.items()},
    }
    times = common.measure_times(rows, options.rounds, common.make_clock("cpu"), warmup=1)
    decode = times["decode"]
    table = []
    for name, values in times.items():
        per_image = median(values) / len(contents)
        table.append([name, f"{per_image:.3f}", f"{1e3 / per_image:.0f}", f"{common.ratio(decode, values)[0]:.0%}"])
        table[-1].append("" if "decode" in name else f"{against_example(name, times):.2f}")
    title = f"{len(contents)} JPEGs of 500 x 375, {options.augment}, batches of {options.batch}, one core"
    report.table(title, ["", "ms an image", "images/s", "share of decoding", "x example"], table)
    report.result["raw"]["loaders"] = times
    if options.augment != "crop":
        value, *spread = common.ratio(times["timm, folder"], times["nkd_hf, folder"])
        report.aim("images/s of nkd_hf / timm, folder", value, 1.0, at_least=True, spread=spread)
        return
    for source in ("folder", "parquet"):
        value, *spread = common.ratio(times[f"example, {source}"], times[f"nkd_hf, {source}"])
        report.aim(f"images/s of nkd_hf / example, {source}", value, AIM, at_least=True, spread=spread)


def compare_crops(folder: Path, options: argparse.Namespace, report: common.Report) -> None:
    augment, interpolation = AUGMENTS[options.augment], "bilinear" if options.augment == "crop" else "bicubic"
    rows = {}
    for source in ("images", "parquet"):
        for crops in (1, *options.crops):
            loader = our_loader(our_dataset(str(folder / source), augment, interpolation, crops), options.batch)
            rows[crops, source] = lambda loader=loader: exhaust(loader)
    times = common.measure_times(rows, options.rounds, common.make_clock("cpu"), warmup=1)
    table = []
    for (crops, source), values in times.items():
        value, *spread = common.ratio(times[1, source], values)
        name = f"{crops} crop{'s' * (crops > 1)}, {'folder' if source == 'images' else source}"
        per_image = median(values) / options.images
        table.append([name, f"{per_image:.3f}", f"{1e3 / per_image:.0f}", f"{value:.2f}"])
        if crops == 4:
            report.aim(f"samples/s, {name} / 1 crop", value, 2.0, at_least=True, spread=spread)
    title = f"{options.images} samples of 500 x 375 JPEGs, {options.augment}, batches of {options.batch}, one core"
    report.table(title, ["", "ms a sample", "samples/s", "x 1 crop"], table)
    report.result["raw"]["crops"] = {f"{crops}, {source}": values for (crops, source), values in times.items()}


def compare_parts(folder: Path, options: argparse.Namespace, report: common.Report) -> None:
    """Where the time of nkd_hf goes: each part on all images, with what it needs prepared."""
    augment, interpolation = AUGMENTS[options.augment], "bilinear" if options.augment == "crop" else "bicubic"
    data = {
        source: our_dataset(str(folder / name), augment, interpolation).dataset
        for source, name in (("folder", "images"), ("parquet", "parquet"))
    }
    dataset = our_dataset(str(folder / "parquet"), augment, interpolation)
    indices = range(len(dataset))
    rows = [data["parquet"][index] for index in indices]
    transform = dataset.transform
    decoded = [read_sample(row, "image", takes_tensors(transform))[0] for row in rows]
    samples = [dataset[0, index, index] for index in indices]
    collator = ImageCollator(len(CLASSES))

    def seed(index: int) -> None:
        with seeded(0, 0, index, torch_only=draws_from_torch(transform)):
            pass

    # Each lets go of what it made, as a loader does: memory that is fresh each time would be measured with it.
    parts = {
        "row of a folder": lambda: exhaust(map(data["folder"].__getitem__, indices)),
        "row of parquet": lambda: exhaust(map(data["parquet"].__getitem__, indices)),
        "decode": lambda: exhaust(read_sample(row, "image", takes_tensors(transform)) for row in rows),
        "seed": lambda: exhaust(map(seed, indices)),
        "transform": lambda: exhaust(map(transform, decoded)),
        "collate": lambda: exhaust(
            collator(samples[start : start + options.batch]) for start in range(0, len(samples), options.batch)
        ),
        "all, from parquet": lambda: exhaust(our_loader(dataset, options.batch)),
    }
    times = common.measure_times(parts, options.rounds, common.make_clock("cpu"), warmup=1)
    total = times["all, from parquet"]
    table = [
        [name, f"{median(values) / len(rows):.3f}", f"{common.ratio(values, total)[0]:.0%}"]
        for name, values in times.items()
    ]
    report.table("Where nkd_hf's time goes", ["", "ms an image", "share"], table)
    report.result["raw"]["parts"] = times


def compare_pixels(folder: Path, report: common.Report) -> None:
    """Greatest and mean difference, and the share of values that differ, in steps of 8 bits after rounding."""
    student = create_student("resnet18", num_labels=len(CLASSES))
    processor = load_image_processor(student)
    dataset = our_dataset(str(folder / "parquet"), {}, "bilinear")
    evaluation = ImageDataset(dataset.dataset, processor_transform(processor), training=False)
    scale, differences = 255 * torch.tensor(STD)[:, None, None], {}
    for index, row in enumerate(dataset.dataset):
        image = decode_with_pillow(row["image"]["bytes"])
        differences.setdefault("decoded by torchcodec - by Pillow", []).append(
            decode_with_torchcodec(row["image"]["bytes"]).permute(1, 2, 0).numpy().astype(float) - np.asarray(image)
        )
        differences.setdefault("evaluation - transformers' processor on Pillow's image", []).append(
            (scale * (evaluation[index]["pixel_values"] - _processed(processor, image))).numpy()
        )
        with seeded(dataset.seed, 0, index):
            expected = example_transform()(image)
        differences.setdefault("training - example, same crop and flip", []).append(
            (scale * (dataset[0, index]["pixel_values"] - expected)).numpy()
        )
    table = []
    for name, values in differences.items():
        steps = np.abs(np.concatenate([value.ravel() for value in values])).round(3)
        table.append([name, f"{steps.max():.3f}", f"{steps.mean():.4f}", f"{(steps > 0).mean():.1%}"])
        report.result["raw"][name] = {"greatest": float(steps.max()), "mean": float(steps.mean())}
    report.table("Pixels, in steps of 8 bits", ["", "greatest", "mean", "differ"], table)


def _processed(processor: BaseImageProcessor, image: PIL.Image.Image) -> Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


def main() -> None:
    parser = common.make_parser(__doc__, rounds=15)
    parser.add_argument("--images", type=int, default=400, help="how many are made (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    parser.add_argument("--augment", choices=AUGMENTS, default="crop", help="(default: %(default)s)")
    parser.add_argument("--crops", type=int, nargs="+", help="crops of an image, in place of the other loaders")
    parser.set_defaults(device="cpu")
    options = common.parse(parser)
    datasets.disable_progress_bars()

    report = common.Report(options)
    with tempfile.TemporaryDirectory() as folder:
        # The copy that `datasets` makes of the files goes with them.
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        write_images(Path(folder), options.images)
        if options.crops:
            compare_crops(Path(folder), options, report)
        else:
            compare_loaders(Path(folder), options, report)
            compare_parts(Path(folder), options, report)
            compare_pixels(Path(folder), report)
    report.write()


if __name__ == "__main__":
    main()
