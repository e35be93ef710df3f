"""Tf-KD: golden vectors of the official code, a literal reference, edges, errors, and a training without a teacher."""

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
from losses_reference import tfkd_reference
from safetensors.torch import load_file
from tiny import digits, make_trainer, timm_cnn

from nkd_hf import KDLoss, RecipeArguments, TfKDLoss, tfkd_loss
from nkd_hf.trainer.distillation_model import DistillationModel


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("tfkd")])
def test_golden(name, dtype):
    params, golden = GOLDEN[name]["params"], load_file(FIXTURES / "golden" / f"{name}.safetensors")
    student_logits = golden["student_logits"].to(dtype).requires_grad_()
    module = TfKDLoss(**params)
    # The official value has the task loss in it.
    task = module.task_weight * F.cross_entropy(student_logits, golden["labels"])
    loss = task + tfkd_loss(student_logits, golden["labels"], **params)
    loss.backward()
    assert loss.dtype == dtype
    assert_close(loss, golden["loss"], TOLERANCE[dtype])
    assert_close(student_logits.grad, golden["grad_student_logits"], TOLERANCE[dtype])
    assert_close(task + module(student_logits, golden["labels"])["tfkd"], golden["loss"], TOLERANCE[dtype])


@pytest.mark.parametrize("labels", [HARD, MIXUP])
@pytest.mark.parametrize(("batch_size", "num_classes"), [(1, 2), (1, 7), (5, 2), (6, 13)])
def test_equals_reference(batch_size, num_classes, labels):
    student, _, labels = make_batch(batch_size, num_classes, labels=labels)
    for settings in ({}, {"alpha": 0.6, "temperature": 0.5, "multiplier": 3.0}):
        outputs, expected = TfKDLoss(**settings)(student, labels), tfkd_reference(student, labels, **settings)
        assert list(outputs) == ["tfkd"]
        assert_same_with_gradients(outputs.values(), expected, [student])
        assert tfkd_loss(student, labels, **settings).item() == pytest.approx(expected[0].item(), rel=1e-10)


def test_one_hot_rows_are_class_indices():
    student, _, labels = make_batch(4, 7)
    rows = F.one_hot(labels, 7).double()
    assert_same_with_gradients([tfkd_loss(student, rows)], [tfkd_loss(student, labels)], [student], 1e-12)


def test_a_high_temperature_is_label_smoothing():
    """The strength is alpha x multiplier / C: 0.1 of 100 classes."""
    student, _, labels = make_batch(4, 100)
    [gradient] = torch.autograd.grad(tfkd_loss(student, labels, temperature=1e6), student)
    uniform = -0.1 * student.log_softmax(1).mean(1).mean()
    [expected] = torch.autograd.grad(uniform, student)
    assert_close(gradient, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, _, labels = make_batch(4, 50, dtype=torch.float32)
    narrow = student.detach().to(dtype).requires_grad_()
    wide = narrow.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tfkd_loss(narrow, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, tfkd_loss(wide, labels))
    [gradient] = torch.autograd.grad(loss, narrow)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, torch.autograd.grad(tfkd_loss(wide, labels), wide)[0].to(dtype))


def test_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = tfkd_loss(student, torch.tensor([1, 2]))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()
    for value in (math.nan, math.inf):
        assert not tfkd_loss(torch.tensor([[value, 0.0]]), torch.tensor([1])).isfinite()


@pytest.mark.parametrize("labels", [HARD, MIXUP])
def test_compiles(labels):
    torch._dynamo.reset()
    student, _, labels = make_batch(4, 9, labels=labels, dtype=torch.float32)
    compiled = torch.compile(TfKDLoss(), fullgraph=True, backend="aot_eager")(student, labels)["tfkd"]
    plain = tfkd_loss(student, labels)
    assert_close(compiled, plain, 1e-6)
    assert_close(torch.autograd.grad(compiled, student)[0], torch.autograd.grad(plain, student)[0], 1e-6)


def test_errors():
    student, labels = torch.zeros(2, 5), torch.tensor([0, 1])
    for settings, message in (
        ({"alpha": 1.5}, "alpha must be at most 1, got 1.5: 1 - alpha is the weight of the task loss"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
        ({"temperature": 0}, "temperature must be a finite number > 0"),
        ({"multiplier": -1}, "multiplier must be a finite number >= 0"),
    ):
        for call in (lambda kw=settings: TfKDLoss(**kw), lambda kw=settings: tfkd_loss(student, labels, **kw)):
            with pytest.raises(ValueError, match=message):
                call()
    for arguments, message in (
        ((torch.zeros(2, 1), labels), "at least two classes"),
        ((torch.zeros(2, 5, 7, 7), labels), r"student_logits must be \[B, C\]"),
        ((student, labels + 4), r"labels must be in 0\.\.4, got 5"),
        ((student, torch.ones(2, 5)), "rows of weights >= 0 that sum to 1"),
        ((student, labels[:1]), r"labels must be class indices \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            tfkd_loss(*arguments)
    with pytest.raises(TypeError, match="student_logits must be a tensor"):
        tfkd_loss([0.0], labels)


@pytest.mark.parametrize("labels", [HARD, MIXUP])
def test_trains_without_a_teacher_and_weighs_the_task_loss(tmp_path, labels):
    arguments = RecipeArguments(student="resnet18", distillation_loss="tfkd", loss_args={"alpha": 0.3})
    assert not arguments.needs_teacher
    train = digits(0, 32)
    if labels == MIXUP:
        for i, sample in enumerate(train):
            sample["labels"] = 0.7 * F.one_hot(torch.tensor(i % 10), 10) + 0.3 * F.one_hot(torch.tensor(3), 10)
    trainer = make_trainer(tmp_path, timm_cnn(), train, distillation_loss=arguments.build_loss(), max_steps=2)
    trainer.train()
    assert trainer.model.task_weight == pytest.approx(0.7)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["task"] + entry["tfkd"], rel=1e-5)
    assert min(entry["task"], entry["tfkd"]) > 0
    with pytest.raises(ValueError, match="tfkd"):
        RecipeArguments(student="resnet18", distillation_loss="tfkd", loss_args={"beta": 0.3})


def test_weights_of_two_losses_multiply():
    model = DistillationModel(timm_cnn(), {"kd": KDLoss(alpha=0.5), "tfkd": TfKDLoss(alpha=0.2)})
    assert model.task_weight == pytest.approx(0.4)


def test_a_strength_that_smooths_the_labels_away_is_warned_of(tmp_path, caplog):
    """The default multiplier is the official one for 100 classes; with 10 classes it is ten times too strong."""
    assert TfKDLoss().describe_misfit(100) is None
    assert TfKDLoss().describe_misfit(1000) is None
    assert TfKDLoss(alpha=0.5, multiplier=10).describe_misfit(10) is None, "alpha is what the user wants"
    make_trainer(tmp_path, timm_cnn(), digits(0, 32), distillation_loss=TfKDLoss(alpha=0.123), max_steps=1)
    [said] = [record.getMessage() for record in caplog.records if record.name == "nkd_hf.trainer.checks"]
    assert said == (
        "alpha * multiplier / classes of tfkd should be about 0.1, as the official code has it for 100 classes, got 0.123 * 100 / 10 "
        "= 1.2. The labels then count for little. Set loss_args multiplier to the number of classes, 10."
    )
