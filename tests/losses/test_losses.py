"""NKD and USKD: golden vectors of the official code, a slow literal reference, edges of the number range, errors.

Unless a test says otherwise, "close" is relative: |a - b| / |b| for a value, ||a - b|| / ||b|| over the whole tensor for
a gradient, at most 1e-10 in float64 and 1e-5 in float32.
"""

import doctest
import importlib
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_checks import FIXTURES, GOLDEN, HARD, MIXUP, TOLERANCE, assert_close, assert_same_with_gradients, make_batch
from losses_reference import nkd_reference, uskd_reference
from safetensors.torch import load_file

from nkd_hf.losses import MGDLoss, NKDLoss, SRRLLoss, USKDLoss, nkd_loss, uskd_loss
from nkd_hf.losses.normalized import normalized_loss
from nkd_hf.losses.uskd import _descending_order, _sortable_bits

# ---- the official implementation


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("nkd")])
def test_nkd_golden(name, dtype):
    params = GOLDEN[name]["params"]
    golden = load_file(FIXTURES / "golden" / f"{name}.safetensors")
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in golden.items()}
    student_logits = inputs["student_logits"].requires_grad_()

    arguments = student_logits, inputs["teacher_logits"], inputs["labels"]
    loss = nkd_loss(*arguments, gamma=params["gamma"], temperature=params["temp"])
    loss.backward()

    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(student_logits.grad, golden["grad_student_logits"], TOLERANCE[dtype])
    components = NKDLoss(gamma=params["gamma"], temperature=params["temp"])(*arguments)
    assert_close(sum(components.values()), golden["loss"], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("uskd")])
def test_uskd_golden(name, dtype):
    params = dict(GOLDEN[name]["params"])
    golden = load_file(FIXTURES / "golden" / f"{name}.safetensors")
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in golden.items()}
    student_logits = inputs["student_logits"].requires_grad_()
    mid_feature = inputs["mid_feature"].requires_grad_()
    module = USKDLoss(mid_feature.shape[1], **params).to(dtype)
    module.load_state_dict({"head.weight": inputs["head_weight"], "head.bias": inputs["head_bias"]})

    loss = sum(module(mid_feature, student_logits, inputs["labels"]).values())
    loss.backward()

    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(student_logits.grad, golden["grad_student_logits"], TOLERANCE[dtype])
    assert_close(mid_feature.grad, golden["grad_mid_feature"], TOLERANCE[dtype])
    assert_close(module.head.weight.grad, golden["grad_head_weight"], TOLERANCE[dtype])
    assert_close(module.head.bias.grad, golden["grad_head_bias"], TOLERANCE[dtype])
    del params["num_classes"]
    mid_logits = F.linear(mid_feature, module.head.weight, module.head.bias)
    assert_close(uskd_loss(mid_logits, student_logits, inputs["labels"], **params), golden["loss"], TOLERANCE[dtype])


# ---- the literal reference


@settings(max_examples=150, deadline=None)
@given(
    batch_size=st.integers(1, 5),
    num_classes=st.integers(2, 12),
    labels=st.sampled_from([HARD, MIXUP]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.01, 1.0, 10.0, 100.0]),
    gamma=st.sampled_from([0.0, 1.5, 3.5]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_nkd_equals_reference(batch_size, num_classes, labels, seed, scale, gamma, temperature):
    student, teacher, labels = make_batch(batch_size, num_classes, labels=labels, seed=seed, scale=scale)
    components = NKDLoss(gamma, temperature)(student, teacher, labels)
    assert list(components) == ["nkd_target", "nkd_non_target"]
    expected = nkd_reference(student, teacher, labels, gamma, temperature)
    assert_same_with_gradients(components.values(), expected, [student])


@settings(max_examples=150, deadline=None)
@given(
    batch_size=st.integers(1, 5),
    num_classes=st.integers(2, 12),
    labels=st.sampled_from([HARD, MIXUP]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.01, 1.0, 10.0, 100.0]),
)
def test_uskd_equals_reference(batch_size, num_classes, labels, seed, scale):
    student, mid, labels = make_batch(batch_size, num_classes, labels=labels, seed=seed, scale=scale)
    mid.requires_grad_()
    module = USKDLoss(num_classes, num_classes, alpha=0.6, beta=2.0, mu=0.3).double()
    with torch.no_grad():  # the head hands its input on
        module.head.weight.copy_(torch.eye(num_classes))
        module.head.bias.zero_()
    components = module(mid, student, labels)
    assert list(components) == ["uskd_target", "uskd_non_target", "uskd_weak"]
    expected = uskd_reference(mid, student, labels, alpha=0.6, beta=2.0, mu=0.3)
    assert_same_with_gradients(components.values(), expected, [student, mid])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("num_targets", [1, 2])
def test_normalized_loss_gradcheck(num_targets, temperature):
    student, other, _ = make_batch(3, 5)
    target = torch.tensor([[0, 4], [3, 1], [2, 2]])[:, :num_targets]  # the last row names one class twice
    weight = torch.tensor([[0.7, -0.2], [0.3, 0.5], [0.9, 0.0]], dtype=torch.float64)[:, :num_targets]
    label = other.scatter(1, target, -math.inf).softmax(1)
    assert torch.autograd.gradcheck(
        lambda logits: normalized_loss(logits, target, weight, label, temperature)[:2], (student,)
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_sort_like_the_values(dtype):
    generator = torch.Generator().manual_seed(0)
    magnitude = 10.0 ** torch.randint(-30, 30, (1000,), generator=generator, dtype=dtype)
    values = torch.randn(1000, generator=generator, dtype=dtype) * magnitude
    values = torch.cat([values, torch.tensor([math.inf, -math.inf, 0.0], dtype=dtype)])
    assert torch.equal(_sortable_bits(values.clone()).argsort(), values.argsort())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_classes", [2, 11, 1000])
def test_order_is_a_stable_sort(num_classes, dtype):
    generator = torch.Generator().manual_seed(0)
    for rank in (
        torch.randn(7, num_classes, generator=generator, dtype=dtype),
        torch.randint(-3, 3, (7, num_classes), generator=generator).to(dtype),  # the lower class first among equals
        torch.zeros(7, num_classes, dtype=dtype),
    ):
        assert torch.equal(_descending_order(rank.clone()), rank.argsort(dim=-1, descending=True, stable=True))


# ---- the task loss from the same softmax


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("num_classes", [2, 7])
@pytest.mark.parametrize("labels", [HARD, MIXUP, "one-hot rows"])
def test_shared_task_loss(labels, num_classes, temperature, label_smoothing):
    student, other, rows = make_batch(5, num_classes, labels=HARD if labels == HARD else MIXUP)
    if labels == "one-hot rows":
        rows = F.one_hot(rows.argmax(1), num_classes).double()
    modules = [
        (NKDLoss(temperature=temperature), (student, other, rows)),
        (USKDLoss(2, num_classes).double(), (other[:, :2], student, rows)),
    ]
    for module, arguments in modules:
        task_loss = F.cross_entropy(student, rows, label_smoothing=label_smoothing)
        alone, shared = module(*arguments), module(*arguments, label_smoothing=label_smoothing)
        assert list(shared) == ["task", *alone]
        expected = [task_loss, *alone.values()]
        weights = (0.6, 0.7, -1.3, 0.4)
        assert_same_with_gradients(shared.values(), expected, [student], weights=weights)


@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_task_loss_is_no_cross_entropy_of_its_own(labels, temperature, monkeypatch):
    student, other, rows = make_batch(5, 7, labels=labels)
    calls, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: calls.append(0) or cross_entropy(*args, **kwargs))
    NKDLoss(temperature=temperature)(student, other, rows, label_smoothing=0.1)
    assert not calls
    USKDLoss(2, 7).double()(other[:, :2], student, rows, label_smoothing=0.1)
    assert len(calls) == 1  # of the auxiliary head


def test_shared_task_loss_of_a_confident_student():
    """The gradient keeps its digits where the softmax rounds to one."""
    student, other, labels = make_batch(4, 7, dtype=torch.float32)
    student = (student.detach() + 30 * F.one_hot(labels, 7)).requires_grad_()
    exact = student.detach().double().requires_grad_()
    shared = NKDLoss()(student, other, labels, label_smoothing=0.0)["task"]
    expected = F.cross_entropy(exact, labels)
    assert_close(shared, expected, 1e-5)
    assert_close(torch.autograd.grad(shared, student)[0], torch.autograd.grad(expected, exact)[0], 1e-5)


@pytest.mark.runs
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_compile_with_the_task_loss(labels, temperature, label_smoothing):
    torch._dynamo.reset()
    student, other, labels = make_batch(6, 11, labels=labels, dtype=torch.float32)
    module = NKDLoss(temperature=temperature)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(student, other, labels, label_smoothing)
    plain = module(student, other, labels, label_smoothing)
    gradients = [torch.autograd.grad(sum(terms.values()), student)[0] for terms in (compiled, plain)]
    assert_close(compiled["task"], plain["task"], 1e-6)
    assert_close(*gradients, 1e-6)


# ---- properties


@pytest.mark.parametrize("labels", [HARD, MIXUP])
def test_shift_of_a_row_changes_nothing(labels):
    student, other, labels = make_batch(4, 7, labels=labels)
    shift = torch.tensor([[-50.0], [3.0], [0.5], [20.0]])
    assert_close(nkd_loss(student + shift, other - 2 * shift, labels), nkd_loss(student, other, labels), 1e-12)
    assert_close(uskd_loss(other - 2 * shift, student + shift, labels), uskd_loss(other, student, labels), 1e-12)


@pytest.mark.parametrize("labels", [HARD, MIXUP])
def test_order_of_classes_changes_nothing(labels):
    student, other, labels = make_batch(4, 7, labels=labels)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    permuted_labels = labels[:, order] if labels.ndim == 2 else order.argsort()[labels]
    arguments = student[:, order], other[:, order], permuted_labels
    assert_close(nkd_loss(*arguments, temperature=2.0), nkd_loss(student, other, labels, temperature=2.0), 1e-12)
    assert_close(uskd_loss(arguments[1], arguments[0], arguments[2]), uskd_loss(other, student, labels), 1e-12)


@pytest.mark.parametrize("num_classes", [2, 7])
def test_one_hot_rows_are_class_indices(num_classes):
    student, other, labels = make_batch(4, num_classes)
    other.requires_grad_()
    one_hot = F.one_hot(labels, num_classes).double()
    for loss in (lambda y: nkd_loss(student, other, y), lambda y: uskd_loss(other, student, y)):
        assert_same_with_gradients([loss(one_hot)], [loss(labels)], [student], 1e-12)
    weak = torch.autograd.grad(uskd_loss(other, student, one_hot), other)[0]
    assert_close(weak, torch.autograd.grad(uskd_loss(other, student, labels), other)[0], 1e-12)


def test_uskd_one_hot_row_among_mixup_rows():
    student, mid, mixed = make_batch(3, 6, labels=MIXUP)
    mixed[1] = F.one_hot(torch.tensor(4), 6)
    mid.requires_grad_(False)
    module = USKDLoss(6, 6).double()
    with torch.no_grad():
        module.head.weight.copy_(torch.eye(6))
        module.head.bias.zero_()
    components = module(mid, student, mixed)

    # rows don't meet in the non-target term
    rows = [uskd_reference(mid[i : i + 1], student[i : i + 1], mixed[i : i + 1])[1] for i in (0, 2)]
    rows.insert(1, uskd_reference(mid[1:2], student[1:2], torch.tensor([4]))[1])
    # the missing second target has no soft label, and its square is zero in the mean
    value, target = mixed.topk(2)
    squared = student.softmax(1).gather(1, target) ** 2
    squared[1, 1] = 0
    soft_target = (squared + value - squared.mean(0)).detach()
    soft_target[1, 1] = 0
    expected_target = -(soft_target * student.log_softmax(1).gather(1, target)).sum(1).mean()

    actual = components["uskd_target"], components["uskd_non_target"]
    assert_same_with_gradients(actual, (expected_target, sum(rows) / 3), [student])


def test_uskd_weak_term_alone_reaches_the_auxiliary_head():
    student, mid, labels = make_batch(4, 7)
    mid.requires_grad_()
    gradient = torch.autograd.grad(uskd_loss(mid, student, labels, mu=0.0), mid, allow_unused=True)[0]
    assert gradient is None or not gradient.any()


def test_single_component_backward():
    student, teacher, labels = make_batch(4, 7)
    for index, name in enumerate(["nkd_target", "nkd_non_target"]):
        actual = torch.autograd.grad(NKDLoss()(student, teacher, labels)[name], student)[0]
        assert_close(actual, torch.autograd.grad(nkd_reference(student, teacher, labels)[index], student)[0], 1e-10)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_backward_twice(temperature):
    student, teacher, labels = make_batch(4, 7)
    loss = nkd_loss(student, teacher, labels, temperature=temperature)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    assert torch.equal(student.grad, 2 * once)


def test_double_backward_is_an_error():
    student, other, labels = make_batch(4, 7)
    for loss in (nkd_loss(student, other, labels), uskd_loss(other, student, labels)):
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("labels", [HARD, MIXUP])
def test_arguments_are_left_alone(labels):
    student, other, labels = make_batch(4, 7, labels=labels)
    copies = [tensor.detach().clone() for tensor in (student, other, labels)]
    nkd_loss(student, other, labels).backward()
    uskd_loss(other, student, labels).backward()
    for tensor, copy in zip((student, other, labels), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_teacher():
    student, teacher, labels = make_batch(4, 7, dtype=torch.float32)
    teacher.requires_grad_()
    loss = nkd_loss(student, teacher, labels)
    loss.backward()
    assert teacher.grad is None
    for dtype in (torch.float64, torch.bfloat16):
        with torch.inference_mode():
            other_teacher = teacher.to(dtype) * 1
        other_loss = nkd_loss(student, other_teacher, labels)
        other_loss.backward()
        assert other_loss.dtype == torch.float32
        assert_close(other_loss, nkd_loss(student, teacher.to(dtype).float(), labels), 1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_narrow_integer_labels(dtype):
    student, other, labels = make_batch(4, 7)
    assert torch.equal(nkd_loss(student, other, labels.to(dtype)), nkd_loss(student, other, labels))
    assert torch.equal(uskd_loss(other, student, labels.to(dtype)), uskd_loss(other, student, labels))


# ---- edges of the number range


def losses_in_float64(student, other, labels, temperature):
    return sum(nkd_reference(student, other, labels, 1.5, temperature)), sum(uskd_reference(other, student, labels))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1e4), (1e4, 1.0), (-1e4, 1.0), (1e4, 40.0)])
def test_large_float32_logits(offset, spread, labels, temperature):
    student, other, labels = make_batch(6, 9, labels=labels, scale=1.0, dtype=torch.float32)
    student = (offset + spread * student.detach()).requires_grad_()
    other = offset + spread * other
    exact = student.detach().double().requires_grad_()
    expected = losses_in_float64(exact, other.double(), labels.double() if labels.ndim == 2 else labels, temperature)
    actual = nkd_loss(student, other, labels, temperature=temperature), uskd_loss(other, student, labels)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-5)
        assert_close(torch.autograd.grad(a, student)[0], torch.autograd.grad(b, exact)[0], 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_fp16_at_the_edge_of_its_range(temperature):
    top = 65504.0
    student = torch.tensor([[top, -top, 0.0], [-top, -top, top], [top, top, top], [-top, top, 0.0]]).half()
    other = student.flip(0)
    labels = torch.tensor([0, 0, 1, 2])
    exact = student.double().requires_grad_()
    student.requires_grad_()
    expected = losses_in_float64(exact, other.double(), labels, temperature)
    actual = nkd_loss(student, other, labels, temperature=temperature), uskd_loss(other, student, labels)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, 1e-5)
    gradient, expected_gradient = (
        torch.autograd.grad(actual[0], student)[0],
        torch.autograd.grad(expected[0], exact)[0],
    )
    assert gradient.dtype == torch.float16
    assert_close(gradient, expected_gradient, 1e-3)  # fp16 has 11 bits
    # among equal logits the order of USKD's rank, and so its gradient, is nobody's to say
    assert torch.autograd.grad(actual[1], student)[0].isfinite().all()


@pytest.mark.parametrize("num_classes", [2, 10])
def test_equal_logits(num_classes):
    student = torch.zeros(3, num_classes, requires_grad=True)
    labels = torch.tensor([0, 1, 1])
    components = NKDLoss(gamma=2.0)(student, torch.zeros(3, num_classes), labels)
    assert components["nkd_target"].item() == pytest.approx(math.log(num_classes) / num_classes)
    assert components["nkd_non_target"].item() == pytest.approx(2 * math.log(num_classes - 1))
    loss = uskd_loss(torch.zeros(3, num_classes), student, labels)
    expected = math.log(num_classes) * 1.005 + 0.1 * math.log(num_classes - 1)
    assert loss.item() == pytest.approx(expected)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_two_classes_have_no_non_target_term(batch_size, labels, temperature):
    student, other, labels = make_batch(batch_size, 2, labels=labels)
    module = USKDLoss(2, 2).double()
    for components in (NKDLoss(1.5, temperature)(student, other, labels), module(other, student, labels)):
        target, non_target = list(components.values())[:2]
        assert non_target.item() == 0
        assert not torch.autograd.grad(non_target, student, retain_graph=True)[0].any()
        assert torch.autograd.grad(target, student)[0].isfinite().all()


@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype, labels):
    student, other, labels = make_batch(4, 50, labels=labels, dtype=torch.float32)
    student, other = student.detach().to(dtype).requires_grad_(), other.to(dtype)
    wide = student.detach().float().requires_grad_()
    pairs = [
        (nkd_loss(student, other, labels), nkd_loss(wide, other.float(), labels)),
        (uskd_loss(other, student, labels), uskd_loss(other.float(), wide, labels)),
    ]
    for narrow_loss, wide_loss in pairs:
        assert narrow_loss.dtype == torch.float32
        assert torch.equal(narrow_loss, wide_loss)
        gradient = torch.autograd.grad(narrow_loss, student)[0]
        assert gradient.dtype == dtype
        assert torch.equal(gradient, torch.autograd.grad(wide_loss, wide)[0].to(dtype))


def test_autocast_leaves_float32_alone():
    student, other, labels = make_batch(4, 50, dtype=torch.float32)
    plain = nkd_loss(student, other, labels), uskd_loss(other, student, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = nkd_loss(student, other, labels), uskd_loss(other, student, labels)
        components = USKDLoss(50, 50)(other, student, labels)  # the head's product runs in bfloat16, as elsewhere
    for a, b in zip(cast, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(torch.autograd.grad(a, student)[0], torch.autograd.grad(b, student)[0])
    assert {value.dtype for value in components.values()} == {torch.float32}


# ---- modules


def test_uskd_module_averages_positions_after_the_norm():
    student, _, labels = make_batch(4, 5, dtype=torch.float32)
    feature = torch.randn(4, 3, 3, 6, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.LayerNorm(6)
    plain, normed = USKDLoss(6, 5), USKDLoss(6, 5, feature_norm=norm)
    assert list(plain.state_dict()) == ["head.weight", "head.bias"]
    pairs = [(plain, feature.mean((1, 2))), (normed, norm(feature).mean((1, 2)))]
    for module, pooled in pairs:
        mid_logits = F.linear(pooled, module.head.weight, module.head.bias)
        assert_close(sum(module(feature, student, labels).values()), uskd_loss(mid_logits, student, labels), 1e-6)
    tokens = feature.flatten(1, 2)
    assert_close(plain(tokens, student, labels)["uskd_weak"], plain(feature, student, labels)["uskd_weak"], 1e-6)
    sum(normed(feature, student, labels).values()).backward()
    assert norm.weight.grad.abs().sum() > 0


def test_uskd_module_takes_half_precision_features():
    student, _, labels = make_batch(4, 5, dtype=torch.bfloat16)
    feature = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    sum(USKDLoss(6, 5)(feature, student, labels).values()).backward()
    assert feature.grad.dtype == torch.bfloat16
    assert feature.grad.isfinite().all()


def test_modules_show_their_scalars():
    assert repr(NKDLoss(gamma=1.0, temperature=2.0)) == "NKDLoss(gamma=1.0, temperature=2.0)"
    assert "alpha=0.5, beta=0.2, mu=0.1" in repr(USKDLoss(3, 4, 0.5, 0.2, 0.1))
    assert "alpha=0.3, mask_ratio=0.5" in repr(MGDLoss(3, 4, alpha=0.3, mask_ratio=0.5))
    assert "alpha=0.4, beta=1.2" in repr(SRRLLoss(3, 4, alpha=0.4, beta=1.2))
    assert not list(NKDLoss().parameters())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_labels_that_are_not_numbers_are_no_class_in_a_compiled_loss(temperature):
    """Compiled code does not raise. The loss is NaN, at which training stops."""
    labels = torch.eye(10)[:4]
    labels[1, 3] = math.nan
    compiled = torch.compile(nkd_loss, fullgraph=True, backend="aot_eager")
    student, teacher = torch.randn(2, 4, 10)
    terms = compiled(student, teacher, labels, temperature=temperature)
    assert terms.isnan()
    assert compiled(student, teacher, torch.eye(10)[:4], temperature=temperature).isfinite()


# ---- torch.compile: inductor for one graph of both losses, and the capture of a whole graph for every variant


def both_losses(student, other, labels, temperature=1.0):
    return nkd_loss(student, other, labels, temperature=temperature), uskd_loss(other, student, labels)


@pytest.mark.runs
@pytest.mark.parametrize(
    ("labels", "temperature", "backend"),
    [(HARD, 1.0, "inductor"), (HARD, 3.0, "aot_eager"), (MIXUP, 1.0, "aot_eager"), (MIXUP, 3.0, "aot_eager")],
)
def test_compile(labels, temperature, backend):
    torch._dynamo.reset()
    student, other, labels = make_batch(6, 11, labels=labels, dtype=torch.float32)
    # in this process: starting inductor's pool of workers takes longer than compiling two small graphs
    options = {"compile_threads": 1} if backend == "inductor" else None
    step = torch.compile(both_losses, fullgraph=True, backend=backend, options=options)
    compiled = step(student, other, labels, temperature)
    plain = both_losses(student, other, labels, temperature)
    for a, b in zip(compiled, plain, strict=True):
        assert_close(a, b, 1e-6)
    gradients = (torch.autograd.grad(0.7 * first - 1.3 * second, student)[0] for first, second in (compiled, plain))
    assert_close(*gradients, 1e-6)


@pytest.mark.parametrize("module", [NKDLoss(gamma=1.0), USKDLoss(11, 11, feature_norm=torch.nn.LayerNorm(11))])
def test_compile_module(module):
    torch._dynamo.reset()
    student, other, labels = make_batch(6, 11, dtype=torch.float32)
    arguments = (other, student, labels) if isinstance(module, USKDLoss) else (student, other, labels)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments)
    plain = module(*arguments)
    assert list(compiled) == list(plain)
    inputs = [student, *module.parameters()]
    compiled_gradients, gradients = (torch.autograd.grad(sum(terms.values()), inputs) for terms in (compiled, plain))
    for a, b in zip(compiled_gradients, gradients, strict=True):
        assert_close(a, b, 1e-6)


def test_compiled_double_backward_is_an_error():
    torch._dynamo.reset()
    student, other, labels = make_batch(6, 11)
    loss = torch.compile(nkd_loss, fullgraph=True, backend="aot_eager")(student, other, labels)
    # torch 2.11 gives a gradient without a graph, which can't be differentiated either.
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        torch.autograd.grad(loss, student, create_graph=True)[0].sum().backward()


# ---- errors

X = torch.zeros(8, 10)
Y = torch.zeros(8, dtype=torch.long)
BAD_NKD = {
    "student_logits must be [B, C], got [8, 10, 7, 7]": (torch.zeros(8, 10, 7, 7), X, Y),
    "student_logits must be floating point, got torch.int64": (X.long(), X, Y),
    "student_logits must hold at least one image, got [0, 10]": (X[:0], X[:0], Y[:0]),
    "at least two classes, got [8, 1]": (X[:, :1], X[:, :1], Y),
    "teacher_logits must be [8, 10] like student_logits, got [8, 21841]: load a 10-class teacher": (
        X,
        torch.zeros(8, 21841),
        Y,
    ),
    "teacher_logits must be [8, 10] like student_logits, got [4, 10]: pass the logits of the same batch": (
        X,
        X[:4],
        Y,
    ),
    "teacher_logits must be [8, 10] like student_logits, got [10]": (X, X[0], Y),
    "teacher_logits must be floating point": (X, X.long(), Y),
    "labels must be class indices [8] or mixup labels [8, 10], got [4]": (X, X, Y[:4]),
    "labels must be class indices [8] or mixup labels [8, 10], got [8, 9]": (X, X, X[:, :9]),
    "labels must be class indices [8] or mixup labels [8, 10], got []": (X, X, Y[0]),
    "labels of shape [8] must be integer class indices, got torch.float32: call .long()": (X, X, Y.float()),
    "labels of shape [8] must be integer class indices, got torch.bool": (X, X, Y.bool()),
    "labels of shape [8, 10] must be floating point (mixup), got torch.int64": (X, X, X.long()),
    "labels must be in 0..9, got 10": (X, X, Y + 10),
    "labels must be in 0..9, got -100": (X, X, Y - 100),
}


@pytest.mark.parametrize("message", BAD_NKD)
def test_nkd_errors(message):
    for loss in (nkd_loss, NKDLoss()):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared as plain text)
            loss(*BAD_NKD[message])
        assert message in str(error.value)


@pytest.mark.parametrize("message", [message for message in BAD_NKD if "teacher" not in message])
def test_uskd_errors(message):
    student, _, labels = BAD_NKD[message]
    mid_feature = torch.zeros(len(student), 3)
    for loss in (lambda: uskd_loss(student, student, labels), lambda: USKDLoss(3, 10)(mid_feature, student, labels)):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            loss()
        expected = ["mid_logits must be"] if student.shape[-1] == 1 else []
        assert any(text in str(error.value) for text in [message, *expected])


def test_uskd_mid_logits_errors():
    with pytest.raises(ValueError, match=r"mid_logits must be \[8, 10\] like student_logits, got \[8, 5\]"):
        uskd_loss(X[:, :5], X, Y)
    with pytest.raises(ValueError, match=r"give the auxiliary head num_classes=10"):
        USKDLoss(3, 5)(torch.zeros(8, 3), X, Y)


@pytest.mark.parametrize(
    ("shape", "mend"),
    [
        ([8, 4], "make USKDLoss with in_features=4"),
        ([8, 3, 7, 7], "move the channels last, or average over the positions"),
        ([4, 3], "pass the feature of the same batch"),
        ([8], "pass at least one row per image"),
        ([8, 0, 3], "pass at least one row per image"),
    ],
)
def test_mid_feature_errors(shape, mend):
    expected = rf"mid_feature must be \[8, 3\] or channels last \[8, \.\.\., 3\], got \[.*\]: {mend}"
    with pytest.raises(ValueError, match=expected):
        USKDLoss(3, 10)(torch.zeros(shape), X, Y)


@pytest.mark.parametrize("value", [-0.1, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["gamma", "temperature", "alpha", "beta", "mu"])
def test_hyper_parameter_errors(name, value):
    calls = [lambda: USKDLoss(3, 10, **{name: value}), lambda: uskd_loss(X, X, Y, **{name: value})]
    if name in ("gamma", "temperature"):
        calls = [lambda: NKDLoss(**{name: value}), lambda: nkd_loss(X, X, Y, **{name: value})]
    for call in calls:
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            call()


def test_hyper_parameters_at_their_bounds():
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got 0"):
        NKDLoss(temperature=0)
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        USKDLoss(0, 10)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        USKDLoss(3, 1)
    assert NKDLoss(gamma=0)(X, X, Y)["nkd_non_target"] == 0
    assert uskd_loss(X, X, Y, alpha=0, beta=0, mu=0) == 0


# ---- the package around it


@pytest.mark.parametrize("name", ["nkd", "uskd"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"nkd_hf.losses.{name}"))
    assert result.attempted >= 10
    assert result.failed == 0


@pytest.mark.runs
def test_import_needs_torch_alone():
    code = "import sys, nkd_hf.losses; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "timm", "datasets", "accelerate", "torchvision", "huggingface_hub"} & set(loaded)


@pytest.mark.runs
def test_benchmark_runs(tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[2] / "benchmarks" / "losses.py"
    # Matrices of a few bytes would be copied half a million times to measure the rate.
    options = ["--batch=32", "--classes=1000", "--rounds=1", "--mode=eager", f"--json={tmp_path / 'o.json'}"]
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    for change in ("set_verbosity_error", "disable_progress_bar"):  # of this process
        monkeypatch.setattr(f"transformers.logging.{change}", lambda: None)
    runpy.run_path(str(script), run_name="__main__")
    assert "NKD, x cross-entropy" in capsys.readouterr().out
    tables = json.loads((tmp_path / "o.json").read_text())["tables"]
    assert [table["dtype"] for table in tables] == ["float32", "bfloat16"]
    for table in tables:
        assert table["rows"]["cross-entropy"]["extra_matrices"] >= 1
        assert len(table["bounds"]) == 5
