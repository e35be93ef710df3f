"""Runs a recipe: opens data and models, trains teacher, baseline and student, and reports them."""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import release_memory
from datasets import DatasetDict, IterableDatasetDict
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.arguments import DataArguments
from ..data.collator import ImageCollator
from ..data.labels import label_names
from ..data.student_datasets import ImageDatasets, make_collator, make_evaluation_images, make_image_datasets
from ..hub.model_card.curves import OTHER_DATASET
from ..hub.teacher_logits import find_store
from ..models.preprocessing import load_image_processor, read_preprocessing
from ..models.students import describe_start
from ..models.teacher import Teacher
from ..models.teacher_loading import load_teacher
from ..teacher_logits.store import TeacherLogits
from ..trainer.agreement import decide_in_first
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.trainer import DistillationTrainer
from .arguments import RecipeArguments
from .build import (
    build_loss,
    count_epochs,
    create_model,
    create_teacher,
    open_data,
    passed_epochs,
    runs_teacher,
    set_stream_steps,
)
from .checks import (
    check_arguments,
    check_batch_sizes,
    check_classes,
    check_names,
    check_number_of_classes,
    check_one_step,
)
from .class_sizes import make_class_settings
from .disk import check_disk
from .fingerprint import check_fingerprint, fingerprint_run
from .progress import shows_bars
from .report import (
    ON_STUDENT_PIXELS,
    PICTURE,
    create_repo_for,
    describe_size,
    make_card_info,
    plot_curves,
    print_table,
    push_result,
    say,
    say_held_out,
    show_example,
)
from .run_folder import (
    RESULTS,
    check_stored_logits,
    collect_settings,
    decide_in_folder,
    exit_if_not_written,
    finish_run,
    is_trained,
    named_checkpoint,
    open_run,
    replace_run,
    write_results,
)
from .stage import find_last_checkpoint, find_trained, make_trainer, open_trained, restore_trained, train_model
from .teacher_accuracy import evaluate_teacher, measure_teacher, say_teacher_accuracy
from .teacher_start import needs_finetuning, open_named_teacher, teacher_changes
from .time_budget import settle_epochs
from .time_left import TimeLeft


class Recipe:
    """One run of a recipe: its data, what was trained so far, and its figures.

    Args:
        recipe (`RecipeArguments`): teacher, student, loss and preprocessing.
        data (`DataArguments`): the dataset and its augmentation.
        training (`DistillationTrainingArguments`): `output_dir` holds the results; each model gets a folder in it. For
            a stream, its settings in epochs are changed to steps.
        splits, teacher: data and pretrained teacher, if they are open already.

    Raises:
        ValueError: arguments, names, data or stored logits do not fit each other.
        SystemExit: with a message, when the folder or the Hub's repo cannot be written to.

    Example:

    ```python
    recipe = Recipe(*parse_args((RecipeArguments, DataArguments, DistillationTrainingArguments)))
    recipe.train_teacher()
    recipe.train_baseline()
    recipe.train_student()
    recipe.report()
    ```
    """

    def __init__(
        self,
        recipe: RecipeArguments,
        data: DataArguments,
        training: DistillationTrainingArguments,
        splits: DatasetDict | IterableDatasetDict | None = None,
        teacher: Teacher | None = None,
    ):
        self.args, self.data_args, self.training_args = recipe, data, training
        self.folder = Path(training.output_dir)
        self.results: dict[str, float | None] = dict.fromkeys(("teacher", ON_STUDENT_PIXELS, "baseline", "distilled"))
        self.accuracies: dict[str, dict[str, float]] = {}
        self.curves: dict[str, list[tuple[float, float]]] = {}
        # The figures of `nkd-hf distill` beside the accuracies: see recipe/deployment.py.
        self.figures: dict[str, Any] = {}
        self.id2label: dict[int, str] = {}
        self.teacher: PreTrainedModel | Teacher | None = teacher
        self.trains_teacher = runs_teacher(recipe) and recipe.names_new_teacher
        self.to_push: DistillationTrainer | None = None
        self.result_trainer: DistillationTrainer | None = None
        # Cheap steps come first, so that a run that must fail does so early.
        check_arguments(recipe, data, training)
        create_repo_for(training)
        self._open_run_folder()
        if recipe.teacher_prompts is None:
            self._open_named_teacher()  # before the data, since their download takes longer
        self._open_data(splits)
        self._decide_on_teacher()
        self._open_teacher_logits()

    # The steps of the constructor

    def _open_run_folder(self) -> None:
        """Locks the folder of the run, and finds out which run is in it."""
        training = self.training_args
        # The settings are collected here, since _open_data changes the steps of a stream.
        self._settings = collect_settings(self.args, self.data_args, training)
        if not decide_in_first(lambda: is_trained(self.folder)):
            check_names(self.args)
        self.goes_on, self.is_trained = decide_in_folder(
            self.folder, lambda: open_run(self.folder, self._settings, training)
        )
        self._is_checked = self.is_trained

    def _open_named_teacher(self) -> None:
        if not self.is_trained and self.teacher is None and runs_teacher(self.args) and not self.trains_teacher:
            self.teacher = open_named_teacher(self.args, self.id2label, self.training_args)

    def _open_data(self, splits: DatasetDict | IterableDatasetDict | None) -> None:
        data, training = self.data_args, self.training_args
        self.data = open_data(data, training) if splits is None else splits
        self.id2label = dict(enumerate(label_names(self.data)))
        say_held_out(data, self.data, training)
        names = list(self.id2label.values())
        check_classes(self.args, data, names)
        self._class_settings = make_class_settings(self.args, self.data["train"], names)
        self.steps_per_epoch = set_stream_steps(data, training) if data.streaming else None

    def _decide_on_teacher(self) -> None:
        """Decides whether a pretrained teacher is fine-tuned first; then its weights are opened again for training."""
        self._open_named_teacher()  # a teacher with teacher_prompts, which need the classes of the data
        if needs_finetuning(self.args, self.teacher, self.id2label, self.data_args):
            self.teacher, self.trains_teacher = None, True

    def _open_teacher_logits(self) -> None:
        """Opens the store of the teacher's logits, and checks that it is of this run."""
        self.teacher_logits: TeacherLogits | None = None
        recipe, training = self.args, self.training_args
        if recipe.teacher_logits is None:
            return
        if self.data_args.streaming:
            raise ValueError(
                "teacher_logits needs streaming off: a stream has no order in which logits could be stored"
            )
        epochs = count_epochs(training, len(self.data["train"]))
        with training.main_process_first(desc="opening the teacher's logits"):
            store = TeacherLogits(find_store(recipe.teacher_logits, epochs))
        fingerprint = self.fingerprint(self.create(recipe.student, recipe.student_args))
        check_fingerprint(store.folder, store.info, recipe, fingerprint, training.teacher_dtype, self.id2label)
        store.check_complete(epochs)
        check_stored_logits(self.folder, store.info, self.goes_on and named_checkpoint(training) is None)
        own, given = store.info.teacher_own_accuracy, store.info.teacher_accuracy
        self.results |= {"teacher": own, ON_STUDENT_PIXELS: given}
        if own is not None:
            self.accuracies["teacher"] = {"accuracy": own}
        if given not in (None, own):
            self.accuracies[ON_STUDENT_PIXELS] = {"accuracy": given}
        self.teacher_logits = store

    # The run

    def check(self, trains_student: bool = True) -> None:
        """Builds the models and the loss and sends one image through them, before anything is trained.

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
            trainer = self.make_stage("student", teacher_compile=False)
            if self.teacher_logits is None:
                check_one_step(trainer, sample)
            if trains_student:
                check_batch_sizes(trainer)
            del trainer
        del student
        release_memory()
        if trains_student:
            settle_epochs(self)
            check_disk(self, self.stages)
        if not self.goes_on:
            # The checks come first, so that wrong input does not delete the results of an earlier run.
            decide_in_folder(self.folder, lambda: replace_run(self.folder, self._settings))
        self._is_checked = True

    def train_teacher(self) -> None:
        """Trains the teacher, unless the run has none, reads stored logits, or uses a pretrained teacher as it is.

        An architecture starts from random weights. A pretrained teacher starts from its own weights, with a new head.

        Raises:
            ValueError: data, models, loss or stored logits do not fit each other. The first of the three trainings checks
                all of them before its first step.
        """
        self.check()
        if not self.is_trained and self.trains_teacher:
            changes = teacher_changes(self.args, self.data_args, self.training_args)
            self.teacher = self._train("teacher", self.create_teacher(), **changes)

    def train_baseline(self) -> None:
        """Trains the student without the distillation loss, for `compare_with_baseline` or if the loss is `none`."""
        self.check()
        if not self.is_trained and (self.args.compare_with_baseline or self.args.distillation_loss == "none"):
            self.measure_teacher()
            self._train("baseline", self.create(self.args.student, self.args.student_args))

    def train_student(self) -> None:
        """Trains the student with the distillation loss, from the baseline's seed and with its labelled images."""
        self.check()
        if not self.is_trained and self.args.distillation_loss != "none":
            if self.teacher is None:
                self.train_teacher()
            self.measure_teacher()
            student = self.create(self.args.student, self.args.student_args)
            # build_loss needs the shapes of the teacher's layers.
            teacher = None if self.teacher is None else load_teacher(self.teacher)
            self._train("student", student, build_loss(self.args, self.training_args, student, teacher), teacher)

    def report(self) -> None:
        """Prints the table, writes `results.json` and `accuracy.png`, pushes the student, and shows how to open it.

        If the run is stopped here, or its push fails, the next start of the run continues with the push.

        Raises:
            SystemExit: with code 1 and a message, when the push or a file failed; everything else is on disk then.
        """
        training = self.training_args
        if training.should_save:
            if self.is_trained:
                say(training, f"All models in {self.folder} are trained: only the report is unfinished")
                results = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
                self.results = {key: results.get(key) for key in self.results}
            else:
                with exit_if_not_written("the report", self.folder):
                    plot_curves(self.folder / PICTURE, self.args.student, self.results, self.curves, self.data_args)
                    write_results(self.folder, self.all_results())
            print_table(self.args, self.results, self.folder)
        folder = self.folder / self._result
        fault = push_result(training, folder, self.to_push, self.is_trained)
        if training.should_save:
            show_example(folder, self.data["validation"], [*self.id2label.values()], self.args.trust_remote_code)
            if not fault:
                finish_run(self.folder)
        # A process that ends while another still writes can end the whole group.
        state = PartialState()
        state.wait_for_everyone()
        state.destroy_process_group()
        if fault:
            raise SystemExit(fault)

    def all_results(self) -> dict[str, Any]:
        """Returns the content of `results.json`."""
        if not self.figures:
            return self.results
        # The other figures are rounded, too.
        return {key: value if value is None else round(value, 4) for key, value in self.results.items()} | self.figures

    # The teacher

    def open_teacher(self) -> None:
        """Opens a teacher that is a Hub id or a folder.

        Raises:
            ValueError: the teacher cannot be opened, or has another number of classes than the data.
        """
        self._open_named_teacher()
        if isinstance(self.teacher, Teacher) and self.args.ignore_label_names:
            check_number_of_classes(self.teacher, self.args, self.data_args, len(self.id2label))
            for member in self.teacher.members:
                member.id2label = None

    def measure_teacher(self) -> None:
        """Measures the teacher's top-1 with its own preprocessing, and on the student's pixels where they differ.

        Before days of training, they show a wrong teacher, and a teacher that the student's settings make worse.
        """
        self.open_teacher()
        if self.teacher is None or self.results[ON_STUDENT_PIXELS] is not None:
            return
        self._measure(load_teacher(self.teacher))
        release_memory()

    def _measure(self, teacher: Teacher) -> None:
        training = self.training_args
        student = self.create(self.args.student, self.args.student_args)
        trainer = self._make_trainer(self.folder, student, dataloader_persistent_workers=False)

        def evaluate(prepared: Teacher, *processors: BaseImageProcessor) -> dict[str, float]:
            held_out, data = self.data["validation"], self.data_args
            images = [make_evaluation_images(held_out, data, processor, training.seed) for processor in processors]
            loaders = [trainer.get_test_dataloader(each) for each in images]
            return evaluate_teacher(prepared, loaders, trainer.accelerator, shows_bars(training))

        # A teacher that this run has trained was measured at the end of its training.
        self.accuracies |= measure_teacher(teacher, student, evaluate, training, self.accuracies.get("teacher"))
        given = self.accuracies.get(ON_STUDENT_PIXELS, self.accuracies["teacher"])
        self.results |= {"teacher": self.accuracies["teacher"]["accuracy"], ON_STUDENT_PIXELS: given["accuracy"]}
        say_teacher_accuracy(self.accuracies, teacher, student, training)

    # What the trainings share

    def create(self, name: str, model_args: dict | None) -> PreTrainedModel:
        """Builds a model with this run's classes."""
        return create_model(self.args, name, model_args, self.id2label, self.training_args.seed)

    def create_teacher(self) -> PreTrainedModel:
        """Builds the teacher that is trained; see [`~nkd_hf.recipe.build.create_teacher`]."""
        return create_teacher(self.args, self.id2label, self.training_args.seed)

    def datasets(self, student: PreTrainedModel, with_unlabeled: bool = True) -> ImageDatasets:
        """Makes the images of training and of evaluation with the student's preprocessing."""
        return make_image_datasets(self.data, self.data_args, student, self.training_args.seed, with_unlabeled)

    def collator(self, with_teacher_logits: bool = False) -> ImageCollator:
        """Makes the collator of this run's batches; with a store of logits, it mixes images in pairs."""
        store, seed = self.teacher_logits, self.training_args.seed
        logits = store if with_teacher_logits else None
        return make_collator(self.data_args, len(self.id2label), seed, store is not None, logits)

    def fingerprint(self, student: PreTrainedModel) -> dict:
        """Collects the settings on which a teacher's logits depend, without the teacher."""
        pixels = read_preprocessing(student, load_image_processor(student))
        names = list(self.id2label.values())
        return fingerprint_run(self.data_args, self.training_args, self.data["train"], names, pixels)

    @property
    def _result(self) -> str:
        """The folder of the model that is pushed; `resume_from_checkpoint` names a checkpoint of this model."""
        return "baseline" if self.args.distillation_loss == "none" else "student"

    @property
    def stages(self) -> list[str]:
        """The names of the trainings of this run, in their order."""
        has_loss = self.args.distillation_loss != "none"
        wanted = {
            "teacher": self.trains_teacher,
            "baseline": self.args.compare_with_baseline or not has_loss,
            "student": has_loss,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]

    def make_stage(self, name: str, **changes) -> DistillationTrainer:
        """Makes the trainer of one of the trainings, with new models; `changes` are training arguments."""
        if name == "teacher":
            changes = teacher_changes(self.args, self.data_args, self.training_args) | changes
            return self._make_trainer(self.folder, self.create_teacher(), **changes)
        student = self.create(self.args.student, self.args.student_args)
        if name == "baseline":
            return self._make_trainer(self.folder, student, **changes)
        teacher = self.teacher
        if runs_teacher(self.args) and teacher is None:
            teacher = load_teacher(self.create_teacher())
        loss = build_loss(self.args, self.training_args, student, teacher)
        return self._make_trainer(self.folder, student, loss, teacher, **changes)

    def _make_trainer(self, folder: Path, student: PreTrainedModel, loss=None, teacher=None, **changes):
        datasets, collator = self.datasets(student, loss is not None), self.collator(loss is not None)
        changes |= self._class_settings
        return make_trainer(
            self.training_args, folder, student, datasets, collator, loss, teacher, self.steps_per_epoch,
            early_stopping_patience=self.args.early_stopping_patience, **changes,
        )  # fmt: skip

    def _train(self, name: str, student: PreTrainedModel, loss=None, teacher=None, **changes) -> PreTrainedModel:
        """Trains a model into its own folder, records its accuracy, and returns it; `changes` are of the arguments."""
        folder, is_result, training = self.folder / name, name == self._result, self.training_args
        # resume_from_checkpoint names a checkpoint of the model that is pushed.
        checkpoint = named_checkpoint(training) if is_result else None
        history = find_trained(folder) if self.goes_on and checkpoint is None else None
        if history is not None:
            self._record(name, history)
            say(training, f"The {name} in {folder} is trained already")
            student = open_trained(folder, student, self.args.trust_remote_code).to(training.device)
            if not is_result:
                return student
        changes["push_to_hub"] = training.push_to_hub and is_result
        has_begun = folder.is_dir()  # Trainer.__init__ makes the folder
        trainer = self._make_trainer(folder, student, loss, teacher, **changes)
        trainer.card_info = make_card_info(self.args, self.data_args, self.data, self.accuracies, self.teacher_logits)
        if history is not None:
            restore_trained(trainer)
        else:
            self._train_from(checkpoint, trainer, name, has_begun)
        if trainer.args.push_to_hub:
            self.to_push = trainer
        if is_result:
            self.result_trainer = trainer
        return trainer.student

    def _train_from(self, checkpoint: str | None, trainer: DistillationTrainer, name: str, has_begun: bool) -> None:
        """Trains one model from the given checkpoint or from the last one of this run, and records its accuracy."""
        training, student = self.training_args, trainer.student
        trainer.add_callback(TimeLeft(name, self.stages[self.stages.index(name) + 1 :]))
        start = f"{describe_size(student)} parameters, {describe_start(student)}"
        say(training, f"Training the {name} ({start}); it goes to {trainer.args.output_dir}")
        if checkpoint is None and self.goes_on:
            checkpoint = find_last_checkpoint(trainer, has_begun)
        train_model(trainer, name, checkpoint, with_card=name == self._result)
        self._record(name, trainer.state.log_history)

    def _record(self, name: str, history: list[dict[str, float]]) -> None:
        """Reads the accuracies and the curve of a model from its log, which ends with its evaluation."""
        key, data, training = "distilled" if name == "student" else name, self.data_args, self.training_args
        entries = [entry for entry in history if "eval_accuracy" in entry and OTHER_DATASET not in entry]
        self.results[key] = entries[-1]["eval_accuracy"]
        self.accuracies[key] = {metric: entries[-1][f"eval_{metric}"] for metric in ("accuracy", "top5_accuracy")}
        self.curves[key] = [(passed_epochs(entry, data, training), entry["eval_accuracy"]) for entry in entries]
