"""What is no classification with one class an image is refused before anything is trained."""

import pytest
import torch
import torch.nn.functional as F
from tiny import digits, make_trainer, native_vit, timm_cnn
from torch import nn

import nkd_hf.trainer.distillation_model
import nkd_hf.trainer.image_losses
from nkd_hf import (
    DistillationTrainer,
    DistillationTrainingArguments,
    DISTLoss,
    DKDLoss,
    KDLoss,
    NKDLoss,
    RLDLoss,
    TfKDLoss,
    USKDLoss,
    WSLDLoss,
    WTTMLoss,
    create_student,
    load_teacher,
)
from nkd_hf.data.label_check import LabelCheck
from nkd_hf.models.teacher import Teacher


class OwnLoss(nn.Module):
    """Takes labels, and looks at nothing."""

    def forward(self, student_logits, labels):
        return {"own": student_logits.square().mean()}


LOSSES = {
    "none": lambda: None,
    "own": OwnLoss,
    "nkd": NKDLoss,
    "uskd": lambda: USKDLoss(in_features=32, num_classes=10),
    "tfkd": TfKDLoss,
    "kd": KDLoss,
    "dkd": DKDLoss,
    "wsld": WSLDLoss,
    "dist": DISTLoss,
    "wttm": WTTMLoss,
    "rld": RLDLoss,
}
TEACHERLESS = ("none", "own", "uskd", "tfkd")


def with_labels(labels) -> list[dict]:
    return [sample | {"labels": label} for sample, label in zip(digits(0, 32), labels, strict=True)]


def trainer_of(folder, loss: str, train, **kwargs):
    teacher = None if loss in TEACHERLESS else timm_cnn(seed=1)
    return make_trainer(folder, timm_cnn(), train, train, teacher=teacher, distillation_loss=LOSSES[loss](), **kwargs)


BAD = {
    "multi-hot": ([torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0, 0, 0])] * 32, r"rows of weights >= 0 that sum to 1, .* 3 to 3"),
    "bf16": ([torch.tensor([1.0, 1] + [0] * 8).bfloat16()] * 32, "sums from 2 to 2"),
    "fp16": ([torch.tensor([0.5] * 10).half()] * 32, "sums from 5 to 5"),
    "none at all": ([torch.zeros(10)] * 32, "sums from 0 to 0"),
    "nan": ([torch.full((10,), torch.nan)] * 32, "sums from nan to nan"),
    "negative": ([torch.tensor([2.0, -1] + [0] * 8)] * 32, "a smallest weight of -1"),
    "int multi-hot": ([torch.tensor([1, 1] + [0] * 8)] * 32, "must be floating point"),
    "regression": ([0.5] * 32, "must be integer class indices"),
    "too large": ([10] * 32, r"must be in 0..9, got 10"),
    "other classes": ([torch.eye(12)[0]] * 32, r"mixup labels \[\d+, 10\], got \[\d+, 12\]"),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("visible", [True, False])
def test_labels_of_no_loss_go_unchecked(tmp_path, loss, visible, monkeypatch):
    if not visible:
        # As on a GPU, where the values can't be looked at without waiting for it: the collator has looked before.
        for module in (nkd_hf.trainer.distillation_model, nkd_hf.trainer.image_losses):
            monkeypatch.setattr(module, "check_labels", lambda *args, **kwargs: None)
    kinds = BAD if loss == "none" and visible else ("multi-hot", "too large")
    for labels, message in (BAD[kind] for kind in kinds):
        trainer = trainer_of(tmp_path, loss, with_labels(labels))
        before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
        for run in (trainer.train, trainer.evaluate):
            with pytest.raises(ValueError, match=message):
                run()
        for name, value in trainer.student.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixtures_pass_in_every_precision(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    ratios = torch.rand(32, 1, generator=generator).to(dtype)
    smooth = [F.one_hot(torch.randint(10, (32,), generator=generator), 10).to(dtype) * 0.9 + 0.01 for _ in range(2)]
    labels = ratios * smooth[0] + (1 - ratios) * smooth[1]
    assert labels.dtype == dtype
    trainer = trainer_of(tmp_path, "none", with_labels(labels), max_steps=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    many = torch.full((4, 1000), 1e-4).to(dtype)
    many[:, 7] = 0.9001
    LabelCheck(lambda rows: {"labels": torch.stack(rows)}, 1000)(list(many))


def test_images_without_a_label_are_left_to_losses_that_ignore_them(tmp_path):
    labels = torch.randint(10, (32,))
    labels[::4] = -100
    for loss in ("none", "kd"):
        trainer = trainer_of(tmp_path, loss, with_labels(labels.tolist()), max_steps=2)
        trainer.train()
    trainer = trainer_of(tmp_path, "nkd", with_labels(labels.tolist()))
    with pytest.raises(ValueError, match=r"must be in 0..9, got -100"):
        trainer.train()


def test_a_loss_of_ones_own_may_take_other_labels(tmp_path):
    class MultiLabel(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(inputs["pixel_values"])["logits"]
            loss = F.binary_cross_entropy_with_logits(logits, inputs["labels"])
            return (loss, {"logits": logits}) if return_outputs else loss

    args = DistillationTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows = with_labels(torch.ones(32, 10))
    trainer = MultiLabel(model=timm_cnn(), args=args, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
@pytest.mark.parametrize("build", [timm_cnn, native_vit])
def test_a_model_for_another_problem_is_refused(tmp_path, build, problem_type):
    train, model = digits(0, 32), build()
    model.config.problem_type = problem_type
    model.save_pretrained(tmp_path / "model")
    message = f"must be single_label_classification, got '{problem_type}'"
    for student in (model, create_student(str(tmp_path / "model"))):
        for loss in (None, OwnLoss()):
            with pytest.raises(ValueError, match=f"the problem_type of the student {message}"):
                make_trainer(tmp_path, student, train, distillation_loss=loss)
        with pytest.raises(ValueError, match=rf"the problem_type of the teacher \(\w+\) {message}"):
            make_trainer(tmp_path, build(), train, teacher=student, distillation_loss=NKDLoss())
    with pytest.raises(ValueError, match=f"the problem_type of the student {message}"):
        DistillationTrainer(
            model_init=lambda: model,
            args=DistillationTrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=train,
        )
    with pytest.raises(ValueError, match=rf"the problem_type of the teacher \(teacher\) {message}"):
        Teacher(model)
    with pytest.raises(ValueError, match=rf"the problem_type of the teacher \(\w+\) {message}"):
        load_teacher(model)
    model.config.problem_type = "single_label_classification"
    make_trainer(tmp_path, model, train)


def test_a_model_of_one_class_is_refused(tmp_path):
    one = create_student("resnet18", num_labels=1, image_size=32, model_args={"channels": [8, 16, 32, 64]})
    with pytest.raises(ValueError, match="the student must have two classes or more, got 1"):
        make_trainer(tmp_path, one, digits(0, 32))
