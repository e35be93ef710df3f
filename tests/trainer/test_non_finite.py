"""A loss that is not finite stops the run with a message, or the step is skipped."""

import math

import pytest
import torch
from digit_rows import NAN, Collator, rows_of_digits
from tiny import digits, make_trainer, timm_cnn
from torch import nn
from transformers import TrainerCallback

from nkd_hf import (
    DistillationTrainer,
    ImageCollator,
    NKDLoss,
    USKDLoss,
)
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.errors import NonFiniteLossError
from nkd_hf.trainer.non_finite import LossWatch

TIMED = ("_runtime", "_per_second")


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
    assert message.startswith(
        f"the loss of step {step} is not finite (task=nan, loss=nan, learning_rate=1e+30, grad_norm=nan)."
    )
    assert "The student's logits are not finite for 8 of 8 samples" in message
    assert "the student diverges: lower learning_rate" in message
    sampler = trainer._get_train_sampler()
    order = [index for _, index in sampler][8 * (step - 1) : 8 * step]
    assert f"by their index in the data: {', '.join(map(str, order))}." in message
    assert f"The last good checkpoint is {tmp_path / f'checkpoint-{step - 1}'}. on_non_finite_loss" in message
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
    assert "nkd_target=nan, nkd_non_target=nan, loss=nan, learning_rate=" in message
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
    with pytest.raises(
        NonFiniteLossError, match=r"the gradient norm of step 1 is not finite \(task=2.*, steep=0, "
    ) as error:
        trainer.train()
    assert "its gradient overflows: look for a root" in str(error.value)


class Own(DistillationTrainer):
    """A compute_loss of one's own, that is NaN in its third call."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(inputs["pixel_values"])["logits"].square().mean()
        self.calls += 1
        return loss * (NAN if self.calls == 3 else 1.0)


class OwnOnTop(DistillationTrainer):
    """Adds to what the trainer computes."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        return super().compute_loss(*args, **kwargs) + (NAN if self.calls == 3 else 1.0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Own, r"\(loss=nan, .*overridden compute_loss or compute_loss_func"),
        (OwnOnTop, r"\(task=2.*, loss=nan, .*The logits are finite"),
    ],
)
def test_a_compute_loss_of_ones_own_is_watched(tmp_path, kind, said):
    args = make_trainer(tmp_path, timm_cnn(), max_steps=3, save_strategy="no").args
    trainer = kind(model=timm_cnn(), args=args, train_dataset=digits(0, 32))
    # The last step, which nothing comes after.
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 3 is not finite " + said):
        trainer.train()


def test_a_device_that_answers_late_is_waited_for_at_the_end(tmp_path, monkeypatch):
    """As on a GPU, where the answer of the last step comes after it."""
    ask = LossWatch.fault
    monkeypatch.setattr(LossWatch, "fault", lambda watch, wait=False: ask(watch, wait) if wait else None)
    args = make_trainer(tmp_path, timm_cnn(), max_steps=3, save_strategy="no").args
    with pytest.raises(NonFiniteLossError, match="the loss of step 3 is not finite"):
        Own(model=timm_cnn(), args=args, train_dataset=digits(0, 32)).train()


def test_the_checkpoint_of_another_run_is_not_called_good(tmp_path):
    make_trainer(tmp_path, timm_cnn(), digits(0, 32), max_steps=9, save_strategy="steps", save_steps=9).train()
    args = make_trainer(tmp_path, timm_cnn(), max_steps=3, save_strategy="no").args
    with pytest.raises(NonFiniteLossError, match="No checkpoint was saved before"):
        Own(model=timm_cnn(), args=args, train_dataset=digits(0, 32)).train()


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, caplog):
    keep, step = Keep(), 2  # The average is the weights themselves before.
    order = [index for _, index in EpochSampler(32, 0)]
    broken = order[8 * step + 3]
    trainer = make_trainer(
        tmp_path, timm_cnn(), rows_of_digits(), on_non_finite_loss="skip", data_collator=Collator(broken), ema_decay=0.9,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, callbacks=[keep], logging_steps=4,
    )  # fmt: skip
    trainer.train()
    before, after = keep.states[step - 1], keep.states[step]
    averaged, trained = (before[f"{of}.timm_model.fc.weight"] for of in ("average.module", "student"))
    assert not torch.equal(averaged, trained)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert any(not torch.equal(keep.states[3][name], keep.states[0][name]) for name in before)
    assert all(value.isfinite().all() for value in keep.states[-1].values())
    assert f"the loss of step {step + 1} is not finite (task=nan" in caplog.text
    assert "The step is skipped." in caplog.text
    entry, *_, last = trainer.state.log_history
    assert entry["loss"] == pytest.approx(entry["task"], rel=1e-6)
    assert 1 < entry["loss"] < 5
    # The mean of the three steps that were not skipped.
    assert last["train_loss"] == pytest.approx(entry["loss"], rel=1e-6)


def test_the_log_of_a_run_that_skips_survives_a_resume(tmp_path):
    def run(**kwargs):
        trainer = make_trainer(
            tmp_path, timm_cnn(), rows_of_digits(), on_non_finite_loss="skip", data_collator=Collator(5), logging_steps=1,
            per_device_train_batch_size=4, max_steps=8, save_strategy="steps", save_steps=7, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train(**kwargs)
        return [{k: v for k, v in e.items() if not k.endswith(TIMED)} for e in trainer.state.log_history]

    whole = run()
    assert [entry["step"] for entry in whole[:-1]] != [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(math.isfinite(value) for entry in whole for value in entry.values())
    assert run(resume_from_checkpoint=str(tmp_path / "checkpoint-7")) == whole


def test_a_run_that_only_skips_is_given_up(tmp_path):
    trainer = make_trainer(
        tmp_path, timm_cnn(), rows_of_digits(), on_non_finite_loss="skip", optim="sgd", learning_rate=1e30, max_steps=50,
        max_grad_norm=0.0, data_collator=ImageCollator(10), lr_scheduler_type="constant",
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="It is the last of 10 steps in a row"):
        trainer.train()
    assert trainer.state.global_step < 20


def test_a_loss_that_would_be_ignored_is_refused(tmp_path):
    args = make_trainer(tmp_path, timm_cnn()).args
    with pytest.raises(ValueError, match="Pass a module as one more distillation_loss, or override compute_loss"):
        DistillationTrainer(timm_cnn(), args, compute_loss_func=nn.MSELoss(), distillation_loss=USKDLoss(32, 10))


def test_the_setting_is_checked(tmp_path):
    with pytest.raises(ValueError, match="on_non_finite_loss must be error or skip, got 'stop'"):
        make_trainer(tmp_path, timm_cnn(), on_non_finite_loss="stop")
