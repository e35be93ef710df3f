"""What transformers.Trainer promises, on the trainer: its loss, its model, its arguments, and what it leaves unchanged."""

import copy
import functools
import gc
import inspect
import pickle
import shutil
import threading

import datasets
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from tiny import accuracy, digits, make_trainer, native_vit, timm_cnn, timm_deit
from torch import nn
from trainer_checks import losses, snapshot
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput

from nkd_hf import (
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    ImageDataset,
    NKDLoss,
    SRRLLoss,
    USKDLoss,
    load_image_processor,
    load_teacher,
    processor_transform,
)
from nkd_hf.metrics import compute_metrics

assert_close = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
WEIGHTS = torch.arange(1.0, 11.0)


@pytest.fixture(scope="module")
def train():
    return digits(0, 64)


@pytest.fixture(scope="module")
def evaluation():
    return digits(64, 104)


def settings(folder, **kwargs) -> dict:
    defaults = {"per_device_train_batch_size": 16, "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1, "seed": 0,
                "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}  # fmt: skip
    return {"output_dir": str(folder)} | defaults | kwargs


def ours(cls, folder, model, train=None, evaluation=None, trainer=None, **kwargs):
    args = DistillationTrainingArguments(**settings(folder, **kwargs))
    return cls(model, args, train_dataset=train, eval_dataset=evaluation, **(trainer or {}))


def weighted_mean(student, samples) -> float:
    """The mean over batches of 8 of the weighted loss, as Trainer counts it."""
    with torch.no_grad():
        logits = student.eval()(torch.stack([sample["pixel_values"] for sample in samples])).logits
    labels = torch.tensor([sample["labels"] for sample in samples])
    batches = zip(logits.split(8), labels.split(8), strict=True)
    return torch.stack([F.cross_entropy(*batch, weight=WEIGHTS) for batch in batches]).mean().item()


class Weighted:
    """The loss of the documentation of Trainer, in any trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class WeightedDistillation(Weighted, DistillationTrainer):
    pass


class WeightedTrainer(Weighted, Trainer):
    loss_is_scaled_for_ga = False


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_of_ones_own_trains_saves_and_evaluates_as_in_trainer(tmp_path, train, evaluation, accumulation):
    kwargs = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8, "save_strategy": "steps",
              "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}  # fmt: skip
    own = ours(WeightedDistillation, tmp_path / "own", native_vit(dropout=0.1), train, evaluation, **kwargs)
    own.train()
    args = TrainingArguments(**settings(tmp_path / "plain", **kwargs))
    plain = WeightedTrainer(native_vit(dropout=0.1), args, train_dataset=train, eval_dataset=evaluation)
    plain.train()
    assert losses(own) == pytest.approx(losses(plain), rel=1e-5)
    evaluated = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (own, plain)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    assert own.state.best_global_step == plain.state.best_global_step
    assert own.evaluate()["eval_loss"] == pytest.approx(weighted_mean(own.student, evaluation), rel=1e-5)
    own.save_model(tmp_path / "student")
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert_close(saved.state_dict(), own.student.state_dict())


def test_a_loss_of_ones_own_with_a_moving_average(tmp_path, train, evaluation):
    trainer = ours(WeightedDistillation, tmp_path, timm_cnn(), train, evaluation, ema_decay=0.5, learning_rate=0.05)
    plain = ours(WeightedDistillation, tmp_path, timm_cnn(), train, evaluation, learning_rate=0.05)
    trainer.train(), plain.train()
    # The gradient is that of the trained student, and the average is evaluated.
    assert losses(trainer) == losses(plain)
    assert trainer.student is not trainer.model.student
    assert trainer.evaluate()["eval_loss"] == pytest.approx(weighted_mean(trainer.student, evaluation), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(weighted_mean(plain.student, evaluation), rel=1e-3)


def test_a_loss_of_ones_own_that_does_not_distil_is_said(tmp_path, train, caplog):
    distillation = {"teacher": timm_cnn(1), "distillation_loss": NKDLoss()}
    ours(WeightedDistillation, tmp_path, timm_cnn(), train, trainer=distillation).train()
    said = "compute_loss of WeightedDistillation returned a loss without the distillation losses (distillation)"
    assert caplog.text.count(said) == 1

    class OnTop(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            loss = loss + outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    caplog.clear()
    trainer = ours(OnTop, tmp_path, timm_cnn(), train, train, trainer=distillation)
    trainer.train()
    assert "compute_loss of" not in caplog.text
    logits = torch.tensor(trainer.predict(train).predictions)
    expected = F.cross_entropy(logits, torch.tensor([s["labels"] for s in train])) + logits.square().mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_method_that_is_set_on_the_trainer_counts_as_overridden(tmp_path, train, evaluation):
    trainer = make_trainer(tmp_path, timm_cnn(), train, evaluation)
    trainer.prediction_step = lambda *args, **kwargs: (torch.tensor(5.0), None, None)
    assert trainer.evaluate()["eval_loss"] == 5
    trainer = make_trainer(tmp_path, timm_cnn(), train, evaluation)
    trainer.compute_loss = lambda model, inputs, return_outputs=False, **_: (torch.tensor(3.0), model(**inputs))
    assert trainer.evaluate()["eval_loss"] == 3


def test_an_overridden_prediction_step_decides_the_loss(tmp_path, train, evaluation):
    class Doubled(DistillationTrainer):
        def prediction_step(self, *args, **kwargs):
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            return 2 * loss, logits, labels

    plain = ours(DistillationTrainer, tmp_path, timm_cnn(), train, evaluation[:32]).evaluate()["eval_loss"]
    doubled = ours(Doubled, tmp_path, timm_cnn(), train, evaluation[:32]).evaluate()["eval_loss"]
    assert doubled == pytest.approx(2 * plain, rel=1e-5)


def test_images_without_a_class_are_not_counted(tmp_path, train, evaluation):
    unknown = [sample | {"labels": -100} if i % 3 == 0 else sample for i, sample in enumerate(evaluation)]
    trainer = make_trainer(tmp_path, timm_cnn(), train, unknown, per_device_eval_batch_size=7)
    known = [sample for sample in unknown if sample["labels"] != -100]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate(known)["eval_loss"], rel=1e-5)


def two_columns(samples) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in ("pixel_values", "labels")}
    return batch | {"weights": torch.arange(len(samples)) + 1.0}


def test_two_label_columns(tmp_path, train, evaluation):
    class PerSample(DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = (F.cross_entropy(outputs.logits, inputs["labels"], reduction="none") * inputs["weights"]).sum()
            return (loss, outputs) if return_outputs else loss

    seen = []
    trainer = {"data_collator": two_columns, "compute_metrics": lambda p: seen.append(p.label_ids) or {}}
    kwargs = {"label_names": ["labels", "weights"], "per_device_eval_batch_size": 8}
    own = ours(PerSample, tmp_path, timm_cnn(), train, evaluation, trainer, **kwargs)
    own.train()
    with torch.no_grad():
        logits = own.student.eval()(torch.stack([sample["pixel_values"] for sample in evaluation])).logits
    rows = F.cross_entropy(logits, torch.tensor([sample["labels"] for sample in evaluation]), reduction="none")
    expected = (rows.view(-1, 8) * torch.arange(1.0, 9)).sum(1).mean().item()
    assert own.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    # The trainer's own loss reads the labels alone.
    plain = ours(DistillationTrainer, tmp_path, timm_cnn(), train, evaluation, trainer, **kwargs)
    plain.student.load_state_dict(own.student.state_dict())
    assert plain.evaluate()["eval_loss"] == pytest.approx(rows.mean().item(), rel=1e-5)
    assert [len(columns) for columns in seen] == [2, 2]


@pytest.mark.parametrize("names", [["label"], ["target"], []])
def test_label_names_without_labels(tmp_path, train, names):
    with pytest.raises(
        ValueError, match=r"label_names must contain 'labels', the column that compute_loss reads, got "
    ):
        make_trainer(tmp_path, timm_cnn(), train, label_names=names)
    ours(WeightedDistillation, tmp_path, timm_cnn(), train, label_names=names)  # It reads what it likes.


def test_arguments_of_evaluation(tmp_path, train, evaluation):
    exact = make_trainer(tmp_path, timm_cnn(), train, evaluation).evaluate()["eval_loss"]
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"first": 1.0}

    trainer = make_trainer(
        tmp_path, timm_cnn(), train, {"a": evaluation, "b": evaluation[:8]}, include_for_metrics=["inputs", "loss"],
        compute_metrics=metrics, per_device_eval_batch_size=16,
    )  # fmt: skip
    both = trainer.evaluate()
    assert both["eval_a_loss"] == pytest.approx(exact, rel=1e-5)
    assert both["eval_a_loss"] != both["eval_b_loss"]
    assert seen[0].inputs.shape == (40, 3, 32, 32)
    assert seen[0].losses.shape == (40,)
    trainer = make_trainer(tmp_path, timm_cnn(), train, evaluation, prediction_loss_only=True, compute_metrics=metrics)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(exact, rel=1e-5)
    assert trainer.predict(evaluation).predictions is None
    trainer = make_trainer(tmp_path, timm_cnn(), train, evaluation, per_device_eval_batch_size=20)
    assert trainer.evaluate(ignore_keys=["hidden_states"])["eval_loss"] == pytest.approx(exact, rel=1e-5)
    assert trainer.evaluate(ignore_keys=["logits"])["eval_loss"] == pytest.approx(exact, rel=1e-5)


def test_predictions_are_the_logits_of_a_student_with_several_outputs(tmp_path, train, evaluation):
    student = native_vit()
    student.config.output_hidden_states = True
    trainer = make_trainer(tmp_path, student, train, evaluation, compute_metrics=accuracy)
    assert "eval_accuracy" in trainer.evaluate()
    assert trainer.predict(evaluation).predictions.shape == (40, 10)
    unlabelled = [{"pixel_values": sample["pixel_values"]} for sample in evaluation]
    assert trainer.predict(unlabelled).predictions.shape == (40, 10)


def test_predict_without_labels_and_with_other_columns(tmp_path, train):
    samples = [{"pixel_values": s["pixel_values"], "path": f"{i}.png", "index": i} for i, s in enumerate(train[:20])]

    def collate(rows):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return columns | {
            "pixel_values": torch.stack(columns["pixel_values"]),
            "index": torch.tensor(columns["index"]),
        }

    trainer = make_trainer(tmp_path, timm_cnn(), train, data_collator=collate)
    assert trainer.predict(samples).predictions.shape == (20, 10)


def test_compute_loss_func_is_that_of_trainer(tmp_path, train, evaluation):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(int(num_items_in_batch))
        return F.cross_entropy(outputs.logits, labels, weight=WEIGHTS, reduction="sum") / num_items_in_batch

    kwargs = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 12, "label_smoothing_factor": 0.1}
    runs = []
    for cls, arguments in ((DistillationTrainer, DistillationTrainingArguments), (Trainer, TrainingArguments)):
        seen.clear()
        args = arguments(**settings(tmp_path, **kwargs))
        trainer = cls(native_vit(), args, train_dataset=train, eval_dataset=evaluation, compute_loss_func=loss)
        trainer.train()
        runs.append([*losses(trainer), trainer.evaluate()["eval_loss"], *seen])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    with pytest.raises(
        ValueError, match=r"compute_loss_func must be None with a distillation_loss, which it would replace"
    ):
        ours(DistillationTrainer, tmp_path, timm_cnn(), train,
             trainer={"compute_loss_func": loss, "distillation_loss": USKDLoss(32, 10)})  # fmt: skip


def test_positional_arguments_are_those_of_trainer(tmp_path, train, evaluation):
    names = [
        [name for name, p in inspect.signature(cls.__init__).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for cls in (DistillationTrainer, Trainer)
    ]
    assert names[0] == names[1]
    args = DistillationTrainingArguments(**settings(tmp_path))
    trainer = DistillationTrainer(None, args, None, train, evaluation, None, lambda: timm_cnn(), None, accuracy, [])
    trainer.train()
    assert "eval_accuracy" in trainer.evaluate()


# The module that is trained


def test_the_model_answers_as_the_student_does(tmp_path):
    model = make_trainer(tmp_path, native_vit(), distillation_loss=USKDLoss(32, 10)).model
    pixels, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    outputs = model(
        pixel_values=pixels, labels=labels, index=torch.tensor([4, 5]), position=None, teacher_logits={}, path=["a"]
    )
    assert isinstance(outputs, ModelOutput)
    assert list(outputs) == ["loss", "logits"]
    torch.testing.assert_close(outputs.logits, model.student(pixels).logits)
    assert outputs[0] is outputs.loss is outputs["loss"]
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))
    assert list(model(pixels)) == ["logits"]
    assert len(model(pixels, output_hidden_states=True).hidden_states) == 5
    larger = torch.rand(2, 3, 48, 48)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(larger)
    torch.testing.assert_close(
        model(larger, interpolate_pos_encoding=True).logits,
        model.student(larger, interpolate_pos_encoding=True).logits,
    )
    # A loss of one's own may read other labels than the cross-entropy does.
    assert list(model(pixels, torch.rand(2))) == ["logits"]
    training = model(pixels, labels, {})
    assert training.losses.keys() == {"task", "uskd_target", "uskd_non_target", "uskd_weak"}
    assert training["losses"] is training.losses


def test_a_student_that_returns_tuples(tmp_path, train, evaluation):
    student = timm_cnn()
    student.config.return_dict = False
    trainer = make_trainer(tmp_path, student, train, evaluation, distillation_loss=USKDLoss(32, 10))
    trainer.train()
    plain = make_trainer(tmp_path, timm_cnn(), train, evaluation)
    plain.student.load_state_dict(trainer.student.state_dict())
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_the_loss_of_the_model_is_smoothed_in_training_alone(tmp_path):
    model = make_trainer(tmp_path, native_vit(), label_smoothing_factor=0.1).model
    pixels, labels = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    for training, smoothing in ((True, 0.1), (False, 0.0)):
        outputs = model.train(training)(pixels, labels)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels, label_smoothing=smoothing))


def test_columns_that_the_student_takes_reach_it_in_training(tmp_path, train):
    seen = []
    student = native_vit()
    student.vit.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["interpolate_pos_encoding"]), with_kwargs=True
    )

    def collate(rows):
        batch = {
            name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("pixel_values", "labels")
        }
        batch["pixel_values"] = F.interpolate(batch["pixel_values"], 48)
        return batch | {"interpolate_pos_encoding": True, "path": ["x"] * len(rows)}

    trainer = make_trainer(tmp_path, student, train, train[:8], data_collator=collate, max_steps=1,
                           distillation_loss=USKDLoss(32, 10))  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert seen == [True, True]


def test_columns_survive_when_unused_ones_are_removed(tmp_path):
    rows = digits(0, 4)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    data = datasets.Dataset.from_dict(
        columns | {"index": range(4), "path": list("abcd"), "interpolate_pos_encoding": [False] * 4}
    ).with_format("torch")
    trainer = make_trainer(tmp_path, native_vit(), remove_unused_columns=True)
    kept = trainer._remove_unused_columns(data).column_names
    assert set(kept) == {"pixel_values", "labels", "index", "interpolate_pos_encoding"}


def test_the_model_lends_what_is_the_students(tmp_path, train):
    seen = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.update(config=model.config, device=model.device, dtype=model.dtype, head=model.classifier,
                        embeddings=model.get_input_embeddings(), parameters=model.num_parameters())  # fmt: skip

        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.save_pretrained(tmp_path / "student")

    trainer = make_trainer(tmp_path, native_vit(), train, ema_decay=0.9, max_steps=2, callbacks=[Look()],
                           distillation_loss=USKDLoss(32, 10))  # fmt: skip
    trainer.train()
    student = trainer.model.student
    assert seen["config"] is student.config
    assert (seen["device"], seen["dtype"]) == (student.device, student.dtype)
    assert seen["head"] is student.classifier
    assert seen["embeddings"] is student.get_input_embeddings()
    assert seen["parameters"] == student.num_parameters()
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert_close(saved.state_dict(), trainer.student.state_dict())
    assert not hasattr(trainer.model, "hf_device_map")
    assert not hasattr(trainer.model, "push_to_hub")
    assert not hasattr(trainer.model, "no_such_attribute")
    head = trainer.model.classifier = nn.Linear(32, 10)
    assert student.classifier is head
    assert "classifier.weight" not in trainer.model.state_dict()


def test_the_model_can_be_copied_and_pickled(tmp_path):
    model = make_trainer(tmp_path, timm_cnn(), distillation_loss=USKDLoss(32, 10)).model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(other.state_dict(), model.state_dict())
        assert other.config.num_labels == 10
        assert other.student is not model.student


def test_a_gathered_state_dict_is_saved_without_the_losses(tmp_path):
    model = make_trainer(tmp_path, timm_cnn(), distillation_loss=USKDLoss(32, 10), ema_decay=0.9).model
    state = {name: value + 1 if name.startswith("average.") else value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "student", state_dict=state)
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "student").state_dict()
    for name, value in model.student.state_dict().items():
        torch.testing.assert_close(saved[name], value + 1)


class ByName(DistillationTrainer):
    """Another rate for the head, by the names of the student's parameters."""

    prefix = "classifier"

    def create_optimizer(self, model=None):
        parameters = dict(self.model.named_parameters())
        head = [name for name in parameters if name.startswith(self.prefix)]
        groups = [{"params": [parameters.pop(name) for name in head], "lr": 0.1}, {"params": [*parameters.values()]}]
        self.optimizer = torch.optim.SGD(groups, lr=0.01)
        return self.optimizer


def test_a_group_that_is_empty_is_said(tmp_path, train):
    said = r"got none in group 0 of 2 \(.*'lr': 0.1.*\). The names in trainer.model.named_parameters\(\) begin with 'student.'"
    trainer = ours(ByName, tmp_path, native_vit(), train)
    before = snapshot(trainer.student)
    with pytest.raises(ValueError, match=said):
        trainer.train()
    assert_close(trainer.student.state_dict(), before)
    student = native_vit()
    optimizer = torch.optim.SGD([{"params": [], "lr": 0.1}, {"params": student.parameters()}], lr=0.01)
    with pytest.raises(ValueError, match=said):
        ours(DistillationTrainer, tmp_path, student, train, trainer={"optimizers": (optimizer, None)})
    trainer = ours(ByName, tmp_path, native_vit(), train)
    trainer.prefix = "student.classifier"
    trainer.train()
    # Trainer's own groups, of which one may be empty, are not concerned.
    make_trainer(tmp_path, timm_deit(), train, no_weight_decay=[]).train()


# What is given stays as it is


def test_a_teacher_is_prepared_for_each_trainer_anew(tmp_path, train):
    names = {i: str(9 - i) for i in range(10)}
    teacher = load_teacher(timm_cnn(1, image_mean=[0.1] * 3, image_std=[0.3] * 3))
    student = timm_cnn(image_mean=[0.2] * 3, image_std=[0.3] * 3)
    kwargs = {"teacher": teacher, "distillation_loss": {"nkd": NKDLoss(), "srrl": SRRLLoss(64, 64)}}
    first = make_trainer(tmp_path, student, train, **kwargs)
    pixels = torch.rand(2, 3, 32, 32)
    before, features = first.teacher(pixels), first.teacher.take_features()
    other = timm_cnn(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    other.config.id2label = names
    second = make_trainer(tmp_path, other, train, teacher_dtype="bf16", **kwargs | {"distillation_loss": NKDLoss()})
    third = make_trainer(
        tmp_path, other, train, **kwargs | {"teacher": second.teacher, "distillation_loss": NKDLoss()}
    )
    assert torch.equal(first.teacher(pixels), before)
    assert_close(first.teacher.take_features(), features)
    assert second.teacher.order.tolist() == [*range(9, -1, -1)]
    assert not torch.equal(second.teacher.scale, first.teacher.scale)
    assert third.teacher(pixels).dtype == torch.bfloat16
    assert (teacher.scale, teacher.shift, teacher.order, teacher.dtype) == (None, None, None, torch.float32)
    assert teacher.take_features() == {}


def test_a_prepared_teacher_computes_in_the_precision_of_its_own_trainer(tmp_path, train):
    kwargs = {"teacher": timm_cnn(1), "distillation_loss": NKDLoss()}
    half = make_trainer(tmp_path, timm_cnn(), train, bf16=True, **kwargs)
    whole = make_trainer(tmp_path, timm_cnn(), train, **kwargs)
    again = make_trainer(tmp_path, timm_cnn(), train, **kwargs | {"teacher": half.teacher})
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.teacher(pixels), whole.teacher(pixels))
    assert not torch.equal(again.teacher(pixels), half.teacher(pixels))


def test_a_compiled_teacher_serves_another_trainer(tmp_path, train):
    kwargs = {"teacher": timm_cnn(1, image_mean=[0.1] * 3), "distillation_loss": NKDLoss()}
    compiled = make_trainer(tmp_path, timm_cnn(), train, torch_compile=True, torch_compile_backend="eager", **kwargs)
    other = timm_cnn(image_mean=[0.5] * 3)
    again = make_trainer(tmp_path, other, train, **kwargs | {"teacher": compiled.teacher})
    expected = make_trainer(tmp_path, other, train, **kwargs)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.teacher(pixels), expected.teacher(pixels))


def test_a_student_is_not_its_own_teacher_and_its_copy_is(tmp_path, train):
    student = timm_cnn()
    for teacher in (student, load_teacher(student)):
        with pytest.raises(ValueError, match="must be two models, got one and the same model"):
            make_trainer(tmp_path, student, train, teacher=teacher, distillation_loss=NKDLoss())
    first = make_trainer(tmp_path, student, train, max_steps=1)
    first.train()
    before = snapshot(student)
    born_again = make_trainer(tmp_path, timm_cnn(2), train, teacher=student, distillation_loss=NKDLoss())
    born_again.train()
    assert_close(student.state_dict(), before)
    first.train()  # The student trains on.
    assert not torch.equal(student.timm_model.fc.weight, before["timm_model.fc.weight"])
    assert not born_again.teacher.model.training


def test_hooks_of_the_teacher_fire_where_they_are(tmp_path, train):
    class Collect:
        def __init__(self):
            self.calls = 0
            self.lock = threading.Lock()  # which cannot be copied

        def hook(self, module, inputs, output):
            self.calls += 1

    collect, teacher = Collect(), timm_cnn(1)
    teacher.timm_model.layer4.register_forward_hook(collect.hook)
    make_trainer(tmp_path, timm_cnn(), train, teacher=teacher, distillation_loss=NKDLoss(), max_steps=2).train()
    assert collect.calls == 2


def test_a_teacher_that_cannot_be_copied_is_used_itself(tmp_path, train, caplog):
    class Session(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 10)
            self.lock = threading.Lock()

        def forward(self, pixel_values):
            return self.layer(pixel_values.mean((2, 3)))

    teacher = Session()
    trainer = make_trainer(tmp_path, timm_cnn(), train, teacher=teacher, distillation_loss=NKDLoss())
    assert "Session cannot be copied" in caplog.text
    assert trainer.teacher.model is teacher
    trainer.train()
    assert not teacher.training


def test_a_student_serves_one_trainer_after_another(tmp_path, train):
    student, uskd = timm_cnn(), USKDLoss(32, 10)
    first = make_trainer(tmp_path, student, train, distillation_loss=uskd, max_steps=2)
    first.train()
    kwargs = {"teacher": timm_cnn(1), "distillation_loss": NKDLoss(), "max_steps": 2}
    second = make_trainer(tmp_path, student, train, **kwargs)
    second.train()
    # The first one's tap has kept nothing of the second one's passes.
    with pytest.raises(RuntimeError, match="took no part in the forward pass"):
        first.model.tap.take()
    third = make_trainer(tmp_path, student, train, ema_decay=0.9, **kwargs)
    third.train()
    first.train()
    assert all(torch.isfinite(torch.tensor(losses(trainer))).all() for trainer in (first, second, third))
    hooks = [hook for module in student.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) == 1
    del first, second, third, hooks
    gc.collect()
    assert not any(module._forward_hooks for module in student.modules())


def test_what_is_given_is_not_changed(tmp_path, train, evaluation):
    loss, callbacks = {"nkd": NKDLoss(), "uskd": USKDLoss(32, 10)}, [TrainerCallback()]
    args = DistillationTrainingArguments(**settings(tmp_path, ema_decay=0.9, precise_bn_images=16))
    before, teacher = args.to_dict(), timm_cnn(1).train()
    trainer = DistillationTrainer(
        timm_cnn(), args, train_dataset=train, eval_dataset=evaluation, callbacks=callbacks, teacher=teacher,
        distillation_loss=loss,
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert (args.to_dict(), trainer.args is args) == (before, True)
    assert (len(callbacks), list(loss)) == (1, ["nkd", "uskd"])
    assert all(module.training for module in teacher.modules())


def test_training_twice_is_training_anew(tmp_path, train):
    trainer = make_trainer(tmp_path, timm_cnn(), train, distillation_loss=USKDLoss(32, 10), ema_decay=0.5, optim="sgd")
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == 4
        assert len(losses(trainer)) == 4
        assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(1e-3)


# By hand, and at the end


@pytest.mark.parametrize("kwargs", [{}, {"on_non_finite_loss": "skip"}])
def test_a_training_step_by_hand(tmp_path, train, kwargs):
    trainer = make_trainer(tmp_path, timm_cnn(), train, distillation_loss=USKDLoss(32, 10), **kwargs)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, batch)
    torch.testing.assert_close(loss, trainer.compute_loss(trainer.model.train(), batch).detach())
    assert trainer.model.student.timm_model.fc.weight.grad.abs().sum() > 0
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(
        sum(v for k, v in first.items() if k == "task" or k.startswith("uskd")), rel=1e-5
    )


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda folder: (folder / "model.safetensors").unlink()])
def test_a_best_checkpoint_that_is_gone_is_a_warning(tmp_path, train, evaluation, caplog, damage):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                damage(tmp_path / "checkpoint-2")

    scores = iter([1.0, 0.0, 0.0])
    trainer = make_trainer(
        tmp_path, timm_cnn(), train, evaluation, max_steps=5, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="score", callbacks=[Damage()],
        compute_metrics=lambda prediction: {"score": next(scores)}, greater_is_better=True,
    )  # fmt: skip
    assert trainer.train().global_step == 5
    assert trainer.state.best_global_step == 2
    assert f"The best model could not be loaded from {tmp_path / 'checkpoint-2'}: " in caplog.text


def test_no_limit_of_saves(tmp_path, train):
    trainer = make_trainer(tmp_path, timm_cnn(), train, save_strategy="steps", save_steps=1, save_total_limit=0)
    trainer.train()
    assert len([*tmp_path.glob("checkpoint-*")]) == 4


def test_a_checkpoint_of_trainer_is_named_as_one(tmp_path, train):
    args = TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=3))
    Trainer(native_vit(), args, train_dataset=train).train()
    said = "cannot be resumed: saved by transformers.Trainer, whose checkpoints this trainer does not resume. Pass its model"
    for wanted in (True, str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError, match=said):
            make_trainer(tmp_path, native_vit(), train).train(resume_from_checkpoint=wanted)
    assert (tmp_path / "checkpoint-3").is_dir()


class Stream(torch.utils.data.IterableDataset):
    """Nine samples, and no length."""

    def __iter__(self):
        return iter(digits(0, 9))


def test_a_last_batch_of_one_from_a_stream_without_length_is_said(tmp_path):
    trainer = make_trainer(tmp_path, timm_cnn(), Stream(), per_device_train_batch_size=4)
    with pytest.raises(
        ValueError, match=r"the batch of step 3 must have at least 2 images, got 1. .* per_device_train_batch_size"
    ):
        trainer.train()
    make_trainer(tmp_path, timm_cnn(), Stream(), per_device_train_batch_size=5).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, None),
        ({"save_strategy": "best", "eval_strategy": "steps"}, None),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, None),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "metric_for_best_model": "loss"},
            "trains",
        ),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_before_the_first_step(tmp_path, arguments, message):
    arguments = {"metric_for_best_model": "accuracy", "max_steps": 2, "eval_steps": 2, "save_steps": 2} | arguments
    trainer = make_trainer(tmp_path, native_vit(), digits(0, 32), digits(32, 48), **arguments)
    if message == "trains":
        trainer.train()
        return
    with pytest.raises(ValueError, match=r"got 'accuracy'. Set compute_metrics, or metric_for_best_model to loss"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer.compute_metrics = compute_metrics
    trainer.args.metric_for_best_model = "acuracy"
    with pytest.raises(
        ValueError, match=r"got 'acuracy'. Set metric_for_best_model to loss or accuracy or top5_accuracy"
    ):
        trainer.train()


def test_weights_that_are_not_numbers_are_said_before_the_first_step(tmp_path):
    student = native_vit()
    student.classifier.bias.data[3] = float("nan")
    with pytest.raises(
        ValueError, match=r"the student's weights must be finite, got NaN or infinity in classifier\.bias"
    ):
        make_trainer(tmp_path, student, digits(0, 32)).train()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ({"image": torch.zeros(3, 32, 32)}, "the batch must hold pixel_values, .*, got image, labels"),
        (
            {"pixel_values": torch.zeros(32, 32, 3)},
            r"pixel_values must be \[B, 3, H, W\] of floats, got \[16, 32, 32, 3\]",
        ),
        ({"pixel_values": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "of floats, got .* of torch.uint8. Normalise"),
    ],
)
def test_batches_without_preprocessed_images_are_refused(tmp_path, pixels, message):
    samples = [{**pixels, "labels": i % 10} for i in range(16)]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, native_vit(), samples, remove_unused_columns=False).train()


def test_names_of_losses_and_settings_for_words_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"names of distillation_loss must be text without a dot, got 'a\.b'"):
        make_trainer(tmp_path, native_vit(), teacher=native_vit(1), distillation_loss={"a.b": NKDLoss()})
    with pytest.raises(ValueError, match="neftune_noise_alpha must be None, got 5"):
        make_trainer(tmp_path, native_vit(), neftune_noise_alpha=5)


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_a_missing_label_is_said_before_the_first_step(tmp_path, split):
    """In the data of the evaluation too, which come after an epoch."""
    pictures = [PIL.Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = {
        name: ImageDataset(
            datasets.Dataset.from_dict(
                {"image": pictures, "label": [0, 1, None if name == split else 2, 3] * 2}, features
            ),
            processor_transform(load_image_processor(timm_cnn())),
            training=name == "train",
        )
        for name in ("train", "evaluation")
    }
    trainer = make_trainer(
        tmp_path, timm_cnn(), images["train"], images["evaluation"], data_collator=ImageCollator(10)
    )
    with pytest.raises(ValueError, match=r"row 2 of the \w+ data has no label \(None\)"):
        trainer.train()
    assert trainer.state.global_step == 0
