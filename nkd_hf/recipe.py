"""The steps that the recipes share: open the data, train teacher, baseline and student, write down what came out."""

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import matplotlib.figure
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import EvalPrediction, IntervalStrategy, PreTrainedModel, pipeline, set_seed

from .architectures import is_architecture
from .bad_images import BadImageReport
from .batches import ImageCollator
from .checkpoints import CheckpointError, checkpoints, fault_of, is_model_only
from .data import DataArguments, label_names, load_image_dataset, streaming_max_steps
from .hub import PushError, create_repo, push_student
from .images import BadSampleError, ImageDataset, StreamingImageDataset, read_sample
from .labels import check_class_order, class_numbers
from .metrics import compute_metrics, top5_indices
from .model_card import CardInfo, check_license, launch_line
from .model_card.curves import OTHER_DATASET
from .opening import open_classifier
from .preprocessing import read_preprocessing
from .recipe_args import RecipeArguments
from .run_folder import RESULTS, begin, finish, hold, is_trained, settings_of, stage_history, write_results
from .store_fingerprint import check_fingerprint, run_fingerprint
from .store_hub import find_store
from .students import load_image_processor
from .teacher import Teacher, load_teacher
from .teacher_logits import TeacherLogits
from .trainer import DistillationTrainer
from .training_args import DistillationTrainingArguments
from .transforms import processor_transform, train_transform


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
        self.results: dict[str, float | None] = {"teacher": None, "baseline": None, "distilled": None}
        self.accuracies: dict[str, dict[str, float]] = {}
        self.curves: dict[str, list[tuple[float, float]]] = {}
        self.teacher: str | PreTrainedModel | Teacher | None = None
        self.to_push: DistillationTrainer | None = None
        if training.push_to_hub and training.process_index == 0:
            self._check_hub()
        self.goes_on, self.is_trained = self._begin()
        if training.device.type == "cpu":
            # Workers and PyTorch's threads share the cores; threads that wait for each other make steps several times
            # slower than fewer of them.
            torch.set_num_threads(max(1, torch.get_num_threads() - training.dataloader_num_workers))
        with training.main_process_first(desc="loading the data"):
            self.data = load_image_dataset(data, training.seed)
        self.id2label = dict(enumerate(label_names(self.data)))
        if data.num_classes not in (None, len(self.id2label)):
            raise ValueError(
                f"num_classes is {data.num_classes}, but {data.dataset_name!r} has {len(self.id2label)} classes: set it to "
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
        """Trains the teacher, if it is named by an architecture and the loss wants one whose logits are not stored."""
        if self.is_trained or not self.args.needs_teacher or self.teacher_logits is not None:
            return
        self.teacher = self.args.teacher
        if is_architecture(self.args.teacher):
            if self.args.needs_teacher_layers:  # Its errors should come before the teacher is trained.
                student = self.create(self.args.student, self.args.student_args)
                self._loss_shapes(student, load_teacher(self.create(self.args.teacher, self.args.teacher_args)))
            self.teacher = self._train("teacher", self.create(self.args.teacher, self.args.teacher_args))

    def train_baseline(self) -> None:
        """Trains the student without the distillation loss, if that is asked for."""
        if not self.is_trained and (self.args.compare_with_baseline or self.args.distillation_loss == "none"):
            self._train("baseline", self.create(self.args.student, self.args.student_args))

    def train_student(self) -> None:
        """Trains the student with the distillation loss, from the seed and with the data of the baseline."""
        if not self.is_trained and self.args.distillation_loss != "none":
            if self.teacher is None:
                self.train_teacher()
            student = self.create(self.args.student, self.args.student_args)
            self.open_teacher()
            loss = self._loss(student)
            self._train("student", student, loss, self.teacher)

    def open_teacher(self) -> None:
        """Opens a teacher that is named by its id or folder."""
        if isinstance(self.teacher, str):
            self.teacher = load_teacher(
                self.teacher, allow_pickle=self.args.allow_pickle, trust_remote_code=self.args.trust_remote_code
            )
        if self.args.ignore_label_names and isinstance(self.teacher, Teacher):
            self.teacher.id2label = None

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
        names = {
            "teacher": f"teacher ({self.args.teacher or (self.args.teacher_logits and 'of ' + self.args.teacher_logits)})",
            "baseline": f"baseline ({self.args.student})",
            "distilled": f"distilled ({self.args.distillation_loss.upper()})",
        }
        print(f"\n{'':<44}top-1 accuracy")
        for name, value in self.results.items():
            if value is not None:
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
            batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
            epochs = math.ceil(training.max_steps / max(1, math.ceil(len(self.data["train"]) / batch)))
        with training.main_process_first(desc="opening the teacher's logits"):
            store = TeacherLogits(find_store(args.teacher_logits, epochs))
        fingerprint = self.fingerprint(self.create(args.student, args.student_args))
        check_fingerprint(store.folder, store.info, args, fingerprint, training.teacher_dtype)
        store.check_complete(epochs)
        if store.info.teacher_accuracy is not None:
            self.results["teacher"] = store.info.teacher_accuracy
            self.accuracies["teacher"] = {"accuracy": store.info.teacher_accuracy}
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

    def _loss(self, student: PreTrainedModel) -> nn.Module | dict[str, nn.Module] | None:
        if self.args.needs_teacher_layers:
            # Opened here for its shapes, and handed on.
            self.teacher = load_teacher(self.teacher)
        return self.args.build_loss(**self._loss_shapes(student, self.teacher))

    def _loss_shapes(self, student: PreTrainedModel, teacher: str | PreTrainedModel | Teacher | None) -> dict:
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
        validation = kind(
            self.data["validation"], processor_transform(processor), seed, args.on_bad_image, training=False
        )
        return train, validation

    def _train(
        self,
        name: str,
        student: PreTrainedModel,
        loss: nn.Module | dict[str, nn.Module] | None = None,
        teacher: str | PreTrainedModel | Teacher | None = None,
    ) -> PreTrainedModel:
        """Trains one model into its own folder, notes its accuracy and returns it."""
        args = copy.copy(self.training_args)
        args.output_dir = str(self.folder / name)
        # What is pushed, and what is resumed, is the recipe's result.
        is_result = name == self._result
        history = stage_history(self.folder / name) if self.goes_on and not is_result else None
        if history is not None:
            self._note(name, history)
            self._say(f"The {name} in {args.output_dir} is trained already")
            check_class_order(args.output_dir, student.config.id2label)
            trained = open_classifier(args.output_dir, trust_remote_code=self.args.trust_remote_code)
            student.load_state_dict(trained.state_dict())
            return student.to(args.device)
        args.push_to_hub = args.push_to_hub and is_result
        args.hub_model_id = args.hub_model_id or self.folder.name
        if loss is None:
            args.feature_layer = args.teacher_dtype = None
            args.teacher_channels_last = args.teacher_compile = False
        train, validation = self.datasets(student)
        trainer = DistillationTrainer(
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
        # One that was not trained here has yet to be measured.
        if teacher is not None and self.results["teacher"] is None:
            self.results["teacher"] = self._teacher_accuracy(trainer)
            self.accuracies["teacher"] = {"accuracy": self.results["teacher"]}
            self._say(f"The teacher's top-1 on the student's pixels: {self.results['teacher']:.2%}")
        trainer.card_info = self._card_info()
        self._say(f"Training the {name} ({_count(student)} parameters); it goes to {args.output_dir}")
        try:
            trainer.train(resume_from_checkpoint=self._checkpoint(trainer, is_result))
        except CheckpointError as error:
            raise SystemExit(f"error: {error}") from error
        # As an internal call, which does not push: report() does, when the figures are written down.
        with self._writes(f"the {name}", args.output_dir):
            trainer.save_model(_internal_call=True)
        trainer.evaluate()
        with self._writes(f"the {name}", args.output_dir):
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
        # To the Trainer, a stream is one long epoch.
        epochs = self.training_args.num_train_epochs if self.data_args.streaming else 1
        self.curves[key] = [(entry["epoch"] * epochs, entry["eval_accuracy"]) for entry in entries]

    def _begin(self) -> tuple[bool, bool]:
        """Whether the run in the folder goes on, and whether all is trained there. One that was stopped does."""
        answer = None
        if self.training_args.process_index == 0:
            try:
                answer = self._begin_in_folder()
            except ValueError as error:
                answer = f"error: {error}"
            except OSError as error:
                answer = (
                    f"error: the folder {self.folder} cannot be written to ({type(error).__name__}: {error}): make "
                    "that possible, or choose another --output_dir"
                )
        [answer] = broadcast_object_list([answer])
        if isinstance(answer, str):
            raise SystemExit(answer)
        return answer

    def _begin_in_folder(self) -> tuple[bool, bool]:
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
        settings = settings_of(self.args, self.data_args, self.training_args)
        afresh = str(self.training_args.resume_from_checkpoint).lower() == "false"
        goes_on = begin(self.folder, settings, afresh)
        return goes_on, goes_on and is_trained(self.folder)

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
            free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
            raise SystemExit(
                f"error: {what} could not be written to {folder} ({type(error).__name__}: {error}; {free / 2**30:.1f} "
                "GiB are free there). The checkpoints are as they were: make room, and start the run again"
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
            baseline=self.accuracies.get("baseline"),
            augmentation=", ".join(f"{name}={value}" for name in (crop, *others) if (value := getattr(data, name))),
            launch=launch_line(),
            license=self.args.license,
        )

    def _teacher_accuracy(self, trainer: DistillationTrainer) -> float:
        """Top-1 of the teacher on the student's pixels: a wrong teacher shows before days of training."""
        indices, labels = [], []
        for batch in tqdm(
            trainer.get_eval_dataloader(), desc="Evaluating the teacher", disable=trainer.args.disable_tqdm
        ):
            answer = top5_indices(trainer.teacher(batch["pixel_values"]))
            for gathered, part in ((indices, answer), (labels, batch["labels"])):
                gathered.append(trainer.accelerator.gather_for_metrics(part).cpu())
        prediction = EvalPrediction(torch.cat(indices).numpy(), torch.cat(labels).numpy())
        return compute_metrics(prediction)["accuracy"]

    def _count_steps(self) -> None:
        """A stream has no length: epochs become steps."""
        args = self.training_args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        images = self.data_args.num_train_images
        if images is not None and self.data_args.max_train_samples is not None:
            images = min(images, self.data_args.max_train_samples)
        self.steps_per_epoch = None if images is None else streaming_max_steps(images, 1, batch)
        if args.max_steps <= 0:
            args.max_steps = streaming_max_steps(images, args.num_train_epochs, batch)
        for kind in ("eval", "save", "logging"):
            if getattr(args, f"{kind}_strategy") == IntervalStrategy.EPOCH:
                setattr(args, f"{kind}_strategy", IntervalStrategy.STEPS)
                setattr(args, f"{kind}_steps", streaming_max_steps(images, 1, batch))

    def _plot(self, path: Path) -> None:
        figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        if self.results["teacher"] is not None:
            axes.axhline(100 * self.results["teacher"], color="0.4", linestyle="--", label="teacher")
        for name in ("baseline", "distilled"):
            if name in self.curves:
                epochs, values = zip(*self.curves[name], strict=True)
                axes.plot(epochs, [100 * value for value in values], marker=".", label=name)
        axes.set(xlabel="epoch", ylabel="top-1 accuracy on held-out images (%)", title=self.args.student)
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
        trust = self.args.trust_remote_code
        classifier = pipeline("image-classification", model=str(folder), device="cpu", trust_remote_code=trust)
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
