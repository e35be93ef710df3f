"""Images without labels: the loss of a batch that has some, and trainings with them."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import in_processes
from tiny import digits, make_trainer, native_vit, timm_cnn, top1
from torch.utils.data import DataLoader
from trained import train

from nkd_hf import (
    DataArguments,
    DISTLoss,
    DKDLoss,
    ImageCollator,
    KDLoss,
    MGDLoss,
    NKDLoss,
    RLDLoss,
    SDNKDLoss,
    USKDLoss,
    WSLDLoss,
    WTTMLoss,
    load_image_dataset,
    load_image_processor,
    make_datasets,
)
from nkd_hf.data.student_datasets import make_evaluation_images
from nkd_hf.errors import NonFiniteLossError
from nkd_hf.trainer.batch_norm import update_batch_norm
from nkd_hf.trainer.distillation_model import DistillationModel

PIXELS = torch.stack([sample["pixel_values"] for sample in digits(0, 8)])
LABELS = torch.tensor([0, 1, 1, 4, 6])
ROWS = 0.7 * F.one_hot(LABELS, 10).float() + 0.3 * F.one_hot(LABELS.roll(1), 10).float()


def without_target(logits: torch.Tensor, target: int, temperature: float) -> torch.Tensor:
    return torch.cat([logits[:target], logits[target + 1 :]]).div(temperature).log_softmax(0)


def kd(student: torch.Tensor, teacher: torch.Tensor, target: int) -> torch.Tensor:
    return -0.5 * 16 * (teacher.div(4).softmax(0) * student.div(4).log_softmax(0)).sum()


def nkd(student: torch.Tensor, teacher: torch.Tensor, target: int) -> torch.Tensor:
    at_target = -teacher.softmax(0)[target] * student.log_softmax(0)[target]
    return at_target - 1.5 * (without_target(teacher, target, 1).exp() * without_target(student, target, 1)).sum()


def dkd(student: torch.Tensor, teacher: torch.Tensor, target: int) -> torch.Tensor:
    s, t = student.div(4).softmax(0)[target], teacher.div(4).softmax(0)[target]
    binary = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    rest_s, rest_t = without_target(student, target, 4), without_target(teacher, target, 4)
    return 16 * (binary + 6 * (rest_t.exp() * (rest_t - rest_s)).sum())


@pytest.mark.parametrize(
    ("loss", "of_image"), [(KDLoss(), kd), (NKDLoss(), nkd), (DKDLoss(), dkd)], ids=["kd", "nkd", "dkd"]
)
@pytest.mark.parametrize("labels", [LABELS, ROWS, LABELS[:0]], ids=["indices", "rows", "no labels"])
def test_the_loss_of_a_batch_is_the_mean_over_its_images_with_the_teachers_class_for_a_label(loss, of_image, labels):
    teacher = torch.randn(8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = DistillationModel(timm_cnn().double(), {"loss": loss}, label_smoothing=0.1).eval()
    output = model(PIXELS.double(), labels, {"teacher_logits": teacher}, num_teacher_only=8 - len(labels))
    logits, losses = output["logits"].detach().requires_grad_(), dict(output["losses"])
    known = labels if labels.ndim == 1 else labels.argmax(-1)
    targets = [*known.tolist(), *teacher[len(labels) :].argmax(-1).tolist()]
    expected = sum(map(of_image, logits, teacher, targets)) / 8
    if len(labels):
        task = F.cross_entropy(
            logits[: len(labels)], labels.double() if labels.ndim == 2 else labels, label_smoothing=0.1
        )
        task = loss.task_weight * task
        assert losses["task"].item() == pytest.approx(task.item(), rel=1e-6)
        expected = expected + task
    assert ("task" in losses) == bool(len(labels))
    assert sum(losses.values()).item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = torch.autograd.grad(sum(losses.values()), output["logits"])[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 digits as a folder of one parquet file, without any labels, and with labels that are wrong."""
    images = load_image_dataset(DataArguments())["train"].select(range(40)).cast_column("image", datasets.Image())
    wrong = images.remove_columns("label").add_column("label", np.random.default_rng(0).integers(0, 3, 40))
    folder = tmp_path_factory.mktemp("digits")
    images.remove_columns("label").to_parquet(folder / "plain" / "train.parquet")
    wrong.to_parquet(folder / "wrong" / "train.parquet")
    return folder


def joined(folder: Path, **kwargs) -> dict:
    """Arguments of a trainer: 24 labelled digits, of which each brings one and a half of the folder's."""
    settings = {"unlabeled_ratio": 1.5, "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "max_train_samples": 24} | kwargs
    data = DataArguments(unlabeled_dataset=str(folder), **settings)
    images, evaluation, collator = make_datasets(data, timm_cnn(), seed=0)
    return {"train": images, "evaluation": evaluation, "data_collator": collator}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A training of 5 steps, three of them an epoch, with a checkpoint in the middle of the second one."""
    return run(tmp_path_factory.mktemp("whole"), folder / "plain", save_strategy="steps", save_steps=4)


def run(output: Path, folder: Path, checkpoint: Path | None = None, **kwargs):
    trainer = make_trainer(
        output, timm_cnn(), **joined(folder), teacher=timm_cnn(1), distillation_loss={"nkd": NKDLoss(), "kd": KDLoss()},
        per_device_train_batch_size=8, max_steps=5, **kwargs,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def assert_same_weights(first, second) -> None:
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=0, atol=0)


def test_a_run_resumes_bit_for_bit_in_the_middle_of_an_epoch(folder, whole, tmp_path):
    resumed = run(tmp_path, folder / "plain", Path(whole.args.output_dir, "checkpoint-4"))
    assert_same_weights(resumed, whole)
    assert {"task", "nkd_target", "kd"} <= whole.state.log_history[0].keys()


def test_labels_of_the_images_without_labels_have_no_influence(folder, whole, tmp_path):
    assert_same_weights(run(tmp_path, folder / "wrong"), whole)


def test_the_labelled_images_are_those_of_a_run_without_others(folder, tmp_path):
    arguments = joined(folder / "plain")
    labelled = make_datasets(
        DataArguments(max_train_samples=24, mixup_alpha=0.2, cutmix_alpha=1.0), timm_cnn(), seed=0
    )
    plain = {"train": labelled[0], "evaluation": labelled[1], "data_collator": labelled[2]}
    loaders = [
        make_trainer(
            tmp_path,
            timm_cnn(),
            **each,
            teacher=timm_cnn(1),
            distillation_loss=KDLoss(),
            per_device_train_batch_size=8,
        ).get_train_dataloader()
        for each in (arguments, plain)
    ]
    for batch, other in zip(*loaders, strict=True):
        assert batch["pixel_values"].shape == (8, 3, 32, 32)
        assert batch["unlabeled_pixel_values"].shape == (12, 3, 32, 32)
        assert set(batch["index"][8:].tolist()) <= set(range(-40, 0))
        for name in ("pixel_values", "labels"):
            torch.testing.assert_close(batch[name], other[name], rtol=0, atol=0)
        torch.testing.assert_close(batch["index"][:8], other["index"])


def test_their_order_follows_data_seed_as_that_of_the_labelled_images_does(folder, tmp_path):
    def rows_of_epoch(**seeds) -> tuple[list[int], list[int]]:
        trainer = make_trainer(
            tmp_path, timm_cnn(), **joined(folder / "plain"), teacher=timm_cnn(1), distillation_loss=KDLoss(),
            per_device_train_batch_size=8, **seeds,
        )  # fmt: skip
        batches = [batch["index"].tolist() for batch in trainer.get_train_dataloader()]
        return [row for batch in batches for row in batch[:8]], [row for batch in batches for row in batch[8:]]

    default, seeded, with_data_seed = rows_of_epoch(), rows_of_epoch(seed=5), rows_of_epoch(data_seed=5)
    for name, first, second, other in zip(("labelled", "unlabelled"), with_data_seed, seeded, default, strict=True):
        assert first == second != other, name


@pytest.mark.runs
def test_two_processes_and_accumulation_train_as_one_process_does(folder, tmp_path):
    def train_with(batch_size: int, accumulation: int = 1) -> torch.Tensor:
        plain = joined(folder / "plain", mixup_alpha=0.0, cutmix_alpha=0.0)
        trainer = make_trainer(
            tmp_path / "run", native_vit(), **plain, teacher=timm_cnn(1), distillation_loss=KDLoss(), optim="sgd",
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=3,
        )  # fmt: skip
        trainer.train()
        return torch.tensor([[entry["loss"], entry["task"]] for entry in trainer.state.log_history[:3]])

    def in_one_of_two() -> None:
        losses = train_with(batch_size=4)
        torch.save(losses, tmp_path / f"{os.environ['RANK']}.pt")

    one = train_with(batch_size=8)
    torch.testing.assert_close(train_with(batch_size=4, accumulation=2), one, rtol=1e-4, atol=1e-5)
    assert in_processes(2, in_one_of_two, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    torch.testing.assert_close(torch.load(tmp_path / "0.pt"), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [WSLDLoss(), DISTLoss(), WTTMLoss(), MGDLoss(64, 64), RLDLoss(), SDNKDLoss(scales=(1,))],
    ids=["wsld", "dist", "wttm", "mgd", "rld", "sdnkd"],
)
def test_other_losses_with_a_teacher_take_the_whole_batch(loss, folder, tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), **joined(folder / "plain"), teacher=timm_cnn(1), distillation_loss=loss, max_steps=1
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))
    with torch.no_grad():  # as in an evaluation
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert len(outputs["logits"]) == len(batch["labels"]) == 16


def test_an_image_without_a_label_is_named_where_its_loss_is_not_finite(folder, tmp_path):
    class Breaks(ImageCollator):
        def __call__(self, samples):
            batch = super().__call__(samples)
            batch["unlabeled_pixel_values"][2] = float("nan")
            broken.append(-1 - batch["index"][len(batch["labels"]) + 2].item())
            return batch

    broken = []  # of this batch, and of one that is made ahead
    arguments = joined(folder / "plain") | {"data_collator": Breaks(10)}
    trainer = make_trainer(
        tmp_path, native_vit(), **arguments, teacher=native_vit(1), distillation_loss=KDLoss(), max_steps=1
    )
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    assert f"1 of 40 samples (unlabelled {broken[0]})" in str(error.value)


@pytest.mark.runs
def test_a_training_without_any_label_learns_what_the_teacher_knows(tmp_path):
    data = DataArguments(
        unlabeled_dataset="digits", train_split="none", random_resized_crop=[0.8, 1.0], horizontal_flip=0.0
    )
    images, evaluation, collator = make_datasets(data, timm_cnn(), seed=0)
    labelled = load_image_dataset(DataArguments())["train"]
    labelled = make_evaluation_images(labelled, data, load_image_processor(timm_cnn()))
    teacher = train(timm_cnn(1), list(DataLoader(labelled, 64)), epochs=4)
    trainer = make_trainer(
        tmp_path, timm_cnn(), images, evaluation, data_collator=collator, teacher=teacher, distillation_loss=NKDLoss(),
        per_device_train_batch_size=48, max_steps=100, learning_rate=1e-2, logging_steps=100,
        precise_bn_images=96,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == (0,)
    assert batch["pixel_values"].shape == (0, 3, 32, 32)
    before = trainer.student.timm_model.bn1.running_mean.clone()
    update_batch_norm(trainer)
    assert not torch.equal(trainer.student.timm_model.bn1.running_mean, before)
    trainer.train()
    assert "task" not in trainer.state.log_history[0]
    held_out = [evaluation[row] for row in range(200)]
    assert top1(trainer.student, held_out) > top1(teacher, held_out) - 0.08 > 0.75


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "images without labels need a distillation loss with a teacher, got none"),
        (USKDLoss(64, 10), "images without labels need a teacher, and the distillation loss distillation has none"),
        ({"nkd": NKDLoss(), "uskd": USKDLoss(64, 10)}, "the distillation loss uskd has none"),
    ],
)
def test_losses_that_cannot_learn_without_labels_are_refused(loss, message, folder, tmp_path):
    teacher = timm_cnn(1) if isinstance(loss, dict) else None
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, timm_cnn(), **joined(folder / "plain"), teacher=teacher, distillation_loss=loss)


def test_what_cannot_read_images_without_labels_is_refused(folder, tmp_path):
    arguments = joined(folder / "plain") | {"teacher": timm_cnn(1), "distillation_loss": KDLoss()}
    with pytest.raises(ValueError, match="dispatch_batches of accelerator_config must be false"):
        make_trainer(tmp_path, timm_cnn(), **arguments, accelerator_config={"dispatch_batches": True})
    with pytest.raises(
        ValueError, match="data_collator must be an ImageCollator with images without labels, got function"
    ):
        make_trainer(tmp_path, timm_cnn(), **arguments | {"data_collator": lambda samples: samples})
