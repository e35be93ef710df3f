"""The steps that the recipes share: open the data, train teacher, baseline and student, write down what came out."""

import contextlib
import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import matplotlib.figure
import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from safetensors import SafetensorError
from torch import nn
from transformers import BaseImageProcessor, IntervalStrategy, PreTrainedModel, pipeline, set_seed
from transformers.utils.logging import disable_progress_bar

from ..data.arguments import DataArguments, streaming_max_steps
from ..data.bad_images import BadImageReport
from ..data.collator import ImageCollator
from ..data.decoding import read_sample
from ..data.image_datasets import ImageDataset, StreamingImageDataset
from ..data.labels import label_names
from ..data.loading import load_image_dataset
from ..data.transforms import processor_transform, train_transform
from ..errors import BadSampleError, CheckpointError, PushError, failed_write, redact
from ..files import path_fault
from ..hub.model_card.curves import OTHER_DATASET
from ..hub.model_card.facts import CardInfo
from ..hub.model_card.licences import check_license
from ..hub.push import create_repo, push_student
from ..hub.teacher_logits import find_store
from ..metrics import compute_metrics, top5_indices
from ..models.architectures import is_architecture
from ..models.labels import check_class_order, class_numbers
from ..models.loading import open_classifier
from ..models.preprocessing import Preprocessing, load_image_processor, read_preprocessing
from ..models.saving import hidden_progress_bars
from ..models.students import check_name, describe_start
from ..models.teacher import Teacher, load_teacher
from ..teacher_logits.store import TeacherLogits
from ..trainer.agreement import decide_in_first, first_fault
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.checkpoints import checkpoints, fault_of, is_model_only
from ..trainer.checks import check_batches
from ..trainer.non_finite import LossWatch
from ..trainer.trainer import DistillationTrainer
from .arguments import RecipeArguments
from .fingerprint import check_fingerprint, run_fingerprint
from .launch_line import launch_line
from .run_folder import (
    RESULTS,
    clear,
    continues,
    finish,
    has_run,
    hold,
    is_trained,
    settings_of,
    stage_history,
    write_results,
)
from .teacher_accuracy import ON_STUDENT_PIXELS, differences, has_same_pixels, teacher_metrics

logger = logging.getLogger(__name__)

# A larger difference of the teacher's two accuracies, a fraction, is a warning.
_MOST_LOST = 0.01


class Recipe:
    """One run of a recipe: its data, what was trained so far, and its figures.

    Args:
        recipe (`RecipeArguments`)
        data (`DataArguments`)
        training (`DistillationTrainingArguments`): `output_dir` holds the results; each model gets a folder in it.

    Example:

    ```python
    recipe = Recipe(*parse_args((RecipeArguments, DataArguments, DistillationTrainingArguments)))
    recipe.train_teacher()
    recipe.train_baseline()
    recipe.train_student()
    recipe.report()
    ```
    """

    def __init__(self, recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments):
        check_license(recipe.license)
        if training.teacher_settings and not recipe.needs_teacher:
            raise ValueError(
                f"{', '.join(training.teacher_settings)} set how a teacher computes, and distillation_loss="
                f"{recipe.distillation_loss} has none: leave them out"
            )
        self.args, self.data_args, self.training_args = recipe, data, training
        self.folder = Path(training.output_dir)
        self._settings = settings_of(recipe, data, training)  # as they were given: a stream's steps are set later
        self.results: dict[str, float | None] = dict.fromkeys(("teacher", ON_STUDENT_PIXELS, "baseline", "distilled"))
        self.accuracies: dict[str, dict[str, float]] = {}
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self.teacher: PreTrainedModel | Teacher | None = None
        self.to_push: DistillationTrainer | None = None
        if training.push_to_hub and training.process_index == 0:
            self._check_hub()
        if not decide_in_first(lambda: is_trained(self.folder)):
            self._check_names()
        self.goes_on, self.is_trained = self._in_folder(self._find_run)
        self._is_checked = self.is_trained
        if not self.is_trained:
            self._open_named_teacher()  # before the data, which are the longer download
        if training.disable_tqdm:
            datasets.disable_progress_bars()
            disable_progress_bar()
        if training.device.type == "cpu":
            # Workers and PyTorch's threads share the cores; threads that wait for each other make steps several times
            # slower than fewer of them.
            torch.set_num_threads(max(1, torch.get_num_threads() - training.dataloader_num_workers))
        with training.main_process_first(desc="loading the data"):
            self.data = load_image_dataset(data, training.seed)
        self.id2label = dict(enumerate(label_names(self.data)))
        if not data.streaming and self.data["validation"].split == self.data["train"].split:
            held_out, kept = len(self.data["validation"]), len(self.data["train"])
            self._say(
                f"{redact(data.dataset_name)} has no split to evaluate on: {held_out} of its {held_out + kept} training images are "
                f"held out (train_val_split={data.train_val_split})"
            )
        if len(self.id2label) < 2:
            raise ValueError(
                f"{redact(data.dataset_name)!r} must have two classes at least, got {list(self.id2label.values())}. Set "
                "label_column_name, or name another dataset"
            )
        if data.num_classes not in (None, len(self.id2label)):
            raise ValueError(
                f"num_classes is {data.num_classes}, but {redact(data.dataset_name)!r} has {len(self.id2label)} classes: set it to "
                "that, or leave it out"
            )
        if recipe.ignore_label_names:
            # Raises where the names are numbers that aren't the positions of a teacher's logits.
            class_numbers(list(self.id2label.values()), len(self.id2label))
        self.steps_per_epoch: int | None = None
        if data.streaming:
            self._count_steps()
        self.teacher_logits = None if recipe.teacher_logits is None else self._open_teacher_logits()

    def train_teacher(self) -> None:
        """Trains the teacher, if it is named by an architecture and the loss wants one whose logits are not stored.

        Raises:
            ValueError: data, models, loss or stored logits do not fit each other. The first of the three trainings checks
                all of them before its first step.
        """
        self.check()
        if self.is_trained or not self._runs_teacher or not is_architecture(self.args.teacher):
            return
        self.teacher = self._train("teacher", self.create(self.args.teacher, self.args.teacher_args))

    def train_baseline(self) -> None:
        """Trains the student without the distillation loss, if that is asked for."""
        self.check()
        if not self.is_trained and (self.args.compare_with_baseline or self.args.distillation_loss == "none"):
            self.measure_teacher()
            self._train("baseline", self.create(self.args.student, self.args.student_args))

    def train_student(self) -> None:
        """Trains the student with the distillation loss, from the seed and with the data of the baseline."""
        self.check()
        if not self.is_trained and self.args.distillation_loss != "none":
            if self.teacher is None:
                self.train_teacher()
            self.measure_teacher()
            student = self.create(self.args.student, self.args.student_args)
            # Opened here for the shapes of its layers.
            teacher = None if self.teacher is None else load_teacher(self.teacher)
            loss = self.args.build_loss(**self._loss_shapes(student, teacher))
            self._train("student", student, loss, teacher)

    @property
    def _runs_teacher(self) -> bool:
        return self.args.needs_teacher and self.args.teacher_logits is None

    def open_teacher(self) -> None:
        """Opens a teacher that is named by its id or folder.

        Raises:
            ValueError: it cannot be opened, or has another number of classes than the data.
        """
        self._open_named_teacher()
        if isinstance(self.teacher, Teacher) and self.args.ignore_label_names:
            self._take_classes_by_number(self.teacher)

    def _open_named_teacher(self) -> None:
        if self.teacher is None and self._runs_teacher and not is_architecture(self.args.teacher):
            self.teacher = load_teacher(
                self.args.teacher, allow_pickle=self.args.allow_pickle, trust_remote_code=self.args.trust_remote_code
            )
            self._say(f"The teacher {self.args.teacher}: {_count(self.teacher.model)} parameters, pretrained")

    def _take_classes_by_number(self, teacher: Teacher) -> None:
        num_classes = teacher.model.config.num_labels
        if num_classes != len(self.id2label):
            raise ValueError(
                f"teacher must have {len(self.id2label)} classes, as {redact(self.data_args.dataset_name)!r} has, got "
                f"{num_classes} of {self.args.teacher}. ignore_label_names takes them by their numbers, so these must be "
                "the same: load a teacher that was trained on these classes"
            )
        teacher.id2label = None

    def measure_teacher(self) -> None:
        """Measures the teacher's top-1 with its own preprocessing, and on the student's pixels where they differ.

        A wrong teacher, and one that the student's settings make worse, shows here, before days of training.
        """
        self.open_teacher()
        if self.teacher is None or self.results[ON_STUDENT_PIXELS] is not None:
            return
        student = self.create(self.args.student, self.args.student_args)
        own, given = load_image_processor(load_teacher(self.teacher).model), load_image_processor(student)
        trainer = self._trainer(self.folder, student, dataloader_persistent_workers=False)
        teacher = self._evaluated_teacher(read_preprocessing(student, given))
        if has_same_pixels(teacher, own, given):
            # The one that was trained here was measured at the end of its training.
            measured = self.accuracies.get("teacher") or self._teacher_metrics(trainer, teacher, given)
            self.accuracies["teacher"] = measured
        else:
            measured = self._teacher_metrics(trainer, teacher, given)
            if "teacher" not in self.accuracies:
                teacher = self._evaluated_teacher(load_teacher(self.teacher).preprocessing)
                self.accuracies["teacher"] = self._teacher_metrics(trainer, teacher, own)
            self.accuracies[ON_STUDENT_PIXELS] = measured
        self.results["teacher"] = self.accuracies["teacher"]["accuracy"]
        self.results[ON_STUDENT_PIXELS] = measured["accuracy"]
        self._say_teacher_accuracy(differences(own, given))
        del trainer, teacher
        release_memory()

    def _evaluated_teacher(self, pixels: Preprocessing) -> Teacher:
        """The teacher as it computes in training, for these pixels; the one that is trained with stays as it is."""
        args, teacher = self.training_args, load_teacher(self.teacher).copy()
        teacher.align(pixels, self.id2label)
        return teacher.for_inference(args.teacher_dtype, channels_last=args.teacher_channels_last).to(args.device)

    def _teacher_metrics(
        self, trainer: DistillationTrainer, teacher: Teacher, processor: BaseImageProcessor
    ) -> dict[str, float]:
        loader = trainer.get_test_dataloader(self._evaluation_images(processor))
        return teacher_metrics(teacher, loader, trainer.accelerator, self.training_args.disable_tqdm)

    def _say_teacher_accuracy(self, different: list[str]) -> None:
        own, given = self.results["teacher"], self.results[ON_STUDENT_PIXELS]
        if given <= 1.5 / len(self.id2label) and self.training_args.process_index == 0:
            logger.warning(
                "The teacher's top-1 is %.2f %%, where guessing gives %.2f %%: a student learns nothing good from it. Train "
                "it for longer or at another learning_rate, or name a pretrained teacher.",
                100 * given,
                100 / len(self.id2label),
            )
        if ON_STUDENT_PIXELS not in self.accuracies:
            self._say(f"The teacher's top-1: {own:.2%}, on pixels that are the student's as well")
            return
        self._say(
            f"The teacher's top-1: {own:.2%} with its own preprocessing, {given:.2%} on the student's pixels, which it is "
            f"distilled on"
        )
        if abs(own - given) > _MOST_LOST and self.training_args.process_index == 0:
            logger.warning(
                "The teacher's top-1 is %.2f %% on the student's pixels and %.2f %% with its own preprocessing: %s. Set these "
                "for the student as the teacher has them, where the student should learn from the better one.",
                100 * given,
                100 * own,
                ", ".join(different) or "their image processors differ",
            )

    def _check_names(self) -> None:
        """Looks for folders of student and teacher, the first and cheapest check of them."""
        names = {"student": self.args.student}
        if self._runs_teacher:
            names["teacher"] = self.args.teacher
        for role, name in names.items():
            if is_architecture(name):
                continue
            check_name(name)
            if fault := path_fault(name):
                raise ValueError(f"{role} {name!r} is not opened: {fault}")

    def check(self, trains_student: bool = True) -> None:
        """Builds all that the run needs and sends one image through it, before anything is trained.

        Args:
            trains_student: whether to check the sizes of the student's batches, too.
        """
        if self._is_checked:
            return
        self.open_teacher()
        student = self.create(self.args.student, self.args.student_args)
        train, validation = self.datasets(student)
        sample = next(iter(validation)) if self.data_args.streaming else validation[0]
        if not self.data_args.streaming:  # A stream fills a buffer first.
            train[0]
        if self.args.distillation_loss != "none":
            teacher = self.teacher
            if self._runs_teacher and teacher is None:
                teacher = load_teacher(self.create(self.args.teacher, self.args.teacher_args))
            loss = self.args.build_loss(**self._loss_shapes(student, teacher))
            trainer = self._trainer(self.folder, student, loss, teacher, teacher_compile=False)
            if self.teacher_logits is None and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
                self._try_step(trainer, sample)
            if trains_student:
                loader = trainer.get_train_dataloader()
                *_, max_steps = trainer.set_initial_training_values(trainer.args, loader)
                check_batches(trainer, loader, max_steps)
                del loader
            del trainer, teacher, loss
        del student
        release_memory()
        if not self.goes_on:
            # Only now, so that input that is refused leaves the results of an earlier run.
            self._in_folder(self._clear_earlier_run)
        self._is_checked = True

    def _try_step(self, trainer: DistillationTrainer, sample: dict[str, Any]) -> None:
        """Computes the loss of one image, twice since BatchNorm wants more than one value."""
        batch = self.collator().without_mixing()([sample, sample])
        batch = {name: value.to(self.training_args.device) for name, value in batch.items()}
        watch = LossWatch()
        with trainer.accelerator.autocast():
            trainer.compute_loss(trainer.model.train(), batch)
        watched = trainer.step_guard.take_note()
        if self.training_args.on_non_finite_loss == "error" and watched is not None:
            watch.add(0, self.training_args.learning_rate, index=None, **watched)
            watch.close_step(grad_norm=None, scaled=False)
            if fault := watch.fault(wait=True):
                raise ValueError(f"an image gives no finite loss before anything is trained: {fault}")

    def report(self) -> None:
        """Prints the table, writes `results.json` and `accuracy.png`, pushes the student, and shows how it is opened.

        A run that is stopped in here, or whose push fails, goes on with the push and the rest when it is started again.

        Raises:
            SystemExit: with code 1 and a message, when the push or a file failed; all else is on disk then.
        """
        if self.training_args.should_save:
            if self.is_trained:
                self._say(f"All is trained in {self.folder}: the report is left")
                self.results = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
            else:
                with self._writes("the report", self.folder):
                    self._plot(self.folder / "accuracy.png")
                    write_results(self.folder, self.results)
            self._print_table()
        fault = self._push()
        if self.training_args.should_save:
            self._show_pipeline(self._result)
            if not fault:
                finish(self.folder)
        # A process that leaves while another still writes can take the whole group down.
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()
        if fault:
            raise SystemExit(fault)

    @property
    def _result(self) -> str:
        return "baseline" if self.args.distillation_loss == "none" else "student"

    def _print_table(self) -> None:
        teacher = self.args.teacher or (self.args.teacher_logits and f"of {self.args.teacher_logits}")
        names = {
            "teacher": f"teacher ({teacher})",
            ON_STUDENT_PIXELS: "teacher, on the student's pixels",
            "baseline": f"baseline ({self.args.student})",
            "distilled": f"distilled ({self.args.distillation_loss.upper()})",
        }
        print(f"\n{'':<44}top-1 accuracy")
        for name, value in self.results.items():
            if value is not None and not (name == ON_STUDENT_PIXELS and value == self.results["teacher"]):
                print(f"{names[name]:<44}{value:14.2%}")
        print(f"\nFigures: {self.folder / RESULTS}, curves: {self.folder / 'accuracy.png'}")

    def _open_teacher_logits(self) -> TeacherLogits:
        """The store, if it is of this run: what differs should be said before anything is trained."""
        args, training = self.args, self.training_args
        if self.data_args.streaming:
            raise ValueError(
                "teacher_logits needs streaming off: a stream has no order in which logits could be stored"
            )
        epochs = math.ceil(training.num_train_epochs)
        if training.max_steps > 0:
            batch = training.global_batch_size()
            epochs = math.ceil(training.max_steps / max(1, math.ceil(len(self.data["train"]) / batch)))
        with training.main_process_first(desc="opening the teacher's logits"):
            store = TeacherLogits(find_store(args.teacher_logits, epochs))
        fingerprint = self.fingerprint(self.create(args.student, args.student_args))
        check_fingerprint(store.folder, store.info, args, fingerprint, training.teacher_dtype)
        store.check_complete(epochs)
        for name, value in (
            ("teacher", store.info.teacher_own_accuracy),
            (ON_STUDENT_PIXELS, store.info.teacher_accuracy),
        ):
            if value is not None:
                self.results[name] = value
                if name == "teacher" or value != store.info.teacher_own_accuracy:
                    self.accuracies[name] = {"accuracy": value}
        return store

    def fingerprint(self, student: PreTrainedModel) -> dict:
        """What a teacher's logits depend on, but for the teacher."""
        pixels = read_preprocessing(student, load_image_processor(student))
        names = list(self.id2label.values())
        return run_fingerprint(self.data_args, self.training_args, self.data["train"], names, pixels)

    def collator(self, with_teacher_logits: bool = False) -> ImageCollator:
        """Makes batches of this run's samples."""
        data, store = self.data_args, self.teacher_logits
        return ImageCollator(
            len(self.id2label),
            data.mixup_alpha,
            data.cutmix_alpha,
            self.training_args.seed,
            mix_pairs=data.mix_pairs or store is not None,
            teacher_logits=store if with_teacher_logits else None,
        )

    def create(self, name: str, model_args: dict | None) -> PreTrainedModel:
        """Builds a model of this run's classes."""
        # The same seed for each: baseline and student start from the same weights.
        set_seed(self.training_args.seed)
        return self.args.create(name, model_args, id2label=self.id2label)

    def _loss_shapes(self, student: PreTrainedModel, teacher: Teacher | None) -> dict:
        size = read_preprocessing(student, load_image_processor(student)).size
        model = teacher_size = None
        if self.args.needs_teacher_layers:
            model, teacher_size = teacher.model, teacher.preprocessing and teacher.preprocessing.size
        return self.args.loss_shapes(student, size, model, self.training_args.feature_layer, teacher_size)

    def datasets(self, student: PreTrainedModel) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset]:
        """The images of training and of evaluation as the student gets them."""
        args, seed = self.data_args, self.training_args.seed
        processor = load_image_processor(student)
        wanted = read_preprocessing(student, processor)
        transform = train_transform(
            args, wanted.size, wanted.mean, wanted.std, wanted.interpolation, wanted.channel_order
        )
        kind = StreamingImageDataset if args.streaming else ImageDataset
        train = kind(self.data["train"], transform, seed, args.on_bad_image)
        return train, self._evaluation_images(processor)

    def _evaluation_images(self, processor: BaseImageProcessor) -> torch.utils.data.Dataset:
        args, seed = self.data_args, self.training_args.seed
        kind = StreamingImageDataset if args.streaming else ImageDataset
        transform = processor_transform(processor)
        return kind(self.data["validation"], transform, seed, args.on_bad_image, training=False)

    def _trainer(
        self,
        folder: Path,
        student: PreTrainedModel,
        loss: nn.Module | dict[str, nn.Module] | None = None,
        teacher: PreTrainedModel | Teacher | None = None,
        **changes,
    ) -> DistillationTrainer:
        """Makes the trainer of one model, with the run's arguments but for `changes`."""
        args = copy.copy(self.training_args)
        for argument, value in {"output_dir": str(folder), "push_to_hub": False, **changes}.items():
            setattr(args, argument, value)
        args.hub_model_id = args.hub_model_id or self.folder.name
        if loss is None:
            args.feature_layer = args.teacher_dtype = None
            args.teacher_channels_last = args.teacher_compile = False
        train, validation = self.datasets(student)
        return DistillationTrainer(
            model=student,
            teacher=teacher,
            distillation_loss=loss,
            args=args,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=self.collator(with_teacher_logits=loss is not None),
            processing_class=load_image_processor(student),
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=top5_indices,
            callbacks=[BadImageReport(self.steps_per_epoch)],
        )

    def _train(
        self,
        name: str,
        student: PreTrainedModel,
        loss: nn.Module | dict[str, nn.Module] | None = None,
        teacher: PreTrainedModel | Teacher | None = None,
    ) -> PreTrainedModel:
        """Trains one model into its own folder, notes its accuracy and returns it."""
        folder = self.folder / name
        # What is pushed, and what is resumed, is the recipe's result.
        is_result = name == self._result
        history = self._in_folder(lambda: stage_history(folder)) if self.goes_on and not is_result else None
        if history is not None:
            fault = first_fault(None if stage_history(folder) == history else f"{folder} lacks the trained {name}")
            if fault:
                raise SystemExit(f"error: output_dir must be one folder for all processes: {fault}")
            self._note(name, history)
            self._say(f"The {name} in {folder} is trained already")
            check_class_order(str(folder), student.config.id2label)
            trained = open_classifier(str(folder), trust_remote_code=self.args.trust_remote_code)
            student.load_state_dict(trained.state_dict())
            return student.to(self.training_args.device)
        push = self.training_args.push_to_hub and is_result
        trainer = self._trainer(folder, student, loss, teacher, push_to_hub=push)
        args = trainer.args
        trainer.card_info = self._card_info()
        start = describe_start(student)
        self._say(f"Training the {name} ({_count(student)} parameters, {start}); it goes to {folder}")
        try:
            trainer.train(resume_from_checkpoint=self._checkpoint(trainer, is_result))
        except CheckpointError as error:
            raise SystemExit(f"error: {error}") from error
        # As an internal call, which does not push: report() does, when the figures are written down.
        with self._writes(f"the {name}", folder):
            trainer.save_model(_internal_call=True)
        trainer.evaluate()
        with self._writes(f"the {name}", folder):
            if args.precise_bn_images is not None:
                trainer.save_model(_internal_call=True)  # with the statistics that were evaluated
            trainer.save_state()
            if is_result:
                trainer.create_model_card(model_name=args.hub_model_id.split("/")[-1])
        self._note(name, trainer.state.log_history)
        if args.push_to_hub:
            self.to_push = trainer
        return trainer.student

    def _note(self, name: str, history: list[dict[str, float]]) -> None:
        """Takes accuracies and curve of a model from its log, which ends with its evaluation."""
        key = "distilled" if name == "student" else name
        entries = [entry for entry in history if "eval_accuracy" in entry and OTHER_DATASET not in entry]
        self.results[key] = entries[-1]["eval_accuracy"]
        self.accuracies[key] = {metric: entries[-1][f"eval_{metric}"] for metric in ("accuracy", "top5_accuracy")}
        self.curves[key] = [(self._passed(entry), entry["eval_accuracy"]) for entry in entries]

    def _passed(self, entry: dict[str, float]) -> float:
        """Epochs after which an entry of the log was made, or steps in a stream whose images nobody has counted."""
        if not self.data_args.streaming:
            return entry["epoch"]
        # To the Trainer, a stream is one epoch.
        images = self._images_per_epoch
        return entry["step"] if images is None else entry["step"] * self.training_args.global_batch_size() / images

    def _in_folder(self, action: Callable[[], Any]) -> Any:
        """What `action` returns in the first process, for all of them; an error ends the run with a message."""
        try:
            return decide_in_first(action)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        except OSError as error:
            cause, advice = failed_write(error, self.folder)
            raise SystemExit(
                f"error: the folder {self.folder} cannot be written to ({cause}): {advice}, or choose another --output_dir"
            ) from error

    def _find_run(self) -> tuple[bool, bool]:
        """Whether the run in the folder goes on, and whether all is trained there. One that was stopped does."""
        checkpoint = self._named_checkpoint
        if checkpoint is not None:  # Who names one knows what it is of.
            fault = fault_of(checkpoint)
            if fault is None and is_model_only(checkpoint):
                fault = "saved with save_only_model, which leaves the optimiser's state out"
            if fault is not None:
                raise ValueError(
                    f"the checkpoint {checkpoint} cannot be resumed: {fault}. Nothing was trained yet: name another "
                    "one, or leave --resume_from_checkpoint out, and the run in output_dir goes on by itself"
                )
        hold(self.folder)
        if checkpoint is not None:
            return True, False
        afresh = str(self.training_args.resume_from_checkpoint).lower() == "false"
        goes_on = continues(self.folder, self._settings, afresh)
        if not has_run(self.folder):
            clear(
                self.folder, self._settings
            )  # There is nothing to lose, and a folder that is read-only is told here.
        return goes_on, goes_on and is_trained(self.folder)

    def _clear_earlier_run(self) -> None:
        if has_run(self.folder):
            print(f"\nThe earlier run in {self.folder} was finished: this one replaces it", flush=True)
            clear(self.folder, self._settings)

    @property
    def _named_checkpoint(self) -> str | None:
        wanted = str(self.training_args.resume_from_checkpoint)
        return None if wanted.lower() in ("none", "true", "false") else wanted

    def _checkpoint(self, trainer: DistillationTrainer, is_result: bool) -> str | None:
        """Where the training of one model goes on: a checkpoint that is named is the result's, else its own last one."""
        if self._named_checkpoint is not None and is_result:
            return self._named_checkpoint
        if not self.goes_on:
            return None
        folder = trainer.args.output_dir
        checkpoint = trainer.last_checkpoint()
        if checkpoint is not None:
            self._say(f"Goes on from {checkpoint}")
            return checkpoint
        missing = f"There is no checkpoint in {folder}"
        if checkpoints(folder):
            missing = f"The checkpoints in {folder} hold the model only (save_only_model)"
        self._say(f"{missing}: this training starts from the beginning")
        return None

    @contextlib.contextmanager
    def _writes(self, what: str, folder: str | Path) -> Iterator[None]:
        """What cannot be written ends the run with a message."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            cause, advice = failed_write(error, folder)
            raise SystemExit(
                f"error: {what} could not be written to {folder} ({cause}). The checkpoints are as they were: {advice}, and "
                "start the run again"
            ) from error

    def _check_hub(self) -> None:
        args = self.training_args
        try:
            create_repo(
                args.hub_model_id or self.folder.name,
                private=args.hub_private_repo,
                token=args.hub_token,
                revision=args.hub_revision,
            )
        except PushError as error:
            raise SystemExit(
                f"error: {error}\nNothing was trained yet. Without --push_to_hub, the student stays here."
            ) from None

    def _push(self) -> str | None:
        """Pushes the result, if that is asked for; what came in the way is returned."""
        args = self.training_args
        commit = None
        try:
            if self.to_push is not None:
                commit = self.to_push.push_to_hub()
            elif self.is_trained and args.push_to_hub and args.process_index == 0:
                commit = push_student(
                    self.folder / self._result,
                    args.hub_model_id or self.folder.name,
                    private=args.hub_private_repo,
                    revision=args.hub_revision,
                    token=args.hub_token,
                )
        except (PushError, ValueError) as error:
            return f"error: {error}"
        if commit is not None:
            self._say(f"The student is on the Hub: {commit.commit_url}")
        return None

    def _card_info(self) -> CardInfo:
        data = self.data_args
        crop = "random_crop_padding" if data.random_crop_padding else "random_resized_crop"
        others = ("horizontal_flip", "auto_augment", "random_erasing", "pca_lighting", "mixup_alpha", "cutmix_alpha")
        split = self.data["validation"].split
        return CardInfo(
            dataset=data.dataset_name,
            dataset_config=data.dataset_config_name,
            # One that was cut out of the training split has no name of its own.
            dataset_split=None if split == self.data["train"].split else str(split),
            num_train_images=None if data.streaming else len(self.data["train"]),
            num_eval_images=None if data.streaming else len(self.data["validation"]),
            teacher=self.accuracies.get("teacher"),
            teacher_on_student_pixels=self.accuracies.get(ON_STUDENT_PIXELS),
            baseline=self.accuracies.get("baseline"),
            augmentation=", ".join(f"{name}={value}" for name in (crop, *others) if (value := getattr(data, name))),
            launch=launch_line(),
            license=self.args.license,
        )

    def _count_steps(self) -> None:
        """A stream has no length: epochs become steps."""
        args = self.training_args
        batch = args.global_batch_size()
        images = self._images_per_epoch
        self.steps_per_epoch = None if images is None else streaming_max_steps(images, 1, batch)
        if args.max_steps <= 0:
            args.max_steps = streaming_max_steps(images, args.num_train_epochs, batch)
        for kind in ("eval", "save", "logging"):
            if getattr(args, f"{kind}_strategy") == IntervalStrategy.EPOCH:
                setattr(args, f"{kind}_strategy", IntervalStrategy.STEPS)
                setattr(args, f"{kind}_steps", streaming_max_steps(images, 1, batch))

    @property
    def _images_per_epoch(self) -> int | None:
        """Images of a pass through a stream, as far as is known."""
        images, limit = self.data_args.num_train_images, self.data_args.max_train_samples
        return min(images, limit) if images is not None and limit is not None else images

    def _plot(self, path: Path) -> None:
        figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        own, given = self.results["teacher"], self.results[ON_STUDENT_PIXELS]
        if own is not None:
            axes.axhline(100 * own, color="0.4", linestyle="--", label="teacher")
        if given not in (None, own):
            axes.axhline(100 * given, color="0.6", linestyle=":", label="teacher, on the student's pixels")
        for name in ("baseline", "distilled"):
            if name in self.curves:
                epochs, values = zip(*self.curves[name], strict=True)
                axes.plot(epochs, [100 * value for value in values], marker=".", label=name)
        is_counted = not self.data_args.streaming or self._images_per_epoch is not None
        axes.set(
            xlabel="epoch" if is_counted else "step",
            ylabel="top-1 accuracy on held-out images (%)",
            title=self.args.student,
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)

    def _show_pipeline(self, name: str) -> None:
        for row in self.data["validation"]:
            with contextlib.suppress(BadSampleError):
                image, label = read_sample(row, "the example")
                break
        example = self.folder / "example.png"
        with self._writes("the example", self.folder):
            image.save(example)
        folder = self.folder / name
        with hidden_progress_bars():
            student = open_classifier(str(folder), trust_remote_code=self.args.trust_remote_code)
        # pipeline() looks for the processor by another way, which warns that timm's has no torchvision backend.
        processor = load_image_processor(student)
        classifier = pipeline("image-classification", model=student, image_processor=processor, device="cpu")
        answer = classifier(str(example), top_k=3)
        print(f"\nThe student opens anywhere; {example} is a held-out image of class {self.id2label[label]!r}:\n")
        print(">>> from transformers import pipeline")
        code = ", trust_remote_code=True" if list(folder.glob("*.py")) else ""
        print(f'>>> classifier = pipeline("image-classification", model="{folder}"{code})')
        print(f'>>> classifier("{example}", top_k=3)')
        print([{"label": entry["label"], "score": round(entry["score"], 4)} for entry in answer])

    def _say(self, message: str) -> None:
        if self.training_args.should_save:
            print(f"\n{message}", flush=True)


def _count(model: PreTrainedModel) -> str:
    parameters = model.num_parameters()
    return f"{parameters / 1e6:.1f} million" if parameters > 1e6 else f"{parameters / 1e3:.0f} thousand"
