"""Can a teacher stand in for labels, and an ensemble for its best member? `python benchmarks/any_teacher.py --work DIR`.

Fashion-MNIST, the small CNN of evidence.py at 28 pixels, KD. The 60,000 training images fall into parts that share no image, the
same for all seeds: 1,000 with labels; 20,000 whose labels only the arms "all labelled" read; 35,000 for the teachers; and 4,000
that choose among the teachers. Accuracy is top-1 on the 10,000 test images, which each training looks at once, at its end.

The teachers are three CNNs of four times the width, of three seeds. They never see the students' images: otherwise their logits
would carry the labels of the 20,000. So they stand for a teacher that somebody trained elsewhere, on more images of the
same kind; a teacher of another kind is not measured. "The teacher" is the one that is best on the 4,000 images.

All students take as many steps of 64 images, of which 16 are labelled where both kinds are in a step. Learning rate and KD's weight
are those that evidence.py chose on 4,000 labelled images for the student alone and for KD. Nothing is chosen here, so that no
student has settings of its own.

Aim: label-free distillation of all 21,000 images reaches 95 % of the gain that their labels give. Both gains are over the 1,000
labelled images alone without a teacher; the teacher is the same. The interval is Fieller's, by `gain_share`, over the seeds:
weights, order and augmentation vary, images and teachers do not.

A training that is done is a file in `--work`, which a second start skips. The whole took 89 minutes of CPU time, shared by `--jobs` processes:
70 to 180 seconds a student, by its number of teachers, and 4 minutes a teacher.
"""

import common  # first: it sets environment variables

# isort: split
import contextlib
import functools
import io
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from datasets import Dataset
from evidence import commit, in_parallel
from evidence_data import FASHION_FOLDER, write_fashion
from evidence_page import Difference, mean_and_deviation, paired_difference
from evidence_runs import SHARED, STUDENTS, TEACHER, TEACHER_SEED
from scipy import stats

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, parse_args

AIM = 0.95
NUM_TEACHERS = 3
KD = {"distillation_loss": "kd", "loss_args": {"alpha": 0.75}, "learning_rate": 0.03}
ALONE = {"distillation_loss": "none", "learning_rate": 0.01}
# Mixing in pairs is refused with images without labels, and nothing is mixed here.
SETTINGS = SHARED | {
    "mix_pairs": False, "random_crop_padding": 2, "horizontal_flip": 0.5, "eval_strategy": "no", "dataloader_drop_last": True,
    "compare_with_baseline": False, "logging_strategy": "steps", "logging_steps": 100,
}  # fmt: skip


class Arm(NamedTuple):
    """What a student is trained on: folders of the data, and how many teachers; one is the best of them."""

    text: str
    labelled: str | None
    unlabelled: str | None
    teachers: int


ARMS = {
    "few": Arm("labelled alone, no teacher", "few", None, 0),
    "few-teacher": Arm("labelled alone, teacher", "few", None, 1),
    "few-ensemble": Arm("labelled alone, ensemble", "few", None, NUM_TEACHERS),
    "joined-teacher": Arm("labelled and the others unlabelled, teacher", "few", "others", 1),
    "label-free": Arm("all unlabelled, teacher", None, "all-unlabelled", 1),
    "all-teacher": Arm("all labelled, teacher", "all", None, 1),
    "all-ensemble": Arm("all labelled, ensemble", "all", None, NUM_TEACHERS),
    "all": Arm("all labelled, no teacher", "all", None, 0),
}


class Sizes(NamedTuple):
    """Images of each part, the length of the trainings, and the images of a step."""

    labelled: int
    unlabelled: int
    teacher: int
    validation: int
    test: int
    steps: int
    teacher_epochs: int
    batch: int


class Bench(NamedTuple):
    """The data, teachers and trainings in the folder `work`."""

    work: Path
    sizes: Sizes
    fashion: Path
    device: str
    threads: int
    commit: str

    def check_settings(self) -> None:
        """A folder holds trainings of one kind only.

        Raises:
            SystemExit: those in the folder had other settings.
        """
        own = {"sizes": self.sizes._asdict(), "kd": KD, "alone": ALONE, "shared": SETTINGS, "student": STUDENTS["cnn"]}
        own |= {"teacher": TEACHER, "device": self.device}
        record, text = self.work / "settings.json", json.dumps(own, indent=1)
        if record.is_file() and record.read_text() != text:
            raise SystemExit(f"{self.work} holds trainings with other settings, see {record}: name another --work")
        self.work.mkdir(parents=True, exist_ok=True)
        record.write_text(text)

    def write_data(self) -> str:
        """Writes the parts: `few`, `others`, `all`, `all-unlabelled` and `teacher`; without labels means without the column."""
        sizes, folder = self.sizes, self.work / "data"
        text = ", ".join(f"{number} {name}" for name, number in zip(sizes._fields[:5], sizes[:5], strict=True))
        if folder.is_dir():
            return f"{text}: there already"
        shutil.rmtree(self.work / "data.part", ignore_errors=True)
        part = self.work / "data.part"
        # The students' images are its training part, the teachers' its validation part.
        ours, theirs = sizes.labelled + sizes.unlabelled, sizes.teacher + sizes.validation
        write_fashion(part / "all", ours, theirs, sizes.test, self.fashion)
        read = functools.partial(Dataset.from_parquet, cache_dir=str(part / "cache"))
        split = functools.partial(Dataset.train_test_split, stratify_by_column="label", seed=0)
        everything = read(str(part / "all" / "train.parquet"))
        student = split(everything, train_size=sizes.labelled, test_size=sizes.unlabelled)
        teacher = split(
            read(str(part / "all" / "validation.parquet")), train_size=sizes.teacher, test_size=sizes.validation
        )
        (part / "all" / "validation.parquet").unlink()
        files = {
            "few/train": student["train"], "others/train": student["test"].remove_columns("label"),
            "all-unlabelled/train": everything.remove_columns("label"), "teacher/train": teacher["train"],
            "teacher/validation": teacher["test"],
        }  # fmt: skip
        for name, rows in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            rows.to_parquet(part / f"{name}.parquet")
        shutil.copy(part / "all" / "test.parquet", part / "few")
        shutil.rmtree(part / "cache")
        part.rename(folder)
        return text

    def train_teacher(self, seed: int) -> str:
        """Trains a teacher into the folder `teachers/SEED`, with its accuracy on the validation part."""
        folder = self.work / "teachers" / str(seed)
        if (folder / "done.json").is_file():
            return f"teacher {seed}: there already"
        start = time.process_time()
        settings = {
            **STUDENTS["cnn"], **TEACHER, "dataset_name": str(self.work / "data" / "teacher"), "seed": seed,
            "validation_split": "validation", "num_train_epochs": self.sizes.teacher_epochs, "distillation_loss": "kd",
        }  # fmt: skip
        recipe = self.open_recipe(folder, settings)
        with contextlib.redirect_stdout(io.StringIO()):
            recipe.train_teacher()
        record = {"seed": seed, "validation": recipe.results["teacher"], "cpu": round(time.process_time() - start, 1)}
        write_json(folder / "done.json", record)
        return f"teacher {seed}: {record['validation']:.2%} on the validation part, {record['cpu']:.0f} s"

    def read_teachers(self) -> list[dict[str, Any]]:
        """The teachers' records, the best on the validation part first; of equals, the first."""
        records = [
            json.loads((self.work / "teachers" / str(seed) / "done.json").read_text()) for seed in teacher_seeds()
        ]
        return sorted(records, key=lambda record: -record["validation"])

    def path_of(self, name: str, seed: int) -> Path:
        return self.work / "runs" / f"{name}-seed{seed}.json"

    def read(self, name: str, seed: int) -> dict[str, Any]:
        return json.loads(self.path_of(name, seed).read_text(encoding="utf-8"))

    def settings_of(self, name: str, seed: int) -> dict[str, Any]:
        """The recipe's settings of one training."""
        arm, data = ARMS[name], self.work / "data"
        own = {"dataset_name": str(data / (arm.labelled or "few")), "validation_split": "test"}
        if arm.unlabelled:
            # As many images a step as in the other arms.
            joined = {"unlabeled_ratio": 3.0, "per_device_train_batch_size": self.sizes.batch // 4}
            own["unlabeled_dataset"] = str(data / arm.unlabelled)
            own |= {"train_split": "none"} if arm.labelled is None else joined
        if arm.teachers:
            best_first = [record["seed"] for record in self.read_teachers()]
            folders = [self.work / "teachers" / str(seed) / "run" / "teacher" for seed in best_first]
            own["teacher"] = [str(folder) for folder in folders[: arm.teachers]]
        method = KD if arm.teachers else ALONE
        return STUDENTS["cnn"] | {"seed": seed, "max_steps": self.sizes.steps} | method | own

    def open_recipe(self, folder: Path, settings: dict[str, Any]) -> Recipe:
        torch.set_num_threads(self.threads)
        folder.mkdir(parents=True, exist_ok=True)
        shared = SETTINGS | {"use_cpu": self.device == "cpu", "per_device_train_batch_size": self.sizes.batch}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(shared | settings, sort_keys=False), encoding="utf-8")
        types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
        with contextlib.redirect_stdout(io.StringIO()):
            return Recipe(*parse_args(types, args=["--config", str(config), "--output_dir", str(folder / "run")]))

    def train(self, name: str, seed: int) -> str:
        """Trains one student, and writes what it was trained on and its accuracy."""
        if self.path_of(name, seed).is_file():
            return f"{name}, seed {seed}: there already"
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            recipe = self.open_recipe(Path(folder), self.settings_of(name, seed))
            with contextlib.redirect_stdout(io.StringIO()):
                recipe.train_baseline()
                recipe.train_student()
            record = {"arm": name, "seed": seed, **describe(recipe)}
        record |= {"cpu": round(time.process_time() - start, 1), "commit": self.commit}
        write_json(self.path_of(name, seed), record)
        return f"{name}, seed {seed}: {record['top1']:.2%}, {record['cpu']:.0f} s"


def describe(recipe: Recipe) -> dict[str, Any]:
    """What a student was trained on, as the recipe opened it, and its accuracy."""
    state, trains = recipe.result_trainer.state, recipe.data["train"]
    joined = recipe.data.get("unlabeled", ())
    num_unlabelled = len(joined) if "label" in trains.column_names else len(trains)
    top1 = recipe.results["distilled" if recipe.args.distillation_loss != "none" else "baseline"]
    return {
        "top1": top1, "teacher": recipe.results["teacher"], "labelled": len(trains) + len(joined) - num_unlabelled,
        "unlabelled": num_unlabelled, "steps": state.global_step,
        "first_log": next((entry for entry in state.log_history if "loss" in entry), None),
    }  # fmt: skip


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n", encoding="utf-8")
    part.replace(path)


def teacher_seeds() -> range:
    return range(TEACHER_SEED, TEACHER_SEED + NUM_TEACHERS)


def gain_share(gains: list[float], full_gains: list[float]) -> Difference:
    """The ratio of two mean gains, paired by seed, with Fieller's 95% interval.

    The interval has each ratio r for which Student's t test of `gain - r * full gain`, seed by seed, does not reject 0. Where the
    full gain itself is not different from 0, or of one seed, it has no bounds.
    """
    full_gain, number = np.mean(full_gains), len(gains)
    value = float(np.mean(gains) / full_gain) if full_gain else math.nan
    if number < 2:
        return Difference(value, -math.inf, math.inf)
    covariance = np.cov(gains, full_gains) * stats.t.ppf(0.975, number - 1) ** 2 / number
    a = full_gain**2 - covariance[1, 1]
    if a <= 0:
        return Difference(value, -math.inf, math.inf)
    b = np.mean(gains) * full_gain - covariance[0, 1]
    c = np.mean(gains) ** 2 - covariance[0, 0]
    half = math.sqrt(max(b * b - a * c, 0.0)) / a
    return Difference(value, float(b / a - half), float(b / a + half))


def tabulate(report: common.Report, sizes: Sizes, teachers: list[dict], runs: dict[str, list[dict]]) -> None:
    """Prints the tables and the aim; `runs` are in the order of the seeds, `teachers` the best first."""
    top1 = {name: [100 * run["top1"] for run in of_arm] for name, of_arm in runs.items()}
    gains = {name: np.subtract(values, top1["few"]).tolist() for name, values in top1.items()}
    title = f"Top-1 on {sizes.test} test images after {sizes.steps} steps; gains are over the first row, shares of the gain of "
    columns = ["", "labelled", "unlabelled", "teacher's top-1", "seed by seed", "mean", "gain, 95% interval", "share"]
    rows = [arm_row(name, of_arm, top1, gains) for name, of_arm in runs.items()]
    report.table(title + ARMS["all-teacher"].text, columns, rows)

    title = f"Teachers, {sizes.teacher_epochs} epochs of {sizes.teacher} images: top-1 on {sizes.validation} others"
    rows = [[f"seed {record['seed']}", f"{100 * record['validation']:.2f}"] for record in teachers]
    rows[0][0] += ", the teacher"
    report.table(title, ["", "top-1"], rows)

    rows = []
    for data in ("few", "all"):
        difference = paired_difference(top1[f"{data}-ensemble"], top1[f"{data}-teacher"])
        rows.append([f"{runs[data][0]['labelled']} labelled images", str(difference)])
    title = "Student of the ensemble less student of its best member, in points"
    report.table(title, ["", "difference, 95% interval"], rows)

    share = gain_share(gains["label-free"], gains["all-teacher"])
    what = "share of the gain of labels that label-free distillation reaches"
    report.aim(what, share.mean, AIM, at_least=True, spread=(share.low, share.high))
    report.result["raw"] = {"teachers": teachers, "runs": [run for of_arm in runs.values() for run in of_arm]}


def arm_row(name: str, runs: list[dict], top1: dict[str, list[float]], gains: dict[str, list[float]]) -> list[str]:
    run = runs[0]
    teacher = "" if run["teacher"] is None else f"{100 * run['teacher']:.2f}"
    seeds = ", ".join(f"{value:.2f}" for value in top1[name])
    gain = share = ""
    if name != "few":
        gain = str(paired_difference(top1[name], top1["few"]))
        share = "{:.3f} [{:.3f}, {:.3f}]".format(*gain_share(gains[name], gains["all-teacher"]))
    images = str(run["labelled"]), str(run["unlabelled"])
    return [ARMS[name].text, *images, teacher, seeds, mean_and_deviation(top1[name]), gain, share]


def main() -> None:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the data and the trainings")
    parser.add_argument("--fashion", type=Path, default=FASHION_FOLDER, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once (default: %(default)s)")
    parser.add_argument("--images", type=int, nargs=5, default=[1000, 20000, 35000, 4000, 10000],
                        metavar=("LABELLED", "UNLABELLED", "TEACHER", "VALIDATION", "TEST"), help="(default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=1640, help="of each student (default: %(default)s)")
    parser.add_argument("--teacher_epochs", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images of a step (default: %(default)s)")
    options = common.parse(parser)
    sizes = Sizes(*options.images, options.steps, options.teacher_epochs, options.batch)
    bench = Bench(options.work.absolute(), sizes, options.fashion, options.device, options.threads, commit())
    report = common.Report(options)
    bench.check_settings()
    in_parallel([(bench.write_data,)], 1, "data")
    in_parallel([(bench.train_teacher, seed) for seed in teacher_seeds()], options.jobs, "teachers")
    seeds = range(options.rounds)
    in_parallel([(bench.train, name, seed) for seed in seeds for name in ARMS], options.jobs, "trainings")
    tabulate(report, sizes, bench.read_teachers(), {name: [bench.read(name, seed) for seed in seeds] for name in ARMS})
    report.write()


if __name__ == "__main__":
    main()
