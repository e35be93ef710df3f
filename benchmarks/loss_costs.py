"""What each loss of logits costs: `python benchmarks/loss_costs.py --json benchmarks/results/loss_costs.json`.

Forward and backward from logits in float32, eager, beside cross-entropy of the same logits. SD-NKD takes the logits of
21 regions, those of its grids 1, 2 and 4. `of a step` is the loss's time, less cross-entropy's, in a training step of
ResNet-18 at 224 pixels on this machine, measured in the same run with a batch of `--step_batch`.
"""

from functools import partial
from statistics import median

import common
import torch
import torch.nn.functional as F
from timm import create_model

from nkd_hf import losses

REGIONS = 21  # of the grids 1 x 1, 2 x 2 and 4 x 4


def make_rows(batch: int, classes: int, device: str) -> dict:
    """Forward and backward of each loss on the same logits."""
    torch.manual_seed(0)
    student = torch.randn(batch, classes, device=device).requires_grad_()
    mid = torch.randn(batch, classes, device=device).requires_grad_()
    teacher = 2 * torch.randn(batch, classes, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    student_regions = torch.randn(batch, classes, REGIONS, device=device).requires_grad_()
    teacher_regions = 2 * torch.randn(batch, classes, REGIONS, device=device)
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
        "SD-NKD, 21 regions": partial(losses.sd_nkd_loss, student_regions, teacher_regions, labels),
        "USKD": partial(losses.uskd_loss, mid, student, labels),
        "Tf-KD": partial(losses.tfkd_loss, student, labels),
    }
    inputs = {"SD-NKD, 21 regions": [student_regions], "USKD": [student, mid]}

    def run(name: str) -> None:
        torch.autograd.grad(calls[name](), inputs.get(name, [student]))

    return {name: partial(run, name) for name in calls}


def make_step(batch: int, device: str) -> dict:
    """A training step of ResNet-18, without an optimiser."""
    model = create_model("resnet18").to(device)
    pixels, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    return {"step": lambda: F.cross_entropy(model(pixels), labels).backward()}


def main() -> None:
    parser = common.make_parser(__doc__, rounds=15)
    parser.add_argument("--batch", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--step_batch", type=int, default=8, help="images of the step (default: %(default)s)")
    options = common.parse(parser)
    report, clock = common.Report(options), common.make_clock(options.device)
    rows = make_rows(options.batch, options.classes, options.device)
    times = common.measure_times(rows | make_step(options.step_batch, options.device), options.rounds, clock)
    per_image = median(times["step"]) / options.step_batch
    matrix = options.batch * options.classes * 4
    table = []
    for name, run in rows.items():
        ratio, low, high = common.ratio(times[name], times["cross-entropy"])
        more = max(0.0, median(times[name]) - median(times["cross-entropy"])) / options.batch
        gradients = REGIONS if "regions" in name else 2 if name == "USKD" else 1
        extra = common.measure_peak(run, options.device) / matrix - gradients
        cells = [
            f"{median(times[name]):.2f}",
            f"{ratio:.2f} ({low:.2f} to {high:.2f})",
            f"{100 * more / per_image:.2f}",
        ]
        table.append([name, *cells, f"{extra:.1f}"])
    columns = ["", "ms", "x cross-entropy", "% of a step", "matrices of logits beyond the gradients"]
    report.table(f"[{options.batch}, {options.classes}] float32, eager", columns, table)
    report.result["raw"] = {"ms": times}
    report.write()


if __name__ == "__main__":
    main()
