"""Reads a mid layer's output during the student's one forward pass.

USKD's auxiliary head reads the last stage but one of a CNN or a Swin, and the class token after the middle block of a
ViT or DeiT (arXiv 2303.13005, section 3.3, and the configurations of github.com/yzd-v/cls_KD).
"""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn


def _pool_nchw(output: Tensor) -> Tensor:
    return output.mean(dim=(2, 3))


def _tokens(output: Tensor) -> Tensor:
    # Left unpooled: Swin's official head normalises the tokens before it averages them, which is the loss's to do.
    return output.flatten(1, -2)


def _class_token(output: Tensor) -> Tensor:
    return output[:, 0]


def _by_rank(output: Tensor) -> Tensor:
    return _pool_nchw(output) if output.ndim == 4 else _tokens(output)


# Family -> (layer, how its output becomes a feature). `{middle}` is the block at half of the depth, `{last}` the last.
_TIMM_LAYERS = {
    "resnet": ("timm_model.layer3", _pool_nchw),
    "mobilenetv1": ("timm_model.blocks.3", _pool_nchw),
    "mobilenetv2": ("timm_model.blocks.6", _pool_nchw),
    "regnet": ("timm_model.s3", _pool_nchw),
    "swin": ("timm_model.layers.2", _tokens),
    "deit": ("timm_model.blocks.{middle}", _class_token),
    "vit": ("timm_model.blocks.{middle}", _class_token),
}
_TRANSFORMERS_LAYERS = {
    "resnet": ("resnet.encoder.stages.2", _pool_nchw),
    "mobilenet_v1": ("mobilenet_v1.layer.21", _pool_nchw),
    "mobilenet_v2": ("mobilenet_v2.layer.15", _pool_nchw),
    "regnet": ("regnet.encoder.stages.2", _pool_nchw),
    # The stage itself returns its output after downsampling (768 channels); its last block does not.
    "swin": ("swin.encoder.layers.2.blocks.{last}", _tokens),
    "vit": ("vit.layers.{middle}", _class_token),
    "deit": ("deit.layers.{middle}", _class_token),
}


class FeatureTap:
    """Keeps the output of one named submodule of `model`, as a feature that a loss can read.

    The hook is registered at construction, so build the tap before `torch.compile` sees the model: a hook that is
    registered later never fires in the compiled graph.

    Args:
        model (`nn.Module`): a `*ForImageClassification` of transformers, timm models among them (`TimmWrapper*`).
        layer (`str`, *optional*): the submodule's name in `model`. None finds the layer that the paper uses.

    Raises:
        ValueError: no layer is known for this model, or the model has no submodule of that name.
    """

    def __init__(self, model: nn.Module, layer: str | None = None):
        family_layer, self._to_feature = _family(model)
        self.layer = layer or family_layer
        if self.layer is None:
            raise ValueError(
                f"no mid layer is known for {_describe(model)}: set feature_layer (--feature_layer) to one of its "
                f"submodules, for example {_candidates(model)}"
            )
        modules = dict(model.named_modules())
        if self.layer not in modules:
            raise ValueError(
                f"feature_layer {self.layer!r} is not a submodule of {_describe(model)}: "
                f"choose one that is, for example {_candidates(model, near=self.layer)}"
            )
        self._output: Tensor | None = None
        module = modules[self.layer]
        # Its last part stands for a Sequential, which timm's gradient checkpointing takes apart without calling it.
        while isinstance(module, nn.Sequential) and len(module):
            module = module[-1]
        self._hook = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        self._output = output if isinstance(output, Tensor) else output[0]

    def take(self) -> Tensor:
        """Hands over the feature of the forward pass that just ran, and lets go of it.

        Returns:
            `Tensor`: [B, D] for CNNs (average-pooled) and for ViT / DeiT (the class token), or [B, N, D] tokens for
            Swin, in the dtype that the layer computed in.

        Raises:
            RuntimeError: the layer took no part in the forward pass.
        """
        output, self._output = self._output, None
        if output is None:
            raise RuntimeError(f"{self.layer} took no part in the forward pass: choose a feature_layer that does")
        return output if output.ndim == 2 else self._to_feature(output)

    def clear(self) -> None:
        """Lets go of a feature that nobody asked for."""
        self._output = None

    def remove(self) -> None:
        """Takes the hook off the model."""
        self._hook.remove()


def feature_shape(model: nn.Module, pixel_values: Tensor, layer: str | None = None) -> torch.Size:
    """Looks at the tapped feature of one batch; its last entry is what `USKDLoss(in_features=...)` wants.

    Args:
        model (`nn.Module`): the student.
        pixel_values (`Tensor`): [B, 3, H, W] float, any image of the size that the student takes.
        layer (`str`, *optional*): as in [`FeatureTap`].

    Returns:
        `torch.Size`: (B, D), or (B, N, D) for Swin.

    Raises:
        ValueError: as in [`FeatureTap`].
    """
    tap = FeatureTap(model, layer)
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values)
        return tap.take().shape
    finally:
        model.train(was_training)
        tap.remove()


def _family(model: nn.Module) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """The layer that the paper taps in models of this kind (None when unknown), and how its output becomes a feature."""
    config = model.config
    if config.model_type == "timm_wrapper":
        layers = _TIMM_LAYERS
        family = next((name for name in layers if config.architecture.startswith(name)), None)
    else:
        layers, family = _TRANSFORMERS_LAYERS, config.model_type
    if family not in layers:
        return None, _by_rank
    layer, to_feature = layers[family]
    modules = dict(model.named_modules())
    if "{" in layer:
        blocks = modules.get(layer.rpartition(".")[0], ())
        layer = layer.format(middle=len(blocks) // 2 - 1, last=len(blocks) - 1)
    # timm has other networks whose names begin alike (resnet51q, resnetv2_50).
    return (layer, to_feature) if layer in modules else (None, _by_rank)


def _describe(model: nn.Module) -> str:
    architecture = getattr(model.config, "architecture", None)
    return f"{type(model).__name__} ({architecture})" if architecture else type(model).__name__


def _candidates(model: nn.Module, near: str = "") -> str:
    """Names of stages and blocks, those most like `near` first."""
    names = [name for name, module in model.named_modules() if name and next(module.children(), None) is not None]
    nearest = difflib.get_close_matches(near, names, n=4, cutoff=0.5)
    names = nearest + sorted((name for name in names if name not in nearest), key=lambda name: name.count("."))
    return ", ".join(names[:12])
