"""The comparators: golden vectors of the official code, literal references, what is read of the models, and training.

Unless a test says otherwise, "close" is relative: at most 1e-10 in float64 and 1e-5 in float32.
"""

import functools
import math

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from loss_checks import (
    FIXTURES,
    GOLDEN,
    HARD,
    MIXUP,
    TOLERANCE,
    assert_close,
    assert_same_with_gradients,
    make_batch,
)
from losses_reference import (
    dist_reference,
    dkd_reference,
    kd_reference,
    mgd_reference,
    rld_reference,
    srrl_reference,
    wsld_reference,
    wttm_reference,
)
from safetensors.torch import load_file
from tiny import DIGITS, digits, make_trainer, native_resnet, native_vit, timm_cnn, timm_deit
from torch import nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from nkd_hf import DKDLoss, KDLoss, MGDLoss, NKDLoss, RecipeArguments, SRRLLoss, create_student, load_teacher, losses
from nkd_hf.losses.registry import LOSSES
from nkd_hf.models.features import FeatureTap, classifier_head, feature_shape
from nkd_hf.recipe.loss_shapes import loss_shapes
from nkd_hf.trainer.distillation_model import DistillationModel

# Name -> module, function, reference, whether it takes labels, components.
OF_LOGITS = {
    "kd": (losses.KDLoss, losses.kd_loss, kd_reference, False, ["kd"]),
    "dkd": (losses.DKDLoss, losses.dkd_loss, dkd_reference, True, ["dkd_target", "dkd_non_target"]),
    "wsld": (losses.WSLDLoss, losses.wsld_loss, wsld_reference, True, ["wsld"]),
    "dist": (losses.DISTLoss, losses.dist_loss, dist_reference, False, ["dist_inter_class", "dist_intra_class"]),
    "wttm": (losses.WTTMLoss, losses.wttm_loss, wttm_reference, False, ["wttm"]),
    "rld": (losses.RLDLoss, losses.rld_loss, rld_reference, True, ["rld_confidence", "rld_correlation"]),
}
OF_MAPS = {"mgd": ["mgd"], "srrl": ["srrl_feature", "srrl_regression"]}
COMPONENTS = {name: entry[4] for name, entry in OF_LOGITS.items()} | OF_MAPS
# The official names of hyper-parameters and of what a loss trains -> ours.
ARGUMENTS = {"temp": "temperature", "alpha_temperature": "target_temperature"}
TRAINED = {"generation.": "generator.", "Connectors.": "connector."}


def golden_of(name, dtype):
    """Hyper-parameters, tensors as they are, and the inputs in the dtype."""
    params = {ARGUMENTS.get(key, key): value for key, value in GOLDEN[name]["params"].items() if key != "num_classes"}
    golden = load_file(FIXTURES / "golden" / f"{name}.safetensors")
    return params, golden, {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden.items()}


def call_of(name, student_logits, teacher_logits, labels):
    """The tensors that a loss of logits takes."""
    return (student_logits, teacher_logits, labels) if OF_LOGITS[name][3] else (student_logits, teacher_logits)


# ---- the official implementations


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.split("_")[0] in [*OF_LOGITS, "rldls"]])
def test_golden_of_logits(name, dtype):
    loss_name = name.split("_")[0].replace("rldls", "rld")  # on standardised logits
    make_module, function, *_ = OF_LOGITS[loss_name]
    params, golden, inputs = golden_of(name, dtype)
    student_logits = inputs["student_logits"].requires_grad_()
    arguments = call_of(loss_name, student_logits, inputs["teacher_logits"], inputs.get("labels"))

    loss = function(*arguments, **params)
    loss.backward()

    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(student_logits.grad, golden["grad_student_logits"], TOLERANCE[dtype])
    module = make_module(**params)
    assert_close(sum(module(*arguments).values()), golden["loss"], TOLERANCE[dtype])
    if loss_name == "kd":
        assert module.task_weight == golden["ce_weight"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OF_MAPS)
def test_golden_of_maps(name, dtype, monkeypatch):
    params, golden, inputs = golden_of(name, dtype)
    student_map = inputs["student_feature"].requires_grad_()
    teacher_map = inputs["teacher_feature"]
    module = {"mgd": MGDLoss, "srrl": SRRLLoss}[name](student_map.shape[1], teacher_map.shape[1], **params).to(dtype)
    state = {key.removeprefix("module."): value for key, value in golden.items() if key.startswith("module.")}
    for official, ours in TRAINED.items():
        state = {key.replace(official, ours): value for key, value in state.items()}
    module.load_state_dict(state)
    if name == "mgd":
        monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: golden["noise"])
        components = module(student_map, teacher_map)
    else:
        teacher = [inputs[key] for key in ("teacher_logits", "teacher_fc_weight", "teacher_fc_bias")]
        components = module(student_map, teacher_map, *teacher)

    loss = sum(components.values())
    loss.backward()

    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(student_map.grad, golden["grad_student_feature"], TOLERANCE[dtype])


# ---- the literal references


@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize(("batch_size", "num_classes"), [(1, 2), (1, 7), (5, 2), (6, 13)])
@pytest.mark.parametrize("name", OF_LOGITS)
def test_equals_reference(name, batch_size, num_classes, labels):
    make_module, function, reference, takes_labels, components = OF_LOGITS[name]
    if labels == MIXUP and not takes_labels:
        return
    settings = {
        "kd": {"alpha": 0.3, "temperature": 2.0},
        "dkd": {"alpha": 0.7, "beta": 2.0, "temperature": 3.0},
        "wsld": {"alpha": 1.5, "temperature": 2.0},
        "dist": {"beta": 0.6, "gamma": 1.7},
        "wttm": {"exponent": 0.35, "beta": 1.4},
        "rld": {"alpha": 0.7, "beta": 2.0, "temperature": 3.0, "target_temperature": 2.0, "standardize": True},
    }[name]
    batch = make_batch(batch_size, num_classes, labels=labels)
    arguments = call_of(name, *batch)
    for kwargs in ({}, settings):
        outputs, expected = make_module(**kwargs)(*arguments), reference(*arguments, **kwargs)
        assert list(outputs) == components
        # One image has no intra-class relation, and two classes no non-target one: their gradients are zero.
        assert_same_with_gradients(outputs.values(), expected, [batch[0]])
        assert function(*arguments, **kwargs).item() == pytest.approx(sum(expected).item(), rel=1e-10)


@pytest.mark.parametrize(("student_channels", "size", "mask_ratio"), [(6, 5, 0.15), (10, 1, 0.6), (6, 3, 0.0)])
def test_mgd_equals_reference(student_channels, size, mask_ratio, monkeypatch):
    torch.manual_seed(0)
    student_map = torch.randn(3, student_channels, size, size + 1, dtype=torch.float64, requires_grad=True)
    teacher_map = torch.randn(3, 10, size, size + 1, dtype=torch.float64)
    module = MGDLoss(student_channels, 10, alpha=0.3, mask_ratio=mask_ratio).double()
    assert isinstance(module.align, nn.Identity) == (student_channels == 10)  # as in the official code
    noise = torch.rand(3, 10, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: noise)
    expected = mgd_reference(module, student_map, teacher_map, noise.flatten(1))
    outputs = module(student_map, teacher_map).values()
    assert_same_with_gradients(outputs, expected, [student_map, *module.parameters()])


@pytest.mark.parametrize(("batch_size", "size"), [(3, 4), (1, 2), (2, 1)])
def test_srrl_equals_reference(batch_size, size):
    torch.manual_seed(0)
    student_map = torch.randn(batch_size, 6, size, size, dtype=torch.float64, requires_grad=True)
    teacher = [
        torch.randn(shape, dtype=torch.float64) for shape in ((batch_size, 8, 3, 2), (batch_size, 5), (5, 8), 5)
    ]
    module = SRRLLoss(6, 8, alpha=0.4, beta=1.2).double()
    nn.init.normal_(module.connector[1].weight)
    nn.init.normal_(module.connector[1].bias)
    expected = srrl_reference(module, student_map, *teacher)
    outputs = module(student_map, *teacher).values()
    assert_same_with_gradients(outputs, expected, [student_map, *module.parameters()])


# ---- dtypes and edges


def call_all(dtype=torch.float32, seed=0):
    """Each comparator's components for one batch of tensors in the dtype, and the tensors that take a gradient."""
    student_logits, teacher_logits, labels = make_batch(4, 9, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    student_map, teacher_map, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 6, 3, 3), (4, 8, 3, 3), (9, 8), (9,))
    )
    student_map.requires_grad_()
    torch.manual_seed(seed)
    modules = {"mgd": MGDLoss(6, 8), "srrl": SRRLLoss(6, 8)}
    if dtype == torch.float64:
        modules = {name: module.double() for name, module in modules.items()}
    calls = {
        name: functools.partial(OF_LOGITS[name][0](), *call_of(name, student_logits, teacher_logits, labels))
        for name in OF_LOGITS
    }
    calls["mgd"] = functools.partial(modules["mgd"], student_map, teacher_map)
    calls["srrl"] = functools.partial(modules["srrl"], student_map, teacher_map, teacher_logits, weight, bias)
    return calls, (student_logits, student_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    # The inputs are rounded to 8 or 11 bits, the arithmetic is not: against the same numbers in float32, 1e-6.
    calls, inputs = call_all(dtype)
    widened, _ = call_all(dtype)
    for name, call in calls.items():
        torch.manual_seed(1)
        expected = widened[name].func(*(t.float() if t.is_floating_point() else t for t in widened[name].args))
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = call()
        for component, value in actual.items():
            assert value.dtype == torch.float32, name
            assert_close(value, expected[component], 1e-6)
        sum(actual.values()).backward()
    for tensor in inputs:
        assert tensor.grad.dtype == dtype
        assert tensor.grad.isfinite().all()


def test_bfloat16_logits_stay_near_those_of_float64():
    # 8 bits of mantissa in logits of scale 3: 2 % of the value.
    rough, exact = call_all(torch.bfloat16)[0], call_all(torch.float64)[0]
    for name in OF_LOGITS:
        assert sum(rough[name]().values()).item() == pytest.approx(sum(exact[name]().values()).item(), rel=2e-2)


def test_teacher_gets_no_gradient():
    for name, call in call_all()[0].items():
        arguments = [t.detach().requires_grad_() if t.is_floating_point() else t for t in call.args]
        sum(call.func(*arguments).values()).backward()
        assert arguments[0].grad.abs().sum() > 0, name
        assert all(tensor.grad is None for tensor in arguments[1:]), name


def test_perfect_student_has_no_gradient():
    teacher_logits = make_batch(5, 7)[1]
    student_logits = teacher_logits.clone().requires_grad_()
    for name, (make_module, *_) in OF_LOGITS.items():
        module = make_module(exponent=1.0) if name == "wttm" else make_module()
        # RLD's student is not perfect where the teacher is wrong.
        labels = teacher_logits.argmax(1) if name == "rld" else torch.arange(5)
        loss = sum(module(*call_of(name, student_logits, teacher_logits, labels)).values())
        [gradient] = torch.autograd.grad(loss, student_logits)
        # DIST's floor of 1e-8 keeps its correlation below 1.
        assert gradient.norm() < (1e-4 if name == "dist" else 1e-12), name
        if name in ("dkd", "wttm", "rld"):
            assert abs(loss.item()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_logits_and_classes_that_the_teacher_masks(dtype):
    student_logits, teacher_logits, labels = make_batch(4, 6, scale=60.0, dtype=dtype)
    teacher_logits[:, 5] = -math.inf
    labels = labels.clamp(max=4)
    for name, (make_module, *_) in OF_LOGITS.items():
        loss = sum(make_module()(*call_of(name, student_logits, teacher_logits, labels)).values())
        [gradient] = torch.autograd.grad(loss, student_logits)
        assert loss.isfinite(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("place", [0, 1], ids=["target", "other"])
def test_a_logit_that_overflowed_is_no_finite_loss(value, side, place):
    """Else a teacher in float16 whose logit is infinite would count as one that is certain."""
    for name, (make_module, *_) in OF_LOGITS.items():
        *logits, labels = make_batch(4, 6)
        logits = [each.detach().clone() for each in logits]
        logits[side][2, (labels[2] + place) % 6] = value
        assert not sum(make_module()(*call_of(name, *logits, labels)).values()).isfinite(), name


def test_dist_of_one_image_and_of_equal_probabilities_is_finite():
    for student_logits in (torch.randn(1, 5), torch.zeros(3, 5)):
        student_logits.requires_grad_()
        components = losses.DISTLoss(gamma=2.0)(student_logits, torch.randn(student_logits.shape))
        sum(components.values()).backward()
        assert components["dist_intra_class"].item() == 2
        assert student_logits.grad.isfinite().all()


def test_wttm_weighs_smooth_teachers_more_and_is_kl_at_exponent_1():
    student_logits, teacher_logits, _ = make_batch(4, 6)
    expected = F.kl_div(student_logits.log_softmax(1), teacher_logits.softmax(1), reduction="batchmean")
    assert losses.wttm_loss(student_logits, teacher_logits, exponent=1.0).item() == pytest.approx(expected.item())
    weights = []
    for scale in (0.0, 1.0, 50.0):
        teacher_logits = scale * torch.arange(6.0, dtype=torch.float64)[None]
        divergence = F.kl_div(
            torch.zeros(1, 6, dtype=torch.float64).log_softmax(1).add(torch.arange(6.0)[None]).log_softmax(1),
            (0.2 * teacher_logits).softmax(1), reduction="batchmean",
        )  # fmt: skip
        weights.append(losses.wttm_loss(torch.arange(6.0, dtype=torch.float64)[None], teacher_logits) / divergence)
    assert weights[0].item() == pytest.approx(6**0.8)
    assert weights[0] > weights[1] > weights[2]
    assert weights[2].item() == pytest.approx(1, abs=1e-3)


def test_rld_of_a_wrong_teacher():
    """The student learns the teacher's confidence for the right class, and nothing of the classes above that."""
    teacher = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 2.0, 5.0]], dtype=torch.float64)
    labels = torch.tensor([1, 0])  # two classes are below the first, none below the second
    student = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    confidence, correlation = losses.RLDLoss()(student, teacher, labels).values()
    [gradient] = torch.autograd.grad(correlation, student, retain_graph=True)
    assert not gradient[0, :2].any()
    assert not gradient[1].any()
    assert gradient[0, 2] < 0 < gradient[0, 3]
    # The answer's probability is what the target's is driven to, above the even share of 0.25.
    [gradient] = torch.autograd.grad(confidence, student)
    assert torch.equal(gradient.argmin(1), labels)
    largest = teacher.softmax(1).amax(1)
    torch.testing.assert_close(gradient[[0, 1], labels], (0.25 - largest) / 2)


def test_rld_of_equal_logits_is_finite():
    for teacher in (torch.zeros(3, 5), torch.randn(3, 5)):
        for standardize in (False, True):
            student = torch.zeros(3, 5, requires_grad=True)
            loss = losses.rld_loss(student, teacher, torch.tensor([0, 1, 2]), standardize=standardize)
            [gradient] = torch.autograd.grad(loss, student)
            assert loss.isfinite()
            assert gradient.isfinite().all()


def test_mgd_mask_is_drawn_anew_for_each_image_and_channel():
    module, maps = MGDLoss(6, 8, mask_ratio=0.5), (torch.randn(3, 6, 4, 4), torch.randn(3, 8, 4, 4))
    torch.manual_seed(0)
    first, second = (module(*maps)["mgd"].item() for _ in range(2))
    torch.manual_seed(0)
    assert module(*maps)["mgd"].item() == first != second
    # nothing hides what is not finite
    maps[0][0, 0, 0, 0] = math.inf
    assert not module(*maps)["mgd"].isfinite()


# ---- errors


def test_errors_of_settings():
    for make, message in (
        (lambda: losses.KDLoss(alpha=1.5), "alpha must be at most 1, got 1.5: 1 - alpha is the weight of the task"),
        (lambda: losses.KDLoss(temperature=0.0), "temperature must be a finite number > 0"),
        (lambda: losses.DKDLoss(beta=-1.0), "beta must be a finite number >= 0"),
        (lambda: losses.WSLDLoss(alpha=math.nan), "alpha must be a finite number"),
        (lambda: losses.DISTLoss(gamma=math.inf), "gamma must be a finite number"),
        (lambda: losses.WTTMLoss(exponent=0.0), "exponent must be a finite number > 0"),
        (lambda: losses.WTTMLoss(beta=-1.0), "beta must be a finite number >= 0"),
        (lambda: losses.RLDLoss(alpha=-1.0), "alpha must be a finite number >= 0"),
        (lambda: losses.RLDLoss(temperature=0.0), "temperature must be a finite number > 0"),
        (lambda: losses.RLDLoss(target_temperature=math.inf), "target_temperature must be a finite number > 0"),
        (lambda: losses.RLDLoss(standardize="no"), "standardize must be True or False, got 'no'"),
        (lambda: MGDLoss(0, 8), "student_channels must be at least 1, got 0"),
        (lambda: MGDLoss(6, 8, mask_ratio=1.0), "mask_ratio must be below 1, got 1.0"),
        (lambda: SRRLLoss(6, True), "teacher_channels must be at least 1, got True"),
        (lambda: SRRLLoss(6, 8, beta=-2), "beta must be a finite number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("name", OF_LOGITS)
def test_errors_of_logits(name):
    module, labels = OF_LOGITS[name][0](), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"teacher_logits must be \[2, 5\] like student_logits, got \[2, 7\]: load a 5"
    ):
        module(*call_of(name, torch.zeros(2, 5), torch.zeros(2, 7), labels))
    with pytest.raises(ValueError, match=r"student_logits must be \[B, C\] with at least two classes"):
        module(*call_of(name, torch.zeros(2, 1), torch.zeros(2, 1), labels))
    with pytest.raises(TypeError, match="teacher_logits must be a tensor"):
        module(*call_of(name, torch.zeros(2, 5), [1.0], labels))
    if OF_LOGITS[name][3]:
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.4, got 5"):
            module(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([0, 5]))


def test_errors_of_maps():
    student_map, teacher_map = torch.zeros(2, 6, 7, 7), torch.zeros(2, 8, 7, 7)
    for maps, message in (
        (
            (student_map, torch.zeros(2, 8, 14, 14)),
            r"MGD's student map is 7x7, the teacher's 14x14: it compares them place",
        ),
        ((torch.zeros(2, 6), teacher_map), r"student_map must be \[B, 6, H, W\], got \[2, 6\]: pass a feature map"),
        ((torch.zeros(2, 5, 7, 7), teacher_map), r"student_map must be .*: make MGDLoss with student_channels=5"),
        (
            (student_map, torch.zeros(2, 9, 7, 7)),
            r"teacher_map must be \[2, 8, H, W\].*: make MGDLoss with teacher_ch",
        ),
        (
            (student_map, torch.zeros(3, 8, 7, 7)),
            r"teacher_map must be .*got \[3, 8, 7, 7\]: pass the map of the same",
        ),
        ((student_map, teacher_map.long()), r"teacher_map must be of a float dtype, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            MGDLoss(6, 8)(*maps)
    module, rest = SRRLLoss(6, 8), (torch.zeros(2, 5), torch.zeros(5, 8), torch.zeros(5))
    module(student_map, torch.zeros(2, 8, 14, 14), *rest)
    for arguments, message in (
        ((student_map[:1, :, :1, :1], teacher_map[:1], *rest), "SRRL's BatchNorm needs two values of a channel"),
        ((student_map[:, :5], teacher_map, *rest), "make SRRLLoss with student_channels=5"),
        (
            (student_map, teacher_map, rest[0], torch.zeros(5, 9), rest[2]),
            r"weight must be \[C, 8\] to classify teacher_m",
        ),
        (
            (student_map, teacher_map, torch.zeros(2, 6), *rest[1:]),
            r"teacher_logits must be \[2, 5\] to fit teacher_head_w",
        ),
        ((student_map, teacher_map, *rest[:2], torch.zeros(4)), r"teacher_head_bias must be \[5\] to fit"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*arguments)


# ---- what is read of the models

SIZES = {"id2label": DIGITS, "image_size": 64}
POOLED = {
    "timm resnet": timm_cnn,
    "bare timm resnet": lambda: timm_cnn().timm_model,
    "timm mobilenet v1": lambda: create_student("mobilenetv1_100", **SIZES),
    "timm mobilenet v2": lambda: create_student("mobilenetv2_100", **SIZES),
    "timm regnet": lambda: create_student("regnetx_002", **SIZES),
    "timm swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
        num_classes=10,
    ),
    "resnet": native_resnet,
    "mobilenet v1": lambda: MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.25, min_depth=4)),
    "mobilenet v2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25)),
    "regnet": lambda: RegNetForImageClassification(
        RegNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], groups_width=8)
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2)
    ),
    "shufflenet": lambda: create_student("shufflenet_v2_x1_0", **SIZES),
    "resnet cifar": lambda: create_student("resnet18_cifar", num_labels=10),
}  # fmt: skip


@pytest.mark.parametrize("build", POOLED.values(), ids=POOLED)
def test_map_is_what_the_classifier_averages(build):
    torch.manual_seed(0)
    model = build().eval()
    tap, head = FeatureTap(model, kind="map"), classifier_head(model)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 64))
        feature_map = tap.take()
        expected = head(feature_map.mean((2, 3)))
    assert feature_map.ndim == 4
    torch.testing.assert_close(getattr(output, "logits", output), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [timm_deit, native_vit])
def test_map_of_a_vit_is_its_patch_tokens(build):
    model = build().eval()
    tokens, feature_map = FeatureTap(model, kind="high"), FeatureTap(model, kind="map")
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    tokens, feature_map = tokens.take(), feature_map.take()
    assert feature_map.shape == feature_shape(model, torch.zeros(2, 3, 32, 32), kind="map") == (2, 32, 4, 4)
    torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens, rtol=0, atol=0)


def test_errors_of_models():
    convnext = timm.create_model("convnext_atto", num_classes=10)
    with pytest.raises(ValueError, match=r"no last feature map is known for ConvNeXt \(convnext_atto\): MGD and SRRL"):
        FeatureTap(convnext, kind="map")
    for model in (timm_deit(), native_vit(), convnext):
        with pytest.raises(
            ValueError, match=r"no classifier of an averaged feature map is known for .*SRRL.* as teacher"
        ):
            classifier_head(model)
    dropping = create_student("deit_tiny_patch16_224", num_labels=10, image_size=32, model_args={
        "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_drop_rate": 0.25,
    })  # fmt: skip
    tap = FeatureTap(dropping, kind="map")
    dropping.train()(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"a token of each of its 4x4 patches, got 12: set its patch_drop_rate to 0"):
        tap.take()


def test_teacher_hands_out_its_classifier_in_the_students_order():
    model = timm_cnn()
    teacher = load_teacher(model).tap(["teacher_map", "teacher_head_weight", "teacher_head_bias"])
    teacher.align(None, {i: DIGITS[9 - i] for i in range(10)})
    logits = teacher(torch.randn(2, 3, 32, 32))
    features = teacher.take_features()
    assert not any(tensor.requires_grad for tensor in features.values())
    weight, bias = features["teacher_head_weight"], features["teacher_head_bias"]
    torch.testing.assert_close(F.linear(features["teacher_map"].mean((2, 3)), weight, bias), logits)
    assert torch.equal(weight, model.timm_model.fc.weight.flip(0))
    model.timm_model.fc.bias = None
    teacher(torch.randn(2, 3, 32, 32))
    assert torch.equal(teacher.take_features()["teacher_head_bias"], torch.zeros(10))
    assert "teacher_head_bias" not in teacher.tap(["teacher_map"])._taps
    teacher(torch.randn(2, 3, 32, 32))
    assert list(teacher.take_features()) == ["teacher_map"]


# ---- training


def wide_cnn(seed=1):
    torch.manual_seed(seed)
    return create_student("resnet18", id2label=DIGITS, image_size=32, model_args={"channels": [8, 16, 32, 96]})


def recipe_trainer(folder, names, student, teacher, loss_args=None, train=None, **kwargs):
    """A trainer with the losses that recipe arguments of these names build for the models."""
    recipe = RecipeArguments(student="resnet18", teacher="resnet34", distillation_loss=names, loss_args=loss_args)
    assert recipe.needs_teacher
    assert recipe.needs_teacher_layers == any(name in names for name in ("vitkd", "mgd", "srrl"))
    torch.manual_seed(3)
    shapes = loss_shapes(recipe.losses.values(), student, (32, 32), teacher if recipe.needs_teacher_layers else None)
    return make_trainer(folder, student, digits(0, 128) if train is None else train, digits(128, 160), teacher=teacher,
                        distillation_loss=recipe.build_loss(**shapes), **kwargs)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "student", "teacher"),
    [
        *[(name, timm_cnn, wide_cnn) for name in COMPONENTS],
        ("nkd+mgd", native_resnet, wide_cnn),
        ("kd+srrl+dist", timm_cnn, lambda: native_resnet(1)),
        ("vitkd+mgd", timm_deit, lambda: timm_deit(1, width=48)),
        ("mgd", timm_deit, lambda: native_vit(1)),
        ("srrl", native_vit, wide_cnn),
    ],
)
def test_trains_by_name_and_components_add_up(tmp_path, names, student, teacher):
    expected = ["task"]
    for name in names.split("+"):
        others = {"nkd": ["nkd_target", "nkd_non_target"], "vitkd": ["vitkd_mimicking", "vitkd_generation"]}
        expected += (COMPONENTS | others)[name]
    # The small weights are meant for large maps.
    louder = {"mgd": {"alpha": 1e-2}, "vitkd": {"alpha": 1e-2, "beta": 1e-2}}
    args = {name: louder[name] for name in names.split("+") if name in louder} or None
    trainer = recipe_trainer(
        tmp_path,
        names,
        student(),
        teacher(),
        args if args is None or "+" in names else args[names],
        learning_rate=3e-3,
        max_steps=2,
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert not [name for name, value in trainer.model.named_parameters() if torch.equal(before[name], value)]
    for entry in trainer.state.log_history[:2]:
        assert [name for name in entry if name in expected] == expected
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in expected), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] > 0


def test_one_step_is_the_loss_of_the_models_outputs(tmp_path):
    student, teacher = timm_cnn(), wide_cnn()
    trainer = recipe_trainer(tmp_path, "mgd+srrl", student, teacher)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    torch.manual_seed(0)
    loss = trainer.compute_loss(trainer.model, batch)
    bare, frozen = student.timm_model, teacher.eval().timm_model
    with torch.no_grad():
        maps = bare.forward_features(batch["pixel_values"]), frozen.forward_features(batch["pixel_values"])
        torch.manual_seed(0)
        expected = trainer.model.losses["mgd"](*maps)
        expected |= trainer.model.losses["srrl"](*maps, frozen.forward_head(maps[1]), frozen.fc.weight, frozen.fc.bias)
        expected["task"] = F.cross_entropy(bare.forward_head(maps[0]), batch["labels"])
    logged = {name: value.item() for name, value in trainer.loss_log.sums.items()}
    assert logged == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_kd_scales_the_task_loss_whatever_is_added():
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    student = timm_cnn().eval()
    outputs = {"teacher_logits": torch.randn(4, 10)}
    tasks = {}
    for weights, modules in (
        (1.0, {"nkd": NKDLoss()}),
        (0.5, {"kd": KDLoss()}),
        (0.1, {"kd": KDLoss(alpha=0.9), "dkd": DKDLoss()}),
        (0.12, {"first": KDLoss(alpha=0.8), "second": KDLoss(alpha=0.4, temperature=1.0)}),
        (0.0, {"kd": KDLoss(alpha=1)}),
    ):
        model = DistillationModel(student, modules, label_smoothing=0.1).eval()
        assert model.task_weight == pytest.approx(weights)
        tasks[weights] = model(pixels, labels, outputs)["losses"]["task"].item()
    assert tasks == pytest.approx({weight: weight * tasks[1.0] for weight in tasks}, rel=1e-6)


def test_saved_and_resumed_bit_for_bit(tmp_path):
    def build(folder):
        return recipe_trainer(
            folder, "mgd+srrl", timm_cnn(), wide_cnn(), max_steps=6, save_strategy="steps", save_steps=3
        )

    whole = build(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    trained = safetensors.torch.load_file(checkpoint / "distillation_losses.safetensors")
    assert {".".join(name.split(".")[:2]) for name in trained} == {"mgd.align", "mgd.generator", "srrl.connector"}
    whole.save_model(tmp_path / "student")
    saved = safetensors.torch.load_file(tmp_path / "student" / "model.safetensors")
    assert set(saved) == {key.removeprefix("timm_model.") for key in whole.student.state_dict()}

    resumed = build(tmp_path / "resumed")
    with torch.no_grad():  # what is not loaded would show
        for parameter in resumed.model.parameters():
            parameter.fill_(0.123)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_bf16_mixup_and_every_loss_at_once(tmp_path):
    train = digits(0, 64)
    for i, sample in enumerate(train):
        sample["labels"] = 0.7 * F.one_hot(torch.tensor(i % 10), 10) + 0.3 * F.one_hot(torch.tensor(3), 10)
    trainer = recipe_trainer(
        tmp_path, "+".join(COMPONENTS), timm_cnn(), wide_cnn(), train=train, bf16=True, max_steps=2
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    names = ["task", *(name for names in COMPONENTS.values() for name in names)]
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in names), rel=1e-5)
    assert trainer.model.task_weight == 0.5


def test_models_that_do_not_fit_are_errors_before_training(tmp_path):
    finer = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10)
    with pytest.raises(ValueError, match=r"MGD's student map is 4x4, the teacher's 8x8: it compares"):
        recipe_trainer(tmp_path, "mgd", timm_deit(), finer)
    with pytest.raises(ValueError, match=r"MGD's student map is 1x1, the teacher's 4x4: it compares"):
        recipe_trainer(tmp_path, "mgd", timm_cnn(), timm_deit(1))
    with pytest.raises(ValueError, match=r"no classifier of an averaged .* \(deit_tiny_patch16_224\): SRRL"):
        recipe_trainer(tmp_path, "srrl", timm_cnn(), timm_deit(1))
    convnext = timm.create_model("convnext_atto", num_classes=10)
    with pytest.raises(ValueError, match=r"no last feature map is known for ConvNeXt"):
        recipe_trainer(tmp_path, "mgd", timm_cnn(), convnext)
    # By hand, without a recipe: where the trainer is made, or in the first step.
    with pytest.raises(ValueError, match=r"no classifier of an averaged"):
        make_trainer(tmp_path, timm_cnn(), teacher=timm_deit(1), distillation_loss=SRRLLoss(64, 32))
    trainer = make_trainer(tmp_path, timm_deit(), digits(0, 16), teacher=finer, distillation_loss=MGDLoss(32, 192))
    with pytest.raises(ValueError, match=r"MGD's student map is 4x4, the teacher's 8x8"):
        trainer.train()
    with pytest.raises(ValueError, match=r"MGDLoss, which asks for a teacher"):
        make_trainer(tmp_path, timm_cnn(), distillation_loss=MGDLoss(64, 64))
    with pytest.raises(ValueError, match=r"loss_args of distillation_loss=mgd are alpha, mask_ratio, got channels"):
        RecipeArguments(student="a", teacher="b", distillation_loss="mgd", loss_args={"channels": 3})
    with pytest.raises(ValueError, match=r"alpha must be at most 1"):
        RecipeArguments(student="a", teacher="b", distillation_loss="kd", loss_args={"alpha": 2.0})
    with pytest.raises(ValueError, match=r"distillation_loss=wttm needs a teacher"):
        RecipeArguments(student="a", distillation_loss="wttm")


@pytest.mark.runs
def test_whole_model_compiles():
    student, teacher_model = timm_cnn(), wide_cnn()
    modules = {"mgd": MGDLoss(64, 96), "srrl": SRRLLoss(64, 96)} | {name: OF_LOGITS[name][0]() for name in OF_LOGITS}
    model = DistillationModel(student, modules).train()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    teacher = load_teacher(teacher_model).tap(model.teacher_inputs)
    runs = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        outputs = {"teacher_logits": teacher(pixels), **teacher.take_features()}
        torch.manual_seed(0)
        runs.append(run(pixels, labels, outputs)["losses"])
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-6)


def test_every_loss_has_its_paper():
    assert len({loss.name for loss in LOSSES.values()}) == len(LOSSES) == 13
    assert {loss.__name__ for loss in LOSSES.values()} <= set(losses.__all__)
    for loss in LOSSES.values():
        assert {"name", "paper", "citation"} <= vars(loss).keys()
        assert loss.paper.startswith("https://")
        assert loss.citation.startswith("@")
        assert loss.citation.endswith("}")


@pytest.mark.parametrize("labels", [torch.tensor([1, 2, 0]), torch.eye(5)[[1, 2, 0]] * 0.8 + 0.04])
@pytest.mark.parametrize("masked", [[3], [0, 2, 3, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize(
    "loss",
    [NKDLoss(), NKDLoss(temperature=4), KDLoss(), DKDLoss(), DKDLoss(temperature=1), losses.WSLDLoss(), losses.WTTMLoss(),
     losses.DISTLoss(), losses.RLDLoss()],
    ids=str,
)  # fmt: skip
def test_classes_that_a_teacher_rules_out(loss, masked, labels):
    """With minus infinity for all but the target, it says nothing of the other classes; with it for all, nothing at all."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 5, generator=generator)
    student = torch.randn(3, 5, generator=generator).requires_grad_()
    teacher[0, masked] = -math.inf
    given = (
        (student, teacher)
        if isinstance(loss, KDLoss | losses.WTTMLoss | losses.DISTLoss)
        else (student, teacher, labels)
    )
    components = loss(*given)
    sum(components.values()).backward()
    is_finite = all(value.isfinite() for value in components.values()) and bool(student.grad.isfinite().all())
    assert is_finite == (len(masked) < 5)
    if is_finite and isinstance(loss, NKDLoss | DKDLoss):
        # The limit of a teacher that rules them out ever more: the same target term, and of the others' term any share.
        teacher[0, masked] = -1e4
        near = loss(*given)
        target, others = components
        torch.testing.assert_close(components[target], near[target])
        if masked == [3]:
            torch.testing.assert_close(components[others], near[others])
        else:
            assert components[others] < near[others]
