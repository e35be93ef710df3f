"""The module that is trained: a student and whatever its losses train."""

import inspect
import os

import safetensors.torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from .features import FeatureTap

# What a loss can ask for, by the names of its forward's arguments.
_LOSS_INPUTS = {"student_logits", "teacher_logits", "labels", "mid_feature"}
_LOSSES_FILE = "distillation_losses.safetensors"


class DistillationModel(nn.Module):
    """A student and the losses that train it, as one module.

    What a loss trains (USKD's auxiliary head) must be in the module that `Trainer` trains: its `zero_grad`, gradient
    clipping, DDP / FSDP and checkpoints cover that module alone. The teacher is not in it.

    Args:
        student (`PreTrainedModel`): any `*ForImageClassification`.
        losses (`dict[str, nn.Module]`): each maps some of `student_logits` [B, C], `teacher_logits` [B, C], `labels`
            and `mid_feature` [B, D] or [B, N, D], asked for by the names of its forward's arguments, to a dict of
            weighted components.
        feature_layer (`str`, *optional*): where `mid_feature` is read; see [`FeatureTap`].
        label_smoothing (`float`, defaults to 0.0): of the task loss.

    Raises:
        ValueError: a loss asks for something else, or no mid layer is found for a loss that needs one.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        losses: dict[str, nn.Module],
        feature_layer: str | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.student = student
        self.losses = nn.ModuleDict(losses)
        self.label_smoothing = label_smoothing
        self._inputs = {name: list(inspect.signature(loss.forward).parameters) for name, loss in losses.items()}
        for name, inputs in self._inputs.items():
            if unknown := set(inputs) - _LOSS_INPUTS:
                raise ValueError(
                    f"the forward of distillation loss {name!r} asks for {sorted(unknown)}: "
                    f"name its arguments from {sorted(_LOSS_INPUTS)}"
                )
        self.tap = None
        if self.needs("mid_feature"):
            self.tap = FeatureTap(student, feature_layer)
        elif feature_layer is not None:
            raise ValueError(f"feature_layer={feature_layer!r} is read by no distillation loss: leave it out")
        # FSDP wraps these blocks; callbacks log the configuration, a push writes the tags.
        self._no_split_modules = student._no_split_modules
        self.config = student.config
        self.main_input_name = student.main_input_name
        self.model_tags = student.model_tags

    def needs(self, name: str) -> bool:
        """Whether a loss asks for this input."""
        return any(name in inputs for inputs in self._inputs.values())

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, teacher_logits: Tensor | None = None
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """Runs the student once and, for training, its losses.

        Args:
            pixel_values (`Tensor`): [B, 3, H, W] float.
            labels (`Tensor`, *optional*): [B] int64 class indices, or [B, C] float rows that sum to 1. None gives the
                logits alone.
            teacher_logits (`Tensor`, *optional*): [B, C] float.

        Returns:
            `dict`: `logits` [B, C] and, with labels, `losses`: scalars by name, `task` (cross-entropy) first.
        """
        logits = self.student(pixel_values).logits
        if labels is not None and not labels.is_floating_point():
            labels = labels.long()
        if labels is None:
            if self.tap is not None:
                self.tap.clear()
            return {"logits": logits}
        # The labels are never handed to the student: rows [B, C] would turn it to binary cross-entropy for good.
        losses = {"task": F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)}
        available = {"student_logits": logits, "teacher_logits": teacher_logits, "labels": labels}
        if self.tap is not None:
            available["mid_feature"] = self.tap.take()
        for name, loss in self.losses.items():
            for component, value in loss(**{key: available[key] for key in self._inputs[name]}).items():
                losses[component if component not in losses else f"{name}_{component}"] = value
        return {"logits": logits, "losses": losses}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts the student's parameters: what callbacks report."""
        return self.student.num_parameters(only_trainable, exclude_embeddings)

    def gradient_checkpointing_enable(self, **kwargs) -> None:
        """Turns gradient checkpointing of the student on."""
        self.student.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """Turns activation checkpointing of the student on."""
        self.student.activation_checkpointing_enable(**kwargs)

    def save(self, folder: str, state_dict: dict[str, Tensor], with_losses: bool) -> None:
        """Writes the student and, into a checkpoint, what the losses train.

        Args:
            folder: of the student, as [`save_student`] writes it.
            state_dict: of this module, gathered when it is sharded.
            with_losses: whether the folder is a checkpoint.
        """
        save_student(self.student, folder, _under("student.", state_dict))
        tensors = _under("losses.", state_dict)
        if tensors and with_losses:
            safetensors.torch.save_file(tensors, os.path.join(folder, _LOSSES_FILE), metadata={"format": "pt"})

    def load(self, folder: str) -> None:
        """Reads student and losses from a checkpoint.

        Raises:
            ValueError: the folder is no checkpoint of this student with these losses.
        """
        # Through from_pretrained, which turns the keys of the file into those of the installed version.
        saved = type(self.student).from_pretrained(folder)
        try:
            self.student.load_state_dict(saved.state_dict())
            if self.losses.state_dict():
                path = os.path.join(folder, _LOSSES_FILE)
                if not os.path.isfile(path):
                    raise ValueError(
                        f"{folder} has no {_LOSSES_FILE}: it was saved without the losses that are set now"
                    )
                self.losses.load_state_dict(safetensors.torch.load_file(path))
        except RuntimeError as error:
            raise ValueError(f"{folder} was saved by another student or other losses: {error}") from error


def save_student(student: PreTrainedModel, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes a student so that transformers and, if it is a timm model, timm open the folder with equal logits.

    Args:
        student: any `*ForImageClassification`.
        folder: where `model.safetensors` and `config.json` go.
        state_dict: its gathered weights, when the student is sharded.
    """
    state_dict = student.state_dict() if state_dict is None else state_dict
    if isinstance(student, TimmWrapperForImageClassification):
        # timm knows its own keys alone; transformers opens both kinds.
        state_dict = _under("timm_model.", state_dict)
        # A config that came from a file holds its file's names, which would be written before those of id2label.
        student.config.__dict__.pop("label_names", None)
    student.save_pretrained(folder, state_dict=state_dict)


def _under(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
