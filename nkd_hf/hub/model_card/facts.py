"""Collects the facts of a card: the author's facts, and the facts of the run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification, TrainerState, TrainingArguments

from ...models.teacher import Teacher
from ...models.zero_shot import ZeroShotClassifier
from ...teacher_logits.info import TeacherDescription, list_teachers
from .curves import publishable_log, read_accuracies
from .licences import check_license
from .text import hub_id


@dataclass
class CardInfo:
    """Facts for the model card that the trainer does not know. The card does not mention omitted facts.

    Args:
        dataset (`str` or `list[str]`, *optional*): the training datasets; the first is also the evaluation dataset.
            An id of the Hub (`owner/name`) is listed in the card's metadata; `digits`, a folder or a description in words
            is only in the text.
        dataset_config, dataset_split (`str`, *optional*): the dataset's configuration, and the evaluation split.
        num_train_images, num_eval_images (`int`, *optional*): the numbers of images of training and evaluation.
        teacher (`dict[str, float]`, *optional*): `accuracy` and, where it was measured, `top5_accuracy` of the teacher on
            the same images with its own preprocessing, as fractions.
        baseline (`dict[str, float]`, *optional*): the same accuracies of the student, trained in the same way without the
            distillation loss.
        augmentation (`str`, *optional*): the augmentation in words.
        class_weights (`str`, *optional*): the class weights of the task loss in words: `balanced`.
        unlabeled_dataset (`str`, *optional*): images that only the teacher taught, named as `dataset`.
        num_unlabeled_images (`int`, *optional*): number of these images.
        trained_without_labels (`bool`): whether there were no other training images, so that `dataset` is the evaluation's.
        launch (`str`, *optional*): the command that started the run; see [`launch_line`].
        license (`str`, *optional*): the licence of the weights, as the Hub spells it: `apache-2.0`. None becomes the
            Hub's `unknown`, since only the author can give a licence.
        language (`str` or `list[str]`, *optional*): the language in the metadata.
        finetuned_from (`str`, *optional*): Hub id of the weights that the student started from. None uses the id that
            the student was opened from.
        tags (`list[str]`): tags that are added to the card's own.
        teacher_on_student_pixels (`dict[str, float]`, *optional*): the teacher's accuracies on the student's pixels,
            where these differ from the pixels of the teacher's own preprocessing.
        deployment (`dict[str, dict]`, *optional*): by the names `teacher`, `baseline`, `student`, `student_onnx` and
            `student_int8`, the measured `top1` (a fraction), `size_bytes`, `latency_ms` (`p50`, `p95`) and `images_per_second`.
        temperature (`float`, *optional*): temperature by which the student's logits are divided for calibrated
            probabilities. The saved weights do not include it.

    Raises:
        ValueError: an accuracy is missing or not a fraction, or the Hub knows no such licence.
    """

    dataset: str | list[str] | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    num_train_images: int | None = None
    num_eval_images: int | None = None
    teacher: dict[str, float] | None = None
    baseline: dict[str, float] | None = None
    augmentation: str | None = None
    launch: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    finetuned_from: str | None = None
    tags: list[str] = field(default_factory=list)
    teacher_on_student_pixels: dict[str, float] | None = None
    class_weights: str | None = None
    unlabeled_dataset: str | None = None
    num_unlabeled_images: int | None = None
    trained_without_labels: bool = False
    deployment: dict[str, dict[str, Any]] | None = None
    temperature: float | None = None

    def __post_init__(self):
        check_license(self.license)
        for name in ("teacher", "teacher_on_student_pixels", "baseline"):
            values = getattr(self, name)
            if values is not None and not ("accuracy" in values and all(0 <= value <= 1 for value in values.values())):
                raise ValueError(
                    f"{name} must hold accuracy, and may hold top5_accuracy, as fractions from 0 to 1, got {values}"
                )

    def updated(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> "CardInfo":
        """Returns a copy with the given arguments of `Trainer.create_model_card`."""
        given = {
            "language": language,
            "license": license,
            "finetuned_from": finetuned_from,
            "dataset": listed(dataset_tags) or listed(dataset),
            "dataset_config": next(iter(listed(dataset_args)), None),
        }
        given = {name: value for name, value in given.items() if value}
        return dataclasses.replace(self, **given, tags=[*self.tags, *listed(tags), *listed(tasks)])


@dataclass
class Run:
    """All facts of a card; see [`create_card`]."""

    student: PreTrainedModel
    name: str
    args: TrainingArguments
    state: TrainerState
    repo_id: str | None
    teacher: Teacher | TeacherDescription | list[TeacherDescription] | None
    losses: Mapping[str, nn.Module]
    info: CardInfo
    curves: str | None
    # The student's folder, which the examples open; None where they open a repository, or a folder with the model's name.
    folder: str | None = None

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """The accuracies of the saved weights, by evaluation dataset; empty if these weights were not evaluated."""
        log = publishable_log(self.state.log_history)
        ends = [i for i, entry in enumerate(log) if "train_runtime" in entry]
        after_training = log[ends[-1] + 1 :] if ends else []
        found = [entry for entry in after_training if read_accuracies(entry)]
        if not found:
            # During training the weights are the last step's; after training, they may be the best step's.
            best = ends and self.args.load_best_model_at_end and self.state.best_global_step
            step = self.state.best_global_step if best else self.state.global_step
            found = [entry for entry in log if read_accuracies(entry) and entry["step"] == step]
        return {name: values for entry in found for name, values in read_accuracies(entry).items()}

    @property
    def last_evaluation(self) -> dict | None:
        """The last entry of the log with an accuracy, of any step's weights."""
        log = publishable_log(self.state.log_history)
        return next((entry for entry in reversed(log) if read_accuracies(entry)), None)

    @property
    def datasets(self) -> list[str]:
        """The names of the training datasets, as a list."""
        return listed(self.info.dataset)

    @property
    def start(self) -> str | None:
        """The id or folder of the weights that the student started from, if there is one."""
        return self.info.finetuned_from or self.student.name_or_path or None

    @property
    def teachers(self) -> list[TeacherDescription]:
        """The teacher, or the members of an ensemble, which ran during training or before; empty without a teacher."""
        if self.teacher is None:
            return []
        teacher = self.teacher
        if isinstance(teacher, Teacher):
            teacher = describe_teacher(teacher, [_find_name(member) for member in teacher.members])
        return list_teachers(teacher)

    @property
    def is_timm(self) -> bool:
        """Whether the student is one of timm's architectures."""
        return isinstance(self.student, TimmWrapperForImageClassification)

    @property
    def has_own_code(self) -> bool:
        """Whether `save_pretrained` copies a modelling file beside the weights."""
        return self.student._auto_class is not None


def architecture(model: nn.Module) -> str:
    """Returns timm's name of a model, or its class."""
    if isinstance(model, TimmWrapperForImageClassification):
        return model.config.architecture
    if isinstance(model, ZeroShotClassifier):
        return model.architecture
    return type(model).__name__.removesuffix("ForImageClassification")


def describe_teacher(teacher: Teacher, names: Sequence[str | None]) -> TeacherDescription | list[TeacherDescription]:
    """Returns name (or None), architecture and number of parameters of a teacher, or of each member of an ensemble."""
    described = [
        TeacherDescription(name, architecture(member.model), sum(p.numel() for p in member.model.parameters()))
        for member, name in zip(teacher.members, names, strict=True)
    ]
    if len(described) == 1:
        return described[0]
    return [each._replace(weight=weight) for each, weight in zip(described, teacher.weights, strict=True)]


def _find_name(teacher: Teacher) -> str | None:
    """Returns the name that a teacher was opened from; None for a module that is from no repository of the Hub."""
    if teacher.name != type(teacher.model).__name__:
        return teacher.name
    # A teacher that was passed as a module has its class as name; its config may name its repository.
    return hub_id(getattr(getattr(teacher.model, "config", None), "name_or_path", None))


def listed(value: str | list[str] | None) -> list[str]:
    """Returns one value or several as a list."""
    return [value] if isinstance(value, str) else list(value or [])
