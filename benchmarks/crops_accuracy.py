"""What several crops of an image do to accuracy: `python benchmarks/crops_accuracy.py`.

A CNN and a DeiT are trained on digits with cross-entropy, for the same number of samples: with one crop of an image an
epoch, and with `--crops` of a quarter (or so) of the images. Seeds and sides alternate.

Aim: the accuracies' mean difference, seed by seed, lies within two standard errors of 0.
"""

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from statistics import mean, stdev

import common
import digits

SMALL_CNN = ["--student", "resnet18", "--student_args", '{"channels": [8, 16, 32, 64], "layers": [1, 1, 1, 1]}']
# Each with a configuration of the digits and more arguments.
STUDENTS = {"CNN": (digits.CONFIG, SMALL_CNN), "DeiT": (digits.CONFIG.with_name("digits_distill_deit.yaml"), [])}


def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--epochs", type=int, default=20, help="a multiple of the crops (default: %(default)s)")
    parser.add_argument("--crops", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=[*STUDENTS], help="(default: both)")
    parser.add_argument("--recipe", default="", metavar="ARGUMENTS", help="more arguments of the recipe, as one text")
    options = common.parse(parser)

    report, accuracies = common.Report(options), {name: {1: [], options.crops: []} for name in options.students}
    args = [*digits.arguments(options), "--distillation_loss", "none", *options.recipe.split()]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        for seed in range(options.rounds):
            for name in options.students:
                config, student = STUDENTS[name]
                for crops in accuracies[name]:
                    own = [*args, *student, "--seed", str(seed), "--crops_per_image", str(crops)]
                    with contextlib.redirect_stdout(io.StringIO()):
                        accuracy = digits.train(folder, own, config=config).results["baseline"]
                    shutil.rmtree(folder)
                    accuracies[name][crops].append(accuracy)
                    print(f"seed {seed}, {name}, crops {crops}: {accuracy:.2%}", flush=True)

    rows = []
    for name, sides in accuracies.items():
        for crops, values in sides.items():
            spread = stdev(values) if len(values) > 1 else 0.0
            difference, error = common.difference(values, sides[1])
            cells = [", ".join(f"{100 * value:.2f}" for value in values)]
            cells += [f"{100 * mean(values):.2f} +- {100 * spread:.2f}"]
            cells.append("" if crops == 1 else f"{100 * difference:+.2f} +- {100 * error:.2f}")
            rows.append([f"{name}, {crops} crop{'s' * (crops > 1)}", *cells])
        what = f"{name}: difference of accuracies, in standard errors"
        report.aim(what, abs(difference) / max(error, 1e-9), 2.0)
    columns = ["", "top-1, seed by seed", "mean +- standard deviation", "less one crop's"]
    report.table(f"Digits, {options.epochs} epochs, {options.rounds} seeds", columns, rows)
    report.result["raw"] = {"accuracies": accuracies}
    report.write()


if __name__ == "__main__":
    main()
