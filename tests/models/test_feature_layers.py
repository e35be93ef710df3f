"""Which layer is read of models of other depths, tokens, norms and shapes than the paper's, and what of its output."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import digits, make_trainer, native_resnet, native_vit, timm_cnn, timm_deit
from torch import nn
from transformers import (
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from nkd_hf import MGDLoss, SRRLLoss, USKDLoss, ViTKDLoss, create_student, load_teacher, token_shape
from nkd_hf.models.features import FeatureTap, check_pooled_head, check_token_grids, feature_shape
from nkd_hf.recipe.arguments import RecipeArguments
from nkd_hf.recipe.loss_shapes import loss_shapes
from nkd_hf.trainer.distillation_model import DistillationModel


def outputs_of(model, *names):
    """The outputs of submodules in a forward pass that comes."""
    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output})
        )
    return outputs


# ---- ViTs: class token or patches, normalised or not

TINY = {"embed_dim": 32, "num_heads": 2, "depth": 3, "img_size": 32, "num_classes": 10}
# name -> arguments: with and without class token, registers and distillation token, and each way of pooling
VITS = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224, avg": {"global_pool": "avg"},
    "vit_tiny_patch16_224, max": {"global_pool": "max", "class_token": False},
    "deit_tiny_patch16_224": {"class_token": False, "global_pool": "avg"},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_base_patch16_gap_224": {},
    "vit_base_patch16_reg4_gap_256": {},
    "vit_base_patch14_reg4_dinov2": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_base_patch16_rpn_224": {},
    "vit_base_patch16_xp_224": {},
    "vit_relpos_base_patch16_224": {},
    "vit_relpos_base_patch16_cls_224": {},
    "vit_relpos_base_patch16_clsgap_224": {},
    "vit_srelpos_small_patch16_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_rope_reg1_gap_256": {},
    "vit_pe_core_small_patch16_384": {},
    "vit_medium_patch16_rope_reg1_gap_256, token": {"class_token": True, "global_pool": "token"},
}


def build_vit(name):
    torch.manual_seed(0)
    model = (
        timm.create_model(name.partition(",")[0], **TINY | {"patch_size": 8} | VITS[name]).eval().requires_grad_(False)
    )
    for token in (model.cls_token, getattr(model, "reg_token", None)):
        if token is not None:
            nn.init.normal_(token)
    return model


@pytest.mark.parametrize("name", VITS)
def test_mid_of_a_vit_is_what_its_classifier_reads(name):
    model, blocks = build_vit(name), {}
    outputs = outputs_of(model, "blocks.0")
    model.blocks[-1].register_forward_hook(lambda _, __, output: blocks.update(last=output.requires_grad_()))
    tap = FeatureTap(model)
    # The gradient shows which tokens reach the logits.
    logits = model(torch.randn(2, 3, 32, 32))
    (gradient,) = torch.autograd.grad(logits.square().sum(), blocks["last"])
    num_prefix = gradient.shape[1] - 16
    tokens = outputs["blocks.0"]
    if gradient[:, num_prefix:].any():
        expected, text = tokens[:, num_prefix:].mean(1), "mean of the patch tokens"
    else:
        expected, text = tokens[:, 0], "class token"
    assert tap.layer == "blocks.0"
    assert tap.text == text
    assert torch.equal(tap.take(), expected)


@pytest.mark.parametrize("name", VITS)
def test_last_tokens_of_a_vit_are_normalised(name):
    model = build_vit(name)
    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    outputs = outputs_of(model, "blocks.2")
    high, feature_map = FeatureTap(model, kind="high"), FeatureTap(model, kind="map")
    model(torch.randn(2, 3, 32, 32))
    last = outputs["blocks.2"][:, -16:]
    if "_xp_" not in name:  # which has a norm without a mean
        last = last - last.mean(-1, keepdim=True)
    expected = last / last.square().mean(-1, keepdim=True).sqrt() * norm.weight
    tokens = high.take()
    torch.testing.assert_close(tokens, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(feature_map.take(), tokens.unflatten(1, (4, 4)).permute(0, 3, 1, 2), rtol=0, atol=0)
    assert token_shape(model) == (16, 32)


def test_vit_without_a_final_norm():
    model = timm.create_model("vit_intern300m_patch14_448", **TINY | {"patch_size": 8})
    for kind in ("high", "map"):
        with pytest.raises(
            ValueError, match=r"after a final norm, got VisionTransformer \(vit_intern300m_patch14_448\), w"
        ):
            FeatureTap(model, kind=kind)
    assert FeatureTap(model).text == "class token"


@pytest.mark.runs
def test_tokens_that_are_normalised_after_pooling_train(tmp_path):
    def build(width):
        args = {"embed_dim": width, "patch_size": 8, "depth": 2, "num_heads": 2, "global_pool": "avg"}
        return create_student("deit_tiny_patch16_224", num_labels=10, image_size=32, model_args=args)

    student, teacher = build(32), build(48)
    loss = {
        "vitkd": ViTKDLoss(32, 48, alpha=1e-2, beta=1e-2),
        "mgd": MGDLoss(32, 48, alpha=1e-2),
        "uskd": USKDLoss(32, 10),
    }
    for precision in ({}, {"bf16": True}, {"teacher_dtype": "bf16"}):
        trainer = make_trainer(
            tmp_path, student, digits(0, 32), teacher=teacher, distillation_loss=loss, max_steps=2, **precision
        )
        trainer.train()
        assert trainer.state.log_history[0]["mgd"] > 0
    # Wrapped and bare, compiled and eager.
    model = DistillationModel(student, loss)
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    inputs = load_teacher(teacher.timm_model).tap(model.teacher_inputs)
    runs = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        inputs(pixels)
        torch.manual_seed(0)
        runs.append(run(pixels, labels, inputs.take_features())["losses"])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


# ---- the last stage but one and the last map, however many there are


def native_swin(depths, **kwargs):
    heads = [1, 1, 2, 2, 4][: len(depths)]
    config = {"image_size": 64, "patch_size": 2, "embed_dim": 8, "window_size": 2} | kwargs
    return SwinForImageClassification(SwinConfig(depths=depths, num_heads=heads, **config))


def timm_swin(depths, **kwargs):
    heads = (1, 1, 2, 2, 4)[: len(depths)]
    config = {"img_size": 64, "patch_size": 2, "embed_dim": 8, "window_size": 2} | kwargs
    return timm.create_model("swin_tiny_patch4_window7_224", depths=depths, num_heads=heads, **config)


def native_cnn(model_class, config_class, num_stages):
    sizes = [8, 16, 24, 32, 40][:num_stages]
    return model_class(
        config_class(embedding_size=8, hidden_sizes=sizes, depths=[1] * num_stages, layer_type="y", groups_width=8)
        if config_class is RegNetConfig
        else config_class(embedding_size=8, hidden_sizes=sizes, depths=[1] * num_stages)
    )


STAGES = {
    **{
        f"{config.__name__}, {count}": (
            lambda model=model, config=config, count=count: native_cnn(model, config, count)
        )
        for model, config in (
            (ResNetForImageClassification, ResNetConfig),
            (RegNetForImageClassification, RegNetConfig),
        )
        for count in (2, 3, 4, 5)
    },
    **{f"swin, {count}": (lambda count=count: native_swin([1] * (count - 1) + [2])) for count in (2, 3, 4, 5)},
    **{f"timm swin, {count}": (lambda count=count: timm_swin((1,) * (count - 1) + (2,))) for count in (2, 3, 4, 5)},
    "timm regnet, 4": lambda: timm.create_model("regnetx_002"),
    "timm mobilenet v1": lambda: timm.create_model("mobilenetv1_100"),
    "timm mobilenet v2": lambda: timm.create_model("mobilenetv2_110d"),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_counted_from_the_back(name):
    torch.manual_seed(0)
    model = STAGES[name]().eval()
    stages = [
        (module_name, module)
        for module_name, module in model.named_modules()
        if re.fullmatch(r"(\w+\.encoder\.)?(stages|layers)\.\d+|s\d+|blocks\.\d+", module_name)
    ]
    assert name.startswith("timm mobilenet") or len(stages) == int(name[-1])
    tap, feature_map = FeatureTap(model), FeatureTap(model, kind="map")
    kept = outputs_of(model, tap.layer)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    # Of MobileNetV2 the last bottleneck, before the convolution to 1280 channels.
    back = -1 if name == "timm mobilenet v2" else -2
    assert tap.layer.startswith(stages[back][0])
    expected = kept[tap.layer][0] if isinstance(kept[tap.layer], tuple) else kept[tap.layer]
    mid = tap.take()
    assert mid.shape[-1] < feature_map.take().shape[1]
    if "swin" in name:
        assert torch.equal(mid, expected.flatten(1, -2))
    else:
        torch.testing.assert_close(mid, expected.mean((2, 3)))
    # The last map is that which the classifier averages.
    check_pooled_head(model, (64, 64))


def test_a_network_of_one_stage_has_no_mid_layer():
    with pytest.raises(ValueError, match="no mid layer is known for ResNetForImageClassification"):
        FeatureTap(native_cnn(ResNetForImageClassification, ResNetConfig, 1))


# ---- SRRL's teacher


class Sharpened(ResNetForImageClassification):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.runs
def test_srrl_needs_a_classifier_of_the_averaged_map(tmp_path):
    recipe = RecipeArguments(student="resnet18", teacher="resnet34", distillation_loss="srrl")
    small = {"channels": [8, 16, 32, 64]}
    wrong = r"got TimmW.* \(resnet18\): its classifier does not read the average .* differ by \d+"
    for pool in ("max", "avgmax"):
        teacher = create_student("resnet18", num_labels=10, image_size=64, model_args=small | {"global_pool": pool})
        with pytest.raises(ValueError, match=wrong):
            loss_shapes(recipe.losses.values(), timm_cnn(), (64, 64), teacher)
        with pytest.raises(ValueError, match=wrong):
            make_trainer(tmp_path, timm_cnn(), teacher=teacher, distillation_loss=SRRLLoss(64, 64))
    regnet = timm.create_model("regnetx_002", num_classes=10, global_pool="max")
    with pytest.raises(ValueError, match=r"got RegNet \(regnetx_002\): its classifier does not read the average"):
        make_trainer(tmp_path, timm_cnn(), teacher=regnet, distillation_loss=SRRLLoss(64, 368))
    with pytest.raises(
        ValueError, match=r"got Sharpened: its logits differ from its classifier's output \(they differ by"
    ):
        make_trainer(
            tmp_path, timm_cnn(), teacher=Sharpened(native_resnet().config), distillation_loss=SRRLLoss(64, 64)
        )
    # Nothing of the teacher is changed by the check, and half precision is no difference.
    teacher = create_student("resnet18", num_labels=10, image_size=64, model_args=small | {"drop_rate": 0.5})
    teacher.train()
    teacher.timm_model.layer1.eval()
    state, modes = {k: v.clone() for k, v in teacher.state_dict().items()}, [m.training for m in teacher.modules()]
    random_state = torch.get_rng_state()
    check_pooled_head(teacher)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in teacher.modules()] == modes
    assert not any(m._forward_hooks for m in teacher.modules())
    torch.testing.assert_close(dict(teacher.state_dict()), state, rtol=0, atol=0)
    for precision in ({"teacher_dtype": "bf16"}, {"teacher_compile": True}):
        make_trainer(tmp_path, timm_cnn(), teacher=teacher, distillation_loss=SRRLLoss(64, 64), **precision)


# ---- a layer that the user names


class Tokens(nn.Module):
    """Features as [B, D, N], as a pair, by name, of one image alone, as a number, and unused."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, stride=8)
        self.flat, self.pair, self.named, self.table, self.number = (nn.Module() for _ in range(5))
        self.flat.forward = lambda x: x.flatten(2)
        self.pair.forward = lambda x: (x, None)
        self.named.forward = lambda x: {"x": x}
        self.table.forward = lambda x: x[:1]
        self.number.forward = lambda x: (len(x),)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = self.conv(x)
        for module in (self.table, self.pair, self.named, self.number):
            module(x)
        return self.head(self.flat(x).mean(2))


@pytest.mark.parametrize(
    ("build", "layer", "size", "pool"),
    [
        # Channels last, channels first, and models that take one size of images alone.
        ("mambaout_femto", "stages.2", 64, lambda x: x.flatten(1, 2)),
        ("mambaout_femto", "stages.1.blocks.0.conv", 64, lambda x: x.mean((2, 3))),
        ("convnext_atto", "stages.2", 64, lambda x: x.mean((2, 3))),
        ("swin_tiny", "layers.1", 64, lambda x: x.flatten(1, 2)),
        ("swin_tiny", "patch_embed", 64, lambda x: x.flatten(1, 2)),
        ("resnet18", "layer2", 64, lambda x: x.mean((2, 3))),
        ("resnet18", "global_pool", 64, lambda x: x),
        ("resnet18", "fc", 64, lambda x: x),
        ("mixer_s32_224", "blocks.3", 224, lambda x: x),
        ("mixer_s32_224", "blocks.0.mlp_tokens", 224, lambda x: x.mean(2)),
        ("deit_tiny", "blocks.2", 32, lambda x: x[:, 0]),
        ("deit_tiny", "blocks.2.mlp.fc1", 32, lambda x: x[:, 0]),
        ("deit_tiny", "patch_embed", 32, lambda x: x.mean(1)),
        ("deit_tiny", "patch_embed.proj", 32, lambda x: x.mean((2, 3))),
        ("deit_tiny", "head", 32, lambda x: x),
        ("vit_base_patch16_siglip_224", "blocks.1", 32, lambda x: x.mean(1)),
        ("vit_base_patch16_siglip_224", "attn_pool", 32, lambda x: x),
        ("tokens", "flat", 32, lambda x: x.mean(2)),
        ("tokens", "pair", 32, lambda x: x[0].mean((2, 3))),
        ("tokens", "named", 32, lambda x: x["x"].mean((2, 3))),
    ],
)
def test_layout_of_any_layer(build, layer, size, pool):
    torch.manual_seed(0)
    if build == "tokens":
        model = Tokens()
    elif build == "swin_tiny":
        model = timm_swin((1, 1, 2, 1), embed_dim=12)
    elif build == "deit_tiny":
        model = timm_deit().timm_model
    elif "siglip" in build:
        model = build_vit(build)
    else:
        small = {"mambaout_femto": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}}
        model = timm.create_model(build, num_classes=10, **small.get(build, {}))
    model.pretrained_cfg = {
        "input_size": (3, size, size),
        "architecture": getattr(model, "default_cfg", {}).get("architecture"),
    }
    model.train()
    tap, outputs = FeatureTap(model, layer), outputs_of(model, layer)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        model.eval()(torch.randn(3, 3, size, size))
    feature = tap.take()
    torch.testing.assert_close(feature, pool(outputs[layer]))
    assert feature.shape[-1] == feature_shape(model, torch.zeros(1, 3, size, size), layer)[-1]


@pytest.mark.parametrize(
    ("build", "layer", "message"),
    [
        # Windows stand on the first axis; one row serves all images; places and channels are as many.
        (lambda: timm_swin((1, 1, 2, 1)), "layers.0.blocks.0.attn", r"got \[\d+, 4, 8\] for 2 images from 'layers.0"),
        (Tokens, "table", r"a map of the batch, got \[1, 6, 28, 28\] for 2 images from 'table'. Choose another"),
        (Tokens, "number", r"a map of the batch, got int for 2 images from 'number'. Choose another"),
        (Tokens, "unused", "'unused' takes no part in the forward pass of Tokens"),
        (
            lambda: timm_swin((1, 1, 2, 1)),
            "layers.1",
            r"which axis has the channels, got \[2, 16, 16, 16\] for images of 64x64 from 'layers.1' of SwinTransformer",
        ),
    ],
)
def test_outputs_that_are_no_feature(build, layer, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        FeatureTap(model, layer)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_is_tried_without_a_trace():
    student = create_student(
        "mambaout_femto", num_labels=10, image_size=64, model_args={"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    )
    student.train()
    student.timm_model.stages[0].eval()
    modes, random_state = [m.training for m in student.modules()], torch.get_rng_state()
    assert feature_shape(student, torch.zeros(1, 3, 64, 64), "timm_model.stages.2") == (1, 16, 24)
    assert [m.training for m in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks for m in student.modules())
    with torch.device("meta"):
        assert feature_shape(timm.create_model("mambaout_femto"), torch.zeros(1, 3, 224, 224), "stages.2") == (
            1,
            196,
            192,
        )


# ---- images that are not square

WIDE = (32, 128)  # in patches of 8: 4 x 16, as many as 8 x 8


def wide_vit():
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": 10,
    }
    return ViTForImageClassification(ViTConfig(image_size=WIDE, patch_size=8, **config))


def wide_deit(width=32, **kwargs):
    return timm.create_model("deit_tiny_patch16_224", img_size=WIDE, patch_size=8, embed_dim=width, depth=4, num_heads=2,
                             num_classes=10, **kwargs)  # fmt: skip


@pytest.mark.parametrize("build", [wide_vit, wide_deit])
def test_map_has_the_grid_of_the_image(build):
    torch.manual_seed(0)
    model = build().eval()
    high, feature_map = FeatureTap(model, kind="high"), FeatureTap(model, kind="map")
    pixels = torch.randn(2, 3, *WIDE)
    with torch.no_grad():
        model(pixels)
    tokens, got = high.take(), feature_map.take()
    assert got.shape == (2, 32, 4, 16)
    assert high.grid == (4, 16)
    # Row by row, as patches are cut from left to right.
    for row, column in ((0, 5), (1, 0), (3, 15)):
        assert torch.equal(got[:, :, row, column], tokens[:, 16 * row + column])
    assert token_shape(model) == (64, 32)


@pytest.mark.parametrize(
    ("build", "size", "grid"),
    [
        (lambda: native_swin([1, 1, 1], image_size=[32, 128], patch_size=4), WIDE, (2, 8)),
        (lambda: native_swin([1, 1, 1]), (72, 40), (9, 5)),
        (lambda: timm_swin((1, 1, 1), img_size=WIDE), WIDE, (4, 16)),
        (lambda: wide_deit(dynamic_img_size=True), (64, 64), (8, 8)),
        (
            lambda: timm.create_model("deit_tiny_patch16_224", depth=2, dynamic_img_size=True, dynamic_img_pad=True),
            (40, 160),
            (3, 10),
        ),
        (lambda: timm.create_model("deit_tiny_patch16_224", depth=2, dynamic_img_size=True), WIDE, (2, 8)),
    ],
)
def test_map_follows_the_images(build, size, grid):
    model = build().eval()
    tap = FeatureTap(model, kind="map")
    with torch.no_grad():
        model(torch.randn(2, 3, *size))
    assert tap.take().shape[2:] == grid


def test_position_codes_that_are_interpolated():
    model = native_vit().eval()
    tap = FeatureTap(model, kind="map")
    with torch.no_grad():
        model(torch.randn(2, 3, *WIDE), interpolate_pos_encoding=True)
    assert tap.take().shape == (2, 32, 4, 16)


def test_grids_of_student_and_teacher_are_compared(tmp_path):
    square = timm.create_model(
        "deit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )
    check_token_grids(wide_vit(), wide_deit())
    check_token_grids(wide_deit(dynamic_img_size=True), square, (64, 64), (64, 64))
    with pytest.raises(ValueError, match=r"a grid like the student's 4x16, got 8x8 from VisionTransformer"):
        check_token_grids(wide_vit(), square)
    with pytest.raises(ValueError, match=r"a grid like the student's 4x16, got 8x8 from VisionTransformer"):
        make_trainer(tmp_path, wide_vit(), teacher=square, distillation_loss=ViTKDLoss(32, 32))
    for name, message in (
        ("vitkd", "like the student's 4x16, got 8x8"),
        ("mgd", "student map is 4x16, the teacher's 8x8"),
    ):
        recipe = RecipeArguments(student="a", teacher="b", distillation_loss=name)
        with pytest.raises(ValueError, match=message):
            loss_shapes(recipe.losses.values(), wide_vit(), WIDE, square, teacher_image_size=(64, 64))
        assert loss_shapes(recipe.losses.values(), wide_vit(), WIDE, wide_deit())


def test_vitkd_generates_in_the_grid_of_the_image():
    student, teacher = wide_vit(), wide_deit(48)
    loss = ViTKDLoss(32, 48)
    model = DistillationModel(student, {"vitkd": loss}).eval()
    pixels, labels = torch.randn(2, 3, *WIDE), torch.tensor([1, 2])
    frozen = load_teacher(teacher).tap(model.teacher_inputs)
    frozen(pixels)
    features = frozen.take_features()
    grids = []
    loss.generator.register_forward_pre_hook(lambda _, inputs: grids.append(tuple(inputs[0].shape)))
    assert model(pixels, labels, features)["losses"]["vitkd_generation"] > 0
    assert grids == [(2, 48, 4, 16)]
    tokens = torch.randn(2, 2, 64, 32), torch.randn(2, 64, 32), torch.randn(2, 2, 64, 48), torch.randn(2, 64, 48)
    with pytest.raises(ValueError, match=r"the 4x8 patch tokens of token_grid, got 64: omit class tokens"):
        loss(*tokens, token_grid=(4, 8))


def test_vitkd_in_a_grid_equals_a_literal_convolution(monkeypatch):
    torch.manual_seed(0)
    loss = ViTKDLoss(6, 6, alpha=0.0, beta=1.0).double()
    low, high, teacher_high = (
        torch.randn(shape, dtype=torch.float64) for shape in ((1, 2, 8, 6), (1, 8, 6), (1, 8, 6))
    )
    noise = torch.arange(8.0).flip(0)[None]  # the first four tokens of the grid 2 x 4, its first row, are masked
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: noise)
    got = loss(low, high, low, teacher_high, token_grid=(2, 4))["vitkd_generation"]
    image = high[0].T.reshape(6, 2, 4).clone()
    image[:, 0] = loss.mask_token.detach()[:, None]
    first, _, second = loss.generator
    hidden = F.conv2d(image[None], first.weight, first.bias, padding=1).relu()
    made = F.conv2d(hidden, second.weight, second.bias, padding=1)[0, :, 0]
    expected = (made - teacher_high[0].T.reshape(6, 2, 4)[:, 0]).square().sum() / 0.5
    torch.testing.assert_close(got, expected)
