"""Defines the CIFAR ResNets: torchvision's ResNet with a 3x3 stem of stride 1 and no max-pool, as a transformers
model.

`save_pretrained` copies this file beside the weights.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class ResNetCifarConfig(PretrainedConfig):
    """Configuration of [`ResNetCifarForImageClassification`]; its defaults are ResNet-18 for CIFAR-100's images.

    Args:
        layers (`list[int]`, *optional*): number of blocks of the four stages; None means ResNet-18's [2, 2, 2, 2].
            ResNet-34 has [3, 4, 6, 3].
        preprocessing (`dict`, *optional*): `input_size`, `mean`, `std`, `crop_pct` and `interpolation`, as in timm's
            `pretrained_cfg`, which is another name of this attribute. None means 32 pixels and CIFAR-100's mean and std.
        kwargs: arguments of every configuration, such as `num_labels` and `id2label`.
    """

    model_type = "nkd_resnet_cifar"
    # config.json has no key pretrained_cfg: with it, AutoImageProcessor would read the folder as a timm model's.
    attribute_map: ClassVar[dict[str, str]] = {"pretrained_cfg": "preprocessing"}

    def __init__(self, layers: list[int] | None = None, preprocessing: dict | None = None, **kwargs):
        self.layers = layers or [2, 2, 2, 2]
        self.preprocessing = preprocessing or {
            "input_size": [3, 32, 32],
            # mmcls' figures, configs/_base_/datasets/cifar100_bs16.py
            "mean": [129.304 / 255, 124.070 / 255, 112.434 / 255],
            "std": [68.170 / 255, 65.392 / 255, 70.418 / 255],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
        }
        super().__init__(**kwargs)


class ResNetCifarForImageClassification(PreTrainedModel):
    """A CIFAR ResNet with a classifier; `model.resnet` is torchvision's network, with its keys.

    Args:
        config (`ResNetCifarConfig`)

    Raises:
        ValueError: there are not four values of `layers`.

    Example:

    ```python
    >>> model = ResNetCifarForImageClassification(ResNetCifarConfig(num_labels=10))
    >>> model(torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 10])

    ```
    """

    config_class = ResNetCifarConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["BasicBlock"]

    def __init__(self, config: ResNetCifarConfig):
        super().__init__(config)
        if len(config.layers) != 4:
            raise ValueError(f"expected layers as the number of blocks of four stages, got {config.layers}")
        self.resnet = ResNet(BasicBlock, config.layers, config.num_labels)
        self.resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.resnet.maxpool = nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The initialisation is that of mmcls/models/backbones/resnet.py, where each block starts as the identity, and
        # heads/linear_head.py.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if any(isinstance(block, BasicBlock) and module is block.bn2 for block in self.modules()):
            nn.init.zeros_(module.weight)

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
        logits = self.resnet(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


# With these calls, save_pretrained names this file's classes in config.json, and copies this file beside the weights.
ResNetCifarConfig.register_for_auto_class()
ResNetCifarForImageClassification.register_for_auto_class("AutoModelForImageClassification")
