"""Does it help? All methods on real data, with one budget for all.

    python benchmarks/evidence.py --json benchmarks/results/evidence.json

The students are trained by `nkd_hf.DistillationTrainer` on what `nkd_hf.Recipe` opens, from stores that `nkd-hf
teacher-logits` writes: one for each data set and seed, shared by all methods and students, of the data set's one teacher.

1. On a seed of its own, each method and student gets six trainings, whose last accuracy on a validation part of the
   training data chooses the learning rate (of four, at the first loss weight) and then the loss weight (of three).
   The baseline, which has no weight, gets two more learning rates. The test part plays no role.
2. With what was chosen, five seeds each; the test part is looked at once, at the end of a training. The validation
   part stays out of the training, and gives the curves.
3. The same for the ablations of NKD and USKD, on the CNN, with the settings of the whole method.

A training that is done is a file in `--output`, which a second start skips; `--extend` takes those of the committed
result as done, for more `--seeds`. evidence_page.py makes the page of the result. `--only fashion/cnn/nkd` trains one
cell again, with its teacher, and compares it with the committed figure.
"""

import common  # first: it sets environment variables

# isort: split
import argparse
import gc
import json
import multiprocessing
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_data import FASHION_FOLDER, has_fashion
from evidence_losses import ABLATIONS
from evidence_runs import DATA, STUDENTS, Bench, Job

RESULT = Path(__file__).parent / "results" / "evidence.json"
SELECTION_SEED = 100

# What is chosen from, six trainings for each method. The rates reach lower for the CNN and higher for the DeiT, since
# there most methods did best at the end of a first choice of three.
RATES = {"cnn": [0.1, 0.03, 0.3, 0.01], "deit": [2e-3, 7e-4, 6e-3, 2e-2]}
MORE_RATES_OF_BASELINE = {"cnn": [0.055, 0.17], "deit": [1.2e-3, 3.5e-3]}
# The first is the default of the library; the others are a third of the weight and three times it (for KD, of alpha to
# 1 - alpha), and for USKD a third of it and the paper's weights for CIFAR-100.
WEIGHTS = {
    "baseline": [{}],
    "kd": [{"alpha": 0.5}, {"alpha": 0.25}, {"alpha": 0.75}],
    "dkd": [{"beta": 6.0}, {"beta": 2.0}, {"beta": 18.0}],
    "dist": [{"beta": 1.0, "gamma": 1.0}, {"beta": 0.33, "gamma": 0.33}, {"beta": 3.0, "gamma": 3.0}],
    "wttm": [{"beta": 1.0}, {"beta": 0.33}, {"beta": 3.0}],
    "nkd": [{"gamma": 1.5}, {"gamma": 0.5}, {"gamma": 4.5}],
    "uskd": [
        {"alpha": 1.0, "beta": 0.1, "mu": 0.005}, {"alpha": 0.33, "beta": 0.033, "mu": 0.0017},
        {"alpha": 0.1, "beta": 0.1, "mu": 0.1},
    ],
}  # fmt: skip


def _set_up_worker() -> None:
    import datasets
    import transformers

    torch.set_num_threads(1)
    common.keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # accelerate collects garbage several times in each training, and would look through all modules: 7% of a short one.
    gc.collect()
    gc.freeze()


def in_parallel(calls: list[tuple], jobs: int, what: str) -> None:
    """Does the calls, (function, *arguments), in processes of their own that have one thread each."""
    if jobs == 1:
        _set_up_worker()
        for number, (function, *args) in enumerate(calls, 1):
            print(f"[{what} {number}/{len(calls)}] {function(*args)}", flush=True)
        return
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["nkd_hf.recipe.recipe", "scipy.stats"])  # imported once for all processes
    with ProcessPoolExecutor(jobs, forks, _set_up_worker) as pool:
        futures = [pool.submit(*call) for call in calls]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                print(f"[{what} {number}/{len(calls)}] {future.result()}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def select(bench: Bench, cells: list[tuple[str, str, str]], jobs: int) -> dict[str, dict]:
    """Chooses learning rate and loss weight of each cell, by the accuracy on the validation part."""

    def candidates(cell: tuple[str, str, str]) -> list[Job]:
        _, student, method = cell
        rates = RATES[student] + (MORE_RATES_OF_BASELINE[student] if method == "baseline" else [])
        return [Job(*cell, SELECTION_SEED, rate, WEIGHTS[method][0]) for rate in rates]

    def best(of: list[Job]) -> Job:
        return max(of, key=lambda job: bench.read(job)["validation"])  # the first of equals: nearest to the default

    tried = {cell: candidates(cell) for cell in cells}
    in_parallel([(bench.train, job, False) for of in tried.values() for job in of], jobs, "learning rates")
    more = {cell: [best(of)._replace(loss_args=args) for args in WEIGHTS[cell[2]][1:]] for cell, of in tried.items()}
    in_parallel([(bench.train, job, False) for of in more.values() for job in of], jobs, "loss weights")
    chosen = {}
    for cell, of in tried.items():
        winner = best([*of, *more[cell]])
        accuracies = [
            {
                "learning_rate": job.learning_rate,
                "loss_args": job.loss_args,
                "validation": bench.read(job)["validation"],
                "cpu": bench.read(job)["cpu"],
            }
            for job in [*of, *more[cell]]
        ]
        chosen["/".join(cell)] = {
            "learning_rate": winner.learning_rate, "loss_args": winner.loss_args, "tried": accuracies
        }  # fmt: skip
    return chosen


def jobs_of(cell: tuple[str, str, str], chosen: dict[str, dict], seeds: list[int]) -> list[Job]:
    """The trainings of a cell; none of an ablation that changes nothing of what was chosen: it is the method itself."""
    data, student, method = cell
    ablation = ABLATIONS.get(method)
    own = chosen[f"{data}/{student}/{ablation.method if ablation else method}"]
    if ablation and not ablation.loss and ablation.loss_args.items() <= own["loss_args"].items():
        return []
    return [Job(*cell, seed, own["learning_rate"], own["loss_args"]) for seed in seeds]


def run_all(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Everything: data, stores, selection, trainings."""
    start, seeds = time.perf_counter(), list(range(options.seeds))
    known = json.loads(options.result.read_text(encoding="utf-8")) if options.extend else None
    if known:
        take_over(bench, known)
    bench.check_settings(options.data)
    in_parallel([(bench.write_data, data) for data in options.data], options.jobs, "data")
    methods = [method for method in WEIGHTS if method in options.methods]
    in_parallel([(bench.write_teacher, data) for data in options.data], options.jobs, "teachers")
    in_parallel(
        [
            (bench.prepare, data, options.students[0], seed)
            for data in options.data
            for seed in (SELECTION_SEED, *seeds)
        ],
        options.jobs,
        "images and logits",
    )
    teachers = {data: bench.teacher_accuracies(data, options.students[0], SELECTION_SEED) for data in options.data}
    if known and any(known["teachers"].get(data) != own for data, own in teachers.items()):
        raise SystemExit(f"the teachers are others: {teachers}, and of {options.result} {known['teachers']}")
    cells = [(data, student, method) for data in options.data for student in options.students for method in methods]
    chosen = select(bench, cells, options.jobs)
    if "cnn" in options.students:
        names = [name for name in options.ablations if ABLATIONS[name].method in methods]
        cells += [(data, "cnn", name) for data in options.data for name in names]
    jobs = [job for cell in cells for job in jobs_of(cell, chosen, seeds)]
    calls = [(bench.train, job, True, job[1:4] == ("cnn", "uskd", 0)) for job in jobs]
    in_parallel(calls, options.jobs, "trainings")
    return {
        "command": shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]]), "commit": bench.commit,
        "machine": common.describe_machine(), "seeds": seeds, "selection_seed": SELECTION_SEED,
        "settings": bench.settings(options.data), "teachers": teachers,
        "minutes_of_this_start": round((time.perf_counter() - start) / 60, 1),
        "chosen": chosen, "runs": [bench.read(job) for job in jobs],
    }  # fmt: skip


def take_over(bench: Bench, result: dict[str, Any]) -> None:
    """Writes the trainings of a result to the bench's folder, as if they had been done there.

    Raises:
        SystemExit: they had other settings, or were done on another machine or with other versions.
    """
    own = common.describe_machine() | {"settings": bench.settings(list(result["settings"]["data"]))}
    theirs = result["machine"] | {"settings": result["settings"]}
    others = [
        f"{name}: {value}, there {theirs.get(name)}"
        for name, value in own.items()
        if name != "load_average" and value != theirs.get(name)
    ]
    if others:
        raise SystemExit(f"--extend: the result was measured under other conditions: {'; '.join(others)}")
    bench.check_settings(list(result["settings"]["data"]))
    runs = list(result["runs"])
    for cell, chosen in result["chosen"].items():
        data, student, method = cell.split("/")
        named = {"data": data, "student": student, "method": method, "seed": result["selection_seed"]}
        runs += [named | trial for trial in chosen["tried"]]
    for run in runs:
        path = bench.path_of(Job(*(run[name] for name in Job._fields)))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            path.write_text(json.dumps({"commit": result["commit"]} | run) + "\n", encoding="utf-8")


def rebuild(bench: Bench, cell: tuple[str, str, str], result: dict[str, Any], jobs: int) -> bool:
    """Trains one cell again, teachers and all, with what was chosen; whether its figures are those of the result."""
    data, student, method = cell
    trainings = jobs_of(cell, result["chosen"], result["seeds"])
    known = {
        run["seed"]: (run["test"], run["test_loss"])
        for run in result["runs"]
        if (run["data"], run["student"], run["method"]) == cell
    }  # fmt: skip
    in_parallel([(bench.write_data, data)], jobs, "data")
    method = ABLATIONS[method].method if method in ABLATIONS else method
    has_teacher = method not in ("baseline", "uskd")
    if has_teacher:
        in_parallel([(bench.write_teacher, data)], jobs, "teachers")
    in_parallel(
        [(bench.prepare, data, student, job.seed, has_teacher) for job in trainings], jobs, "images and logits"
    )
    in_parallel([(bench.train, job, True) for job in trainings], jobs, "trainings")
    done = [bench.read(job) for job in trainings]
    again = {run["seed"]: (run["test"], run["test_loss"]) for run in done}
    for name, figures in (("again", again), ("committed", known)):
        values = 100 * np.array([accuracy for accuracy, _ in figures.values()])
        print(f"{name:<10}{values.mean():.2f} +- {values.std(ddof=1):.2f}   {', '.join(f'{v:.2f}' for v in values)}")
    return again == known


def commit() -> str:
    """The commit of the code, and whether it was changed since."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../nkd_hf", "../benchmarks/*.py")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/evidence"), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--fashion", type=Path, default=FASHION_FOLDER, help="folder of the files of Debian's package "
                        "dataset-fashion-mnist (default: %(default)s)")  # fmt: skip
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--only", metavar="DATA/STUDENT/METHOD", help="train one cell of the result again, and compare")
    known.add_argument("--extend", action="store_true", help="train only what the result lacks, such as more --seeds")
    parser.add_argument("--result", type=Path, default=RESULT, help="for both (default: %(default)s)")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--methods", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--ablations", nargs="*", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="in place of those of the data, for a trial")
    parser.add_argument("--images", type=int, help="at most so many of each part, for a trial")
    options = parser.parse_args(args)
    if "baseline" not in options.methods:
        parser.error("--methods must have the baseline, which the others are compared with")
    if options.only:
        result = json.loads(options.result.read_text(encoding="utf-8"))
        cell = tuple(options.only.split("/"))
        if cell not in {(run["data"], run["student"], run["method"]) for run in result["runs"]}:
            parser.error(f"--only: {options.result} has no cell {options.only}")
        with tempfile.TemporaryDirectory() as folder:
            settings = result["settings"]["data"][cell[0]]
            bench = Bench(Path(folder), settings["epochs"], max(settings["images"].values()), options.fashion)
            same = rebuild(bench, cell, result, options.jobs)
        sys.exit(0 if same else "the figures differ: another machine, other versions, or other code")
    if "fashion" in options.data and not has_fashion(options.fashion):
        print(f"Fashion-MNIST is skipped: {options.fashion} lacks its files (apt install dataset-fashion-mnist)")
        options.data.remove("fashion")
    bench = Bench(options.output.absolute(), options.epochs, options.images, options.fashion, commit())
    result = run_all(bench, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(dump(result), encoding="utf-8")
        print(f"wrote {options.json}")


def dump(result: dict[str, Any]) -> str:
    """JSON with one line for each training."""
    runs = ",\n".join(json.dumps(run) for run in result["runs"])
    head = json.dumps(result | {"runs": []}, indent=1, default=str)
    return head.replace('"runs": []', f'"runs": [\n{runs}\n]') + "\n"


if __name__ == "__main__":
    main()
