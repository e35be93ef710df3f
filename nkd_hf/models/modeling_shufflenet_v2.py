"""Defines ShuffleNetV2 (arXiv 1807.11164), torchvision's network as a transformers model.

`save_pretrained` copies this file beside the weights.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import ShuffleNetV2
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class ShuffleNetV2Config(PretrainedConfig):
    """Configuration of [`ShuffleNetV2ForImageClassification`]; its defaults are ShuffleNetV2 1.0x for ImageNet.

    Args:
        stages_repeats (`list[int]`, *optional*): number of blocks of the three stages; None means [4, 8, 4].
        stages_out_channels (`list[int]`, *optional*): channels of the stem, the three stages and the last convolution;
            None means [24, 116, 232, 464, 1024].
        preprocessing (`dict`, *optional*): `input_size`, `mean`, `std`, `crop_pct` and `interpolation`, as in timm's
            `pretrained_cfg`, which is another name of this attribute. None means 224 pixels and ImageNet's mean and std.
        kwargs: arguments of every configuration, such as `num_labels` and `id2label`.
    """

    model_type = "nkd_shufflenet_v2"
    # config.json has no key pretrained_cfg: with it, AutoImageProcessor would read the folder as a timm model's.
    attribute_map: ClassVar[dict[str, str]] = {"pretrained_cfg": "preprocessing"}

    def __init__(
        self,
        stages_repeats: list[int] | None = None,
        stages_out_channels: list[int] | None = None,
        preprocessing: dict | None = None,
        **kwargs,
    ):
        self.stages_repeats = stages_repeats or [4, 8, 4]
        self.stages_out_channels = stages_out_channels or [24, 116, 232, 464, 1024]
        self.preprocessing = preprocessing or {
            "input_size": [3, 224, 224],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "crop_pct": 0.875,
            "interpolation": "bilinear",
        }
        super().__init__(**kwargs)


class ShuffleNetV2ForImageClassification(PreTrainedModel):
    """ShuffleNetV2 with a classifier; `model.shufflenet` is torchvision's network, with its keys.

    Args:
        config (`ShuffleNetV2Config`)

    Raises:
        ValueError: there are not three values of `stages_repeats` and five of `stages_out_channels`.

    Example:

    ```python
    >>> model = ShuffleNetV2ForImageClassification(ShuffleNetV2Config(num_labels=10))
    >>> model(torch.zeros(2, 3, 64, 64)).logits.shape
    torch.Size([2, 10])

    ```
    """

    config_class = ShuffleNetV2Config
    base_model_prefix = "shufflenet"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["InvertedResidual"]

    def __init__(self, config: ShuffleNetV2Config):
        super().__init__(config)
        self.shufflenet = ShuffleNetV2(config.stages_repeats, config.stages_out_channels, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The initialisation is that of mmcls/models/backbones/shufflenet_v2.py and heads/linear_head.py. The norms get
        # no bias of 0.0001, though shufflenet_v2.py names it: shufflenet_v2.py passes their weight to constant_init,
        # which needs the module.
        if isinstance(module, nn.Conv2d):
            stem = module is self.shufflenet.conv1[0]
            nn.init.normal_(module.weight, std=0.01 if stem else 1 / module.weight.shape[1])
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Classifies images.

        Args:
            pixel_values (`Tensor`): [B, 3, H, W] float.
            labels (`Tensor`, *optional*): [B] int64 class indices, or [B, C] float probabilities.

        Returns:
            `ImageClassifierOutputWithNoAttention`: `logits` [B, C] and, with labels, `loss`: their cross-entropy.
        """
        logits = self.shufflenet(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


# With these calls, save_pretrained names this file's classes in config.json, and copies this file beside the weights.
ShuffleNetV2Config.register_for_auto_class()
ShuffleNetV2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")
