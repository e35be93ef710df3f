"""Keeps the outputs of some layers during a model's forward pass, as the features that a loss reads.

The module docstring of feature_layers.py defines the features: `mid`, `low`, `high` and `map`.
"""

import difflib
import math
import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .feature_layers import Grid, classifier_name, describe, known_reading, timm_model
from .feature_layout import Output, find_reading, input_size, run_once, unchanged

# Argument of a loss's forward -> kind of feature.
STUDENT_FEATURES = {"mid_feature": "mid", "student_low": "low", "student_high": "high", "student_map": "map"}
TEACHER_FEATURES = {"teacher_low": "low", "teacher_high": "high", "teacher_map": "map"}
# Arguments that are no features: the parameters of classifiers that read the average of a map.
STUDENT_HEAD = ("student_head_weight", "student_head_bias")
TEACHER_HEAD = ("teacher_head_weight", "teacher_head_bias")

# Kind of feature -> its name in a message, and the models that its losses need.
_UNKNOWN = {
    "map": (
        "last feature map is",
        "MGD and SRRL, which read it, need a ResNet, MobileNet, RegNet, ShuffleNetV2, Swin, ViT or DeiT, timm's or "
        "transformers', as student and as teacher; SD-NKD needs one of these, but no ViT or DeiT",
    ),
    "low": (
        "low patch tokens are",
        "ViTKD, which reads them, needs a ViT or DeiT, timm's or transformers', as student and as teacher",
    ),
}
_UNKNOWN["high"] = ("high patch tokens are", _UNKNOWN["low"][1])


class FeatureTap:
    """Keeps the output of named submodules of `model`, as a feature that a loss can read.

    The constructor registers the hooks, so build the tap before `torch.compile` compiles the model: a hook that is
    registered later never fires in the compiled graph. With `layer`, the constructor runs the model on two images.

    Args:
        model (`nn.Module`): a `*ForImageClassification` of transformers, timm models among them (`TimmWrapper*`), or a
            bare timm model.
        layer (`str`, *optional*): the submodule's name in `model`, for the kind `mid`. None means the layers that the paper
            uses.
        kind (`str`, defaults to `"mid"`): `mid`, `low`, `high` or `map`; see the module docstring of
        feature_layers.py.

    Attributes:
        layer (`str`): the names of the submodules.
        text (`str`): the feature's name in messages, such as `class token` or `mean of the patch tokens`.
        grid (`tuple[int, int]`, *optional*): height and width, in patches, of the images of the last forward pass, for
            `low`, `high` and `map` of a ViT.

    Raises:
        ValueError: no layer is known for this model, the model has no submodule of that name, or the submodule's output is
            no feature.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, kind: str = "mid"):
        modules = dict(model.named_modules())
        if layer is not None and layer not in modules:
            raise ValueError(
                f"feature_layer {layer!r} is not a submodule of {describe(model)}: "
                f"choose one that is, for example {_candidates(model, near=layer)}"
            )
        reading = known_reading(model, kind) if layer is None else find_reading(model, layer)
        if reading is None and kind in _UNKNOWN:
            what, need = _UNKNOWN[kind]
            raise ValueError(f"no {what} known for {describe(model)}: {need}")
        if reading is None:
            raise ValueError(
                f"no mid layer is known for {describe(model)}: set feature_layer (--feature_layer) to one of its "
                f"submodules, for example {_candidates(model)}"
            )
        self.layer = ", ".join(reading.layers)
        self.text = reading.text
        self.grid: Grid | None = None
        self._read = reading.read
        self._outputs = [Output(modules[name]) for name in reading.layers]
        grid_layers = [] if reading.grid_layer is None else [reading.grid_layer]
        self._grids = [Output(modules[name], _grid_of) for name in grid_layers]
        # The model may outlive the tap.
        hooks = [output.hook for output in (*self._outputs, *self._grids)]
        weakref.finalize(self, _remove_hooks, hooks).atexit = False

    def listen(self, on: bool = True) -> None:
        """Switches the tap on, as a new tap is, or off, so that other calls of the model leave no outputs in it."""
        for output in (*self._outputs, *self._grids):
            output.listening = on

    def take(self) -> Tensor:
        """Returns the feature of the last forward pass, and forgets it.

        Returns:
            `Tensor`, in the dtype that the layer computed in. `mid`: [B, D] for CNNs (average-pooled) and for ViT / DeiT
            (the class token; the mean of the patch tokens where the classifier reads no class token), or [B, N, D] tokens
            for Swin. `low`: [B, 2, P, D] patch tokens, row by row, without class, distillation and register tokens; `high`:
            [B, P, D] patch tokens, normalised. `map`: [B, D, H, W].

        Raises:
            RuntimeError: the layer took no part in the forward pass.
            ValueError: a ViT did not return the tokens of all patches.
        """
        outputs = [output.take() for output in self._outputs]
        if any(output is None for output in outputs):
            raise RuntimeError(
                f"{self.layer} took no part in the forward pass: choose a feature_layer that does, and pass a model "
                "that has not run compiled before"
            )
        for output in self._grids:
            self.grid = output.take()
        features = [self._read(output, self.grid) for output in outputs]
        return features[0] if len(features) == 1 else torch.stack(features, dim=1)

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for output in (*self._outputs, *self._grids):
            output.take()
            output.hook.remove()


def _grid_of(output: Tensor) -> Grid:
    return tuple(output.shape[-2:])


def _remove_hooks(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def feature_shape(model: nn.Module, pixel_values: Tensor, layer: str | None = None, kind: str = "mid") -> torch.Size:
    """Returns the shape of the tapped feature of one batch; its last entry is the `in_features` of `USKDLoss`.

    Args:
        model (`nn.Module`): the student.
        pixel_values (`Tensor`): [B, 3, H, W] float, any image of the size that the student takes.
        layer (`str`, *optional*): as in [`FeatureTap`].
        kind (`str`, defaults to `"mid"`): as in [`FeatureTap`].

    Returns:
        `torch.Size`: the shape of [`FeatureTap.take`]: for `mid` (B, D), or (B, N, D) for Swin.

    Raises:
        ValueError: as in [`FeatureTap`].
    """
    tap = FeatureTap(model, layer, kind)
    try:
        with unchanged(model):
            model(pixel_values)
        return tap.take().shape
    finally:
        tap.remove()


def classifier_head(model: nn.Module, role: str = "teacher") -> nn.Linear:
    """Returns the classifier that reads the average of the feature map of kind `map`, for SRRL and SD-NKD.

    Args:
        model (`nn.Module`): the teacher or the student.
        role (`str`): `teacher` or `student`, for the message.

    Raises:
        ValueError: the model's classifier reads something else (a ViT's reads the class token), or the model is unknown.
    """
    name = classifier_name(model)
    head = None if name is None else model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"no classifier of an averaged feature map is known for {describe(model)}: SRRL and SD-NKD, which feed other "
            f"averages to it, need a ResNet, MobileNet, RegNet, ShuffleNetV2 or Swin, timm's or transformers', as {role}"
        )
    return head


def head_parameters(head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Returns weight [C, D] and bias [C] of a classifier; the bias is zero if the classifier has none."""
    return head.weight, head.weight.new_zeros(head.out_features) if head.bias is None else head.bias


def check_pooled_head(model: nn.Module, size: tuple[int, int] | None = None, role: str = "teacher") -> None:
    """Raises ValueError unless [`classifier_head`] of the averaged `map` returns the model's own logits on random
    images.

    A model on the meta device, which has no values, passes if its layers are known.

    Args:
        model (`nn.Module`): the teacher or the student.
        size (`tuple[int, int]`, *optional*): height and width of its images. Default: the size that it was built for.
        role (`str`): `teacher` or `student`, for the message.
    """
    head, tap = classifier_head(model, role), FeatureTap(model, kind="map")
    calls: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    try:
        if head.weight.is_meta:
            return
        output = run_once(model, input_size(model) if size is None else size)
        feature_map = tap.take()
    finally:
        hook.remove()
        tap.remove()
    logits = output if isinstance(output, Tensor) else output.logits
    pooled = feature_map.mean((2, 3))
    read, given = calls[-1]
    for what, wanted, got in (
        ("its classifier does not read the average of its last feature map", pooled, read),
        ("its logits differ from its classifier's output", given, logits),
    ):
        difference = _relative_difference(wanted, got)
        # Half-precision sums in another order differ in some of the last bits. `not <=` refuses NaN, too.
        if not difference <= max(1e-4, 4 * torch.finfo(wanted.dtype).eps):
            raise ValueError(
                f"the {role} of SRRL or SD-NKD must average its last feature map and classify that, got {describe(model)}: "
                f"{what} (they differ by {difference:.1%} on random images). Choose a {role} with plain average pooling and "
                "one linear layer after it"
            )


def _relative_difference(wanted: Tensor, got: Tensor) -> float:
    """Returns the largest difference, in units of the largest value; infinite if the shapes differ."""
    if wanted.shape != got.shape:
        return math.inf
    wanted, got = wanted.double(), got.double()
    return ((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()


def token_shape(model: nn.Module) -> tuple[int, int]:
    """Returns the number and width of a ViT's patch tokens, as in `ViTKDLoss(student_dim=token_shape(model)[1], ...)`.

    Args:
        model (`nn.Module`): a ViT or DeiT, timm's (wrapped by transformers or bare) or transformers'.

    Returns:
        `tuple[int, int]`: (P, D) at the image size that the model was built for, read without running it.

    Raises:
        ValueError: the model is no ViT or DeiT.

    Example:

    ```python
    >>> from nkd_hf import create_student, token_shape
    >>> token_shape(create_student("deit_tiny_patch16_224", num_labels=10))
    (196, 192)

    ```
    """
    height, width = _token_grid(model)
    vit = timm_model(model)
    return height * width, model.config.hidden_size if vit is None else vit.embed_dim


def check_token_grids(
    student: nn.Module,
    teacher: nn.Module,
    student_size: tuple[int, int] | None = None,
    teacher_size: tuple[int, int] | None = None,
) -> None:
    """Raises ValueError unless student and teacher are ViTs that cut their images into the same grid of patches.

    Args:
        student (`nn.Module`): a ViT or DeiT.
        teacher (`nn.Module`): a ViT or DeiT.
        student_size (`tuple[int, int]`, *optional*): height and width of the student's images. Default: the size that it was
            built for.
        teacher_size (`tuple[int, int]`, *optional*): the same of the teacher's images.
    """
    wanted, got = _token_grid(student, student_size), _token_grid(teacher, teacher_size)
    if wanted != got:
        raise ValueError(
            f"ViTKD needs patch tokens from the teacher in a grid like the student's {wanted[0]}x{wanted[1]}, got "
            f"{got[0]}x{got[1]} from {describe(teacher)}: choose a teacher whose image size / patch size is the student's"
        )


def _token_grid(model: nn.Module, size: tuple[int, int] | None = None) -> Grid:
    """Returns height and width in patches of an image of this size, or of the size that the model was built for."""
    FeatureTap(model, kind="low").remove()  # raises the ValueError if the model is no ViT
    vit = timm_model(model)
    if vit is not None:
        return tuple(vit.patch_embed.grid_size if size is None else vit.patch_embed.dynamic_feat_size(size))
    patches = model.base_model.embeddings.patch_embeddings
    size = patches.image_size if size is None else size
    return tuple(side // patch for side, patch in zip(size, patches.patch_size, strict=True))


def _candidates(model: nn.Module, near: str = "") -> str:
    """Returns names of stages and blocks, the most similar ones to `near` first."""
    names = [name for name, module in model.named_modules() if name and next(module.children(), None) is not None]
    nearest = difflib.get_close_matches(near, names, n=4, cutoff=0.5)
    names = nearest + sorted((name for name in names if name not in nearest), key=lambda name: name.count("."))
    return ", ".join(names[:12])
