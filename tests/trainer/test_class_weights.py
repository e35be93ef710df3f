"""Weights of the classes in the task loss."""

import pytest
import torch
import torch.nn.functional as F
from processes import in_processes
from tiny import digits, make_trainer, native_vit, timm_cnn

from nkd_hf import KDLoss, NKDLoss, USKDLoss
from nkd_hf.trainer.distillation_model import DistillationModel
from nkd_hf.trainer.task_loss import cross_entropy

WEIGHTS = torch.tensor([0.2, 3.0, 1.0, 0.0, 1.5, 1.0, 2.0, 1.0, 0.5, 1.0])
PIXELS = torch.stack([sample["pixel_values"] for sample in digits(0, 8)])
INDICES = torch.tensor([0, 1, 1, 4, 6, 0, 8, 2])
ROWS = 0.7 * F.one_hot(INDICES, 10).float() + 0.3 * F.one_hot(INDICES.flip(0), 10).float()


@pytest.mark.parametrize("labels", [INDICES, ROWS], ids=["indices", "rows"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_task_loss_is_that_of_torch_and_the_other_components_do_not_change(labels, smoothing):
    teacher = {"teacher_logits": torch.randn(8, 10, generator=torch.Generator().manual_seed(0))}
    torch.manual_seed(0)
    distillation = {"nkd": NKDLoss(), "uskd": USKDLoss(in_features=32, num_classes=10)}
    plain = DistillationModel(native_vit(), distillation, label_smoothing=smoothing).eval()
    weighted = DistillationModel(plain.student, distillation, label_smoothing=smoothing, class_weights=WEIGHTS).eval()
    before, outputs = (model(PIXELS, labels, teacher) for model in (plain, weighted))
    assert list(outputs["losses"]) == list(before["losses"])
    logits = outputs["logits"].detach().requires_grad_()
    expected = F.cross_entropy(logits, labels, weight=WEIGHTS, label_smoothing=smoothing)
    assert outputs["losses"]["task"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert outputs["losses"]["task"].item() != pytest.approx(before["losses"]["task"].item(), rel=1e-3)
    for name in set(before["losses"]) - {"task"}:
        torch.testing.assert_close(outputs["losses"][name], before["losses"][name])
    gradient = torch.autograd.grad(outputs["losses"]["task"], outputs["logits"])[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_a_model_has_the_weighted_loss_in_training_mode_alone():
    model = DistillationModel(timm_cnn(), {"kd": KDLoss()}, class_weights=WEIGHTS)
    for training in (True, False):
        output = model.train(training)(PIXELS, INDICES)
        expected = F.cross_entropy(output.logits, INDICES, weight=WEIGHTS if training else None)
        torch.testing.assert_close(output.loss, expected)
    assert not any("class_weights" in name for name in model.state_dict())
    # In half precision, the buffer is, too.
    assert cross_entropy(torch.randn(8, 10).half(), INDICES, 0.0, WEIGHTS.half()).dtype == torch.float32


def test_accumulation_is_the_mean_over_micro_batches_and_evaluation_has_no_weights(tmp_path):
    train = digits(0, 16)
    trainer = make_trainer(
        tmp_path, native_vit(), train, digits(16, 48), class_weights=WEIGHTS + 0.1, label_smoothing_factor=0.1,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=1, optim="sgd", learning_rate=1.0,
        max_grad_norm=0.0, train_sampling_strategy="sequential", save_strategy="steps", save_steps=1,
    )  # fmt: skip
    student = native_vit()
    parts = [
        F.cross_entropy(
            student(torch.stack([sample["pixel_values"] for sample in part])).logits,
            torch.tensor([sample["labels"] for sample in part]),
            weight=WEIGHTS + 0.1,
            label_smoothing=0.1,
        )
        for part in (train[:8], train[8:])
    ]
    (sum(parts) / 2).backward()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(parts).item() / 2, rel=1e-5)
    for (name, after), before in zip(
        trainer.student.named_parameters(), native_vit().state_dict().values(), strict=True
    ):
        gradient = student.get_parameter(name).grad
        torch.testing.assert_close(before - after.detach(), gradient, rtol=1e-3, atol=1e-5, msg=name)
    pixels = torch.stack([sample["pixel_values"] for sample in digits(16, 48)])
    labels = torch.tensor([sample["labels"] for sample in digits(16, 48)])
    with torch.no_grad():
        expected = F.cross_entropy(trainer.student.eval()(pixels).logits, labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.runs
def test_processes_weight_their_own_batches(tmp_path):
    def run() -> None:
        trainer = make_trainer(tmp_path, native_vit(), digits(0, 16), class_weights=WEIGHTS + 0.1,
                               per_device_train_batch_size=8, max_steps=1, train_sampling_strategy="sequential")  # fmt: skip
        trainer.train()
        parts = []
        for part in (digits(0, 8), digits(8, 16)):
            pixels = torch.stack([sample["pixel_values"] for sample in part])
            labels = torch.tensor([sample["labels"] for sample in part])
            parts.append(F.cross_entropy(native_vit()(pixels).logits, labels, weight=WEIGHTS + 0.1))
        assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(parts).item() / 2, rel=1e-5)

    assert in_processes(2, run, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("weights", "got"),
    [
        (torch.ones(9), r"a tensor \[9\]"),
        (torch.ones(10, 1), r"a tensor \[10, 1\]"),
        ([1.0] * 10, r"\[1.0, 1.0"),
        (torch.zeros(10), "weights from 0 to 0"),
        (WEIGHTS - 1, "weights from -1 to 2"),
        (WEIGHTS / 0, "weights from nan to nan"),
    ],
)
def test_weights_that_fit_no_student_are_refused(tmp_path, weights, got):
    with pytest.raises(
        ValueError, match=rf"class_weights must be a tensor \[10\] of finite numbers >= 0.*, got {got}"
    ):
        make_trainer(tmp_path, timm_cnn(), class_weights=weights)
