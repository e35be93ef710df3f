"""What the resize of training images does to accuracy: `python benchmarks/input_accuracy.py`.

scikit-learn's digits, enlarged to 64 x 64 and written as JPEGs, train the CNN of SETTINGS at 32 pixels with
cross-entropy and random resized crops. For each seed there are two runs, equal in all but the training pixels: in one
torchcodec decodes and PyTorch resizes, as nkd_hf does with plain JPEGs; in the other Pillow does both, with the same
draws. Evaluation goes through Pillow in either.

Aim: the accuracies' mean difference, seed by seed, lies within two standard errors of 0. The second table compares
the pixels that the two runs were trained on, in steps of 8 bits.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from statistics import mean, stdev

import common
import datasets
import digits
import PIL.Image
import torch

from nkd_hf import DataArguments, ImageDataset, Recipe, load_image_dataset

# A ResNet-10 of width 8, which learns the digits in few epochs.
SETTINGS = [
    *("--distillation_loss", "none", "--student", "resnet18"),
    *("--student_args", '{"channels": [8, 16, 32, 64], "layers": [1, 1, 1, 1]}'),
]
SIZE, QUALITY = 64, 95


def write_images(folder: Path) -> None:
    """The package's splits of the digits as `<split>.parquet`, of JPEGs in RGB."""
    folder.mkdir()
    for split, rows in load_image_dataset(DataArguments(dataset_name="digits")).items():
        images = []
        for row in rows:
            image, jpeg = PIL.Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), io.BytesIO()
            image.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=QUALITY)
            images.append({"image": {"bytes": jpeg.getvalue(), "path": None}, "label": row["label"]})
        features = datasets.Features(image=datasets.Image(), label=rows.features["label"])
        datasets.Dataset.from_list(images, features=features).to_parquet(folder / f"{split}.parquet")


class SeenImages(ImageDataset):
    """Keeps the pixels of each sample, in 8 bits, by epoch and row."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: dict[tuple[int, int], torch.Tensor] = {}

    def get_sample(self, epoch: int, index: int) -> dict:
        sample = super().get_sample(epoch, index)
        pixels = sample["pixel_values"] * self.transform.std + self.transform.mean
        self.seen[epoch, index] = (255 * pixels).round().to(torch.uint8)
        return sample


class TensorRecipe(Recipe):
    takes_tensors = True

    def datasets(self, student: torch.nn.Module) -> tuple[SeenImages, ImageDataset]:
        train, validation = super().datasets(student)
        train.transform.takes_tensors = self.takes_tensors
        self.images = SeenImages(train.dataset, train.transform, train.seed)
        return self.images, validation


class PillowRecipe(TensorRecipe):
    takes_tensors = False


def pixel_steps(images: SeenImages, others: SeenImages) -> torch.Tensor:
    """How many of the pixels' values differ by 0, 1, 2, ... steps."""
    if images.seen.keys() != others.seen.keys():
        raise RuntimeError("the two runs were trained on different images")
    counts = torch.zeros(256, dtype=torch.int64)
    for key, pixels in images.seen.items():
        counts += (pixels.int() - others.seen[key].int()).abs().flatten().bincount(minlength=256)
    if not counts[1:].any():
        raise RuntimeError("the two runs were trained on the same pixels: no image was read as a tensor")
    return counts


def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--seeds", type=int, dest="rounds", default=5, help="the same as --rounds")
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--interpolation", nargs="+", default=["bilinear", "bicubic"], help="(default: both)")
    options = common.parse(parser)
    datasets.disable_progress_bars()

    report, accuracies, steps = common.Report(options), {}, {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        # The copy that `datasets` makes of the files goes with them.
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        write_images(folder / "digits")
        args = [*digits.arguments(options), *SETTINGS, "--dataset_name", str(folder / "digits")]
        for seed in range(options.rounds):
            for interpolation in options.interpolation:
                images = []
                for side, kind in (("Pillow", PillowRecipe), ("tensors", TensorRecipe)):
                    own = [*args, "--interpolation", interpolation, "--seed", str(seed)]
                    with contextlib.redirect_stdout(io.StringIO()):
                        recipe = digits.train(folder / "run", own, kind)
                    shutil.rmtree(folder / "run")
                    images.append(recipe.images)
                    accuracy = recipe.results["baseline"]
                    accuracies.setdefault(interpolation, {}).setdefault(side, []).append(accuracy)
                    print(f"seed {seed}, {interpolation}, {side}: {accuracy:.2%}", flush=True)
                steps[interpolation] = steps.get(interpolation, 0) + pixel_steps(*images)

    rows, pixels = [], []
    for interpolation, sides in accuracies.items():
        for side, values in sides.items():
            spread = stdev(values) if len(values) > 1 else 0.0
            difference, error = common.difference(values, sides["Pillow"])
            cells = [", ".join(f"{100 * value:.2f}" for value in values)]
            cells += [f"{100 * mean(values):.2f} +- {100 * spread:.2f}"]
            rows.append([f"{interpolation}, {side}", *cells, f"{100 * difference:+.2f} +- {100 * error:.2f}"])
            if side == "tensors":
                what = f"{interpolation}: difference of accuracies, in standard errors"
                report.aim(what, abs(difference) / max(error, 1e-9), 2.0)
        counts = steps[interpolation]
        share = counts / counts.sum()
        average = (share * torch.arange(256)).sum()
        greatest = counts.nonzero().max()
        pixels.append([f"{interpolation}, tensors - Pillow", f"{greatest}", f"{average:.4f}", f"{1 - share[0]:.1%}"])
    columns = ["", "top-1, seed by seed", "mean +- standard deviation", "less Pillow's"]
    report.table(f"Digits as JPEGs, {options.epochs} epochs, {options.rounds} seeds", columns, rows)
    report.table("Training pixels, in steps of 8 bits", ["", "greatest", "mean", "differ"], pixels)
    report.result["raw"] = {
        "accuracies": accuracies, "pixels by steps": {name: counts.tolist() for name, counts in steps.items()},
    }  # fmt: skip
    report.write()


if __name__ == "__main__":
    main()
