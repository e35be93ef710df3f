"""Builds the models of cls_KD (mmcls), and renames their weights."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from timm.data import ImageNetInfo
from torch import Tensor
from transformers import PreTrainedModel

from .students import create_student

# Buffers that the models compute themselves, and norms that belong to the loss: USKD's mid feature of Swin passes through
# norm2 (USKDLoss(feature_norm=...)); timm's model has only norm3.
_LEFT_OUT = re.compile(
    r"data_preprocessor\..*|backbone\..*\.(relative_position_index|attn_mask)|backbone\.norm[0-2]\..*"
)


def convert_state_dict(state_dict: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Renames official weights, and reorders channels whose order differs.

    - RegNetX: the official model reads BGR and the student RGB, so the channels of the stem are reversed.
    - Swin: the weights that merge patches have the order channel, row, column in mmcls and column, row, channel in timm.

    Args:
        state_dict: weights by official names, `backbone.*` and `head.*`. `data_preprocessor.*`, Swin's tables and its
            `backbone.norm0` to `norm2` are skipped.
        architecture: one of [`OFFICIAL_ARCHITECTURES`], such as `resnet18`.

    Returns:
        `dict[str, Tensor]`: the weights by the student's names, for its `load_state_dict`. An unknown key is kept, so
        that `load_state_dict` names it.

    Raises:
        ValueError: the architecture is unknown.
    """
    return {new: _reordered(state_dict[key], key, architecture) for key, new in _renamed(state_dict, architecture)}


def create_official_student(
    state_dict: dict[str, Tensor], architecture: str, id2label: dict[int, str] | None = None
) -> PreTrainedModel:
    """Builds the student of an architecture, with the architecture's preprocessing, and loads official weights into
    it.

    Args:
        state_dict: weights by official names; see [`convert_state_dict`].
        architecture: one of [`OFFICIAL_ARCHITECTURES`].
        id2label: class names. None means ImageNet's, and for CIFAR-100 `LABEL_0` to `LABEL_99`.

    Raises:
        ValueError: keys are missing or unknown, or weights have another shape or are not finite; the message lists them.
    """
    target = _architecture(architecture)
    if id2label is None and "num_labels" not in target.arguments:
        imagenet = ImageNetInfo()
        descriptions = imagenet.label_descriptions(as_dict=True)
        id2label = {i: descriptions[synset] for i, synset in enumerate(imagenet.label_names())}
    student = create_student(target.student, id2label=id2label, **target.arguments)
    missing = {key: list(value.shape) for key, value in student.state_dict().items()}
    unknown, misshapen = [], []
    for key, new in _renamed(state_dict, architecture):
        expected, got = missing.pop(new, None), list(state_dict[key].shape)
        if expected is None:
            unknown.append(key)
        elif got != expected:
            misshapen.append(f"{key} {got} instead of {expected}")
    not_finite = [key for key, value in state_dict.items() if value.is_floating_point() and not value.isfinite().all()]
    faults = {"missing": list(missing), "unknown": unknown, "of another shape": misshapen, "not finite": not_finite}
    if any(faults.values()):
        raise ValueError(
            f"these are not the weights of {architecture} with {student.config.num_labels} classes: "
            + "; ".join(f"{len(keys)} {fault}: {_first(keys)}" for fault, keys in faults.items() if keys)
        )
    student.load_state_dict(convert_state_dict(state_dict, architecture))
    return student


def _architecture(name: str) -> "_Architecture":
    if name not in OFFICIAL_ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(OFFICIAL_ARCHITECTURES)}, got {name!r}")
    return OFFICIAL_ARCHITECTURES[name]


def _renamed(state_dict: Iterable[str], architecture: str) -> Iterator[tuple[str, str]]:
    """Yields the official and the student's name of each weight."""
    target = _architecture(architecture)
    for key in state_dict:
        if not _LEFT_OUT.fullmatch(key):
            known = key.startswith(("backbone.", "head."))
            yield key, target.prefix + target.rename(key.removeprefix("backbone.")) if known else key


def _reordered(weight: Tensor, key: str, architecture: str) -> Tensor:
    if architecture.startswith("regnetx") and key == "backbone.conv1.weight":
        return weight.flip(1)
    if architecture.startswith("swin") and re.search(r"downsample\.(norm|reduction)\.", key):
        # mmcls: channel, row, column (nn.Unfold); timm: column, row, channel
        return weight.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
    return weight


def _first(keys: list[str], most: int = 10) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


# Official names without their `backbone.` -> timm's or torchvision's names.


def _resnet(key: str) -> str:
    return key.replace("head.fc.", "fc.")


def _mobilenet(key: str) -> str:
    if match := re.fullmatch(r"(model|s4)\.(\d+)\.(\d)\.(.+)", key):
        part, block, layer, rest = match.groups()
        number = int(block) + (12 if part == "s4" else 0)
        if number == 0:
            return f"{('conv_stem', 'bn1')[int(layer)]}.{rest}"
        # timm's stages have 1, 2, 2, 6 and 2 blocks.
        stage = sum(number > end for end in (1, 3, 5, 11))
        name = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}[layer]
        return f"blocks.{stage}.{number - (1, 2, 4, 6, 12)[stage]}.{name}.{rest}"
    return key.replace("head.fc.", "classifier.")


def _mobilenet_v2(key: str) -> str:
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.conv\.(\d)\.(conv|bn)\.(.+)", key):
        stage, block, layer, kind, rest = match.groups()
        # The first stage does not expand.
        convs = ("conv_dw", "conv_pw") if stage == "1" else ("conv_pw", "conv_dw", "conv_pwl")
        name = convs[int(layer)] if kind == "conv" else f"bn{int(layer) + 1}"
        return f"blocks.{int(stage) - 1}.{block}.{name}.{rest}"
    names = {"conv1.conv": "conv_stem", "conv1.bn": "bn1", "conv2.conv": "conv_head", "conv2.bn": "bn2"}
    head, _, rest = key.rpartition(".")
    return f"{names[head]}.{rest}" if head in names else key.replace("head.fc.", "classifier.")


def _shufflenet_v2(key: str) -> str:
    # torchvision's branches are flat: 0 conv, 1 bn, 2 ReLU; a depthwise convolution has no ReLU.
    starts = {"branch1": (0, 2), "branch2": (0, 3, 5)}
    if match := re.fullmatch(r"layers\.(\d)\.(\d)\.(branch\d)\.(\d)\.(conv|bn)\.(.+)", key):
        stage, block, branch, layer, kind, rest = match.groups()
        return f"stage{int(stage) + 2}.{block}.{branch}.{starts[branch][int(layer)] + (kind == 'bn')}.{rest}"
    key = key.replace("layers.3.", "conv5.").replace("head.fc.", "fc.")
    return re.sub(r"^(conv[15])\.(conv|bn)\.", lambda match: f"{match[1]}.{int(match[2] == 'bn')}.", key)


def _regnet(key: str) -> str:
    key = re.sub(r"^(conv|bn)1\.", r"stem.\1.", key)
    key = re.sub(r"^layer(\d)\.(\d+)\.", lambda match: f"s{match[1]}.b{int(match[2]) + 1}.", key)
    key = re.sub(r"\.(conv)(\d)\.", r".conv\2.conv.", key)
    key = re.sub(r"\.bn([123])\.", r".conv\1.bn.", key)
    return key.replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")


def _swin(key: str) -> str:
    # timm downsamples at the start of a stage.
    key = re.sub(r"^stages\.(\d)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.", key)
    key = key.replace("stages.", "layers.").replace("attn.w_msa.", "attn.").replace("norm3.", "norm.")
    return _feed_forward(key)


def _deit(key: str) -> str:
    key = re.sub(r"^layers\.(\d+)\.", r"blocks.\1.", key.replace("head.layers.head.", "head."))
    key = re.sub(r"^ln1\.", "norm.", key)
    return _feed_forward(key.replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2."))


def _feed_forward(key: str) -> str:
    key = key.replace("ffn.layers.0.0.", "mlp.fc1.").replace("ffn.layers.1.", "mlp.fc2.")
    return key.replace("patch_embed.projection.", "patch_embed.proj.")


class _Architecture(NamedTuple):
    student: str
    rename: Callable[[str], str]
    arguments: dict[str, Any] = {}  # noqa: RUF012
    prefix: str = "timm_model."


OFFICIAL_ARCHITECTURES = {
    "resnet18": _Architecture("resnet18", _resnet),
    "resnet34": _Architecture("resnet34", _resnet),
    "resnet50": _Architecture("resnet50", _resnet),
    "resnet101": _Architecture("resnet101", _resnet),
    "mobilenet": _Architecture("mobilenetv1_100", _mobilenet, {"model_args": {"act_layer": "relu"}}),
    "mobilenetv2": _Architecture("mobilenetv2_100", _mobilenet_v2),
    "shufflenetv2": _Architecture("shufflenet_v2_x1_0", _shufflenet_v2, prefix="shufflenet."),
    "regnetx-1.6gf": _Architecture("regnetx_016", _regnet),
    "swin-tiny": _Architecture("swin_tiny_patch4_window7_224", _swin),
    "deit-tiny": _Architecture("deit_tiny_patch16_224", _deit),
    "deit-small": _Architecture("deit_small_patch16_224", _deit),
    "deit-base": _Architecture("deit_base_patch16_224", _deit),
    "resnet18-cifar100": _Architecture("resnet18_cifar", _resnet, {"num_labels": 100}, "resnet."),
    "resnet34-cifar100": _Architecture("resnet34_cifar", _resnet, {"num_labels": 100}, "resnet."),
}
