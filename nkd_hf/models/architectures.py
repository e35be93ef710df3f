"""Lists the architectures that are built by name: timm's, and two families that neither timm nor transformers has."""

from typing import Any, NamedTuple

import timm
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from .modeling_resnet_cifar import ResNetCifarConfig, ResNetCifarForImageClassification
from .modeling_shufflenet_v2 import ShuffleNetV2Config, ShuffleNetV2ForImageClassification


class Architecture(NamedTuple):
    """An architecture of `ARCHITECTURES`.

    Attributes:
        model_class (`type[PreTrainedModel]`)
        num_labels (`int`): default number of classes.
        settings (`dict[str, Any]`): arguments of its configuration; `model_args` may replace them.
    """

    model_class: type[PreTrainedModel]
    num_labels: int
    settings: dict[str, Any]


ARCHITECTURES = {
    "shufflenet_v2_x1_0": Architecture(
        ShuffleNetV2ForImageClassification,
        1000,
        {"stages_repeats": [4, 8, 4], "stages_out_channels": [24, 116, 232, 464, 1024]},
    ),
    "resnet18_cifar": Architecture(ResNetCifarForImageClassification, 100, {"layers": [2, 2, 2, 2]}),
    "resnet34_cifar": Architecture(ResNetCifarForImageClassification, 100, {"layers": [3, 4, 6, 3]}),
}

# If nkd_hf is imported, transformers opens saved folders of these models without trust_remote_code.
for _config, _model in (
    (ShuffleNetV2Config, ShuffleNetV2ForImageClassification),
    (ResNetCifarConfig, ResNetCifarForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)


def is_architecture(name: str) -> bool:
    """Whether a name is that of an architecture, which starts from random weights: timm's, or one of `ARCHITECTURES`.

    Example:

    ```python
    >>> from nkd_hf.models.architectures import is_architecture
    >>> is_architecture("resnet18"), is_architecture("shufflenet_v2_x1_0"), is_architecture("microsoft/resnet-18")
    (True, True, False)

    ```
    """
    return timm.is_model(name) or name in ARCHITECTURES


def with_start(name: str, start: str | None) -> str:
    """Returns the name of the same model with a given start: an architecture for random weights, an id for pretrained
    ones.

    Args:
        name: the name of an architecture, a folder or a repo of the Hub.
        start: `random`, `pretrained`, or None, which returns the name unchanged.

    Raises:
        ValueError: timm has no pretrained weights of the architecture, or no architecture of timm follows from the
            name.

    Example:

    ```python
    >>> from nkd_hf.models.architectures import with_start
    >>> with_start("resnet34", "pretrained"), with_start("timm/resnet34.a1_in1k", "random")
    ('timm/resnet34.a1_in1k', 'resnet34')

    ```
    """
    if start == "pretrained" and is_architecture(name):
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if cfg is None or not cfg.hf_hub_id:
            raise ValueError(
                f"there are no pretrained weights of {name!r} in timm. Name a folder or a repo of the Hub"
            )
        return cfg.hf_hub_id
    if start == "random" and not is_architecture(name):
        architecture = name.removeprefix("timm/").partition(".")[0]
        if not name.startswith("timm/") or not is_architecture(architecture):
            raise ValueError(
                f"random weights need the name of an architecture such as resnet34, got {name!r}. Name one, or set the "
                "start to pretrained"
            )
        return architecture
    return name
