"""Is the plain command as good as a tuned recipe? `python benchmarks/plain_command.py --work DIR`.

Both train the students of evidence.py at 28 pixels, with NKD, from a teacher of random weights that has four times the CNN's
width; both see the same training, validation and test parts.

Tuned: the trainings of EVIDENCE.md, whose learning rate and weight were chosen on the validation part, and whose epochs,
augmentation, pixels and optimiser were set by hand for these data.

Plain: `nkd-hf distill` with data, models, size and seed alone. The command chooses the rest, trains the teacher too, and keeps the best
checkpoint on the validation part. `nkd-hf evaluate` then measures the student on the test part, once.

A training that is done is a file in `--work`, which a second start skips.
"""

import common  # first: it sets environment variables

# isort: split
import json
import statistics
import subprocess
import sys
from pathlib import Path

from deploy import read_option
from evidence_data import FASHION_FOLDER
from evidence_page import RESULT, mean_and_deviation
from evidence_runs import SIZE, STUDENTS, TEACHER, Bench
from scipy import stats

CELLS = ("digits/cnn", "digits/deit", "fashion/cnn", "fashion/deit")
AIM = 1.0


def run_seed(bench: Bench, cell: str, seed: int, more: list[str]) -> float:
    """Trains with the plain command, if that is not done yet, and returns the student's top-1 on the test part."""
    data, student = cell.split("/")
    out = bench.output / "runs" / f"{data}-{student}-seed{seed}"
    command = [Path(sys.executable).with_name("nkd-hf")]
    measured = out / "test.json"
    if not measured.is_file():
        own, teacher, folder = STUDENTS[student], TEACHER, bench.data_folder(data)
        train = ["distill", "--dataset_name", folder, "--validation_split", "validation", "--image_size", SIZE]
        train += ["--teacher", teacher["teacher"], "--teacher_args", json.dumps(teacher["teacher_args"])]
        train += ["--student", own["student"], "--student_args", json.dumps(own["student_args"])]
        train += ["--seed", seed, "--output_dir", out, *more]
        evaluate = [
            "evaluate",
            "--model",
            out / "student",
            "--dataset",
            folder,
            "--split",
            "test",
            "--output",
            measured,
        ]
        for arguments in (train, evaluate):
            subprocess.run([str(part) for part in command + arguments], check=True)
    return json.loads(measured.read_text(encoding="utf-8"))["top1"]


def main() -> None:
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the data and the runs")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="(default: all)")
    parser.add_argument("--fashion", type=Path, default=FASHION_FOLDER, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, help="at most so many of each part, for a trial")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of nkd-hf distill, for a trial"
    )
    options = common.parse(parser)
    report = common.Report(options)
    bench = Bench(options.work, images=options.images, fashion=options.fashion)
    for data in sorted({cell.split("/")[0] for cell in options.cells}):
        bench.write_data(data)
    more = [part for argument in options.set for part in read_option(argument)]
    plain = {
        cell: [100 * run_seed(bench, cell, seed, more) for seed in range(options.rounds)] for cell in options.cells
    }
    tabulate(report, plain, read_tuned())
    report.write()


def read_tuned() -> dict[str, list[float]]:
    """NKD's top-1 on the test part in evidence.py, by cell and in the order of the seeds."""
    runs = json.loads(RESULT.read_text(encoding="utf-8"))["runs"]
    nkd = sorted((run for run in runs if run["method"] == "nkd"), key=lambda run: run["seed"])
    return {cell: [100 * run["test"] for run in nkd if f"{run['data']}/{run['student']}" == cell] for cell in CELLS}


def tabulate(report: common.Report, plain: dict[str, list[float]], tuned: dict[str, list[float]]) -> None:
    """Prints the table and the aims; the seeds of the two sides are not paired."""
    rows = []
    for cell, top1 in plain.items():
        seeds = ", ".join(f"{value:.2f}" for value in top1)
        rows.append([cell, seeds, mean_and_deviation(top1), mean_and_deviation(tuned[cell])])
    title = "Top-1 on the test part, and its standard deviation over the seeds"
    report.table(title, ["", "plain, seed by seed", "plain", "tuned"], rows)
    for cell, top1 in plain.items():
        value, spread = statistics.mean(tuned[cell]) - statistics.mean(top1), None
        if len(top1) > 1:
            interval = stats.ttest_ind(tuned[cell], top1, equal_var=False).confidence_interval()
            spread = float(interval.low), float(interval.high)
        report.aim(f"points of top-1, {cell}, tuned less plain", value, AIM, spread=spread)
    report.result["raw"] = {"plain": plain, "tuned": tuned}


if __name__ == "__main__":
    main()
