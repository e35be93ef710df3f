"""The tap finds the paper's layer in every student of its tables, in one forward pass, compiled or not."""

import pytest
import torch
from tiny import digits, make_trainer, native_resnet, native_vit, timm_cnn, timm_deit
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from nkd_hf import USKDLoss, create_student
from nkd_hf.models.features import FeatureTap, feature_shape
from nkd_hf.trainer.distillation_model import DistillationModel

# layer, channels and shape of the feature, from the table of the design notes and the official configurations
TIMM = {
    "resnet18": ("layer3", (2, 256)),
    "resnet50": ("layer3", (2, 1024)),
    "mobilenetv1_100": ("blocks.3", (2, 512)),
    "mobilenetv2_100": ("blocks.6", (2, 320)),
    "regnetx_016": ("s3", (2, 408)),
    "swin_tiny_patch4_window7_224": ("layers.2", (2, 196, 384)),
    "deit_tiny_patch16_224": ("blocks.5", (2, 192)),
}
NATIVE = {
    "mobilenet_v1.layer.21": (lambda: MobileNetV1ForImageClassification(MobileNetV1Config()), (2, 512)),
    "mobilenet_v2.layer.15": (lambda: MobileNetV2ForImageClassification(MobileNetV2Config()), (2, 320)),
    "regnet.encoder.stages.2": (
        lambda: RegNetForImageClassification(RegNetConfig(hidden_sizes=[72, 168, 408, 912], groups_width=24)),
        (2, 408),
    ),
    "swin.encoder.layers.2.blocks.5": (lambda: SwinForImageClassification(SwinConfig()), (2, 49 * 4, 384)),
}


def run_once(model, layer, shape):
    tap = FeatureTap(model)
    assert tap.layer == layer
    calls = []
    model.get_submodule(layer).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        logits = model.eval()(torch.randn(2, 3, 224, 224)).logits
    assert tuple(tap.take().shape) == shape
    assert len(calls) == 1
    assert logits.shape[0] == 2


@pytest.mark.parametrize("name", TIMM)
def test_timm_students(name):
    layer, shape = TIMM[name]
    run_once(create_student(name, num_labels=10), f"timm_model.{layer}", shape)


@pytest.mark.parametrize("layer", NATIVE)
def test_transformers_students(layer):
    build, shape = NATIVE[layer]
    run_once(build(), layer, shape)


def test_the_feature_is_the_layers_output():
    for student, layer, pool in (
        (timm_cnn(), "timm_model.layer3", lambda output: output.mean((2, 3))),
        (timm_deit(), "timm_model.blocks.1", lambda output: output[:, 0]),
        (native_resnet(), "resnet.encoder.stages.2", lambda output: output.mean((2, 3))),
        (native_vit(), "vit.layers.1", lambda output: output[:, 0]),
    ):
        outputs = []
        student.get_submodule(layer).register_forward_hook(lambda _, __, output, kept=outputs: kept.append(output))
        tap = FeatureTap(student)
        student(torch.randn(2, 3, 32, 32))
        torch.testing.assert_close(tap.take(), pool(outputs[0]), rtol=0, atol=0)


def test_unknown_architecture_and_wrong_layer_list_candidates():
    model = ConvNextForImageClassification(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32]))
    with pytest.raises(
        ValueError, match=r"no mid layer is known for ConvNext.*--feature_layer.*convnext.encoder.stages.2"
    ):
        FeatureTap(model)
    with pytest.raises(ValueError, match=r"'convnext.encoder.stage.2' is not a submodule.*convnext.encoder.stages.2"):
        FeatureTap(model, "convnext.encoder.stage.2")
    assert feature_shape(model, torch.zeros(1, 3, 64, 64), "convnext.encoder.stages.2") == (1, 24)
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_that_does_not_run_is_an_error():
    student = timm_cnn()
    tap = FeatureTap(student, "timm_model.layer2")
    with pytest.raises(RuntimeError, match=r"timm_model.layer2 took no part in the forward pass"):
        tap.take()


def test_feature_layer_reaches_the_loss(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 32), distillation_loss=USKDLoss(16, 10), feature_layer="timm_model.layer2"
    )
    trainer.train()
    assert trainer.model.tap.layer == "timm_model.layer2"


def test_swin_normalises_the_tokens_before_it_averages_them():
    args = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
    student = create_student("swin_tiny_patch4_window7_224", num_labels=10, image_size=64, model_args=args).eval()
    outputs = []
    student.timm_model.layers[2].register_forward_hook(lambda _, __, output: outputs.append(output))
    loss = USKDLoss(96, 10, feature_norm=nn.LayerNorm(96))
    nn.init.normal_(loss.feature_norm.weight)
    heads = []
    loss.head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    DistillationModel(student, {"uskd": loss})(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]), {})
    torch.testing.assert_close(heads[0], loss.feature_norm(outputs[0]).mean((1, 2)))


@pytest.mark.runs
@pytest.mark.parametrize("student", [timm_cnn, timm_deit])
def test_compiled_whole_and_equal(student):
    model = DistillationModel(student(), {"uskd": USKDLoss(32, 10)}).train()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager_losses, losses = model(pixels, labels, {})["losses"], compiled(pixels, labels, {})["losses"]
    torch.testing.assert_close(losses, eager_losses, rtol=1e-5, atol=1e-6)
    sum(losses.values()).backward()
    assert model.losses["uskd"].head.weight.grad.abs().sum() > 0
