"""The trainings of evidence.py: their settings, the teachers' stores, and one training."""

import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import yaml
from evidence_data import FASHION_FOLDER, KeptImages, write_digits, write_fashion, write_numbers
from evidence_losses import ABLATIONS, uskd_labels
from torch import Tensor, nn

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    Recipe,
    RecipeArguments,
    cli,
    parse_args,
)
from nkd_hf.data.image_datasets import ImageDataset
from nkd_hf.data.loading import load_evaluation_split
from nkd_hf.data.sampler import epoch_order
from nkd_hf.data.transforms import processor_transform
from nkd_hf.metrics import compute_metrics, top5_indices
from nkd_hf.models.preprocessing import load_image_processor
from nkd_hf.recipe.loss_shapes import loss_shapes
from nkd_hf.teacher_logits.store import TeacherLogits

SIZE = 28

# Images of each part, and what all methods, students and the teacher share.
DATA = {
    "digits": {
        "images": {"train": 1150, "validation": 287, "test": 360},
        "epochs": 20, "random_resized_crop": [0.6, 1.0], "horizontal_flip": 0.0,
    },
    "fashion": {
        "images": {"train": 4000, "validation": 1000, "test": 5000},
        "epochs": 10, "random_crop_padding": 2, "horizontal_flip": 0.5,
    },
}  # fmt: skip
_CNN = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 5e-4}
STUDENTS = {
    "cnn": {
        "student": "resnet18",
        "student_args": {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64], "stem_type": "deep", "stem_width": 4},
        **_CNN,
    },
    "deit": {
        "student": "deit_tiny_patch16_224",
        "student_args": {"patch_size": 7, "embed_dim": 48, "depth": 4, "num_heads": 3},
        "weight_decay": 0.05, "no_weight_decay": ["norm", "bias", "embedding"], "warmup_steps": 0.1,
    },
}  # fmt: skip
TEACHER = {
    "teacher": "resnet18",
    "teacher_args": {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "stem_type": "deep", "stem_width": 16},
    **_CNN, "learning_rate": 0.1,
}  # fmt: skip
# One for each data set, of a seed of its own, trained for so many times the students' epochs.
TEACHER_SEED, TEACHER_EPOCHS = 200, 3
WRITERS = {"digits": write_digits, "fashion": write_fashion, "numbers": write_numbers, "pretrained": write_fashion}
SHARED = {
    "image_size": SIZE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bilinear",
    "mix_pairs": True, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 250, "max_grad_norm": 5.0,
    "lr_scheduler_type": "cosine", "logging_strategy": "epoch", "save_strategy": "no", "use_cpu": True,
    "report_to": "none", "disable_tqdm": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
}  # fmt: skip


class Suite(NamedTuple):
    """What a benchmark trains on, and what: `epochs` of the data are those of each student, or one number for all."""

    data: dict[str, dict[str, Any]]
    students: dict[str, dict[str, Any]]
    teacher: dict[str, Any] = TEACHER


EVIDENCE = Suite(DATA, STUDENTS)


class Job(NamedTuple):
    """One training; `method` is that of `WEIGHTS` or of `ABLATIONS`, and `loss_args` are without an ablation's."""

    data: str
    student: str
    method: str
    seed: int
    learning_rate: float
    loss_args: dict[str, float]

    @property
    def name(self) -> str:
        args = "".join(f"-{name}{value:g}" for name, value in self.loss_args.items())
        return f"{self.data}-{self.student}-{self.method}-{self.learning_rate:g}{args}-seed{self.seed}"


class Bench(NamedTuple):
    """Where things lie, and how much is trained; `epochs` and `images` replace those of the data, for trials."""

    output: Path
    epochs: int | None = None
    images: int | None = None
    fashion: Path = FASHION_FOLDER
    commit: str = "unknown"  # of the code, kept with each training
    suite: Suite = EVIDENCE

    def epochs_of(self, data: str, student: str | None = None) -> int:
        """The epochs of a student, or of the one that has the most."""
        epochs = self.suite.data[data]["epochs"]
        if isinstance(epochs, dict):
            epochs = epochs[student] if student else max(epochs.values())
        return self.epochs or epochs

    def images_of(self, data: str) -> dict[str, int]:
        images = self.suite.data[data]["images"]
        return {name: min(number, self.images or number) for name, number in images.items()}

    def settings_of(self, data: str) -> dict[str, Any]:
        settings = self.suite.data[data]
        return settings | {"images": self.images_of(data), "epochs": self.epochs or settings["epochs"]}

    def settings(self, names: list[str]) -> dict[str, Any]:
        """All that decides about the trainings on these data, but for what is chosen."""
        teacher = self.suite.teacher | {"seed": TEACHER_SEED, "times_the_epochs": TEACHER_EPOCHS}
        data = {data: self.settings_of(data) for data in names}
        return {"data": data, "students": self.suite.students, "shared": SHARED, "teacher": teacher}

    def data_folder(self, data: str) -> Path:
        return self.output / "data" / data

    def teacher_folder(self, data: str) -> Path:
        return self.output / "teachers" / data

    def store_folder(self, data: str, student: str, seed: int) -> Path:
        """The students that train for equally many epochs share a store, and the images."""
        return self.output / "stores" / f"{data}-{self.epochs_of(data, student)}epochs-seed{seed}"

    def recipe_args(self, data: str, seed: int, folder: Path, **settings: Any) -> list[str]:
        """The command line of a recipe, whose configuration is written to the folder."""
        own = {
            name: value for name, value in self.suite.data[data].items() if name not in ("images", "epochs", "classes")
        }
        settings = {
            **SHARED, **own, "dataset_name": str(self.data_folder(data)), "num_train_epochs": self.epochs_of(data),
            "seed": seed, **settings,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        return ["--config", str(path)]

    def image_size(self, data: str) -> int:
        return self.suite.data[data].get("image_size", SIZE)

    def check_settings(self, names: list[str]) -> None:
        """A folder holds trainings of one kind only.

        Raises:
            SystemExit: those in the folder had other settings.
        """
        for data in names:
            record, text = self.output / f"{data}.json", json.dumps(self.settings([data]), indent=1)
            if record.is_file() and record.read_text() != text:
                raise SystemExit(
                    f"{self.output} holds trainings with other settings, see {record}: name another --output"
                )
            self.output.mkdir(parents=True, exist_ok=True)
            record.write_text(text)

    def write_data(self, data: str) -> str:
        """Writes the images of a data set, if they are not there."""
        folder = self.data_folder(data)
        record = folder / "images.json"
        if not (record.is_file() and json.loads(record.read_text()) == self.images_of(data)):
            own = {"source": self.fashion} if WRITERS[data] is write_fashion else {}
            WRITERS[data](folder, **self.images_of(data), **own)
            record.write_text(json.dumps(self.images_of(data)))
        return f"{data}: {', '.join(f'{number} {name}' for name, number in self.images_of(data).items())}"

    def prepare(self, data: str, student: str, seed: int, with_teacher: bool = True) -> str:
        """Makes what all trainings of a seed share: their images, and the teacher's logits on them."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            job = Job(data, student, "baseline", seed, 0.1, {})
            recipe = self._recipe(job, Path(folder))
            model = recipe.create(recipe.args.student, recipe.args.student_args)
            images = self._training_images(job, recipe, model), recipe.datasets(model)[1]
        return self.write_store(data, student, seed, images) if with_teacher else f"images of {data}, seed {seed}"

    def write_teacher(self, data: str) -> str:
        """Trains the teacher of a data set."""
        folder = self.teacher_folder(data)
        if not (folder / "done.json").is_file():
            args = self.recipe_args(
                data, TEACHER_SEED, folder, validation_split="test", eval_strategy="no", distillation_loss="nkd",
                **STUDENTS["cnn"] | self.suite.teacher | {"num_train_epochs": TEACHER_EPOCHS * self.epochs_of(data, "cnn")},
            )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                recipe = _open_recipe([*args, "--output_dir", str(folder / "run")])
                recipe.train_teacher()
            (folder / "done.json").write_text(json.dumps({"accuracy": recipe.results["teacher"]}))
        return f"teacher of {data}"

    def teacher_accuracies(self, data: str, student: str, seed: int) -> dict[str, float]:
        """Top-1 of the teacher on the test part, and, from the store of a seed, on the validation part."""
        test = json.loads((self.teacher_folder(data) / "done.json").read_text())["accuracy"]
        return {
            "test": test,
            "validation": TeacherLogits(self.store_folder(data, student, seed)).info.teacher_accuracy,
        }

    def write_store(self, data: str, student: str, seed: int, images: tuple, **settings: Any) -> str:
        """Stores the teacher's logits on the images of all epochs of a seed; `settings` are those of the command."""
        folder = self.store_folder(data, student, seed)
        if not (folder / "done").is_file():
            args = self.recipe_args(
                data, seed, folder, validation_split="validation", eval_strategy="no", distillation_loss="nkd",
                teacher=str(self.teacher_folder(data) / "run" / "teacher"), **STUDENTS["cnn"], **settings,
            )  # fmt: skip
            epochs = str(self.epochs_of(data, student))
            command = ["teacher-logits", *args, "--output", str(folder), "--epochs", epochs, "--batch_size", "64"]
            # The kept images are the recipe's bit for bit, and need no augmentation a second time.
            kept = mock.patch.object(Recipe, "datasets", return_value=images)
            with contextlib.redirect_stdout(io.StringIO()), kept:
                cli.main(command)
            (folder / "done").touch()
        return f"logits of {data}, seed {seed}"

    def path_of(self, job: Job) -> Path:
        return self.output / "runs" / f"{job.name}.json"

    def read(self, job: Job) -> dict[str, Any]:
        return json.loads(self.path_of(job).read_text(encoding="utf-8"))

    def train(self, job: Job, with_test: bool, with_labels: bool = False) -> str:
        """Trains one student, and writes its accuracies; one that is written already is left."""
        path = self.path_of(job)
        if path.is_file() and (not with_test or "test" in self.read(job)):
            return f"{job.name}: there already"
        start, cpu_start = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            result = self._train(job, Path(folder), with_test, with_labels)
        result |= {"seconds": round(time.perf_counter() - start, 1), "cpu": round(time.process_time() - cpu_start, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        record = job._asdict() | result | {"commit": self.commit}
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        shown = ", ".join(f"{name} {result[name]:.2%}" for name in ("validation", "test") if name in result)
        return f"{job.name}: {shown}, {result['seconds']:.0f} s"

    def _train(self, job: Job, folder: Path, with_test: bool, with_labels: bool) -> dict[str, Any]:
        trainer = self.make_trainer(job, folder)
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
        result: dict[str, Any] = {"validation": evaluations[-1]["eval_accuracy"]}
        result |= {"validation_loss": evaluations[-1]["eval_loss"]}
        result |= {"curve": [round(entry["eval_accuracy"], 4) for entry in evaluations]}
        if with_test:
            measured = trainer.evaluate(self._pixels(job.data, "test", trainer.processing_class))
            result |= {"test": measured["eval_accuracy"], "test_loss": measured["eval_loss"]}
        if with_labels:
            result["soft_labels"] = soft_labels(
                trainer, TeacherLogits(self.store_folder(job.data, job.student, job.seed))
            )
        return result

    def make_trainer(
        self, job: Job, folder: Path, kind: type = DistillationTrainer, **more: Any
    ) -> DistillationTrainer:
        """The trainer of a job; `kind` gets `more` as well."""
        recipe = self._recipe(job, folder)
        student = recipe.create(recipe.args.student, recipe.args.student_args)
        processor = load_image_processor(student)
        return kind(
            model=student, distillation_loss=self._make_loss(job, recipe, student), args=recipe.training_args,
            processing_class=processor, train_dataset=self._training_images(job, recipe, student),
            eval_dataset=self._pixels(job.data, "validation", processor),
            data_collator=recipe.collator(with_teacher_logits=recipe.teacher_logits is not None),
            compute_metrics=compute_metrics, preprocess_logits_for_metrics=top5_indices, **more,
        )  # fmt: skip

    def _make_loss(self, job: Job, recipe: Recipe, student: nn.Module) -> Any:
        size = self.image_size(job.data)
        shapes = loss_shapes(recipe.args.losses.values(), student, (size, size))
        ablation = ABLATIONS.get(job.method)
        if ablation and ablation.loss:
            shapes.pop("feature_norm", None)
            return ablation.loss(**shapes, **job.loss_args | ablation.loss_args)
        return recipe.args.build_loss(**shapes)

    def method_settings(self, job: Job) -> dict[str, Any]:
        """The recipe's settings that make the method."""
        ablation = ABLATIONS.get(job.method)
        method = ablation.method if ablation else job.method
        loss_args = job.loss_args | (ablation.loss_args if ablation else {})
        return {"distillation_loss": "none" if method == "baseline" else method, "loss_args": loss_args or None}

    def _recipe(self, job: Job, folder: Path) -> Recipe:
        method = self.method_settings(job)
        alone = method["distillation_loss"] in ALONE
        store = {} if alone else {"teacher_logits": str(self.store_folder(job.data, job.student, job.seed))}
        args = self.recipe_args(
            job.data, job.seed, folder, validation_split="validation", eval_strategy="epoch", **method,
            **self.suite.students[job.student] | store,
            num_train_epochs=self.epochs_of(job.data, job.student), learning_rate=job.learning_rate,
        )  # fmt: skip
        return _open_recipe([*args, "--output_dir", str(folder / "run")])

    def _training_images(self, job: Job, recipe: Recipe, student: nn.Module) -> KeptImages:
        path = self.output / "images" / f"{self.store_folder(job.data, job.student, job.seed).name}.npy"
        return KeptImages(recipe.datasets(student)[0], path, self.epochs_of(job.data, job.student))

    def _pixels(self, data: str, part: str, processor: Any) -> list[dict]:
        # Kept for all trainings of this process, whose students have the preprocessing of SHARED: otherwise each
        # evaluation would decode and resize the images once more.
        folder = self.data_folder(data)
        if (folder, part) not in _known_pixels:
            _, split = load_evaluation_split(DataArguments(dataset_name=str(folder), validation_split=part))
            _known_pixels[folder, part] = list(ImageDataset(split, processor_transform(processor), training=False))
        return _known_pixels[folder, part]


def _open_recipe(args: list[str]) -> Recipe:
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    return Recipe(*parse_args(types, args=args))


ALONE = ("none", "uskd", "tfkd")
_known_pixels: dict[tuple[Path, str], list[dict]] = {}


def soft_labels(trainer: DistillationTrainer, store: TeacherLogits, number: int = 6) -> dict[str, list]:
    """What teacher, NKD and USKD say of images of the first batch, one of a class; USKD at the end of its training."""
    args, dataset = trainer.args, trainer.train_dataset
    (loss,) = trainer.distillation_losses.values()  # USKDLoss
    size = args.per_device_train_batch_size
    order = epoch_order(len(dataset), args.seed, 0)[:size]
    samples = [dataset[(0, index)] for index in order]
    pixels, labels = (
        torch.stack([torch.as_tensor(row[name]) for row in samples]) for name in ("pixel_values", "labels")
    )
    mid_logits = []
    handle = loss.head.register_forward_hook(lambda module, inputs, output: mid_logits.append(output))
    model = trainer.model.eval()
    with torch.no_grad():
        student_logits = model(pixels, labels, {})["logits"]
    handle.remove()
    target, others = uskd_labels(mid_logits[0], student_logits, labels, True, True, "official")
    teacher = store.dense(store.read(0, range(len(order)))).softmax(-1)
    nkd_others = teacher.scatter(1, labels[:, None], 0)
    nkd_others /= nkd_others.sum(1, keepdim=True)
    _, first = np.unique(labels.numpy(), return_index=True)
    chosen = np.sort(first)[:number].tolist()

    def rows(values: Tensor) -> list:
        return [[round(value, 4) for value in row] for row in values[chosen].tolist()]

    names = trainer.student.config.id2label
    return {
        "classes": [names[label] for label in range(len(names))],
        "images": ((pixels[chosen, 0] * 0.5 + 0.5) * 255).round().int().tolist(), "labels": labels[chosen].tolist(),
        "student": rows(student_logits.softmax(-1)), "teacher": rows(teacher), "nkd_others": rows(nkd_others),
        "nkd_target": [round(teacher[row, labels[row]].item(), 4) for row in chosen], "uskd_others": rows(others),
        "uskd_target": [round(value, 4) for value in target[chosen].tolist()],
    }  # fmt: skip
