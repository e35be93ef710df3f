"""What each loss costs: `python benchmarks/loss_costs.py --json benchmarks/results/loss_costs.json`.

Forward and backward in float32, eager. The losses of logits are beside cross-entropy of the same logits, and `% of a step` is
their time, less cross-entropy's, in a training step of ResNet-18. The losses of feature maps begin with the last maps of
ResNet-18 and ResNet-34, so that their time has all that they add: SD-NKD's classifiers of 21 regions, SRRL's connector, MGD's
generator. ViTKD begins with the tokens of DeiT-Tiny and DeiT-Small. Steps are those of the student alone at 224 pixels,
measured in the same run with a batch of `--step_batch`, which the losses of feature maps have too.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import common
import torch
import torch.nn.functional as F
from timm import create_model
from torch import Tensor, nn

from nkd_hf import losses

STEPS = {"ResNet-18": "resnet18", "DeiT-Tiny": "deit_tiny_patch16_224"}
OF_TOKENS = "ViTKD"
DEVICE_COLUMN = ["device ms"]  # of a GPU's kernels alone


def make_rows(batch: int, classes: int, device: str) -> dict:
    """Forward and backward of each loss on the same logits."""
    torch.manual_seed(0)
    student = torch.randn(batch, classes, device=device).requires_grad_()
    mid = torch.randn(batch, classes, device=device).requires_grad_()
    teacher = 2 * torch.randn(batch, classes, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    both = student, teacher
    calls = {
        "cross-entropy": partial(F.cross_entropy, student, labels),
        "label smoothing": partial(F.cross_entropy, student, labels, label_smoothing=0.1),
        "KD": partial(losses.kd_loss, *both),
        "KD, standardised": partial(losses.kd_loss, *both, standardize=True),
        "DKD": partial(losses.dkd_loss, *both, labels),
        "WSLD": partial(losses.wsld_loss, *both, labels),
        "DIST": partial(losses.dist_loss, *both),
        "WTTM": partial(losses.wttm_loss, *both),
        "RLD": partial(losses.rld_loss, *both, labels),
        "NKD": partial(losses.nkd_loss, *both, labels),
        "USKD": partial(losses.uskd_loss, mid, student, labels),
        "Tf-KD": partial(losses.tfkd_loss, student, labels),
    }
    inputs = {"USKD": [student, mid]}

    def run(name: str) -> None:
        torch.autograd.grad(calls[name](), inputs.get(name, [student]))

    return {name: partial(run, name) for name in calls}


def make_map_rows(batch: int, classes: int, device: str) -> dict:
    """Forward and backward of each loss of feature maps or tokens, with the gradients of all that it trains."""
    torch.manual_seed(0)

    def draw(*shape: int, trained: bool = False) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_(trained)

    labels = torch.randint(classes, (batch,), device=device)
    student, teacher = draw(batch, 512, 7, 7, trained=True), draw(batch, 512, 7, 7)
    head, teacher_head = ([draw(classes, 512, trained=own), draw(classes, trained=own)] for own in (True, False))
    low, high = draw(batch, 2, 196, 192, trained=True), draw(batch, 196, 192, trained=True)
    sdnkd, srrl, mgd, vitkd = (
        loss.to(device)
        for loss in (
            losses.SDNKDLoss(),
            losses.SRRLLoss(512, 512),
            losses.MGDLoss(512, 512),
            losses.ViTKDLoss(192, 384),
        )
    )
    calls = {
        "SD-NKD": (partial(sdnkd, student, teacher, *head, *teacher_head, labels), [student, *head]),
        "SRRL": (partial(srrl, student, teacher, draw(batch, classes), *teacher_head), [student, *srrl.parameters()]),
        "MGD": (partial(mgd, student, teacher), [student, *mgd.parameters()]),
        OF_TOKENS: (
            partial(vitkd, low, high, draw(batch, 2, 196, 384), draw(batch, 196, 384)),
            [low, high, *vitkd.parameters()],
        ),
    }

    def run(name: str) -> None:
        call, inputs = calls[name]
        torch.autograd.grad(sum(call().values()), inputs)

    return {name: partial(run, name) for name in calls}


def make_steps(batch: int, device: str) -> dict:
    """Training steps of the students, without an optimiser."""
    pixels, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)

    def step(model: nn.Module) -> None:
        F.cross_entropy(model(pixels), labels).backward()

    return {name: partial(step, create_model(model).to(device)) for name, model in STEPS.items()}


def show_device_ms(run: Callable[[], None], device: str) -> list[str]:
    ms = common.measure_device_ms(run, device)
    return [] if ms is None else [f"{ms:.3f}"]


def main() -> None:
    parser = common.make_parser(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=256, help="of logits (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument(
        "--step_batch", type=int, default=8, help="images of a step and of maps (default: %(default)s)"
    )
    options = common.parse(parser)
    report, clock = common.Report(options), common.make_clock(options.device)
    rows = make_rows(options.batch, options.classes, options.device)
    map_rows = make_map_rows(options.step_batch, options.classes, options.device)
    steps = make_steps(options.step_batch, options.device)
    times = common.measure_times(rows | map_rows | steps, options.rounds, clock)
    per_image = median(times["ResNet-18"]) / options.step_batch
    matrix = options.batch * options.classes * 4
    table = []
    for name, run in rows.items():
        ratio, low, high = common.ratio(times[name], times["cross-entropy"])
        more = max(0.0, median(times[name]) - median(times["cross-entropy"])) / options.batch
        extra = common.measure_peak(run, options.device) / matrix - (2 if name == "USKD" else 1)
        cells = [
            common.show_ms(median(times[name])),
            f"{ratio:.2f} ({low:.2f} to {high:.2f})",
            f"{100 * more / per_image:.2f}",
            f"{extra:.1f}",
        ]
        table.append([name, *cells, *show_device_ms(run, options.device)])
    columns = ["", "ms", "x cross-entropy", "% of a step", "matrices of logits beyond the gradients"]
    columns += DEVICE_COLUMN if options.device != "cpu" else []
    report.table(f"[{options.batch}, {options.classes}] float32, eager", columns, table)
    table = []
    for name, run in map_rows.items():
        step = "DeiT-Tiny" if name == OF_TOKENS else "ResNet-18"
        share, low, high = (100 * value for value in common.ratio(times[name], times[step]))
        cells = [common.show_ms(median(times[name])), step, f"{share:.1f} ({low:.1f} to {high:.1f})"]
        table.append([name, *cells, *show_device_ms(run, options.device)])
    columns = ["", "ms", "step", "% of a step", *(DEVICE_COLUMN if options.device != "cpu" else [])]
    report.table(f"From maps and tokens of {options.step_batch} images, float32, eager", columns, table)
    report.result["raw"] = {"ms": times}
    report.write()


if __name__ == "__main__":
    main()
