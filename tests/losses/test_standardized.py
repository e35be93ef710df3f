"""KD and DKD on standardised logits: golden vectors of the official code, a literal reference, equal logits, errors."""

import math

import pytest
import torch
from loss_checks import FIXTURES, GOLDEN, MIXUP, TOLERANCE, assert_close, assert_same_with_gradients, make_batch
from losses_reference import dkd_reference, kd_reference, standardized_reference
from safetensors.torch import load_file

from nkd_hf.losses import DKDLoss, KDLoss, dkd_loss, kd_loss
from nkd_hf.losses.standardized import standardize_logits


def golden_of(name, dtype):
    golden = load_file(FIXTURES / "golden" / f"{name}.safetensors")
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in golden.items()}
    inputs["student_logits"].requires_grad_()
    return GOLDEN[name]["params"], golden, inputs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("lskd")])
def test_kd_golden(name, dtype):
    params, golden, inputs = golden_of(name, dtype)
    student_logits, teacher_logits = inputs["student_logits"], inputs["teacher_logits"]
    loss = kd_loss(student_logits, teacher_logits, alpha=1.0, standardize=True, **params)
    loss.backward()
    # The official value is a divergence: the teacher's entropy smaller.
    temperature = params["temperature"]
    teacher = torch.distributions.Categorical(logits=standardized_reference(golden["teacher_logits"]) / temperature)
    assert_close(loss, golden["loss"] + temperature**2 * teacher.entropy().mean(), TOLERANCE[dtype])
    assert_close(student_logits.grad, golden["grad_student_logits"], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("dkdls")])
def test_dkd_golden(name, dtype):
    params, golden, inputs = golden_of(name, dtype)
    arguments = inputs["student_logits"], inputs["teacher_logits"], inputs["labels"]
    loss = dkd_loss(*arguments, standardize=True, **params)
    loss.backward()
    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(arguments[0].grad, golden["grad_student_logits"], TOLERANCE[dtype])
    components = DKDLoss(standardize=True, **params)(*arguments)
    assert_close(sum(components.values()), golden["loss"], TOLERANCE[dtype])


@pytest.mark.parametrize("num_classes", [2, 7])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_reference(batch_size, num_classes):
    student, teacher, labels = make_batch(batch_size, num_classes, labels=MIXUP)
    # Two standardised logits are constants: what is left of the gradient is rounding.
    expected = kd_reference(standardized_reference(student), standardized_reference(teacher))
    assert_same_with_gradients(KDLoss(standardize=True)(student, teacher).values(), expected, [student])
    expected = dkd_reference(standardized_reference(student), standardized_reference(teacher), labels)
    assert_same_with_gradients(DKDLoss(standardize=True)(student, teacher, labels).values(), expected, [student])


def test_size_and_shift_of_the_logits_do_not_matter():
    student, teacher, labels = make_batch(4, 7)
    given = student * 3 - 40, teacher * 0.2 + 5
    assert_close(kd_loss(*given, standardize=True), kd_loss(student, teacher, standardize=True), 1e-6)
    assert_close(
        dkd_loss(*given, labels, standardize=True), dkd_loss(student, teacher, labels, standardize=True), 1e-6
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_have_no_gradient(value, dtype):
    """A classifier that begins with zeros gives them; one over its deviation would be 1e7."""
    _, teacher, labels = make_batch(3, 8, dtype=dtype)  # the mean of eight equal numbers is exact
    student = torch.full((3, 8), value, dtype=dtype)
    student[2] = torch.arange(8)
    student.requires_grad_()
    for components in (
        KDLoss(standardize=True)(student, teacher),
        DKDLoss(standardize=True)(student, teacher, labels),
        KDLoss(standardize=True)(student, torch.zeros_like(teacher)),
    ):
        [gradient] = torch.autograd.grad(sum(components.values()), student)
        assert all(component.isfinite() for component in components.values())
        assert not gradient[:2].any()
        assert gradient[2].isfinite().all()
        assert gradient[2].any()
    assert torch.equal(standardize_logits(student)[:2], torch.zeros(2, 8, dtype=dtype))


def test_half_precision_is_computed_in_float32():
    student, teacher, labels = make_batch(4, 50, dtype=torch.float32)
    narrow = student.detach().bfloat16().requires_grad_()
    wide, teacher = narrow.detach().float().requires_grad_(), teacher.bfloat16()
    for loss in (
        lambda s, t: kd_loss(s, t, standardize=True),
        lambda s, t: dkd_loss(s, t, labels, standardize=True),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = loss(narrow, teacher)
        expected = loss(wide, teacher.float())
        assert torch.equal(actual, expected)
        [gradient], [expected_gradient] = torch.autograd.grad(actual, narrow), torch.autograd.grad(expected, wide)
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, expected_gradient.bfloat16())


def test_compiles():
    torch._dynamo.reset()
    student, teacher, labels = make_batch(4, 9, dtype=torch.float32)

    def both(student, teacher, labels):
        return kd_loss(student, teacher, standardize=True) + dkd_loss(student, teacher, labels, standardize=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(student, teacher, labels)
    plain = both(student, teacher, labels)
    assert_close(compiled, plain, 1e-6)
    assert_close(torch.autograd.grad(compiled, student)[0], torch.autograd.grad(plain, student)[0], 1e-6)


def test_numbers_that_are_not_finite_stay_so():
    student, teacher, _ = make_batch(4, 9)
    for value in (math.nan, math.inf, -math.inf):
        teacher[1, 2] = value
        assert not kd_loss(student, teacher, standardize=True).isfinite()


def test_text_of_the_modules():
    assert repr(KDLoss()) == "KDLoss(alpha=0.5, temperature=4.0)"
    assert repr(KDLoss(standardize=True)) == "KDLoss(alpha=0.5, temperature=4.0, standardize=True)"
    assert repr(DKDLoss()) == "DKDLoss(alpha=1.0, beta=6.0, temperature=4.0)"
    assert repr(DKDLoss(standardize=True)).endswith("temperature=4.0, standardize=True)")


@pytest.mark.parametrize("value", ["false", 1, None])
def test_errors(value):
    student, teacher, labels = make_batch(2, 3)
    for call in (
        lambda: KDLoss(standardize=value),
        lambda: DKDLoss(standardize=value),
        lambda: kd_loss(student, teacher, standardize=value),
        lambda: dkd_loss(student, teacher, labels, standardize=value),
    ):
        with pytest.raises(ValueError, match="standardize must be True or False, got"):
            call()
