"""Names the layers that compute a model's features, and defines how a layer's output becomes a feature.

- `mid`, for USKD's auxiliary head: the last stage but one of a CNN or a Swin, and, after the middle block of a ViT or DeiT,
  the class token (arXiv 2303.13005, section 3.3, and the configurations of github.com/yzd-v/cls_KD). A ViT whose classifier
  does not read the class token (it has none, or averages or attends to the patch tokens) has no trained class token: `mid`
  is then the mean of its patch tokens.
- `low` and `high`, for ViTKD: a ViT's patch tokens after its first two blocks, and after its last block and final norm
  (arXiv 2209.02432; forward of the backbones `VisionTransformer` and `Deit_3` of github.com/yzd-v/cls_KD). A ViT of timm
  that pools before it normalises (`fc_norm`) has that norm applied to each token.
- `map`, for MGD, SRRL and SD-NKD: the last feature map, which the classifier of a CNN or a Swin averages over its places; for a ViT,
  the patch tokens after the final norm, in the grid of the image's patches.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

# Height and width in patches.
Grid = tuple[int, int]


class Reading(NamedTuple):
    """The layers and the function that read a feature from a model.

    Attributes:
        layers (`tuple[str, ...]`): the submodules whose outputs are read; the features of several are stacked on dim 1.
        read (`Callable[[Tensor, Grid | None], Tensor]`): turns one output into a feature.
        text (`str`): names the feature in messages.
        grid_layer (`str`, *optional*): the submodule whose output [B, D, h, w] has the grid of a ViT's or Swin's patches.
    """

    layers: tuple[str, ...]
    read: Callable[[Tensor, Grid | None], Tensor]
    text: str
    grid_layer: str | None = None


class _Pooled(NamedTuple):
    """A network whose classifier `head` reads the average of the output of `last`."""

    mid: str
    last: str
    head: str
    channels_last: bool = False
    grid: str | None = None  # for a Swin with tokens [B, N, D]: the convolution that cuts the image into patches


class _Vit(NamedTuple):
    """A network of tokens; `grid` is the convolution that cuts the image into patches."""

    blocks: str
    norm: str
    grid: str


# The keys are the beginning of timm's architecture, and transformers' model_type. `{-1}` stands for the last of the
# submodules that are numbered at that place, and `{-2}` for the last but one.
_TIMM_LAYERS = {
    "resnet": _Pooled("layer{-2}", "layer{-1}", "fc"),
    "mobilenetv1": _Pooled("blocks.{-2}", "bn2", "classifier"),
    "mobilenetv2": _Pooled("blocks.{-1}", "bn2", "classifier"),
    "regnet": _Pooled("s{-2}", "final_conv", "head.fc"),
    "swin": _Pooled("layers.{-2}", "norm", "head.fc", channels_last=True),
    "deit": _Vit("blocks", "norm", "patch_embed.proj"),
    "vit": _Vit("blocks", "norm", "patch_embed.proj"),
}
_TRANSFORMERS_LAYERS = {
    "resnet": _Pooled("resnet.encoder.stages.{-2}", "resnet.encoder.stages.{-1}", "classifier.1"),
    "mobilenet_v1": _Pooled("mobilenet_v1.layer.{-5}", "mobilenet_v1.layer.{-1}", "classifier"),
    "mobilenet_v2": _Pooled("mobilenet_v2.layer.{-1}", "mobilenet_v2.conv_1x1", "classifier"),
    "regnet": _Pooled("regnet.encoder.stages.{-2}", "regnet.encoder.stages.{-1}", "classifier.1"),
    # The stage itself returns its output after downsampling (768 channels of Swin-T); its last block does not.
    "swin": _Pooled(
        "swin.encoder.layers.{-2}.blocks.{-1}",
        "swin.layernorm",
        "classifier",
        channels_last=True,
        grid="swin.embeddings.patch_embeddings.projection",
    ),
    "vit": _Vit("vit.layers", "vit.layernorm", "vit.embeddings.patch_embeddings.projection"),
    "deit": _Vit("deit.layers", "deit.layernorm", "deit.embeddings.patch_embeddings.projection"),
    "nkd_shufflenet_v2": _Pooled("shufflenet.stage{-1}", "shufflenet.conv5", "shufflenet.fc"),
    "nkd_resnet_cifar": _Pooled("resnet.layer{-2}", "resnet.layer{-1}", "resnet.fc"),
}
# The class token, and DeiT's distillation token. A timm model has an attribute num_prefix_tokens.
_TRANSFORMERS_PREFIX_TOKENS = {"vit": 1, "deit": 2}


def known_reading(model: nn.Module, kind: str) -> Reading | None:
    """Returns the papers' reading of this kind of feature; None if the model is unknown or has no such feature.

    Args:
        model: a `*ForImageClassification`, or a bare timm model.
        kind: `mid`, `low`, `high` or `map`.

    Raises:
        ValueError: `kind` is `high` or `map`, and the ViT has no final norm.
    """
    family = _family(model)
    try:
        if isinstance(family, _Pooled):
            return _pooled_reading(model, family, kind)
        return None if family is None else _vit_reading(model, family, kind)
    except LookupError:  # timm has other networks whose names begin alike (resnet51q, resnetv2_50)
        return None


def classifier_name(model: nn.Module) -> str | None:
    """Returns the name of the classifier that reads the average of the last feature map; None for other models."""
    family = _family(model)
    try:
        return _named(model, family.head) if isinstance(family, _Pooled) else None
    except LookupError:
        return None


def classifier_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Returns the layers with one row for each class, by name: two with a distillation head, none if the model is
    unknown.

    In a model of transformers these layers are outside of the base model, and the last layer there is one of them.
    """
    timm = timm_model(model)
    if timm is None:
        base = f"{model.base_model_prefix}."
        layers = {name: layer for name, layer in model.named_modules() if not name.startswith(base)}
    else:
        heads = timm.get_classifier() if hasattr(timm, "get_classifier") else ()
        heads = heads if isinstance(heads, tuple | list) else [heads]
        inside = {layer for head in heads for layer in head.modules()}
        layers = {name: layer for name, layer in model.named_modules() if layer in inside}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)}
    num_rows = [len(layer.weight) for layer in layers.values()]
    return {name: layer for name, layer in layers.items() if len(layer.weight) == num_rows[-1]}


def prefix_tokens(model: nn.Module) -> int | None:
    """Counts the tokens before a ViT's patch tokens (class, distillation, register tokens); None for other models."""
    if not isinstance(_family(model), _Vit):
        return None
    vit = timm_model(model)
    if vit is None:
        return _TRANSFORMERS_PREFIX_TOKENS[model.config.model_type]
    # timm's SAM, whose tokens are a map, has no such attribute.
    return getattr(vit, "num_prefix_tokens", None)


def pool_places(output: Tensor, grid: Grid | None = None) -> Tensor:
    """Averages [B, D, ...] to [B, D]."""
    return output.flatten(2).mean(2)


def keep_tokens(output: Tensor, grid: Grid | None = None) -> Tensor:
    """Flattens [B, ..., D] to [B, N, D]."""
    # The tokens are not averaged: Swin's official head normalises them first, and USKDLoss(feature_norm=...) does
    # both.
    return output.flatten(1, -2)


def read_tokens(model: nn.Module) -> tuple[Callable[[Tensor, Grid | None], Tensor], str]:
    """Returns the function that reads `mid` from all tokens [B, N, D] of a known ViT, and the feature's name for messages."""
    vit = timm_model(model)
    pooling = "token" if vit is None else vit.global_pool
    # The pooling prr (attention without parameters) returns the class token of a ViT that has one.
    if pooling == "token" or (pooling == "prr" and vit.cls_token is not None):
        return _class_token, "class token"
    return functools.partial(_mean_of_patches, num_prefix=prefix_tokens(model)), "mean of the patch tokens"


def timm_model(model: nn.Module) -> nn.Module | None:
    """Returns the timm model itself, or the one inside its wrapper; None for a model of transformers."""
    config = getattr(model, "config", None)
    if config is None:
        return model
    return model.timm_model if config.model_type == "timm_wrapper" else None


def describe(model: nn.Module) -> str:
    """Returns the class of a model and, for timm's, its architecture."""
    architecture = _architecture(model)
    return f"{type(model).__name__} ({architecture})" if architecture else type(model).__name__


def _architecture(model: nn.Module) -> str | None:
    """Returns the name of a timm architecture."""
    config = getattr(model, "config", None)
    if config is not None:
        return getattr(config, "architecture", None)
    named = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    # timm.create_model sets pretrained_cfg; a call of timm's class does not.
    return named or ("vit" if type(model).__name__.startswith("VisionTransformer") else None)


def _family(model: nn.Module) -> _Pooled | _Vit | None:
    if timm_model(model) is None:
        return _TRANSFORMERS_LAYERS.get(model.config.model_type)
    architecture = _architecture(model) or ""
    return next((family for start, family in _TIMM_LAYERS.items() if architecture.startswith(start)), None)


def _named(model: nn.Module, pattern: str) -> str:
    """Resolves a name in the tables to the name of a submodule; LookupError if the model has no such submodule."""
    name = pattern if timm_model(model) in (None, model) else f"timm_model.{pattern}"
    modules = dict(model.named_modules())
    while match := re.search(r"\{(-\d+|middle)\}", name):
        start, end = name[: match.start()], name[match.end() :]
        numbered = (re.fullmatch(re.escape(start) + r"(\d+)", other) for other in modules)
        numbers = sorted(int(other[1]) for other in numbered if other)
        count = len(numbers)
        place = count // 2 - 1 if match[1] == "middle" else count + int(match[1])
        if place < 0:
            raise LookupError(pattern)
        name = f"{start}{numbers[place]}{end}"
    if name not in modules:
        raise LookupError(pattern)
    return name


def _pooled_reading(model: nn.Module, family: _Pooled, kind: str) -> Reading | None:
    if kind == "mid":
        read, text = (keep_tokens, "tokens") if family.channels_last else (pool_places, "average over the places")
        return Reading((_named(model, family.mid),), read, text)
    if kind != "map":
        return None
    layers, text = (_named(model, family.last),), "feature map"
    if family.grid is None:
        return Reading(layers, _channels_first if family.channels_last else _as_it_is, text)
    # Each stage but the last halves the grid, and rounds up.
    reduction = 2 ** (len(model.config.depths) - 1)
    read = functools.partial(_token_map, reduction=reduction, where=describe(model))
    return Reading(layers, read, text, _named(model, family.grid))


def _vit_reading(model: nn.Module, family: _Vit, kind: str) -> Reading | None:
    num_prefix = prefix_tokens(model)
    if num_prefix is None:
        return None
    if kind == "mid":
        return Reading((_named(model, f"{family.blocks}.{{middle}}"),), *read_tokens(model))
    patches = functools.partial(_patch_tokens, num_prefix=num_prefix, where=describe(model))
    grid_layer = _named(model, family.grid)
    if kind == "low":
        layers = tuple(_named(model, f"{family.blocks}.{block}") for block in range(2))
        return Reading(layers, patches, "patch tokens", grid_layer)
    layers, norm, text = (_named(model, family.norm),), None, "patch tokens after the final norm"
    if isinstance(model.get_submodule(layers[0]), nn.Identity):
        # timm's fc_norm follows the pooling.
        norm, text = timm_model(model).fc_norm, "patch tokens after fc_norm"
        if isinstance(norm, nn.Identity):
            raise ValueError(
                f"the losses that read a ViT's last tokens (ViTKD, MGD) are weighted for tokens after a final norm, got "
                f"{describe(model)}, which has none: choose another model"
            )
    patches = functools.partial(patches, norm=norm)
    read = patches if kind == "high" else functools.partial(_patch_map, patches=patches)
    return Reading(layers, read, text, grid_layer)


def _as_it_is(output: Tensor, grid: Grid | None) -> Tensor:
    return output


def _channels_first(output: Tensor, grid: Grid | None) -> Tensor:
    return output.permute(0, 3, 1, 2)


def _class_token(output: Tensor, grid: Grid | None) -> Tensor:
    return output[:, 0]


def _mean_of_patches(output: Tensor, grid: Grid | None, num_prefix: int) -> Tensor:
    return output[:, num_prefix:].mean(1)


def _patch_tokens(output: Tensor, grid: Grid, num_prefix: int, where: str, norm: nn.Module | None = None) -> Tensor:
    tokens = output[:, num_prefix:]
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{where} must have a token of each of its {grid[0]}x{grid[1]} patches, got {tokens.shape[1]}: set its "
            "patch_drop_rate to 0"
        )
    # The tokens get the norm's dtype, since autocast may be off outside of the model's forward.
    return tokens if norm is None else norm(tokens.to(norm.weight.dtype))


def _patch_map(output: Tensor, grid: Grid, patches: Callable[[Tensor, Grid], Tensor]) -> Tensor:
    return _channels_first(patches(output, grid).unflatten(1, grid), grid)


def _token_map(output: Tensor, grid: Grid, reduction: int, where: str) -> Tensor:
    grid = tuple(-(-side // reduction) for side in grid)
    if output.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"the last tokens of {where} must be {grid[0]}x{grid[1]}, got {output.shape[1]}")
    return _channels_first(output.unflatten(1, grid), grid)
