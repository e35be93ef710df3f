"""Reads what some layers of a model put out during its one forward pass, as the features that a loss asks for.

- `mid`, for USKD's auxiliary head: the last stage but one of a CNN or a Swin, and the class token after the middle block
  of a ViT or DeiT (arXiv 2303.13005, section 3.3, and the configurations of github.com/yzd-v/cls_KD).
- `low` and `high`, for ViTKD: a ViT's patch tokens after its first two blocks, and after its last block and final norm
  (arXiv 2209.02432; forward of the backbones `VisionTransformer` and `Deit_3` of github.com/yzd-v/cls_KD).
- `map`, for MGD and SRRL: the last feature map, which the classifier of a CNN or a Swin averages over its places; of a ViT
  its patch tokens after the final norm, laid out as they stood in the image.
"""

import difflib
import functools
import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def _pool_nchw(output: Tensor) -> Tensor:
    return output.mean(dim=(2, 3))


def _tokens(output: Tensor) -> Tensor:
    # Left unpooled: Swin's official head normalises the tokens before it averages them, which is the loss's to do.
    return output.flatten(1, -2)


def _class_token(output: Tensor) -> Tensor:
    return output[:, 0]


def _patch_tokens(output: Tensor, num_prefix_tokens: int) -> Tensor:
    return output[:, num_prefix_tokens:]


def _nchw(output: Tensor) -> Tensor:
    return output


def _token_map(output: Tensor) -> Tensor:
    """[B, H, W, D], or [B, P, D] of a square grid, to [B, D, H, W]."""
    if output.ndim == 3:
        side = math.isqrt(output.shape[1])
        if side**2 != output.shape[1]:
            raise ValueError(
                f"the {output.shape[1]} tokens of the last layer are laid out as a feature map, and that is no square: "
                "train on square images"
            )
        output = output.unflatten(1, (side, side))
    return output.permute(0, 3, 1, 2)


def _patch_map(output: Tensor, num_prefix_tokens: int) -> Tensor:
    return _token_map(_patch_tokens(output, num_prefix_tokens))


def _by_rank(output: Tensor) -> Tensor:
    return _pool_nchw(output) if output.ndim == 4 else _tokens(output)


def _vit(blocks: str, norm: str) -> dict[str, tuple]:
    return {
        "mid": (f"{blocks}.{{middle}}", _class_token),
        "low": ((f"{blocks}.0", f"{blocks}.1"), _patch_tokens),
        "high": (norm, _patch_tokens),
        "map": (norm, _patch_map),
    }


def _pooled(mid: tuple[str, Callable], last: str, head: str, to_map: Callable = _nchw) -> dict[str, tuple | str]:
    """Of a model whose classifier `head` averages what `last` puts out."""
    return {"mid": mid, "map": (last, to_map), "head": head}


# What a loss can ask for, by the names of its forward's arguments -> the kind of feature.
STUDENT_FEATURES = {"mid_feature": "mid", "student_low": "low", "student_high": "high", "student_map": "map"}
TEACHER_FEATURES = {"teacher_low": "low", "teacher_high": "high", "teacher_map": "map"}
# Parameters of the classifier that reads the average of the teacher's map, which is no feature of a batch.
TEACHER_HEAD = ("teacher_head_weight", "teacher_head_bias")

# Family -> kind of feature -> (layer or layers, how an output becomes a feature). Those of several layers are stacked on
# dim 1. `{middle}` is the block at half of the depth, `{last}` the last. `head` is the classifier of the averaged map.
_TIMM_LAYERS = {
    "resnet": _pooled(("timm_model.layer3", _pool_nchw), "timm_model.layer4", "timm_model.fc"),
    "mobilenetv1": _pooled(("timm_model.blocks.3", _pool_nchw), "timm_model.bn2", "timm_model.classifier"),
    "mobilenetv2": _pooled(("timm_model.blocks.6", _pool_nchw), "timm_model.bn2", "timm_model.classifier"),
    "regnet": _pooled(("timm_model.s3", _pool_nchw), "timm_model.final_conv", "timm_model.head.fc"),
    "swin": _pooled(("timm_model.layers.2", _tokens), "timm_model.norm", "timm_model.head.fc", _token_map),
    "deit": _vit("timm_model.blocks", "timm_model.norm"),
    "vit": _vit("timm_model.blocks", "timm_model.norm"),
}
_TRANSFORMERS_LAYERS = {
    "resnet": _pooled(("resnet.encoder.stages.2", _pool_nchw), "resnet.encoder.stages.3", "classifier.1"),
    "mobilenet_v1": _pooled(("mobilenet_v1.layer.21", _pool_nchw), "mobilenet_v1.layer.25", "classifier"),
    "mobilenet_v2": _pooled(("mobilenet_v2.layer.15", _pool_nchw), "mobilenet_v2.conv_1x1", "classifier"),
    "regnet": _pooled(("regnet.encoder.stages.2", _pool_nchw), "regnet.encoder.stages.3", "classifier.1"),
    # The stage itself returns its output after downsampling (768 channels); its last block does not.
    "swin": _pooled(("swin.encoder.layers.2.blocks.{last}", _tokens), "swin.layernorm", "classifier", _token_map),
    "vit": _vit("vit.layers", "vit.layernorm"),
    "deit": _vit("deit.layers", "deit.layernorm"),
    "nkd_shufflenet_v2": _pooled(("shufflenet.stage4", _pool_nchw), "shufflenet.conv5", "shufflenet.fc"),
    "nkd_resnet_cifar": _pooled(("resnet.layer3", _pool_nchw), "resnet.layer4", "resnet.fc"),
}
_MAPPED = "a ResNet, MobileNet, RegNet, ShuffleNetV2, Swin, ViT or DeiT"
# Class and distillation token; a timm model knows the number of its own.
_TRANSFORMERS_PREFIX_TOKENS = {"vit": 1, "deit": 2}


class FeatureTap:
    """Keeps the output of named submodules of `model`, as a feature that a loss can read.

    The hooks are registered at construction, so build the tap before `torch.compile` sees the model: a hook that is
    registered later never fires in the compiled graph.

    Args:
        model (`nn.Module`): a `*ForImageClassification` of transformers, timm models among them (`TimmWrapper*`), or a
            bare timm model.
        layer (`str`, *optional*): the submodule's name in `model`. None finds the layers that the paper uses.
        kind (`str`, defaults to `"mid"`): what is read, see the top of this file: `mid`, `low`, `high` or `map`.

    Raises:
        ValueError: no layer is known for this model, or the model has no submodule of that name.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, kind: str = "mid"):
        layers, self._to_feature = _find(model, kind)
        layers = layers if layer is None else (layer,)
        if not layers and kind == "map":
            raise ValueError(
                f"no last feature map is known for {_describe(model)}: MGD and SRRL, which read it, need {_MAPPED}, timm's or "
                "transformers', as student and as teacher"
            )
        if not layers and kind != "mid":
            raise ValueError(
                f"no {kind} patch tokens are known for {_describe(model)}: ViTKD, which reads them, needs a ViT or DeiT, "
                "timm's or transformers', as student and as teacher"
            )
        if not layers:
            raise ValueError(
                f"no mid layer is known for {_describe(model)}: set feature_layer (--feature_layer) to one of its "
                f"submodules, for example {_candidates(model)}"
            )
        modules = dict(model.named_modules())
        if layers[0] not in modules:
            raise ValueError(
                f"feature_layer {layers[0]!r} is not a submodule of {_describe(model)}: "
                f"choose one that is, for example {_candidates(model, near=layers[0])}"
            )
        self.layer = ", ".join(layers)
        self._outputs = [_Output(modules[name]) for name in layers]
        # The model may outlive the tap.
        weakref.finalize(self, _remove_hooks, [output.hook for output in self._outputs]).atexit = False

    def listen(self, on: bool = True) -> None:
        """Keeps outputs from now on, as a new tap does, or ignores them, so that other users of the model leave none here."""
        for output in self._outputs:
            output.listening = on

    def take(self) -> Tensor:
        """Hands over the feature of the forward pass that just ran, and lets go of it.

        Returns:
            `Tensor`, in the dtype that the layer computed in. `mid`: [B, D] for CNNs (average-pooled) and for ViT / DeiT
            (the class token), or [B, N, D] tokens for Swin. `low`: [B, 2, P, D] patch tokens, row by row, without class
            tokens and their like; `high`: [B, P, D] of those. `map`: [B, D, H, W].

        Raises:
            RuntimeError: the layer took no part in the forward pass.
            ValueError: `map` of a ViT or Swin, whose tokens are no square grid.
        """
        outputs = [output.take() for output in self._outputs]
        if any(output is None for output in outputs):
            raise RuntimeError(
                f"{self.layer} took no part in the forward pass: choose a feature_layer that does, and hand in a model "
                "that has not run compiled before"
            )
        features = [output if output.ndim == 2 else self._to_feature(output) for output in outputs]
        return features[0] if len(features) == 1 else torch.stack(features, dim=1)

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for output in self._outputs:
            output.take()
        _remove_hooks([output.hook for output in self._outputs])


class _Output:
    """The last output of one module."""

    def __init__(self, module: nn.Module):
        self.listening = True
        self._value: Tensor | None = None
        # Its last part stands for a Sequential, which timm's gradient checkpointing takes apart without calling it.
        while isinstance(module, nn.Sequential) and len(module):
            module = module[-1]
        self.hook = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        if self.listening:
            self._value = output if isinstance(output, Tensor) else output[0]

    def take(self) -> Tensor | None:
        value, self._value = self._value, None
        return value


def _remove_hooks(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def feature_shape(model: nn.Module, pixel_values: Tensor, layer: str | None = None, kind: str = "mid") -> torch.Size:
    """Looks at the tapped feature of one batch; its last entry is what `USKDLoss(in_features=...)` wants.

    Args:
        model (`nn.Module`): the student.
        pixel_values (`Tensor`): [B, 3, H, W] float, any image of the size that the student takes.
        layer (`str`, *optional*): as in [`FeatureTap`].
        kind (`str`, defaults to `"mid"`): as in [`FeatureTap`].

    Returns:
        `torch.Size`: of what [`FeatureTap.take`] returns: for `mid` (B, D), or (B, N, D) for Swin.

    Raises:
        ValueError: as in [`FeatureTap`].
    """
    tap = FeatureTap(model, layer, kind)
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values)
        return tap.take().shape
    finally:
        model.train(was_training)
        tap.remove()


def classifier_head(model: nn.Module) -> nn.Linear:
    """The classifier that reads the average of the feature map of kind `map`, for SRRL.

    Args:
        model (`nn.Module`): the teacher.

    Raises:
        ValueError: the model's classifier reads something else (a ViT's its class token), or none is known.
    """
    head = _known(model).get("head", "")
    head = dict(model.named_modules()).get(head.removeprefix("timm_model.") if _timm_model(model) is model else head)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"no classifier of an averaged feature map is known for {_describe(model)}: SRRL, which feeds the student's to "
            "it, needs a ResNet, MobileNet, RegNet, ShuffleNetV2 or Swin, timm's or transformers', as teacher"
        )
    return head


def token_shape(model: nn.Module) -> tuple[int, int]:
    """How many patch tokens a ViT makes of an image, and of which width: `ViTKDLoss(student_dim=token_shape(model)[1], ...)`.

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
    FeatureTap(model, kind="high").remove()
    vit = _timm_model(model)
    if vit is not None:
        return vit.patch_embed.num_patches, vit.embed_dim
    return model.base_model.embeddings.patch_embeddings.num_patches, model.config.hidden_size


def check_token_grids(student: nn.Module, teacher: nn.Module) -> None:
    """ValueError unless both are ViTs that cut the images they were built for into as many patches."""
    student_tokens, teacher_tokens = token_shape(student)[0], token_shape(teacher)[0]
    if student_tokens != teacher_tokens:
        raise ValueError(
            f"ViTKD needs as many patch tokens from the teacher as from the student's {student_tokens}, got "
            f"{teacher_tokens} from {_describe(teacher)}: choose a teacher whose image size / patch size is the student's"
        )


def _timm_model(model: nn.Module) -> nn.Module | None:
    """The timm model that this is or wraps; None for those of transformers."""
    config = getattr(model, "config", None)
    if config is None:
        return model
    return model.timm_model if config.model_type == "timm_wrapper" else None


def _architecture(model: nn.Module) -> str | None:
    """The name of a timm architecture."""
    config = getattr(model, "config", None)
    if config is not None:
        return getattr(config, "architecture", None)
    named = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    # timm's class may have been called by hand.
    return named or ("vit" if type(model).__name__.startswith("VisionTransformer") else None)


def _known(model: nn.Module) -> dict[str, tuple | str]:
    """What the tables above know of models of this kind."""
    if _timm_model(model) is None:
        return _TRANSFORMERS_LAYERS.get(model.config.model_type, {})
    architecture = _architecture(model) or ""
    return next((kinds for family, kinds in _TIMM_LAYERS.items() if architecture.startswith(family)), {})


def _find(model: nn.Module, kind: str) -> tuple[tuple[str, ...], Callable[[Tensor], Tensor]]:
    """The layers that the paper reads in models of this kind (none when unknown), and how outputs become a feature."""
    timm_model, known = _timm_model(model), _known(model)
    if kind not in known:
        return (), _by_rank
    layers, to_feature = known[kind]
    layers = layers if isinstance(layers, tuple) else (layers,)
    if timm_model is model:
        layers = tuple(layer.removeprefix("timm_model.") for layer in layers)
    modules = dict(model.named_modules())
    if "{" in layers[0]:
        blocks = modules.get(layers[0].rpartition(".")[0], ())
        layers = (layers[0].format(middle=len(blocks) // 2 - 1, last=len(blocks) - 1),)
    # timm has other networks whose names begin alike (resnet51q, resnetv2_50).
    if not modules.keys() >= set(layers):
        return (), _by_rank
    if to_feature in (_patch_tokens, _patch_map):
        count = (
            _TRANSFORMERS_PREFIX_TOKENS[model.config.model_type]
            if timm_model is None
            else timm_model.num_prefix_tokens
        )
        to_feature = functools.partial(to_feature, num_prefix_tokens=count)
    return layers, to_feature


def _describe(model: nn.Module) -> str:
    architecture = _architecture(model)
    return f"{type(model).__name__} ({architecture})" if architecture else type(model).__name__


def _candidates(model: nn.Module, near: str = "") -> str:
    """Names of stages and blocks, those most like `near` first."""
    names = [name for name, module in model.named_modules() if name and next(module.children(), None) is not None]
    nearest = difflib.get_close_matches(near, names, n=4, cutoff=0.5)
    names = nearest + sorted((name for name in names if name not in nearest), key=lambda name: name.count("."))
    return ", ".join(names[:12])
