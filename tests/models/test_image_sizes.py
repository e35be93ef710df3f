"""Every family of timm is built at a size that it takes, or refused with the sizes that it takes."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import native_resnet, native_vit
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, ViTImageProcessor, set_seed

from nkd_hf import create_student
from nkd_hf.models.image_sizes import is_of_the_meta_device, own_image_size, run_fault
from nkd_hf.models.meta_device import OnlyShapes
from nkd_hf.models.saving import save_student

# The smallest model of each module of timm 1.0.31.
FAMILIES = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m_enc ghostnet_050 hardcorenas_b hgnetv2_b0
hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224
lcnet_035 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny
nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050
repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s
shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224
ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905
# Of 64 pixels: each with a size that its message names.
NOT_AT_64 = {
    "crossvit_tiny_240": 240,
    "deepseek_vit_412m": 56,
    "efficientformer_l1": 224,
    "halonet_h1": 256,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}
# An encoder that gives tokens, and has no logits at any size.
NO_CLASSIFIER = "gemma4_vit_167m_enc"
# More than a few seconds to build even without weights.
LARGE = {"nasnetalarge", "pnasnet5large", "mobilenetv5_base", "deepseek_vit_412m", "sequencer2d_s", NO_CLASSIFIER}
LARGE |= {"inception_resnet_v2", "inception_v4"}


def test_every_module_of_timm_has_a_row():
    for module in timm.list_modules():
        assert not set(timm.list_models(module=module)).isdisjoint(FAMILIES), module


def _slow_unless_fixed(name: str):
    """CNNs of a free size take 64 pixels but for those in the table, which make the difference here."""
    fast = name in NOT_AT_64 or timm.get_pretrained_cfg(name).fixed_input_size
    return name if fast and name not in LARGE else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.runs
@pytest.mark.parametrize("name", [*map(_slow_unless_fixed, FAMILIES)])
def test_64_pixels_or_an_error_that_names_other_sizes(name):
    with torch.device("meta"):
        if name in NOT_AT_64 or name == NO_CLASSIFIER:
            with pytest.raises(ValueError, match=r"image_size must be a size that|can't be trained here") as refused:
                create_student(name, num_labels=10, image_size=64)
            if name in NOT_AT_64:
                assert str(NOT_AT_64[name]) in str(refused.value).partition("Set image_size to ")[2].split(" or ")
            return
        student = create_student(name, num_labels=10, image_size=64)
        # What create_student tried on a model of its own holds for the one that it returns, in training, too.
        logits = student.train()(torch.zeros(2, 3, 64, 64)).logits
    assert logits.shape == (2, 10)
    assert student.config.pretrained_cfg["input_size"] == [3, 64, 64]


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 64, 96])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LARGE])
def test_a_training_step_or_an_error(name, size):
    if size is None and own_image_size(name) > 256:
        pytest.skip("more memory than a test may take")
    try:
        student = create_student(name, num_labels=10, image_size=size)
    except ValueError as error:
        assert re.search(r"image_size must be a size that .*Set image_size to \d", str(error))  # noqa: PT017
        return
    side = student.config.pretrained_cfg["input_size"][-1]
    logits = student(torch.randn(2, 3, side, side)).logits
    F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("eva_large_patch14_336", 336),
        ("cait_xxs24_384", 384),
        ("swinv2_tiny_window16_256", 256),
        # The paper's.
        ("deit_tiny_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
        ("resnet18", 224),
        ("mobilenetv1_100", 224),
        ("regnetx_016", 224),
        ("shufflenet_v2_x1_0", 224),
        ("resnet18_cifar", 32),
        # Of a size that timm recommends, and doesn't fix.
        ("inception_v3", 224),
    ],
)
def test_none_is_the_architectures_own_size(name, size):
    with torch.device("meta"):
        student = create_student(name, num_labels=10)
    assert student.config.pretrained_cfg["input_size"] == [3, size, size]
    assert run_fault(student, size) is None


def test_cait_takes_64_pixels():
    student = create_student("cait_xxs24_224", num_labels=10, image_size=64)
    assert student(torch.randn(1, 3, 64, 64)).logits.shape == (1, 10)
    assert student.config.model_args == {"img_size": 64}


def test_img_size_among_the_models_arguments_is_the_image_size():
    for img_size in (96, [96, 96]):
        student = create_student("test_vit", num_labels=10, model_args={"img_size": img_size})
        assert student.config.pretrained_cfg["input_size"] == [3, 96, 96]
    with pytest.raises(ValueError, match=r"size that deit_tiny_patch16_224 takes, got 64.*Set image_size to 96"):
        create_student("deit_tiny_patch16_224", image_size=64, model_args={"img_size": 96, "depth": 1})


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "test_vit",
            40,
            "(Input height (40) should be divisible by patch size (16)). Set image_size to 32 or 48 or 160",
        ),
        ("efficientformer_l1", 96, "Set image_size to 224"),
        ("test_vit", 15, "Set image_size to 32 or 48 or 160"),
    ],
)
def test_sizes_that_an_architecture_does_not_take(name, size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_student(name, num_labels=10, image_size=size)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d(8), torch.nn.LayerNorm([8, 4, 4]), torch.nn.LayerNorm(4)])
def test_a_norm_that_does_not_fit_its_input_fails_on_the_meta_device_too(norm):
    norm = norm.to("meta").eval()
    with torch.device("meta"), OnlyShapes():
        assert F.gelu(norm(torch.zeros(2, 8, 4, 4))).shape == (2, 8, 4, 4)
        with pytest.raises(RuntimeError):
            norm(torch.zeros(2, 6, 4, 5))


def test_only_the_meta_device_has_no_values():
    with OnlyShapes():
        assert F.silu(torch.nn.BatchNorm1d(1).eval()(torch.ones(1, 1).clamp_(2))).item() > 1


def test_the_check_draws_nothing():
    for name in ("test_resnet", "test_vit"):
        args = {"img_size": 64} if name == "test_vit" else None
        set_seed(0)
        config = TimmWrapperConfig(architecture=name, model_args=args, num_labels=10)
        expected, after = TimmWrapperForImageClassification(config).state_dict(), torch.rand(1)
        set_seed(0)
        student = create_student(name, num_labels=10, image_size=64)
        assert torch.equal(torch.rand(1), after)
        torch.testing.assert_close(student.state_dict(), expected, rtol=0, atol=0)
        assert all(module.training for module in student.modules())


def test_a_model_that_the_meta_device_cannot_run_is_run_itself(monkeypatch):
    forward = TimmWrapperForImageClassification.forward

    def reads_a_value(model, pixel_values, **kwargs):
        assert pixel_values.sum().item() == 0
        return forward(model, pixel_values, **kwargs)

    monkeypatch.setattr(TimmWrapperForImageClassification, "forward", reads_a_value)
    with torch.device("meta"):
        fault = run_fault(TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet")), 32)
    assert is_of_the_meta_device(fault)
    assert create_student("test_resnet", num_labels=10, image_size=32).config.num_labels == 10
    monkeypatch.undo()
    with pytest.raises(ValueError, match="image_size must be a size that test_vit takes, got 40"):
        create_student("test_vit", num_labels=10, image_size=40)


def test_an_opened_model_whose_processor_makes_another_size(tmp_path):
    native_vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"ViTForImageClassification takes, got 224 .*Set image_size to 32"):
        create_student(str(tmp_path / "vit"))
    native_resnet().save_pretrained(tmp_path / "resnet")
    ViTImageProcessor().save_pretrained(tmp_path / "resnet")
    assert create_student(str(tmp_path / "resnet")).config.num_labels == 10


@pytest.mark.parametrize(
    ("name", "size"), [("deit_tiny_patch16_224", 50), ("vit_tiny_patch16_224", 31), ("convnext_atto", 66)]
)
def test_a_size_whose_last_pixels_no_patch_sees_is_refused(name, size):
    with pytest.raises(
        ValueError, match=rf"got {size} \(its patches leave \d+ of {size} pixels unseen\)\. Set image_size to"
    ):
        create_student(name, num_labels=3, image_size=size)


def test_a_size_that_an_architecture_was_designed_for_is_its_own_business():
    """SigLIP's 27 patches of 14 pixels see 378 of 384, in timm as in the paper."""
    with torch.device("meta"):
        student = create_student("vit_so400m_patch14_siglip_384", num_labels=3, model_args={"depth": 1})
    assert student.config.pretrained_cfg["input_size"] == [3, 384, 384]


def test_a_student_of_a_folder_takes_no_size_with_pixels_that_no_patch_sees(tmp_path):
    model_args = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    save_student(
        create_student("deit_tiny_patch16_224", num_labels=3, image_size=32, model_args=model_args), str(tmp_path)
    )
    with pytest.raises(ValueError, match="its patches leave 8 of 40 pixels unseen"):
        create_student(str(tmp_path), image_size=40)
    assert create_student(str(tmp_path), image_size=48).config.pretrained_cfg["input_size"] == [3, 48, 48]
