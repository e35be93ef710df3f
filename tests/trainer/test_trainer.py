"""The trainer on tiny real models and scikit-learn's digits."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from tiny import (
    accuracy,
    digits,
    make_trainer,
    native_resnet,
    native_vit,
    timm_cnn,
    timm_deit,
    top1,
)
from torch import nn
from trainer_checks import losses, snapshot
from transformers import Trainer, TrainerCallback, TrainingArguments

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    ImageDataset,
    NKDLoss,
    USKDLoss,
    load_image_dataset,
    train_transform,
)
from nkd_hf.trainer.distillation_model import DistillationModel

STUDENTS = {"timm-cnn": timm_cnn, "timm-deit": timm_deit, "native-vit": native_vit, "native-resnet": native_resnet}
COMPONENTS = {
    NKDLoss: {"task", "nkd_target", "nkd_non_target"},
    USKDLoss: {"task", "uskd_target", "uskd_non_target", "uskd_weak"},
}


@pytest.fixture(scope="module")
def train():
    return digits(0, 128)


@pytest.fixture(scope="module")
def evaluation():
    return digits(128, 192)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.runs
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("loss", [NKDLoss, USKDLoss])
def test_loss_goes_down_and_everything_that_trains_moves(tmp_path, train, evaluation, student, loss):
    student = STUDENTS[student]()
    teacher = timm_cnn(seed=1) if loss is NKDLoss else None
    distillation_loss = NKDLoss() if loss is NKDLoss else USKDLoss(in_features=32, num_classes=10)
    trainer = make_trainer(
        tmp_path, student, train, evaluation, teacher=teacher, distillation_loss=distillation_loss,
        learning_rate=3e-3, max_steps=32, compute_metrics=accuracy,
    )  # fmt: skip
    before = snapshot(trainer.model)
    trainer.train()

    assert sum(losses(trainer)[-4:]) < sum(losses(trainer)[:4])
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    # Attention is blind to the bias of its keys: their gradient is zero in theory, and AdamW moves them all the same.
    still = {name for name in trained if torch.equal(before[name], trainer.model.state_dict()[name])}
    assert not still
    first = trainer.state.log_history[0]
    assert COMPONENTS[loss] <= first.keys()
    assert first["loss"] == pytest.approx(sum(first[name] for name in COMPONENTS[loss]), rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(top1(trainer.student, evaluation))


def test_evaluation_is_the_students_cross_entropy_alone(tmp_path, train, evaluation):
    calls = []
    teacher = timm_cnn(seed=1)
    teacher.register_forward_hook(lambda *_: calls.append("teacher"))
    loss = {"nkd": NKDLoss(), "uskd": USKDLoss(32, 10)}
    trainer = make_trainer(tmp_path, timm_cnn(), train, evaluation, teacher=teacher, distillation_loss=loss,
                           label_smoothing_factor=0.1, compute_metrics=accuracy)  # fmt: skip
    loss["uskd"].head.register_forward_hook(lambda *_: calls.append("head"))
    metrics = trainer.evaluate()
    prediction = trainer.predict(evaluation)
    assert calls == []

    pixels = torch.stack([sample["pixel_values"] for sample in evaluation])
    labels = torch.tensor([sample["labels"] for sample in evaluation])
    with torch.no_grad():
        logits = trainer.student.eval()(pixels).logits
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert prediction.predictions.shape == (64, 10)
    torch.testing.assert_close(torch.tensor(prediction.predictions), logits)

    unlabelled = [{"pixel_values": sample["pixel_values"]} for sample in evaluation]
    assert trainer.predict(unlabelled).predictions.shape == (64, 10)


def test_teacher_is_frozen_in_eval_mode_and_untouched(tmp_path, train):
    teacher = timm_cnn(seed=1).train()
    before = snapshot(teacher)
    seen = []
    teacher.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    trainer = make_trainer(tmp_path, timm_cnn(), train, teacher=teacher, distillation_loss=NKDLoss(), save_strategy="steps",
                           save_steps=2)  # fmt: skip
    trainer.teacher.train()
    trainer.train()
    assert seen == [(False, False)] * 4
    assert_equal(before, snapshot(teacher))
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    # The trainer's teacher is a copy that shares the weights.
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(module.training for module in teacher.modules())
    shared = zip(teacher.parameters(), trainer.teacher.model.parameters(), strict=True)
    assert all(theirs.data_ptr() == ours.data_ptr() for theirs, ours in shared)
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    optimizer = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert set(saved) == {key.removeprefix("timm_model.") for key in trainer.student.state_dict()}
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(list(trainer.student.parameters()))


@pytest.mark.parametrize("student", [timm_deit, native_vit])
def test_accumulation_equals_one_large_batch(tmp_path, train, student):
    runs = {}
    for batch, accumulation in ((16, 1), (4, 4)):
        trainer = make_trainer(
            tmp_path, student(), train, teacher=timm_cnn(seed=1), distillation_loss=NKDLoss(), optim="sgd", learning_rate=0.1,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=5,
        )  # fmt: skip
        trainer.train()
        runs[batch] = trainer
    for large, small in zip(runs[16].state.log_history[:5], runs[4].state.log_history[:5], strict=True):
        for key in {"loss", "grad_norm", *COMPONENTS[NKDLoss]}:
            assert small[key] == pytest.approx(large[key], rel=1e-5), key
    assert_equal(snapshot(runs[16].student), snapshot(runs[4].student), rtol=1e-4, atol=1e-6)


def test_last_accumulation_of_an_epoch_may_be_short(tmp_path, train):
    # 128 images are 32 micro-batches of 4: with 5 a step, the last step of the epoch has 2.
    trainer = make_trainer(tmp_path, timm_deit(), train, teacher=timm_cnn(seed=1), distillation_loss=NKDLoss(),
                           per_device_train_batch_size=4, gradient_accumulation_steps=5, max_steps=7)  # fmt: skip
    trainer.train()
    for entry in trainer.state.log_history[:7]:
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in COMPONENTS[NKDLoss]), rel=1e-5)


def test_components_are_averaged_over_the_logged_steps(tmp_path, train):
    def run(logging_steps):
        trainer = make_trainer(tmp_path, timm_deit(), train, distillation_loss=USKDLoss(32, 10), max_steps=6,
                               logging_steps=logging_steps)  # fmt: skip
        torch.nn.init.zeros_(trainer.model.losses["distillation"].head.weight)
        torch.nn.init.zeros_(trainer.model.losses["distillation"].head.bias)
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    each, every_third = run(1), run(3)
    for name in COMPONENTS[USKDLoss]:
        for i, entry in enumerate(every_third):
            assert entry[name] == pytest.approx(sum(e[name] for e in each[3 * i : 3 * i + 3]) / 3, rel=1e-4), name


def test_no_distillation_loss_is_the_plain_trainer(tmp_path, train):
    ours = make_trainer(tmp_path, native_vit(dropout=0.1), train)
    ours.train()
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, learning_rate=1e-3, max_steps=4, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    plain = Trainer(native_vit(dropout=0.1), args, train_dataset=train)
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)
    assert_equal(snapshot(ours.student), snapshot(plain.model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("student", [lambda: timm_deit(drop_path=0.2), lambda: native_vit(dropout=0.1)])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, train, evaluation, student):
    def build(folder):
        torch.manual_seed(3)
        return make_trainer(folder, student(), train, evaluation, distillation_loss=USKDLoss(32, 10), max_steps=12,
                            save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=3)  # fmt: skip

    whole = build(tmp_path / "whole")
    whole.train()
    resumed = build(tmp_path / "resumed")
    with torch.no_grad():  # what is not loaded would show
        for parameter in resumed.model.parameters():
            parameter.fill_(0.123)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_equal(snapshot(whole.model), snapshot(resumed.model))
    history = [entry for entry in whole.state.log_history if "loss" in entry]
    assert [e for e in resumed.state.log_history if "loss" in e] == history


def test_checkpoint_of_other_losses_is_refused(tmp_path, train):
    trainer = make_trainer(tmp_path, timm_cnn(), train, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    other = make_trainer(tmp_path, timm_cnn(), train, distillation_loss=USKDLoss(32, 10))
    with pytest.raises(ValueError, match=r"has no distillation_losses.safetensors"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("build", [timm_cnn, native_vit])
def test_checkpoint_with_the_classes_in_another_order_is_refused(tmp_path, train, build):
    make_trainer(tmp_path, build(), train, max_steps=1, save_strategy="steps", save_steps=1).train()
    student = build()
    student.config.id2label = dict(enumerate(sorted(map(str, range(10)), reverse=True)))
    other = make_trainer(tmp_path, student, train)
    with pytest.raises(
        ValueError, match=r"the classes must stand in the order .* got '9' for class 0, which is '0' there"
    ):
        other.train(resume_from_checkpoint=True)
    # Other names for them are no other order.
    student.config.id2label = [f"digit {i}" for i in range(10)]
    make_trainer(tmp_path, student, train, max_steps=2).train(resume_from_checkpoint=True)


def test_best_model_is_loaded_with_its_head(tmp_path, train, evaluation):
    heads = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            heads[state.global_step] = snapshot(model)

    trainer = make_trainer(
        tmp_path, timm_cnn(), train, evaluation, distillation_loss=USKDLoss(32, 10), max_steps=6, save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        learning_rate=0.05, callbacks=[Keep()],
    )  # fmt: skip
    trainer.train()
    assert_equal(snapshot(trainer.model), heads[trainer.state.best_global_step])


def test_what_is_saved_is_the_student(tmp_path, train):
    trainer = make_trainer(tmp_path / "run", timm_deit(), train, distillation_loss=USKDLoss(32, 10), save_strategy="steps",
                           save_steps=4)  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "student")
    assert sorted(os.listdir(tmp_path / "student")) == ["config.json", "model.safetensors", "training_args.yaml"]
    saved = safetensors.torch.load_file(tmp_path / "student" / "model.safetensors")
    assert set(saved) == {key.removeprefix("timm_model.") for key in trainer.student.state_dict()}
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert "problem_type" not in config
    head = safetensors.torch.load_file(tmp_path / "run" / "checkpoint-4" / "distillation_losses.safetensors")
    assert set(head) == {"distillation.head.weight", "distillation.head.bias"}


def test_tensorboard_shows_the_components(tmp_path, train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, timm_deit(), train, distillation_loss=USKDLoss(32, 10), report_to="tensorboard")
    trainer.train()
    (file,) = Path(tmp_path).rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    logged = [entry["uskd_weak"] for entry in trainer.state.log_history if "uskd_weak" in entry]
    assert [event.value for event in events.Scalars("train/uskd_weak")] == pytest.approx(logged)


def test_mixup_labels_smoothing_and_evaluation_without_mixing(tmp_path, train, evaluation):
    seen = []

    class Watch(NKDLoss):
        def forward(self, student_logits, teacher_logits, labels):
            seen.append(labels)
            return super().forward(student_logits, teacher_logits, labels)

    trainer = make_trainer(
        tmp_path, native_vit(), train, evaluation, teacher=timm_cnn(seed=1), distillation_loss=Watch(), max_steps=9,
        data_collator=ImageCollator(10, mixup_alpha=0.8, cutmix_alpha=1.0), label_smoothing_factor=0.1,
        per_device_train_batch_size=15, compute_metrics=accuracy, eval_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert [list(labels.shape) for labels in seen] == [[15, 10]] * 8 + [[8, 10]]
    assert any(((labels > 0).sum(1) == 2).any() for labels in seen)
    assert "eval_accuracy" in trainer.evaluate()
    assert trainer.student.config.problem_type is None
    assert isinstance(trainer.data_collator, ImageCollator)
    assert trainer.data_collator.mixup_alpha == 0.8


def test_label_smoothing_is_in_the_task_loss(tmp_path, train):
    batch = {"pixel_values": torch.stack([s["pixel_values"] for s in train[:8]]), "labels": torch.arange(8)}
    trainer = make_trainer(tmp_path, native_vit(), train, label_smoothing_factor=0.1)
    loss = trainer.compute_loss(trainer.model, batch)
    logits = trainer.student(batch["pixel_values"]).logits
    assert loss.item() == pytest.approx(F.cross_entropy(logits, batch["labels"], label_smoothing=0.1).item())


def test_bf16_computes_losses_in_float32(tmp_path, train):
    trainer = make_trainer(tmp_path, timm_deit(), train, teacher=timm_cnn(seed=1), bf16=True,
                           distillation_loss={"nkd": NKDLoss(), "uskd": USKDLoss(32, 10)})  # fmt: skip
    trainer.train()
    assert all(value.dtype == torch.float32 for value in trainer.student.parameters())
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    batch = {"pixel_values": torch.stack([s["pixel_values"] for s in train[:8]]), "labels": torch.arange(8)}
    with trainer.accelerator.autocast():
        assert trainer.compute_loss(trainer.model, batch).dtype == torch.float32


def test_model_init_and_callbacks(tmp_path, train):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append(state.global_step)

    trainer = DistillationTrainer(
        model_init=lambda: timm_deit(),
        args=DistillationTrainingArguments(
            str(tmp_path), max_steps=3, report_to="none", use_cpu=True, save_strategy="no"
        ),
        train_dataset=train,
        distillation_loss=USKDLoss(32, 10),
        callbacks=[Count],
    )
    trainer.train()
    assert steps == [1, 2, 3]


def test_arguments_that_do_not_fit_are_errors(tmp_path, train):
    with pytest.raises(ValueError, match=r"NKDLoss, which asks for a teacher"):
        make_trainer(tmp_path, timm_cnn(), train, distillation_loss=NKDLoss())
    with pytest.raises(ValueError, match=r"none, which asks for no teacher"):
        make_trainer(tmp_path, timm_cnn(), train, teacher=timm_cnn())
    with pytest.raises(ValueError, match=r"must be a module such as NKDLoss\(\)"):
        make_trainer(tmp_path, timm_cnn(), train, teacher=timm_cnn(), distillation_loss=NKDLoss)
    with pytest.raises(ValueError, match=r"args must be DistillationTrainingArguments, got TrainingArguments"):
        DistillationTrainer(timm_cnn(), TrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match=r"is read by no distillation loss"):
        make_trainer(tmp_path, timm_cnn(), train, feature_layer="timm_model.layer2")
    with pytest.raises(ValueError, match=r"got ResNet: for a timm architecture give create_student"):
        make_trainer(tmp_path, timm_cnn().timm_model, train)
    student = timm_cnn()
    with pytest.raises(ValueError, match=r"one and the same model"):
        make_trainer(tmp_path, student, train, teacher=student, distillation_loss=NKDLoss())

    class Odd(nn.Module):
        def forward(self, student_logits, attention_maps):
            return {}

    with pytest.raises(ValueError, match=r"asks for \['attention_maps'\]"):
        make_trainer(tmp_path, timm_cnn(), train, distillation_loss=Odd())


@pytest.mark.parametrize("student", [timm_cnn, timm_deit, native_vit])
def test_gradient_checkpointing_changes_nothing(tmp_path, train, student):
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        loss = USKDLoss(32, 10)
        trainer = make_trainer(
            tmp_path, student(), train, distillation_loss=loss, gradient_checkpointing=checkpointing
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_model_init_starts_the_losses_anew(tmp_path, train):
    args = DistillationTrainingArguments(
        str(tmp_path),
        max_steps=3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        learning_rate=0.1,
    )
    trainer = DistillationTrainer(
        model_init=lambda: timm_deit(), args=args, train_dataset=train, distillation_loss=USKDLoss(32, 10)
    )
    first = trainer.train() and losses(trainer)
    assert (trainer.train() and losses(trainer)) == first


def test_a_trial_of_a_search_trains_with_its_own_values(tmp_path, train):
    """Trainer makes the model of a trial before it sets the trial's values, some of which the model reads."""
    pytest.importorskip("optuna")
    points = [
        {"label_smoothing_factor": 0.3, "learning_rate": 0.01},
        {"label_smoothing_factor": 0.0, "learning_rate": 0.1},
        {"label_smoothing_factor": 0.2, "learning_rate": 0.1, "ema_decay": 0.5},
    ]

    def make(**values):
        args = DistillationTrainingArguments(
            str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no", **values
        )
        torch.manual_seed(0)  # for USKD's head
        return DistillationTrainer(
            args=args, model_init=lambda: timm_deit(), train_dataset=train, eval_dataset=train,
            distillation_loss=USKDLoss(32, 10),
        )  # fmt: skip

    searched = []

    def read(metrics):
        searched.append((losses(trainer), metrics["eval_loss"]))
        return metrics["eval_loss"]

    trainer = make()
    trainer.hyperparameter_search(lambda trial: points[trial.number], read, n_trials=3, backend="optuna")
    for point, found in zip(points, searched, strict=True):
        alone = make(**point)
        alone.train()
        assert found == (losses(alone), alone.evaluate()["eval_loss"])


def test_parts_of_an_image_dataset_are_refused(tmp_path):
    data = load_image_dataset(DataArguments(max_train_samples=32))["train"]
    images = ImageDataset(data, train_transform(DataArguments(), 32, [0.5] * 3, [0.5] * 3))
    for part in (torch.utils.data.Subset(images, range(8)), torch.utils.data.ConcatDataset([images, images])):
        trainer = make_trainer(tmp_path, timm_cnn(), part)
        with pytest.raises(ValueError, match=r"a resumed run would see the augmentation of epoch 0 again"):
            trainer.train()


def test_arguments_that_yaml_has_no_name_for_are_saved(tmp_path):
    trainer = make_trainer(tmp_path, timm_cnn(), learning_rate=np.float64(1e-3), run_name=Path("run"))
    trainer.save_model(tmp_path / "student")
    saved = yaml.safe_load((tmp_path / "student" / "training_args.yaml").read_text())
    assert saved["learning_rate"] == 1e-3
    assert saved["run_name"] == "run"


def test_integer_labels_of_any_size(tmp_path, train):
    batch = {"pixel_values": torch.stack([s["pixel_values"] for s in train[:8]]), "labels": torch.arange(8)}
    trainer = make_trainer(tmp_path, native_vit(), train, distillation_loss=USKDLoss(32, 10))
    expected = trainer.compute_loss(trainer.model, batch)
    batch["labels"] = batch["labels"].int()
    assert trainer.compute_loss(trainer.model, batch) == expected
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_predict_without_labels_through_the_collator(tmp_path, train):
    trainer = make_trainer(tmp_path, timm_cnn(), train, data_collator=ImageCollator(10, mixup_alpha=0.8))
    unlabelled = [{"pixel_values": sample["pixel_values"]} for sample in train[:20]]
    assert trainer.predict(unlabelled).predictions.shape == (20, 10)
    with pytest.raises(ValueError, match=r"the batch must hold pixel_values and labels"):
        trainer.compute_loss(trainer.model, {"pixel_values": torch.zeros(1, 3, 32, 32)})


def test_components_leave_out_the_attempts_of_auto_find_batch_size(tmp_path, train):
    class OutOfMemoryOnce(USKDLoss):
        calls = 0

        def forward(self, mid_feature, student_logits, labels):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(mid_feature, student_logits, labels)

    trainer = make_trainer(tmp_path, timm_deit(), train, distillation_loss=OutOfMemoryOnce(32, 10), logging_steps=2,
                           auto_find_batch_size=True)  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(sum(first[name] for name in COMPONENTS[USKDLoss]), rel=1e-5)


def test_workers_end_with_the_training_and_with_an_evaluation_after_it(tmp_path):
    """Those that end when the trainer is collected as garbage make it wait for five seconds each."""
    alive = []

    class Count(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            alive.append({process.pid for process in multiprocessing.active_children()})

    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 32), digits(32, 48), max_steps=6, eval_strategy="epoch", callbacks=[Count()],
        dataloader_num_workers=1, dataloader_persistent_workers=True,
    )  # fmt: skip
    trainer.train()
    first, second, third = alive
    assert len(first) == 1
    assert second == third  # the evaluation's beside it, and none anew
    assert len(third) == 2
    assert multiprocessing.active_children() == []
    for _ in range(2):
        trainer.evaluate()
        assert multiprocessing.active_children() == []
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert multiprocessing.active_children() == []


def test_two_losses_give_their_components_and_one_task_loss():
    torch.manual_seed(0)
    distillation = {"nkd": NKDLoss(), "uskd": USKDLoss(in_features=32, num_classes=10)}
    model = DistillationModel(timm_cnn(), distillation, label_smoothing=0.1)
    pixels, labels = torch.stack([sample["pixel_values"] for sample in digits(0, 8)]), torch.arange(8)
    teacher_logits = torch.randn(8, 10)
    outputs = model(pixels, labels, {"teacher_logits": teacher_logits})
    assert list(outputs["losses"]) == [
        "task", "nkd_target", "nkd_non_target", "uskd_target", "uskd_non_target", "uskd_weak",
    ]  # fmt: skip
    logits = outputs["logits"].detach()
    nkd = NKDLoss()(logits, teacher_logits, labels)
    expected = {"task": F.cross_entropy(logits, labels, label_smoothing=0.1), **nkd}
    for name, value in expected.items():
        torch.testing.assert_close(outputs["losses"][name].detach(), value, rtol=1e-5, atol=1e-6)


def test_what_is_summed_for_the_log_keeps_no_graph(tmp_path):
    trainer = make_trainer(tmp_path, timm_cnn(), teacher=timm_cnn(seed=1), distillation_loss=NKDLoss())
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    trainer.compute_loss(trainer.model, batch).backward()
    assert trainer.loss_log.sums.keys() == {"task", "nkd_target", "nkd_non_target"}
    assert not any(value.requires_grad for value in trainer.loss_log.sums.values())
