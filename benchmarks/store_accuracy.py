"""What training from a store of teacher logits does to curve and accuracy: `python benchmarks/store_accuracy.py`.

The recipe of recipes/configs/digits_distill_cnn.yaml: one teacher is trained; then, for each seed, a student with
the live teacher, which is the floor, and one from a store of each K that `nkd-hf teacher-logits` writes. Seeds and
sides alternate.

Aims: at K = all, the training loss of each step is the live teacher's to 1e-4; at smaller K, the accuracies' mean
difference from the live teacher's, seed by seed, lies within two standard errors of 0. The digits have 10 classes, so
that K = 10 and 100 are the same store, of all logits with those but the target's in float16; K = 2 is the harder
case, which leaves seven out. `--numbers` trains on two digits side by side, 100 classes, in place of one: there
K = 100 has all of them, and K = 10 a tenth.

`--cycle 1 2` adds stores of all logits whose epochs are repeated. Aim: with a sixth of the epochs or more, the mean
difference lies within two standard errors of 0. Smaller cycles show where the accuracy begins to suffer.
"""

import argparse
import contextlib
import io
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from statistics import mean

import common
import datasets
import digits
import torch

from nkd_hf import cli

CURVE_AIM = 1e-4


def run(folder: Path, args: list[str]) -> tuple[list[float], float]:
    """The training losses, step by step, and the accuracy of the student that the recipe trains."""
    recipe = digits.train(folder, args)
    history = json.loads((folder / "student" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], recipe.results["distilled"]


def tabulate(
    report: common.Report, options: argparse.Namespace, accuracies: dict, losses: dict, num_bytes: dict
) -> None:
    rows = []
    for side, values in accuracies.items():
        difference, error = common.difference(values, accuracies["live"])
        cells = [", ".join(f"{100 * value:.2f}" for value in values), f"{100 * mean(values):.2f}"]
        cells.append(f"{100 * difference:+.2f} +- {100 * error:.2f}")
        name = side if side == "live" else f"stored, {side}"
        rows.append([name, *cells, "", f"{num_bytes.get(side, 0) / 1e6:.2f}"])
        if side in losses:
            pairs = zip(losses[side], losses["live"], strict=True)
            off = max((torch.tensor(curve) - torch.tensor(live)).abs().max().item() for curve, live in pairs)
            rows[-1][-2] = f"{off:.1e}"
        if side == "all":
            report.aim("stored, all: greatest difference of a step's loss from the live teacher's", off, CURVE_AIM)
        elif side != "live" and (not side.startswith("cycle") or 6 * _epochs(side) >= options.epochs):
            what = f"stored, {side}: difference of accuracies, in standard errors"
            report.aim(what, abs(difference) / max(error, 1e-9), 2.0)
    columns = ["", "top-1, seed by seed", "mean", "less the live teacher's", "loss off by", "MB of the store"]
    data = f"{options.numbers} numbers of two digits" if options.numbers else "Digits"
    report.table(f"{data}, {options.epochs} epochs, {options.rounds} seeds", columns, rows)
    report.result["raw"] = {"accuracies": accuracies, "losses": losses}


def _epochs(side: str) -> int:
    return int(side.split()[-1])


def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--epochs", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--cycle", type=int, nargs="+", default=[], help="stores of so many epochs, repeated")
    parser.add_argument("--top_k", nargs="*", default=["all", "10", "2"], help="stores (default: all 10 2)")
    parser.add_argument("--recipe", default="", metavar="ARGUMENTS", help="more arguments of the recipe, as one text")
    parser.add_argument("--numbers", type=int, metavar="IMAGES", help="train on so many numbers of two digits")
    options = common.parse(parser)

    report, losses, accuracies, num_bytes = common.Report(options), {}, {}, {}
    common_args = [*digits.arguments(options), *shlex.split(options.recipe)]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        if options.numbers:
            # The copy that `datasets` makes of the files goes with them.
            datasets.config.HF_DATASETS_CACHE = folder / "cache"
            datasets.disable_progress_bars()
            digits.write_numbers(folder / "numbers", options.numbers, 1000)
            # A smaller crop would cut a digit off.
            common_args += ["--dataset_name", str(folder / "numbers"), "--random_resized_crop", "0.9", "1.0"]
        with contextlib.redirect_stdout(io.StringIO()):
            run(folder / "first", common_args)  # for its teacher
        common_args += ["--teacher", str(folder / "first" / "teacher"), "--teacher_args", "{}"]
        for seed in range(options.rounds):
            args = [*common_args, "--seed", str(seed)]
            for side in ("live", *options.top_k, *(f"cycle of {cycle}" for cycle in options.cycle)):
                own = args
                with contextlib.redirect_stdout(io.StringIO()):
                    if side != "live":
                        store = str(folder / "store")
                        # In batches of the run's size, as kernels for other sizes may round differently.
                        command = [
                            "teacher-logits",
                            "--config",
                            str(digits.CONFIG),
                            *args,
                            "--output",
                            store,
                            "--top_k",
                            *(["all", "--cycle", side.split()[-1]] if side.startswith("cycle") else [side]),
                        ]
                        cli.main([*command, "--epochs", str(options.epochs), "--batch_size", "64"])
                        own = [*args, "--teacher_logits", store]
                        sizes = [path.stat().st_size for path in Path(store).glob("epoch-*/*.safetensors")]
                        num_bytes[side] = sum(sizes)
                    curve, accuracy = run(folder / "run", own)
                if options.top_k and not side.startswith("cycle"):
                    losses.setdefault(side, []).append(curve)
                accuracies.setdefault(side, []).append(accuracy)
                print(f"seed {seed}, {side}: {accuracy:.2%}", flush=True)
                for name in ("run", "store"):
                    shutil.rmtree(folder / name, ignore_errors=True)

    tabulate(report, options, accuracies, losses, num_bytes)
    report.write()


if __name__ == "__main__":
    main()
