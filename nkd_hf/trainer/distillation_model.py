"""Defines the module that Trainer trains: a student and the losses with their own layers."""

import copy
import inspect
import math
import os
from dataclasses import dataclass, fields
from typing import Any

import safetensors.torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import ADAPTER_CONFIG_NAME, ModelOutput

from ..losses.base import loss_inputs
from ..losses.checks import check_labels
from ..models.feature_layers import classifier_name
from ..models.features import (
    STUDENT_FEATURES,
    STUDENT_HEAD,
    TEACHER_FEATURES,
    TEACHER_HEAD,
    FeatureTap,
    check_pooled_head,
    head_parameters,
)
from ..models.labels import check_class_order
from ..models.outputs import check_inputs, read_logits
from ..models.saving import rename_keys, save_student
from .block_classes import block_classes
from .loss_components import compute_components
from .task_loss import IGNORE_INDEX, cross_entropy, read_class_weights
from .unlabeled import add_labels

# The arguments that a loss's forward may name, as DistillationLoss lists them.
_LOSS_INPUTS = {
    "student_logits", "teacher_logits", "logit_moments", "labels", "label_smoothing", "token_grid",
    *STUDENT_FEATURES, *STUDENT_HEAD, *TEACHER_FEATURES, *TEACHER_HEAD,
}  # fmt: skip
# Public attributes of a student that DistillationModel does not lend. Trainer would not move a model with a device
# map, so that the losses would stay on their device. push_to_hub would push neither the average nor a folder that timm
# opens.
_NOT_LENT = {"hf_device_map", "push_to_hub"}
_LOSSES_FILE = "distillation_losses.safetensors"
# This file has the student before averaging, in a checkpoint whose model.safetensors is the moving average.
_UNAVERAGED_FILE = "unaveraged_student.safetensors"


@dataclass
class DistillationOutput(ModelOutput):
    """The output of a training step's forward pass.

    Args:
        logits (`Tensor`): [B, C] logits of the student.
        losses (`dict[str, Tensor]`): scalars by name, `task` (weighted cross-entropy) first.
    """

    logits: Tensor | None = None
    losses: dict[str, Tensor] | None = None


class DistillationModel(nn.Module):
    """A student and the losses that train it, as one module.

    Layers of a loss (USKD's auxiliary head) must be in the module that `Trainer` trains: its `zero_grad`, gradient
    clipping, DDP / FSDP and checkpoints cover that module alone. The teacher is not part of the module.

    The module lends the student's public attributes: `config`, `device`, `dtype`, `get_input_embeddings` and submodules such
    as `classifier` read as they do on the student. The names of its parameters begin with `student.`.

    Args:
        student (`PreTrainedModel`): any `*ForImageClassification`.
        losses (`dict[str, nn.Module]`): losses by name; [`DistillationLoss`] describes their forward.
        feature_layer (`str`, *optional*): the layer of `mid_feature`; see [`FeatureTap`].
        label_smoothing (`float`, defaults to 0.0): label smoothing of the task loss.
        ema_decay (`float`, *optional*): decay of a moving average of the student's weights, evaluated and saved.
        class_weights (`Tensor`, *optional*): [C] float, weights of the task loss; see [`cross_entropy`].

    Raises:
        ValueError: a loss reads an unknown input, or a feature that is not known for this student; or there is not one
            class weight for each class.
    """

    # Trainer would count the labels of a batch for a forward that takes **kwargs.
    accepts_loss_kwargs = False

    def __init__(
        self,
        student: PreTrainedModel,
        losses: dict[str, nn.Module],
        feature_layer: str | None = None,
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        class_weights: Tensor | None = None,
    ):
        super().__init__()
        check_inputs(student, "the student")
        self.student = student
        # The average is made before the taps, whose hooks would be copied, too. As in mmengine, buffers are copied and
        # not averaged.
        self.average = None if ema_decay is None else ModelEmaV3(student, ema_decay, exclude_buffers=True)
        if self.average is not None:
            self.average.requires_grad_(False)
        self.losses = nn.ModuleDict(losses)
        self.label_smoothing = label_smoothing
        weights = read_class_weights(class_weights, student.config.num_labels)
        self.register_buffer("class_weights", weights, persistent=False)
        # Where several losses have a task_weight, the weights multiply.
        self.task_weight = math.prod(getattr(loss, "task_weight", 1) for loss in losses.values())
        self.inputs_of = {name: loss_inputs(loss) for name, loss in losses.items()}
        for name, inputs in self.inputs_of.items():
            if unknown := set(inputs) - _LOSS_INPUTS:
                raise ValueError(
                    f"the forward of distillation loss {name!r} asks for {sorted(unknown)}: "
                    f"name its arguments from {sorted(_LOSS_INPUTS)}"
                )
        if feature_layer is not None and not self.needs("mid_feature"):
            raise ValueError(f"feature_layer={feature_layer!r} is read by no distillation loss: omit it")
        self.taps = {
            name: FeatureTap(student, feature_layer if name == "mid_feature" else None, kind)
            for name, kind in STUDENT_FEATURES.items()
            if self.needs(name)
        }
        # The taps listen only for the losses: other calls of the student keep no features.
        for tap in self.taps.values():
            tap.listen(False)
        self._head_name = None
        if any(self.needs(name) for name in STUDENT_HEAD):
            check_pooled_head(student, role="student")
            self._head_name = classifier_name(student)
        # FSDP shards these blocks one by one.
        self._no_split_modules = block_classes(student)
        self.columns, self._takes_options = _forward_columns(student)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get("_modules", {}).get("student")
            if student is None or name.startswith("_") or name in _NOT_LENT:
                raise
            return getattr(student, name)

    def __setattr__(self, name: str, value: Any) -> None:
        student = self.__dict__.get("_modules", {}).get("student")
        # A new head (`trainer.model.classifier = ...`) belongs to the student; super() would set it beside the
        # student.
        if isinstance(value, nn.Module) and student is not None and name in student._modules:
            setattr(student, name, value)
        else:
            super().__setattr__(name, value)

    def needs(self, name: str, of: str | None = None) -> bool:
        """Whether a loss reads this input; with `of`, whether the loss of that name reads it."""
        return any(name in inputs for loss, inputs in self.inputs_of.items() if of in (None, loss))

    @property
    def tap(self) -> FeatureTap | None:
        """The tap that reads `mid_feature`."""
        return self.taps.get("mid_feature")

    @property
    def teacher_inputs(self) -> list[str]:
        """The inputs that the losses read from a teacher; an empty list needs a model without a teacher."""
        return [name for name in ("teacher_logits", *TEACHER_FEATURES, *TEACHER_HEAD) if self.needs(name)]

    def select_columns(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns of a batch that the student's forward names."""
        return {name: inputs[name] for name in self.columns if name in inputs}

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        teacher_outputs: dict[str, Tensor] | None = None,
        num_teacher_only: int = 0,
        **kwargs: Any,
    ) -> ModelOutput:
        """Runs the student once and, for training, its losses.

        The labels are never passed to the student: rows [B, C] would switch its loss to binary cross-entropy for good.

        Args:
            pixel_values (`Tensor`): [B, 3, H, W] float.
            labels (`Tensor`, *optional*): [B] int64 class indices, or [B, C] float rows that sum to 1.
            teacher_outputs (`dict[str, Tensor]`, *optional*): at least `teacher_inputs` by name, such as
                `teacher_logits` [B, C] float; `kd.teacher_logits` is read by the loss `kd` in its place. With a dict, even
                an empty one, the losses are computed, which needs labels.
            num_teacher_only (`int`): number of images without a label, at the end of the batch; `labels` has the
                labels of the others. (`Trainer` takes all arguments with `label` in their names for columns.)
            **kwargs: arguments of the student's forward, such as `interpolate_pos_encoding` or `output_hidden_states`.
                Other columns of a batch (`index`, `position`, `path`, ...) are ignored.

        Returns:
            `ModelOutput`: with `teacher_outputs` a [`DistillationOutput`]. Without them, the output of the student, or
            in evaluation mode the output of the averaged student, if there is one. With labels it has a `loss`: the
            cross-entropy, in training mode with the label smoothing and the class weights.
        """
        options = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        columns = self.select_columns(kwargs) | (options if self._takes_options else {})
        if teacher_outputs is not None:
            return self._training_output(pixel_values, labels, teacher_outputs, columns, num_teacher_only)
        output = _run(self.student if self.training else self.evaluated_student, pixel_values, columns)
        if labels is None:
            return output
        if labels.shape != (output.logits.shape if labels.is_floating_point() else output.logits.shape[:1]):
            return output  # A user's own loss may read labels of other shapes.
        settings = (self.label_smoothing, self.class_weights) if self.training else ()
        return _with_loss(output, cross_entropy(output.logits, labels, *settings))

    def _training_output(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        teacher_outputs: dict[str, Tensor],
        columns: dict[str, Any],
        num_unlabeled: int,
    ) -> DistillationOutput:
        for tap in self.taps.values():
            tap.listen()
        output = _run(self.student, pixel_values, columns)
        logits = read_logits(output, "the student", len(pixel_values), self.student.config.num_labels)
        # The labels are checked once for all losses, the user's own included. The task loss ignores the label of
        # images without a class.
        if num_unlabeled < len(logits):
            shape = len(logits) - num_unlabeled, logits.shape[1]
            check_labels(labels, shape, ignore_index=None if self.needs("labels") else IGNORE_INDEX)
        labels = labels if labels.is_floating_point() else labels.long()
        targets = add_labels(labels, teacher_outputs, num_unlabeled) if num_unlabeled else labels
        available = {"student_logits": logits, "logit_moments": None, "labels": targets, **teacher_outputs}
        for name, tap in self.taps.items():
            available[name] = tap.take()
            tap.listen(False)
        if self._head_name is not None:
            head = self.student.get_submodule(self._head_name)
            available |= dict(zip(STUDENT_HEAD, head_parameters(head), strict=True))
        available["token_grid"] = next((tap.grid for tap in self.taps.values() if tap.grid is not None), None)
        losses = compute_components(self, available, labels, len(logits) - num_unlabeled)
        return DistillationOutput(logits=logits, losses=losses)

    @property
    def evaluated_student(self) -> PreTrainedModel:
        """The student that is evaluated and saved: the averaged one if there is an average."""
        return self.student if self.average is None else self.average.module

    def update_average(self, step: int) -> None:
        """Moves the average towards the student after optimiser step number `step`, counted from 0.

        As in mmengine, the average starts with the weights after the first step.
        """
        self.average.update(self.student, step=step + 1)

    def save_pretrained(
        self, save_directory: str | os.PathLike, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Writes the student alone, with `ema_decay` the averaged one, as [`save_student`] does.

        Args:
            save_directory: the folder.
            state_dict: the state of this module, gathered if it is sharded.
            **kwargs: arguments of `PreTrainedModel.save_pretrained`.
        """
        if state_dict is not None:
            state_dict = rename_keys("student." if self.average is None else "average.module.", state_dict)
        save_student(self.evaluated_student, str(save_directory), state_dict, **kwargs)

    def save(self, folder: str, state_dict: dict[str, Tensor], with_losses: bool) -> None:
        """Writes the student and, into a checkpoint, the losses' weights and the student before averaging.

        Args:
            folder: the folder of the student; see [`save_student`].
            state_dict: the state of this module, gathered if it is sharded.
            with_losses: whether the folder is a checkpoint.
        """
        self.save_pretrained(folder, state_dict)
        if with_losses:
            _save_tensors(rename_keys("losses.", state_dict), os.path.join(folder, _LOSSES_FILE))
            if self.average is not None:
                _save_tensors(rename_keys("student.", state_dict), os.path.join(folder, _UNAVERAGED_FILE))

    def load(self, folder: str) -> None:
        """Reads student, losses and the moving average from a checkpoint.

        Raises:
            ValueError: the folder is no checkpoint of this student with these losses and settings, or its classes are
                in another order.
        """
        # from_pretrained converts the keys of the file to the keys of the installed version. The checkpoint may come
        # from anywhere, so neither a pickle in it nor its config.json is read.
        if os.path.exists(os.path.join(folder, ADAPTER_CONFIG_NAME)):
            # With peft, from_pretrained would read the weights of the model that the file names.
            raise ValueError(f"a checkpoint must hold no {ADAPTER_CONFIG_NAME}, got one in {folder}. Remove the file")
        check_class_order(folder, self.config.id2label)
        saved, report = type(self.student).from_pretrained(
            folder, config=copy.deepcopy(self.student.config), use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        if wrong := [f"{kind}: {', '.join(map(str, keys))}" for kind, keys in report.items() if keys]:
            raise ValueError(f"{folder} was saved by another student: {'; '.join(wrong)}")
        saved = saved.state_dict()
        if self.average is None and os.path.isfile(os.path.join(folder, _UNAVERAGED_FILE)):
            raise ValueError(f"{folder} was saved with ema_decay: set the same ema_decay")
        try:
            self.evaluated_student.load_state_dict(saved)
            if self.average is not None:
                self.student.load_state_dict(_load_tensors(folder, _UNAVERAGED_FILE, "ema_decay"))
            if self.losses.state_dict():
                self.losses.load_state_dict(_load_tensors(folder, _LOSSES_FILE, "the losses of this run"))
        except RuntimeError as error:
            raise ValueError(f"{folder} was saved by another student or other losses: {error}") from error


def _forward_columns(student: PreTrainedModel) -> tuple[list[str], bool]:
    """Returns the arguments that the student's forward names beside pixels and labels, and whether it takes **kwargs."""
    parameters = inspect.signature(student.forward).parameters.values()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    # The output is a ModelOutput whatever the batch says.
    return [name for name in named if name not in ("pixel_values", "labels", "return_dict")], open_ended


def _run(student: PreTrainedModel, pixel_values: Tensor, columns: dict[str, Any]) -> ModelOutput:
    output = student(pixel_values, **columns)
    # With return_dict=False in its configuration a student returns a tuple.
    return ImageClassifierOutput(logits=output[0]) if isinstance(output, tuple) else output


def _with_loss(output: ModelOutput, loss: Tensor) -> ModelOutput:
    """Returns the output with the loss as its first entry."""
    if "loss" in {field.name for field in fields(output)}:
        return type(output)(**{**output, "loss": loss})
    others = {name: output[name] for name in ("hidden_states", "attentions") if name in output}
    return ImageClassifierOutput(loss=loss, logits=output.logits, **others)


def _save_tensors(tensors: dict[str, Tensor], path: str) -> None:
    if tensors:
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _load_tensors(folder: str, file: str, wanted: str) -> dict[str, Tensor]:
    path = os.path.join(folder, file)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {file}: it was saved without {wanted}")
    return safetensors.torch.load_file(path)
