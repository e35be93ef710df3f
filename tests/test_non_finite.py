"""A loss that is not finite stops the run with a message, or the step is skipped."""

import pytest
import torch
from tiny import digits, make_trainer, timm_cnn
from torch import nn
from transformers import TrainerCallback

from nkd_hf import DataArguments, ImageCollator, ImageDataset, NKDLoss, load_image_dataset, train_transform
from nkd_hf.non_finite import NonFiniteLossError

NAN = float("nan")


def rows_of_digits(num_samples: int = 32) -> ImageDataset:
    data = load_image_dataset(DataArguments(max_train_samples=num_samples))["train"]
    return ImageDataset(data, train_transform(DataArguments(horizontal_flip=0.0), 32, [0.5] * 3, [0.5] * 3))


class Collator(ImageCollator):
    """Makes the batch with one sample a broken one."""

    def __init__(self, index: int, value: float = NAN):
        super().__init__(10)
        self.index, self.value = index, value

    def __call__(self, samples):
        batch = super().__call__(samples)
        batch["pixel_values"][batch["index"] == self.index] = self.value
        return batch


class BrokenTeacher(nn.Module):
    """Gives NaN for the second image of its third batch."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, pixel_values):
        self.calls += 1
        logits = torch.zeros(len(pixel_values), 10)
        if self.calls == 3:
            logits[1, 4] = NAN
        return logits


class Keep(TrainerCallback):
    """Copies of all weights and statistics after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


def test_a_diverging_student_is_named_and_the_good_checkpoint_kept(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), rows_of_digits(), optim="sgd", learning_rate=1e30, max_grad_norm=0.0, max_steps=8,
        save_strategy="steps", save_steps=1, save_total_limit=1, data_collator=ImageCollator(10),
        per_device_train_batch_size=8, lr_scheduler_type="constant",
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    message = str(error.value)
    step = trainer.state.global_step + 1
    assert step > 1
    assert message.startswith(f"the loss of step {step} is not finite (task=nan, learning_rate=1e+30, grad_norm=nan).")
    assert "The student's logits are not finite for 8 of 8 samples" in message
    assert "it diverges; lower learning_rate" in message
    sampler = trainer._get_train_sampler()
    order = [index for _, index in sampler][8 * (step - 1) : 8 * step]
    assert f"by their index in the data: {', '.join(map(str, order))}." in message
    assert f"The last good checkpoint is {tmp_path / f'checkpoint-{step - 1}'};" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step - 1}"]


def test_a_teacher_that_gives_nan_is_told_apart(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), rows_of_digits(), teacher=BrokenTeacher(), distillation_loss=NKDLoss(),
        data_collator=ImageCollator(10), per_device_train_batch_size=8, gradient_accumulation_steps=2,
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    message = str(error.value)
    # The third half step is of the second step.
    assert message.startswith("the loss of step 2 is not finite (task=2.")
    assert "nkd_target=nan, nkd_non_target=nan, learning_rate=" in message
    bad = [index for _, index in trainer._get_train_sampler()][17]
    assert f"The teacher's logits are not finite for 1 of 8 samples ({bad}), while the student's are" in message
    assert "No checkpoint was saved before" in message


def test_broken_pixels_are_of_both(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), rows_of_digits(), teacher=timm_cnn(1), distillation_loss=NKDLoss(),
        data_collator=Collator(5), per_device_train_batch_size=8,
    )  # fmt: skip
    with pytest.raises(
        NonFiniteLossError, match=r"Neither the teacher's logits .* for 1 of 8 samples \(5\) and .*images"
    ):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_a_fault_of_the_step(tmp_path):
    class Steep(nn.Module):
        def forward(self, student_logits, labels):
            # The root of 0: a finite loss of infinite slope.
            return {"steep": (student_logits - student_logits.detach()).abs().sum().sqrt()}

    trainer = make_trainer(tmp_path, timm_cnn(), digits(0, 32), distillation_loss=Steep())
    with pytest.raises(NonFiniteLossError, match=r"the gradient norm of step 1 is not finite \(task=2.*, steep=0, "):
        trainer.train()


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, caplog):
    keep = Keep()
    trainer = make_trainer(
        tmp_path, timm_cnn(), rows_of_digits(), on_non_finite_loss="skip", data_collator=Collator(5), ema_decay=0.9,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, callbacks=[keep], logging_steps=4,
    )  # fmt: skip
    trainer.train()
    order = [index for _, index in trainer._get_train_sampler()]
    step = order.index(5) // 8
    assert 0 < step < 4, "choose another sample"
    before, after = keep.states[step - 1], keep.states[step]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert any(not torch.equal(keep.states[3][name], keep.states[0][name]) for name in before)
    assert all(value.isfinite().all() for value in keep.states[-1].values())
    assert f"the loss of step {step + 1} is not finite (task=nan" in caplog.text
    assert "The step is skipped." in caplog.text
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["task"], rel=1e-6)
    assert 1 < entry["loss"] < 5


def test_a_run_that_only_skips_is_given_up(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), rows_of_digits(), on_non_finite_loss="skip", optim="sgd", learning_rate=1e30, max_steps=50,
        max_grad_norm=0.0, data_collator=ImageCollator(10), lr_scheduler_type="constant",
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="It is the last of 10 steps in a row"):
        trainer.train()
    assert trainer.state.global_step < 20


def test_the_setting_is_checked(tmp_path):
    with pytest.raises(ValueError, match="on_non_finite_loss must be error or skip, got 'stop'"):
        make_trainer(tmp_path, timm_cnn(), on_non_finite_loss="stop")
