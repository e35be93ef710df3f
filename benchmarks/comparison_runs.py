"""The cells, methods and trainings of comparison.py."""

import contextlib
import copy
import io
import json
import math
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from comparison_teacher import FINETUNING, PACKAGE, write_pretrained_teacher, write_small_teacher
from comparison_temperature import describe_confidence
from evidence_runs import STUDENTS, TEACHER_SEED, Bench, Job, Suite
from scipy import stats
from torch import nn
from transformers import IntervalStrategy

from nkd_hf import DistillationTrainer, NonFiniteLossError
from nkd_hf.files import write_whole
from nkd_hf.teacher_logits.store import TeacherLogits

PRETRAINED = "pretrained"
DATA = {
    "fashion": {
        "classes": 10, "images": {"train": 4000, "validation": 1000, "test": 10000},
        "epochs": {"cnn": 15, "deit": 40}, "random_crop_padding": 2, "horizontal_flip": 0.5,
    },
    "numbers": {
        "classes": 100, "images": {"train": 4000, "validation": 1000, "test": 5000},
        "epochs": {"cnn": 15, "deit": 40}, "random_resized_crop": [0.9, 1.0], "horizontal_flip": 0.0,
    },
    # The images of `fashion`, and a teacher with ImageNet weights.
    PRETRAINED: {
        "classes": 10, "images": {"train": 4000, "validation": 1000, "test": 10000},
        "epochs": {"cnn": 15}, "random_crop_padding": 2, "horizontal_flip": 0.5, "image_size": 32,
    },
}  # fmt: skip
# A ResNet of twice the student's width, whose weights lie beside the results.
TEACHER = {
    "teacher": "resnet18",
    "teacher_args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128], "stem_type": "deep", "stem_width": 8},
    "optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4, "learning_rate": 0.1,
}  # fmt: skip
SUITE = Suite(DATA, STUDENTS, TEACHER)
CELLS = [f"{data}/{student}" for data in DATA for student in DATA[data]["epochs"]]


class Range(NamedTuple):
    """Bounds of a setting."""

    low: float
    high: float

    def at(self, place: float) -> float:
        """The value at a place from 0 to 1 of the logarithmic scale between the bounds."""
        return self.low * (self.high / self.low) ** place


class Rest(NamedTuple):
    """Bounds of the task loss's share, which is 1 minus the setting: KD's `alpha`."""

    low: float
    high: float

    def at(self, place: float) -> float:
        return 1 - Range(*self).at(place)


RATES = {"cnn": Range(0.003, 0.3), "deit": Range(5e-4, 1e-2)}


class Method(NamedTuple):
    """A loss of the library, or none, with what is searched beside the learning rate, and what is fixed."""

    text: str
    loss: str = "none"
    searched: dict[str, Range | Rest] = {}  # noqa: RUF012 (they are not changed)
    fixed: dict[str, Any] = {}  # noqa: RUF012
    # Whether it is in the families of the comparison. Else it is an arm of the test of NKD's temperature, a family of its own.
    in_families: bool = True


_SHARE, _WEIGHT, _TEMPERATURE = Rest(0.01, 0.9), Range(0.25, 4.0), Range(1.0, 8.0)
GAMMA = Range(0.25, 4.0)
TEMPERATURE_1, CONFIDENCE = "nkd_temperature_1", "nkd_confidence"
BY_CONFIDENCE, BY_CLASSES = "by the teacher's confidence", "the number of classes"
# Of each method its weight and its temperature, where it has them. Tf-KD's strength is alpha * multiplier / classes: with this
# multiplier it is alpha, as in the official code, which is for 100 classes.
METHODS = {
    "baseline": Method("baseline"),
    "label_smoothing": Method("label smoothing", searched={"label_smoothing_factor": Range(0.02, 0.4)}),
    "kd": Method("KD", "kd", {"alpha": _SHARE, "temperature": _TEMPERATURE}),
    "kd_standardized": Method(
        "standardised KD", "kd", {"alpha": _SHARE, "temperature": _TEMPERATURE}, {"standardize": True}
    ),
    "dkd": Method("DKD", "dkd", {"beta": Range(0.5, 16.0), "temperature": _TEMPERATURE}),
    "dist": Method("DIST", "dist", {"beta": _WEIGHT, "gamma": _WEIGHT}),
    "wttm": Method("WTTM", "wttm", {"beta": _WEIGHT, "exponent": Range(0.1, 0.8)}),
    "rld": Method("RLD", "rld", {"beta": Range(0.5, 16.0), "temperature": _TEMPERATURE}),
    "nkd": Method("NKD", "nkd", {"gamma": GAMMA, "temperature": _TEMPERATURE}),
    "uskd": Method("USKD", "uskd", {"alpha": Range(0.1, 1.0), "beta": Range(0.02, 0.5)}),
    "tfkd": Method(
        "Tf-KD", "tfkd", {"alpha": Range(0.01, 0.9), "temperature": Range(4.0, 40.0)}, {"multiplier": BY_CLASSES}
    ),
    TEMPERATURE_1: Method("NKD at temperature 1", "nkd", {"gamma": GAMMA}, {"temperature": 1.0}, in_families=False),
    CONFIDENCE: Method(
        "NKD at the rule's temperature", "nkd", {"gamma": GAMMA}, {"temperature": BY_CONFIDENCE}, in_families=False
    ),
}
MAIN = [name for name, method in METHODS.items() if method.in_families]
# By student: the methods in the order in which they are run, and how many of them a cell must have to count.
ORDERS = {
    "cnn": MAIN,
    "deit": [
        "baseline",
        "nkd",
        "dist",
        "kd",
        "uskd",
        "label_smoothing",
        "wttm",
        "dkd",
        "rld",
        "kd_standardized",
        "tfkd",
    ],
}
NEEDED = {"cnn": len(MAIN), "deit": 4}


def draw_points(ranges: dict[str, Range | Rest], trials: int) -> list[dict[str, float]]:
    """Draws the settings of the trials of a method, from the Latin hypercube with seed 0 that all methods share.

    So each setting has one value in each of `trials` equal parts of its range, all methods of a student have the same
    learning rates, and two methods with the same settings have the same points.
    """
    places = stats.qmc.LatinHypercube(3, optimization="random-cd", rng=0).random(trials).tolist()
    assert len(ranges) <= len(places[0]), "the hypercube needs a dimension more"
    return [{name: bounds.at(at) for (name, bounds), at in zip(ranges.items(), row, strict=False)} for row in places]


def points_of(student: str, method: str, trials: int) -> list[dict[str, float]]:
    """The settings of the trials of a method, in their order."""
    return draw_points({"learning_rate": RATES[student], **METHODS[method].searched}, trials)


def are_near(points: list[dict[str, float]], others: list[dict[str, float]]) -> bool:
    """Whether two lists of settings are equal but for the rounding of another processor."""
    return len(points) == len(others) and all(
        point.keys() == other.keys() and all(math.isclose(point[name], other[name], rel_tol=1e-9) for name in point)
        for point, other in zip(points, others, strict=True)
    )


def describe(method: str) -> dict[str, Any]:
    """What a search records of its method, beside the points."""
    return {"loss": METHODS[method].loss, "fixed": METHODS[method].fixed}


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
        loss_args = method.fixed | job.loss_args
        if loss_args.get("temperature") == BY_CONFIDENCE:
            loss_args["temperature"] = self.read_confidence(job.data)["temperature"]
        if loss_args.get("multiplier") == BY_CLASSES:
            loss_args["multiplier"] = float(self.suite.data[job.data]["classes"])
        return {"distillation_loss": method.loss, "loss_args": loss_args or None}

    def confidence_path(self, data: str) -> Path:
        return self.output / "confidence" / f"{data}.json"

    def read_confidence(self, data: str) -> dict[str, float]:
        return json.loads(self.confidence_path(data).read_text())

    def measure_confidence(self, data: str, student: str, seed: int) -> str:
        """Measures the teacher's confidence on the training images of a seed's first epoch, if that is not done."""
        path = self.confidence_path(data)
        if not path.is_file():
            store = TeacherLogits(self.store_folder(data, student, seed))
            rows = store.read(0, range(store.info.num_samples))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(describe_confidence(store.dense(rows), rows["target"].long())))
        return f"{data}: temperature {self.read_confidence(data)['temperature']}"

    def settings(self, names: list[str]) -> dict[str, Any]:
        settings = super().settings(names)
        if names == [PRETRAINED]:
            settings["teacher"] = FINETUNING | {
                "teacher": PACKAGE,
                "seed": TEACHER_SEED,
                "weights": "convolutions as differences in 4 bits",
            }
        else:
            settings["teacher"] |= {"weights": "rounded to half precision"}
        return settings

    def write_teacher(self, data: str) -> str:
        if data == PRETRAINED:
            return write_pretrained_teacher(self, data)
        return write_small_teacher(self, data, super().write_teacher)

    def write_store(self, data: str, student: str, seed: int, images: tuple) -> str:
        # EfficientNet-Lite0 takes a third of the time with it, and its logits differ by rounding alone.
        settings = {"teacher_channels_last": True} if data == PRETRAINED else {}
        return super().write_store(data, student, seed, images, **settings)

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
        record = (
            {"data": data, "student": student, "method": method, "seed": seed} | describe(method) | {"trials": done}
        )
        record |= {"cpu": round(time.process_time() - start, 1), "commit": self.commit}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        return f"{path.stem}: best {best:.2%}, {record['cpu']:.0f} s"

    def _search(self, job: Job, folder: Path, trials: int) -> list[dict[str, Any]]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        points = points_of(job.student, job.method, trials)
        done = [{"params": point, "validation": 0.0} for point in points]

        def read(metrics: dict[str, float]) -> float:
            done[number] |= {"validation": metrics["eval_accuracy"], "validation_loss": metrics["eval_loss"]}
            return metrics["eval_accuracy"]

        def draw(trial: optuna.Trial) -> dict[str, float]:
            nonlocal number
            number = trial.number
            return points[number]

        number = 0
        trainer = self.make_trainer(job, folder, SearchTrainer)
        trainer.args.eval_strategy = IntervalStrategy.NO  # hyperparameter_search evaluates the end of each training.
        # A training whose loss is not finite counts as an accuracy of 0.
        trainer.hyperparameter_search(
            draw, read, trials, "maximize", "optuna", pruner=optuna.pruners.NopPruner(), catch=NonFiniteLossError
        )
        return done

    def choose(self, data: str, student: str, method: str, seeds: list[int]) -> dict[str, Any]:
        """The settings with the best mean accuracy over the seeds of the search; the first of equals.

        Raises:
            SystemExit: a search had other points than this code's, or another loss.
        """
        searches = [json.loads(self.search_path(data, student, method, seed).read_text()) for seed in seeds]
        points = [[trial["params"] for trial in search["trials"]] for search in searches]
        own = points_of(student, method, len(points[0]))
        for search, others in zip(searches, points, strict=True):
            if not are_near(others, own) or {name: search[name] for name in describe(method)} != describe(method):
                raise SystemExit(
                    f"{data}/{student}/{method}: the search of seed {search['seed']} had other settings than this code draws. "
                    "Remove the method from the --json and its files from search and runs of --output, or check out the code "
                    f"of its commit, {search['commit']}"
                )
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
