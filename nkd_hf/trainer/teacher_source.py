"""Provides the teacher's outputs of a batch, from a model or from a store of its logits."""

from collections.abc import Mapping
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BaseImageProcessor
from transformers.utils import logging

from ..data.collator import ImageCollator
from ..data.unlabeled_images import UNLABELED
from ..losses.top_k import TopKView, read_top_k_view
from ..models.features import check_token_grids
from ..models.preprocessing import read_preprocessing
from ..models.teacher import Teacher
from ..models.teacher_loading import load_teacher
from ..teacher_logits.info import TeacherDescription
from ..teacher_logits.store import TeacherLogits
from .arguments import DistillationTrainingArguments
from .distillation_model import DistillationModel
from .unlabeled import TARGET

logger = logging.get_logger(__name__)


class TeacherSource(Protocol):
    """The methods of a teacher that the trainer calls."""

    @property
    def description(self) -> Teacher | TeacherDescription | list[TeacherDescription]:
        """The teacher or its description, for the model card."""

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns `teacher_logits` [B, C] and the features that the losses read, by the names of their arguments.

        An entry such as `kd.teacher_logits` is for the loss `kd` alone.
        """


class LiveTeacher:
    """A teacher that computes in each step.

    Args:
        model: the prepared [`Teacher`], possibly wrapped.
        accelerator: unwraps the model.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.model = model
        self._accelerator = accelerator

    @property
    def description(self) -> Teacher:
        return self._accelerator.unwrap_model(self.model)

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        logits = self.model(batch["pixel_values"])
        return {"teacher_logits": logits, **self.description.take_features()}


class StoredLogits:
    """A teacher whose logits of each image and epoch are stored.

    Args:
        store: the store that the batches' `teacher_logits` were read from.
        views: for a store of the largest logits, the part of the logits that each loss reads, by the loss's name; else
            empty.
    """

    def __init__(self, store: TeacherLogits, views: dict[str, TopKView]):
        self.store = store
        self._views = views

    @property
    def description(self) -> TeacherDescription | list[TeacherDescription]:
        return self.store.info.teacher

    @property
    def approximates(self) -> list[str]:
        """The names of the losses that read approximations of some logits."""
        info = self.store.info
        # The target's logit is stored beside the K largest.
        return list(self._views) if info.top_k is not None and info.top_k < info.num_classes - 1 else []

    @property
    def max_temperature(self) -> float:
        """The highest temperature at which a loss reads the largest logits."""
        return max(view.temperature for view in self._views.values())

    def outputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        rows = batch["teacher_logits"]
        target = {TARGET: rows["target"]} if UNLABELED in batch else {}
        return self._rebuild(rows) | target

    def _rebuild(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._views:
            return {"teacher_logits": self.store.dense(rows)}
        rebuilt = {view: self.store.rebuild(rows, view) for view in dict.fromkeys(self._views.values())}
        outputs = dict(next(iter(rebuilt.values())))
        if len(rebuilt) > 1:
            outputs |= {
                f"{name}.{key}": value for name, view in self._views.items() for key, value in rebuilt[view].items()
            }
        return outputs


def open_teacher_source(
    teacher: str | nn.Module | Teacher | list | None,
    collator: Any,
    model: DistillationModel,
    processing_class: BaseImageProcessor | None,
    args: DistillationTrainingArguments,
    accelerator: Accelerator,
) -> TeacherSource | None:
    """Returns the source of the teacher's outputs: `teacher`, or the store of an [`ImageCollator`].

    Raises:
        ValueError: teacher or store do not fit the losses of `model`.
    """
    store = collator.teacher_logits if isinstance(collator, ImageCollator) else None
    stored = None if store is None else open_stored_logits(store, model)
    check_teacher_is_asked_for(model, teacher, store, args)
    if teacher is None:
        if stored is not None and stored.approximates and accelerator.is_main_process:
            # A run makes several trainers of its student, and the warning should come once.
            logger.warning_once(describe_approximation(stored, model))
        return stored
    return open_live_teacher(teacher, model, processing_class, args, accelerator)


def open_stored_logits(store: TeacherLogits, model: DistillationModel) -> StoredLogits:
    """Returns the source that reads a store.

    Raises:
        ValueError: the store lacks outputs that the losses of the model read from a teacher.
    """
    if set(model.teacher_inputs) - {"teacher_logits"}:
        raise ValueError(
            f"the distillation losses ask a teacher for {', '.join(model.teacher_inputs)}, and {store.folder} has its "
            "logits alone: set a teacher and no teacher_logits"
        )
    views = {
        name: read_top_k_view(loss) for name, loss in model.losses.items() if model.needs("teacher_logits", of=name)
    }
    if store.info.top_k is None or not views:
        return StoredLogits(store, {})
    if others := [type(model.losses[name]).__name__ for name, view in views.items() if view is None]:
        raise ValueError(
            f"{', '.join(others)} needs top_k = all, and {store.folder} has the {store.info.top_k} largest logits: write a "
            "store without --top_k"
        )
    for name, view in views.items():
        if fault := store.find_missing(view):
            raise ValueError(f"{type(model.losses[name]).__name__}'s {fault}")
    return StoredLogits(store, views)


def describe_approximation(stored: StoredLogits, model: DistillationModel) -> str:
    """Describes in a line the losses that a store of the largest logits approximates."""
    info, names = stored.store.info, [type(model.losses[name]).__name__ for name in stored.approximates]
    return (
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} approximated: of {info.num_classes} classes, "
        f"{stored.store.folder} has the {info.top_k} largest logits but the target's, and the remaining probability is spread "
        "evenly over the other classes"
        + (". Above temperature 1, this is far from the exact logits" if stored.max_temperature > 1 else "")
    )


def check_teacher_is_asked_for(
    model: DistillationModel, teacher: Any, store: TeacherLogits | None, args: DistillationTrainingArguments
) -> None:
    """Raises ValueError where teacher, store, losses and arguments don't fit each other."""
    if store is not None and teacher is not None:
        raise ValueError(
            f"the teacher's logits are those of {store.folder}: omit teacher, or the collator's teacher_logits"
        )
    has_teacher = teacher is not None or store is not None
    if bool(model.teacher_inputs) != has_teacher:
        names = ", ".join(type(loss).__name__ for loss in model.losses.values()) or "none"
        raise ValueError(
            f"distillation_loss is {names}, which asks for no teacher: omit teacher (and teacher_logits)"
            if has_teacher
            else f"distillation_loss is {names}, which asks for a teacher: set teacher to a Hub id, folder or model"
        )
    if model.taps and args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) cannot read a feature: start the script with "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if not has_teacher and (unused := args.teacher_settings):
        raise ValueError(f"{', '.join(unused)} set how a teacher computes, and there is none: omit them")


def open_live_teacher(
    teacher: str | nn.Module | Teacher | list,
    model: DistillationModel,
    processing_class: BaseImageProcessor | None,
    args: DistillationTrainingArguments,
    accelerator: Accelerator,
) -> LiveTeacher:
    """Returns the source that runs a teacher, with the student's pixels and classes and in the precision of `args`.

    Raises:
        ValueError: the teacher can't be opened, is the student itself, or lacks the student's classes or a layer that a
            loss reads.
    """
    teacher = load_teacher(teacher)
    if any(_have_same_weights(member.model, model.student) for member in teacher.members):
        raise ValueError(
            "teacher and student must be two models, got one and the same model, which changes while it teaches. "
            "Pass copy.deepcopy(student) as teacher."
        )
    # The teacher is copied, since another trainer, or its owner, may use it, too.
    teacher = teacher.copy()
    pixels = read_preprocessing(model.student, processing_class)
    teacher.align(pixels, model.config.id2label)
    teacher.for_inference(args.teacher_dtype, channels_last=args.teacher_channels_last, compile=args.teacher_compile)
    teacher.tap(model.teacher_inputs)
    if model.needs("student_high") and model.needs("teacher_high"):
        sizes = [wanted and wanted.size for wanted in (pixels, teacher.preprocessing or pixels)]
        check_token_grids(model.student, teacher.model, *sizes)
    # device_placement is set, since accelerate leaves the device to FSDP, which does not see the teacher.
    prepared = accelerator.prepare_model(teacher, device_placement=True, evaluation_mode=True)
    return LiveTeacher(prepared, accelerator)


def _have_same_weights(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether teacher and student share their parameters in memory."""
    ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (student, teacher))
    return ours == theirs != set()
