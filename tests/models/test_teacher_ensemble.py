"""Several teachers as one: the mean of their probabilities, each with its own pixels, precision and classes."""

import math

import pytest
import torch
from tiny import DIGITS, digits, make_trainer, native_resnet, timm_cnn, timm_deit
from torch import nn
from transformers import ViTImageProcessor

from nkd_hf import (
    DISTLoss,
    DKDLoss,
    KDLoss,
    MGDLoss,
    NKDLoss,
    RLDLoss,
    SRRLLoss,
    WSLDLoss,
    WTTMLoss,
    create_student,
    load_teacher,
)
from nkd_hf.models.preprocessing import read_preprocessing
from nkd_hf.models.saving import save_student
from nkd_hf.models.teacher import Teacher

PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def mean_of(members, weights, pixels=PIXELS) -> torch.Tensor:
    """The weighted mean of the probabilities in float64."""
    parts = [member(pixels).double().softmax(-1) * weight for member, weight in zip(members, weights, strict=True)]
    return sum(parts) / sum(weights)


def biased_cnn(seed: int, scale: float = 1.0):
    """A CNN whose probabilities are far from equal."""
    model = timm_cnn(seed)
    nn.init.normal_(model.timm_model.fc.bias, std=scale, generator=torch.Generator().manual_seed(seed))
    return model


def test_softmax_of_the_logits_is_the_weighted_mean():
    models = [biased_cnn(1), biased_cnn(2, 50.0), timm_deit(3)]  # the second one's probabilities are 0 and 1
    members = [load_teacher(model) for model in models]
    for weights in ([3, 1, 1], [1e-6, 1.0, 2.5], None):
        ensemble = load_teacher(models, weights=weights)
        logits = ensemble(PIXELS)
        assert isinstance(ensemble, Teacher)
        assert logits.dtype == torch.float32
        assert not logits.requires_grad
        assert logits.isfinite().all()
        expected = mean_of(members, weights or [1, 1, 1])
        torch.testing.assert_close(logits.double().softmax(-1), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(logits.double().exp(), expected, rtol=0, atol=1e-6)
    assert ensemble.weights == [1 / 3] * 3
    assert torch.equal(
        load_teacher(models[:2], weights=[3, 1])(PIXELS), load_teacher(models[:2], weights=[0.75, 0.25])(PIXELS)
    )


def test_the_order_of_two_does_not_matter():
    first, second = biased_cnn(1), biased_cnn(2)
    swapped = load_teacher([second, first], weights=[1, 3])(PIXELS)
    assert torch.equal(load_teacher([first, second], weights=[3, 1])(PIXELS), swapped)


def test_an_ensemble_in_a_list_counts_as_its_members():
    first, second, third = (biased_cnn(seed) for seed in (1, 2, 3))
    nested = load_teacher([load_teacher([first, second], weights=[3, 1]), third], weights=[1, 1])
    assert nested.weights == [0.375, 0.125, 0.5]
    assert torch.equal(nested(PIXELS), load_teacher([first, second, third], weights=[3, 1, 4])(PIXELS))


def test_a_class_that_a_member_masks():
    class Masked(nn.Module):
        def forward(self, pixel_values):
            return torch.tensor([0.0, 1.0, -math.inf]).expand(len(pixel_values), 3)

    both = load_teacher([Masked(), Masked()])(PIXELS)
    torch.testing.assert_close(both.exp(), Masked()(PIXELS).softmax(-1))
    assert (both[:, 2] == -math.inf).all()


def test_each_member_has_its_own_pixels_precision_and_classes():
    names = [str(9 - i) for i in range(10)]
    backwards = create_student("resnet18", id2label=names, image_size=48, image_mean=[0.1, 0.2, 0.3])
    half = load_teacher(biased_cnn(1)).for_inference("bf16")
    members = [load_teacher(backwards), half]
    pixels = read_preprocessing(timm_cnn(image_mean=[0.4] * 3))
    ensemble = load_teacher([backwards, half], weights=[1, 2]).align(pixels, DIGITS)
    seen = []
    for member in ensemble.members:
        member.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = ensemble(PIXELS)
    assert [(each.dtype, tuple(each.shape[-2:])) for each in seen] == [
        (torch.float32, (48, 48)),
        (torch.bfloat16, (32, 32)),
    ]
    alone = [member.copy().align(pixels, DIGITS) for member in members]
    torch.testing.assert_close(logits.double().softmax(-1), mean_of(alone, [1, 2]), rtol=0, atol=1e-6)
    # One tensor for each member: here, as its own preprocessing makes it.
    for member in ensemble.members:
        member.align(member.preprocessing, DIGITS)
    own = [torch.randn(2, 3, 48, 48), torch.randn(2, 3, 32, 32)]
    expected = [member.align(member.preprocessing, DIGITS)(each) for member, each in zip(members, own, strict=True)]
    assert torch.equal(ensemble(*own), ensemble.combine(expected))


def test_a_copy_is_prepared_on_its_own():
    ensemble = load_teacher([biased_cnn(1), biased_cnn(2)]).align(read_preprocessing(timm_cnn()), DIGITS)
    before = ensemble(PIXELS)
    names = {i: str(9 - i) for i in range(10)}
    clone = ensemble.copy().align(read_preprocessing(timm_cnn()), names).for_inference("bf16")
    torch.testing.assert_close(clone(PIXELS), before.flip(1), rtol=0.05, atol=0.05)
    assert clone.weights == ensemble.weights
    assert torch.equal(ensemble(PIXELS), before)
    assert not any(module.training for module in clone.train().modules())


@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [1, 0], [-1, -1], [1, math.nan], [1, math.inf], [1e308, 1e308], [1e-320, 1e300]]
)
def test_weights_must_be_positive_and_one_for_each_teacher(weights):
    with pytest.raises(ValueError, match=r"weights must be 2 positive numbers, one for each teacher, got \[.*Omit it"):
        load_teacher([timm_cnn(1), timm_cnn(2)], weights=weights)


def test_a_wrong_list_is_said_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="an ensemble must have one teacher at least"):
        load_teacher([])
    with pytest.raises(ValueError, match=r"weights must be omitted for one teacher, got \[1\]"):
        load_teacher(timm_cnn(1), weights=[1])
    with pytest.raises(ValueError, match="processing_class must be omitted for a list of teachers"):
        load_teacher([native_resnet()], processing_class=ViTImageProcessor())
    with pytest.raises(ValueError, match=r"teacher '.*nothing' "):
        load_teacher([timm_cnn(1), str(tmp_path / "nothing")])


def test_a_member_of_other_classes_is_named(tmp_path):
    save_student(
        create_student("resnet18", id2label=["cat", "dog"], image_size=32, model_args={"channels": [4] * 4}),
        tmp_path / "pets",
    )
    teachers = [timm_cnn(1), str(tmp_path / "pets")]
    with pytest.raises(ValueError, match="pets has 2 classes and the student 10"):
        make_trainer(tmp_path, timm_cnn(), digits(0, 32), teacher=teachers, distillation_loss=NKDLoss())

    class Two(nn.Module):
        def forward(self, pixel_values):
            return pixel_values.mean((2, 3))[:, :2]

    with pytest.raises(ValueError, match=r"must have the same classes, got 10 of TimmWrapper.*, 2 of Two"):
        load_teacher([timm_cnn(1), Two()])(PIXELS)


@pytest.mark.parametrize(
    "loss", [NKDLoss(), KDLoss(), DKDLoss(), WSLDLoss(), DISTLoss(), WTTMLoss(), RLDLoss()], ids=lambda loss: loss.name
)
def test_every_loss_of_logits_trains(tmp_path, loss):
    trainer = make_trainer(
        tmp_path, timm_cnn(), digits(0, 64), teacher=[timm_cnn(1), timm_deit(2)], distillation_loss=loss, max_steps=2
    )
    before = [parameter.clone() for parameter in trainer.teacher.parameters()]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert all(torch.equal(*pair) for pair in zip(before, trainer.teacher.parameters(), strict=True))


@pytest.mark.parametrize("loss", [MGDLoss(64, 64), SRRLLoss(64, 64)], ids=["mgd", "srrl"])
def test_a_loss_that_reads_layers_is_refused(tmp_path, loss):
    with pytest.raises(
        ValueError, match=r"losses read teacher_.* of one teacher, got an ensemble of .*Pass one"
    ) as error:
        make_trainer(tmp_path, timm_cnn(), digits(0, 32), teacher=[timm_cnn(1), timm_cnn(2)], distillation_loss=loss)
    assert "\n" not in str(error.value)


def test_the_student_is_no_member(tmp_path):
    student = timm_cnn()
    with pytest.raises(ValueError, match="teacher and student must be two models"):
        make_trainer(tmp_path, student, digits(0, 32), teacher=[timm_cnn(1), student], distillation_loss=NKDLoss())


def test_a_training_under_the_trainers_precision(tmp_path):
    """The trainer's precision is each member's, and the mean is of float32."""
    options = {"teacher_dtype": "bf16", "bf16": True}
    trainer = make_trainer(
        tmp_path,
        timm_cnn(),
        digits(0, 32),
        teacher=[biased_cnn(1), biased_cnn(2)],
        distillation_loss=KDLoss(),
        max_steps=1,
        **options,
    )
    assert [member.dtype for member in trainer.teacher.members] == [torch.bfloat16] * 2
    assert trainer.teacher(PIXELS).dtype == torch.float32
    trainer.train()


def test_a_training_that_is_stopped_goes_on_bit_for_bit(tmp_path):
    def train(folder, checkpoint=None, **kwargs):
        teachers = [biased_cnn(1), biased_cnn(2)]
        trainer = make_trainer(
            folder, timm_cnn(), digits(0, 64), teacher=teachers, distillation_loss=NKDLoss(), max_steps=4, **kwargs
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.student.state_dict()

    whole = train(tmp_path / "run", save_strategy="steps", save_steps=2)
    resumed = train(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
