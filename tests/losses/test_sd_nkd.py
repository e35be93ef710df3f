"""SD-NKD: golden vectors of the official code, a literal reference, regions of maps, errors, and training."""

import math

import pytest
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
from losses_reference import sd_nkd_reference
from safetensors.torch import load_file
from tiny import DIGITS, digits, make_trainer, native_vit, timm_cnn
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from nkd_hf import RecipeArguments, SDNKDLoss, create_student, load_teacher, sd_nkd_loss
from nkd_hf.recipe.loss_shapes import loss_shapes
from nkd_hf.trainer.distillation_model import DistillationModel


def region_batch(batch_size, num_classes, num_regions, labels=HARD):
    """Student's and teacher's logits of regions, and labels."""
    torch.manual_seed(1)
    labels = make_batch(batch_size, num_classes, labels=labels)[2]
    student, teacher = 3 * torch.randn(2, batch_size, num_classes, num_regions, dtype=torch.float64)
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("sdnkd")])
def test_golden(name, dtype):
    """Of the official code. Its vector of 1000 classes has 2 MB and is not kept; the difference there is 4e-16."""
    golden = load_file(FIXTURES / "golden" / f"{name}.safetensors")
    student = golden["student_region_logits"].to(dtype).requires_grad_()
    loss = sd_nkd_loss(student, golden["teacher_region_logits"].to(dtype), golden["labels"], **GOLDEN[name]["params"])
    loss.backward()
    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(student.grad, golden["grad_student_region_logits"], TOLERANCE[dtype])


@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize(("batch_size", "num_classes", "num_regions"), [(1, 2, 1), (1, 7, 5), (5, 2, 5), (4, 6, 21)])
def test_equals_reference(batch_size, num_classes, num_regions, labels):
    student, teacher, labels = region_batch(batch_size, num_classes, num_regions, labels)
    for settings in ({}, {"gamma": 0.4, "temperature": 3.0}):
        loss = sd_nkd_loss(student, teacher, labels, **settings)
        assert_same_with_gradients([loss], [sd_nkd_reference(student, teacher, labels, **settings)], [student])


def test_regions_where_the_teacher_contradicts_itself_count_twice():
    right, wrong = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([0.0, 4.0, 1.0])
    labels = torch.tensor([0])
    for whole, part, weight in ((right, right, 1), (right, wrong, 2), (wrong, right, 2), (wrong, wrong, 1)):
        student = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0))
        teacher = torch.stack([whole, part], dim=-1)[None]
        alone = [sd_nkd_loss(student[..., [r]], teacher[..., [r]], labels) for r in range(2)]
        loss = sd_nkd_loss(student, teacher, labels)
        torch.testing.assert_close(loss, (alone[0] + weight * alone[1]) / 2)


def test_edges():
    student, teacher, labels = region_batch(3, 4, 5)
    for loss in (
        sd_nkd_loss(torch.zeros_like(student, requires_grad=True), torch.zeros_like(teacher), labels),
        sd_nkd_loss(student * 1e4, teacher * 1e4, labels),
    ):
        assert loss.isfinite()
    ruled_out = teacher.clone()
    ruled_out[:, 3] = -math.inf
    labels = labels.clamp(max=2)
    [gradient] = torch.autograd.grad(sd_nkd_loss(student, ruled_out, labels), student)
    assert gradient.isfinite().all()
    for value in (math.nan, math.inf):
        teacher[0, 1, 2] = value
        assert not sd_nkd_loss(student, teacher, labels).isfinite()


# ---- maps and classifiers


def map_batch(dtype=torch.float64, requires_grad=True):
    """What the module takes: maps of 7x7 and 5x6, two classifiers, labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 6, 7, 7), (3, 8, 5, 6), (9, 6), (9,), (9, 8), (9,))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for i in (0, 2, 3):
        tensors[i].requires_grad_(requires_grad)
    return *tensors, torch.tensor([0, 4, 8])


def test_module_equals_reference():
    student_map, teacher_map, weight, bias, teacher_weight, teacher_bias, labels = arguments = map_batch()

    def regions(feature_map, weight, bias):
        cells = [feature_map.mean((2, 3))]
        for scale in (2, 4):
            height, width = feature_map.shape[2:]
            for i in range(scale):
                for j in range(scale):
                    rows = slice(i * height // scale, -(-(i + 1) * height // scale))
                    columns = slice(j * width // scale, -(-(j + 1) * width // scale))
                    cells.append(feature_map[:, :, rows, columns].mean((2, 3)))
        return torch.stack([cell @ weight.T + bias for cell in cells], dim=-1)

    student, teacher = regions(student_map, weight, bias), regions(teacher_map, teacher_weight, teacher_bias)
    expected = sd_nkd_reference(student, teacher, labels, gamma=0.5, temperature=2.0)
    outputs = SDNKDLoss(gamma=0.5, temperature=2.0)(*arguments)
    assert list(outputs) == ["sdnkd_target", "sdnkd_soft"]
    assert_same_with_gradients([sum(outputs.values())], [expected], [student_map, weight, bias])
    alone = SDNKDLoss(scales=[1])(*arguments)
    expected = sd_nkd_reference(student[..., :1], teacher[..., :1], labels)
    torch.testing.assert_close(sum(alone.values()), expected)


def test_the_teacher_gets_no_gradient():
    arguments = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in map_batch()]
    sum(SDNKDLoss()(*arguments).values()).backward()
    assert [tensor.grad is not None for tensor in arguments] == [True, False, True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_computed_in_float32(dtype):
    arguments = map_batch(dtype)
    wide = [t.detach().float() if t.is_floating_point() else t for t in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = SDNKDLoss()(*arguments)
    for name, value in SDNKDLoss()(*wide).items():
        assert outputs[name].dtype == torch.float32
        assert_close(outputs[name], value, 1e-6)
    sum(outputs.values()).backward()
    assert all(arguments[i].grad.dtype == dtype and arguments[i].grad.isfinite().all() for i in (0, 2, 3))


def test_errors():
    for settings, message in (
        ({"gamma": -1}, "gamma must be a finite number >= 0"),
        ({"temperature": 0}, "temperature must be a finite number > 0"),
        ({"scales": 2}, r"scales must be a list of grid sizes, got 2: pass, for example, \[1, 2, 4\]"),
        ({"scales": []}, "scales must be a list of grid sizes"),
        ({"scales": [1, 2.5]}, "scales must be at least 1, got 2.5"),
        ({"scales": [2, 4]}, r"scales must begin with 1, the whole image, .* got \[2, 4\]"),
        ({"scales": [1, 2, 2]}, "name each grid once"),
    ):
        with pytest.raises(ValueError, match=message):
            SDNKDLoss(**settings)
    regions, labels = torch.zeros(2, 5, 3), torch.tensor([0, 1])
    for arguments, message in (
        ((regions[..., 0], regions, labels), r"student_region_logits must be \[B, C, R\] .* got \[2, 5\]"),
        ((regions[:, :1], regions, labels), r"two classes .* got \[2, 1, 3\]"),
        (
            (regions, torch.zeros(2, 7, 3), labels),
            r"like student_region_logits, got \[2, 7, 3\]: load a 5-class teacher",
        ),
        ((regions, regions[..., :2], labels), r"must be \[2, 5, 3\] like .* got \[2, 5, 2\]: cut both alike"),
        ((regions.long(), regions, labels), "student_region_logits must be floating point"),
        ((regions, regions, labels + 4), r"labels must be in 0\.\.4, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            sd_nkd_loss(*arguments)
    with pytest.raises(TypeError, match="teacher_region_logits must be a tensor"):
        sd_nkd_loss(regions, [0.0], labels)
    good = list(map_batch())
    for index, tensor, message in (
        (0, torch.zeros(3, 6), r"student_map must be \[B, D, H, W\], got \[3, 6\]"),
        (
            0,
            torch.zeros(3, 6, 3, 7),
            r"student_map must have 4 places or more on each side .* got 3x7: set smaller scales",
        ),
        (1, torch.zeros(3, 8, 1, 1), r"teacher_map must have 4 places"),
        (1, torch.zeros(3, 8, 5, 5).long(), "teacher_map must be of a float dtype"),
        (2, torch.zeros(9, 7), r"student_head_weight and student_head_bias must be \[C, 6\] and \[C\]"),
        (5, torch.zeros(8), r"teacher_head_weight and teacher_head_bias must be .* got \[9, 8\] and \[8\]"),
        (1, torch.zeros(2, 8, 5, 5), r"teacher_region_logits must be \[3, 9, 21\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SDNKDLoss()(*good[:index], tensor, *good[index + 1 :])


# ---- models


def cnn(seed=0, width=64, **model_args):
    """A ResNet whose last map is 2x2 at 64 pixels."""
    torch.manual_seed(seed)
    return create_student(
        "resnet18", id2label=DIGITS, image_size=64, model_args={"channels": [8, 16, 32, width], **model_args}
    )


def large_digits(labels=HARD):
    samples = digits(0, 32)
    for i, sample in enumerate(samples):
        sample["pixel_values"] = F.interpolate(sample["pixel_values"][None], size=64)[0]
        if labels == MIXUP:
            sample["labels"] = 0.7 * F.one_hot(torch.tensor(i % 10), 10) + 0.3 * F.one_hot(torch.tensor(3), 10)
    return samples


@pytest.mark.parametrize(("labels", "bf16"), [(HARD, False), (MIXUP, True)])
def test_trains_by_name(tmp_path, labels, bf16):
    arguments = RecipeArguments(
        student="resnet18", teacher="resnet34", distillation_loss="sdnkd", loss_args={"scales": [1, 2]}
    )
    assert arguments.needs_teacher_layers
    student, teacher = cnn(), cnn(1, width=96)
    shapes = loss_shapes(arguments.losses.values(), student, (64, 64), teacher)
    trainer = make_trainer(
        tmp_path, student, large_digits(labels), teacher=teacher, distillation_loss=arguments.build_loss(**shapes),
        max_steps=2, bf16=bf16,
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert not [name for name, value in trainer.model.named_parameters() if torch.equal(before[name], value)]
    entry = trainer.state.log_history[0]
    names = ["task", "sdnkd_target", "sdnkd_soft"]
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in names), rel=1e-5)


@pytest.mark.runs
def test_one_step_is_the_loss_of_the_models_and_compiles():
    student, teacher_model = cnn(), cnn(1, width=96)
    student.timm_model.fc.bias = None  # a classifier without a bias has one of zeros
    model = DistillationModel(student, {"sdnkd": SDNKDLoss(scales=(1, 2))}).train()
    teacher = load_teacher(teacher_model).tap(model.teacher_inputs)
    pixels, labels = torch.randn(4, 3, 64, 64), torch.tensor([1, 2, 3, 4])
    outputs = {"teacher_logits": teacher(pixels), **teacher.take_features()}
    losses = model(pixels, labels, outputs)["losses"]
    maps = student.timm_model.forward_features(pixels), teacher_model.eval().timm_model.forward_features(pixels)
    heads = (
        student.timm_model.fc.weight,
        torch.zeros(10),
        teacher_model.timm_model.fc.weight,
        teacher_model.timm_model.fc.bias,
    )
    expected = SDNKDLoss(scales=(1, 2))(*maps, *heads, labels)
    torch.testing.assert_close({name: losses[name] for name in expected}, expected, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels, labels, outputs)["losses"]
    torch.testing.assert_close(compiled, losses, rtol=1e-5, atol=1e-6)
    # A replaced classifier is read, too.
    student.timm_model.fc = nn.Linear(64, 10)
    maps = student.timm_model.forward_features(pixels), maps[1]
    heads = *student.timm_model.fc.parameters(), *heads[2:]
    replaced = model(pixels, labels, outputs)["losses"]["sdnkd_soft"]
    torch.testing.assert_close(
        replaced, SDNKDLoss(scales=(1, 2))(*maps, *heads, labels)["sdnkd_soft"], rtol=1e-5, atol=1e-6
    )


def test_models_that_do_not_fit_are_refused_before_training(tmp_path):
    recipe = RecipeArguments(student="a", teacher="b", distillation_loss="sdnkd")
    for student, message in (
        (cnn(global_pool="max"), "the student of SRRL or SD-NKD must average its last feature map .* got TimmW"),
        (native_vit(), r"no classifier of an averaged feature map is known for ViT.*SD-NKD.* as student"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_shapes(recipe.losses.values(), student, (64, 64), cnn(1))
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, student, teacher=cnn(1), distillation_loss=SDNKDLoss())
    for teacher, message in (
        (cnn(1, global_pool="avgmax"), "the teacher of SRRL or SD-NKD must average"),
        (native_vit(1), "no classifier of an averaged feature map .* as teacher"),
        ([cnn(1), cnn(2)], "losses read teacher_.* of one teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, cnn(), teacher=teacher, distillation_loss=SDNKDLoss())
    with pytest.raises(ValueError, match="SDNKDLoss, which asks for a teacher"):
        make_trainer(tmp_path, cnn(), distillation_loss=SDNKDLoss())
    # A map of one place, in the first step; a recipe takes that before anything is trained.
    trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 16), teacher=timm_cnn(1), distillation_loss=SDNKDLoss())
    with pytest.raises(
        ValueError, match=r"student_map must have 4 places .* got 1x1: set smaller scales in loss_args"
    ):
        trainer.train()


def test_transformers_models_and_the_moving_average(tmp_path):
    student = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, id2label=DIGITS))
    loss = SDNKDLoss(scales=(1, 2))
    trainer = make_trainer(
        tmp_path, student, large_digits(), teacher=cnn(1), distillation_loss=loss, max_steps=1, ema_decay=0.9
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["sdnkd_soft"])
