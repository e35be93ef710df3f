"""SIGTERM to a group of processes with DataLoader workers, as a cluster sends it."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.utils import gather_object
from digit_rows import Collator, rows_of_digits
from distributed_runs import Terminate
from processes import in_a_process, in_processes
from tiny import digits, make_trainer, native_vit, timm_cnn
from transformers import TrainerCallback

from nkd_hf import ImageCollator
from nkd_hf.trainer.checkpoints import find_damage
from nkd_hf.trainer.sigterm import Sigterm


def train_in_a_group(folder: Path) -> None:
    os.setpgid(0, 0)  # with its DataLoader workers, as torchrun starts it
    data = rows_of_digits(64)
    # A sample that one process alone meets makes both skip the step.
    trainer = make_trainer(
        folder / "skip", native_vit(), data, data_collator=Collator(5), on_non_finite_loss="skip",
        per_device_train_batch_size=8, max_steps=4,
    )  # fmt: skip
    trainer.train()
    weights = torch.cat([value.flatten() for value in trainer.model.state_dict().values()])
    both = trainer.accelerator.gather(weights[None])
    assert both.isfinite().all()
    assert torch.equal(both[0], both[1])
    groups = gather_object([f"-{os.getpid()}"])

    class TerminateBoth(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5 and args.process_index == 0:
                # From a process of its own: the workers heed their parent, and a signal to its own group would end it.
                subprocess.run(["kill", "-TERM", "--", *groups], check=True, start_new_session=True)

    trainer = make_trainer(
        folder / "run", native_vit(), data, data_collator=ImageCollator(10), per_device_train_batch_size=8,
        max_steps=2000, dataloader_num_workers=1, dataloader_persistent_workers=True, callbacks=[TerminateBoth()],
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        Path(folder, f"steps-{trainer.args.process_index}").write_text(str(trainer.state.global_step))


@pytest.mark.runs
def test_a_group_of_processes_saves_one_checkpoint_and_ends(tmp_path):
    log = tmp_path / "log"
    assert in_processes(2, lambda: train_in_a_group(tmp_path), log) == [143, 143], log.read_text()[-3000:]
    said = log.read_text()
    assert said.count("SIGTERM was received: the run is saved as") == 1, said[-4000:]
    assert "DataLoader worker" not in said
    assert said.count("is not finite") == 2  # one process knows why, the other that there is a reason
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    steps = {int((tmp_path / f"steps-{rank}").read_text()) for rank in (0, 1)}
    assert steps == {int(checkpoint.name.split("-")[1])}
    assert max(steps) < 10
    assert find_damage(str(checkpoint)) is None
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}


@pytest.mark.parametrize("event", ["on_step_begin", "on_evaluate", "on_save"])
def test_one_that_comes_as_training_ends_is_not_forgotten(tmp_path, event):
    trainer = make_trainer(
        tmp_path, native_vit(), digits(0, 64), digits(64, 80), max_steps=2, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, callbacks=[Terminate(event, 1 + (event == "on_step_begin"))],
    )  # fmt: skip
    with pytest.raises(SystemExit) as exit:
        trainer.train()
    assert exit.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert find_damage(str(tmp_path / "checkpoint-2")) is None


def test_a_trainer_that_was_stopped_trains_again(tmp_path):
    """In the same process, as a notebook or a scheduler that catches SystemExit does."""
    trainer = make_trainer(
        tmp_path, native_vit(), digits(0, 64), max_steps=4, save_strategy="steps", save_steps=1,
        callbacks=[Terminate("on_step_begin", 2)],
    )  # fmt: skip
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 2
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_the_handler_of_others_is_left_alone(tmp_path):
    previous = signal.signal(signal.SIGTERM, lambda *args: None)
    try:
        with Sigterm(world_size=1) as sigterm:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not sigterm.was_received()
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_handler_is_gone_after_training(tmp_path):
    def collator(samples):
        raise KeyError("broken")

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    trainer = make_trainer(tmp_path, timm_cnn(), [{}] * 16, data_collator=collator)
    with pytest.raises(KeyError):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_signal_ends_the_process(tmp_path):
    def work():
        with Sigterm(1):
            os.kill(os.getpid(), signal.SIGTERM)
            print("noted", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            print("alive", flush=True)

    assert in_a_process(work, tmp_path / "log") == -signal.SIGTERM
    assert (tmp_path / "log").read_text().splitlines()[-1] == "noted"
