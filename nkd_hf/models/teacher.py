"""Defines a frozen teacher with its own preprocessing and label order."""

import contextlib
import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import TEACHER_FEATURES, TEACHER_HEAD, FeatureTap, check_pooled_head, classifier_head, head_parameters
from .labels import check_classifier, match_labels
from .outputs import check_inputs, read_logits
from .preprocessing import Preprocessing

logger = logging.getLogger(__name__)

# The dtypes by the values of `teacher_dtype`.
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(nn.Module):
    """A frozen classifier that takes the student's pixels and returns logits in the student's order of labels.

    It always stays in eval mode, and its parameters have no gradient. It shares only the memory of `model`'s weights:
    `model` keeps its mode, its `requires_grad`, its dtype, its device and its hooks.
    Differs from cls_KD: there the training loop's `model.train()` reaches the teacher, whose batch statistics and drop
    path then vary with the batch.

    Args:
        model (`nn.Module`): maps [B, 3, H, W] to logits [B, C], as a tensor or as an output with `.logits`.
        preprocessing (`Preprocessing`, *optional*): the model's preprocessing; None means the student's.
        id2label (`dict[int, str]`, *optional*): the model's class names.
        name (`str`): the name of the teacher in messages.

    Raises:
        ValueError: the model needs more than pixels, or its configuration does not describe a classifier of one class an image.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing | None = None,
        id2label: dict[int, str] | None = None,
        name: str = "teacher",
    ):
        super().__init__()
        check_classifier(getattr(model, "config", None), f"the teacher ({name})")
        check_inputs(model, f"teacher {name}")
        self.model = _sharing_weights(model)
        self.preprocessing = preprocessing
        self.id2label = id2label
        self.name = name
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.channels_last = self.has_own_dtype = self.selects_classes = False
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.register_buffer("channels", None, persistent=False)
        self.register_buffer("order", None, persistent=False)
        self._taps: dict[str, FeatureTap] = {}
        self._hands_out_head = False
        self.eval().requires_grad_(False)

    @property
    def members(self) -> list["Teacher"]:
        """The teachers of one model each in this teacher: only itself, unless it is an ensemble."""
        return [self]

    @property
    def weights(self) -> list[float]:
        """The share of each member; the shares add up to 1."""
        return [1.0]

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    def align(self, preprocessing: Preprocessing | None, id2label: dict[int, str] | None) -> "Teacher":
        """Prepares the teacher for a student's pixels and labels.

        Args:
            preprocessing: the student's preprocessing; None means the teacher's.
            id2label: the student's class names.

        Raises:
            ValueError: the two label spaces cannot be matched (see [`match_labels`]).
        """
        self.scale = self.shift = self.channels = None
        if (self.preprocessing is None) != (preprocessing is None):
            logger.warning(
                "The %s's preprocessing is not known: the pixels reach %s as the student gets them. Pass the %s, so that "
                "both get pixels of their own normalisation and size.",
                *(
                    ("student", self.name, "student's image processor as the trainer's processing_class")
                    if preprocessing is None
                    else ("teacher", self.name, "teacher as load_teacher(model, processing_class=its_image_processor)")
                ),
            )
        if self.preprocessing and preprocessing and preprocessing.colours != self.preprocessing.colours:
            order = list(self.preprocessing.channel_order)
            student_mean, student_std, mean, std = (
                torch.tensor(values, dtype=torch.float32)[order].view(-1, 1, 1)
                for values in (preprocessing.mean, preprocessing.std, self.preprocessing.mean, self.preprocessing.std)
            )
            # ((pixels * student_std + student_mean) - mean) / std, in one multiplication and one addition
            self.scale, self.shift = student_std / std, (student_mean - mean) / std
            if preprocessing.channel_order != self.preprocessing.channel_order:
                self.channels = torch.tensor([preprocessing.channel_order.index(colour) for colour in order])
        order = None
        if self.id2label is not None and id2label is not None:
            order = match_labels(id2label, self.id2label, self.name, allow_more=self.selects_classes)
        self.order = None if order is None else torch.tensor(order)
        return self

    def for_inference(
        self, dtype: str | None = None, *, channels_last: bool = False, compile: bool = False
    ) -> "Teacher":
        """Sets the precision and memory format of the model. The module that was passed to the constructor does not
        change.

        Call it before [`Teacher.tap`].

        Args:
            dtype: `float32`, `bf16` or `fp16`, the dtype of weights and computation, whatever autocast outside is.
                None keeps the weights' dtype, and autocast decides the dtype of the computation.
            channels_last: whether a CNN's convolutions get their pixels and weights in this memory format, which is
                best for GPUs' half precision kernels.
            compile: whether `torch.compile` makes one graph of the model, when it is first called.

        Raises:
            ValueError: there is no such dtype.
        """
        if dtype is not None:
            if dtype not in _DTYPES:
                raise ValueError(f"the teacher's dtype must be {', '.join(_DTYPES)}, got {dtype!r}")
            self.has_own_dtype = True
        own_dtype = self.dtype if dtype is None else _DTYPES[dtype]
        if own_dtype != self.dtype:
            self.model.to(own_dtype)
        self.dtype, self.channels_last = own_dtype, channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        return self

    def tap(self, names: Iterable[str]) -> "Teacher":
        """Sets the features to keep, in place of earlier ones. Call it before a compiled teacher's first forward pass.

        Args:
            names: the names of losses' inputs: `teacher_low`, `teacher_high`, `teacher_map`, and, for the classifier,
                `teacher_head_weight` and `teacher_head_bias`. Other names (`teacher_logits`) are ignored.

        Raises:
            ValueError: no such feature is known for this model, or `names` has the classifier, and the classifier does
                not read the average of the last feature map.
        """
        for tap in self._taps.values():
            tap.remove()
        self._taps = {}
        names = list(names)
        self._hands_out_head = not set(TEACHER_HEAD).isdisjoint(names)
        if self._hands_out_head:
            check_pooled_head(self.model, self.preprocessing and self.preprocessing.size)
        for name in names:
            if name in TEACHER_FEATURES:
                self._taps[name] = FeatureTap(self.model, kind=TEACHER_FEATURES[name])
                self._taps[name].listen(False)
        return self

    def copy(self) -> "Teacher":
        """Returns a teacher that shares the weights' memory and has its own preparation (pixels, labels, taps)."""
        clone = copy.copy(self)
        clone._buffers = dict(self._buffers)
        clone._modules = {name: _sharing_weights(module) for name, module in self._modules.items()}
        clone._taps = {}
        return clone._without_preparation()

    def _without_preparation(self) -> "Teacher":
        # Accelerator.prepare sets a forward that is bound to the original teacher and has that accelerator's
        # precision.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.__dict__.pop(name, None)
        return self

    def take_features(self) -> dict[str, Tensor]:
        """Returns the tapped features of the last call by name, without gradient; see [`FeatureTap.take`].

        If [`Teacher.tap`] got the classifier's names, the result also has `teacher_head_weight` [C, D] and
        `teacher_head_bias` [C], in the student's order of labels.

        Raises:
            RuntimeError: the teacher was not called since its features were last taken.
        """
        features = {name: tap.take() for name, tap in self._taps.items()}
        if self._hands_out_head:
            weight, bias = head_parameters(classifier_head(self.model))
            order = slice(None) if self.order is None else self.order
            features |= dict(zip(TEACHER_HEAD, (weight[order], bias[order]), strict=True))
        return features

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Classifies the student's pixels.

        Args:
            pixel_values (`Tensor`): [B, 3, H, W] float, normalised for the student.

        Returns:
            `Tensor`: [B, C] float logits, in the student's order of labels, without gradient.
        """
        own_dtype = torch.autocast(pixel_values.device.type, enabled=False)
        with torch.no_grad(), own_dtype if self.has_own_dtype else contextlib.nullcontext():
            if self.channels is not None:
                pixel_values = pixel_values[:, self.channels]
            if self.scale is not None:
                pixel_values = pixel_values * self.scale + self.shift
            if self.preprocessing and pixel_values.shape[-2:] != self.preprocessing.size:
                pixel_values = F.interpolate(
                    pixel_values, self.preprocessing.size, mode=self.preprocessing.interpolation, antialias=True
                )
            memory_format = torch.channels_last if self.channels_last else torch.preserve_format
            for tap in self._taps.values():
                tap.listen()
            output = self.model(pixel_values.to(self.dtype, memory_format=memory_format))
            for tap in self._taps.values():
                tap.listen(False)
            num_classes = None if self.id2label is None else len(self.id2label)
            logits = read_logits(output, f"teacher {self.name}", len(pixel_values), num_classes)
            return logits if self.order is None else logits[:, self.order]

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """Returns the teacher's logits from its members' logits; this teacher is its only member."""
        return logits[0]


def _sharing_weights(module: nn.Module) -> nn.Module:
    """Returns a copy of the module, hooks included, that shares the weights' memory.

    A module that cannot be copied in this way is returned itself, such as a module with a lock or a session, or
    TorchScript's.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            # A parameter of another class may have a state beside its data, so deepcopy copies it whole.
            if type(parameter) is nn.Parameter:
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for buffer in part.buffers(recurse=False):
            if type(buffer) is Tensor:
                memo[id(buffer)] = buffer.detach()
        # deepcopy would copy a hook that is a method together with its object, and the original object would get no
        # calls.
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            memo |= {id(hook): hook for hook in hooks.values()}
    try:
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise TypeError("copies of a TorchScript module have weights of their own")
        return copy.deepcopy(module, memo)
    except Exception as error:
        logger.warning(
            "%s cannot be copied (%s), so that the teacher is the module itself: it is frozen and put in eval mode.",
            type(module).__name__,
            error,
        )
        return module
