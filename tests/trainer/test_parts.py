"""The parts of the trainer that hold its state, each on its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from transformers import TrainerState

from nkd_hf import NonFiniteLossError
from nkd_hf.errors import CheckpointError
from nkd_hf.trainer.checkpoint_writer import CheckpointWriter, find_sums
from nkd_hf.trainer.checkpoints import UNFINISHED, find_damage
from nkd_hf.trainer.loaders import configure_loaders
from nkd_hf.trainer.loss_log import LossLog
from nkd_hf.trainer.non_finite import MAX_SKIPPED, StepGuard

NAN = float("nan")


def test_the_log_averages_over_steps_and_processes_and_begins_again():
    log = LossLog()
    for value in (1.0, 3.0, 5.0, 7.0):  # two steps of two micro-batches
        log.add({"task": torch.tensor(value, requires_grad=True), "nkd": torch.tensor(2 * value)}, share=0.5)
    assert not log.sums["task"].requires_grad
    other = torch.tensor([[20.0, 0.0]])  # what another process has summed up
    assert log.means(lambda sums: torch.cat([sums, other])) == {"task": 7.0, "nkd": 4.0}
    assert log.means(lambda sums: sums) == {}
    log.add({"task": torch.tensor(4.0)}, share=1.0)
    assert log.means(lambda sums: sums) == {"task": 4.0}


def test_a_log_goes_on_from_its_record_and_a_copy_stays_as_it_was():
    log = LossLog(skipped_steps=2)
    log.add({"task": torch.tensor(4.0)}, share=1.0)
    before = log.copy()
    log.add({"task": torch.tensor(8.0)}, share=1.0)
    resumed = LossLog()
    resumed.load(json.loads(json.dumps(log.state())), torch.device("cpu"))
    assert resumed.skipped_steps == 2
    assert resumed.means(lambda sums: sums) == log.means(lambda sums: sums) == {"task": 6.0}
    assert before.means(lambda sums: sums) == {"task": 4.0}


def step(guard: StepGuard, number: int, loss: float, grad_norm: float = 1.0):
    guard.begin(lambda: f"before step {number}")
    guard.note({"task": torch.tensor(loss)}, torch.full((2, 3), loss), None)
    guard.add(number, 0.1, torch.tensor(loss), index=torch.tensor([5, 6]))
    return guard.close_step(number, grad_norm, scaled=False)


def test_a_guard_that_skips_gives_back_the_state_before_the_step():
    guard = StepGuard(skips=True)
    assert step(guard, 1, 0.5) is None
    assert step(guard, 2, NAN) == "before step 2"
    assert guard.step_was_skipped
    assert step(guard, 3, 0.5, grad_norm=float("inf")) == "before step 3"
    assert step(guard, 4, 0.5) is None
    assert not guard.step_was_skipped
    for number in range(5, 4 + MAX_SKIPPED):
        step(guard, number, NAN)
    with pytest.raises(NonFiniteLossError, match=f"It is the last of {MAX_SKIPPED} steps in a row. No checkpoint"):
        step(guard, 4 + MAX_SKIPPED, NAN)


def test_a_step_of_accumulation_is_undone_to_its_first_micro_batch():
    guard = StepGuard(skips=True)
    guard.begin(lambda: "first")
    guard.add(1, 0.1, torch.tensor(1.0), None)
    guard.begin(lambda: "second")
    guard.add(1, 0.1, torch.tensor(NAN), None)
    assert guard.close_step(1, 1.0, scaled=False) == "first"


def test_a_guard_that_stops_names_step_samples_and_the_last_good_checkpoint():
    guard = StepGuard(skips=False, last_good_checkpoint="run/checkpoint-5")
    step(guard, 6, 0.5)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss of step 7 is not finite .*: 5, 6. The last good .*checkpoint-5"
    ):
        step(guard, 7, NAN)
    assert guard.take_note() is None


def write(folder: Path, number: int, content: str, writer: CheckpointWriter) -> str:
    state = TrainerState(global_step=number)
    with writer.write(str(folder), state, lambda: {"loss": number}) as checkpoint:
        assert writer.is_writing
        unfinished = folder / UNFINISHED / f"checkpoint-{number}"
        unfinished.mkdir(parents=True)
        state.save_to_json(str(unfinished / "trainer_state.json"))
        (unfinished / "model.safetensors").write_text(content)
        if content == "fail":
            raise OSError(28, "No space left on device")
    return checkpoint


def test_a_checkpoint_takes_its_place_when_it_is_whole(tmp_path):
    writer = CheckpointWriter()
    checkpoint = write(tmp_path, 3, "first", writer)
    assert (find_damage(checkpoint), find_sums(checkpoint, 1, 0), find_sums(checkpoint, 2, 0)) == (
        None,
        {"loss": 3},
        None,
    )
    assert write(tmp_path, 3, "second", writer) == checkpoint
    assert Path(checkpoint, "model.safetensors").read_text() == "second"
    with pytest.raises(CheckpointError, match=r"step 4 could not be written .* make room, and resume"):
        write(tmp_path, 4, "fail", writer)
    assert not writer.is_writing
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("device", "is_pinned", "waits"), [("cuda", True, False), ("cuda", False, True), ("cpu", True, True)]
)
def test_a_step_waits_for_no_batch_that_is_copied_from_pinned_memory(device, is_pinned, waits):
    config = DataLoaderConfiguration()
    args = SimpleNamespace(world_size=1, seed=0, dataloader_pin_memory=is_pinned)
    configure_loaders(SimpleNamespace(device=torch.device(device), dataloader_config=config), args)
    assert config.non_blocking is not waits


def test_a_gradient_norm_may_be_a_number():
    guard = StepGuard(skips=False)
    guard.add(1, 0.1, torch.tensor(2.0), None)
    with pytest.raises(NonFiniteLossError, match="the gradient norm of step 1 is not finite"):
        guard.close_step(1, float("inf"), scaled=False)
