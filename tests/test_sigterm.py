"""SIGTERM to a group of processes with DataLoader workers, as a cluster sends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import make_trainer, timm_cnn

from nkd_hf.checkpoints import fault_of
from nkd_hf.sigterm import Sigterm

TRAIN = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
from test_non_finite import Collator, rows_of_digits
from tiny import make_trainer, native_vit
from transformers import TrainerCallback

from nkd_hf import ImageCollator

folder = sys.argv[1]
data = rows_of_digits(64)

# A sample that one process alone meets makes both leave the step out.
trainer = make_trainer(
    os.path.join(folder, "skip"), native_vit(), data, data_collator=Collator(5), on_non_finite_loss="skip",
    per_device_train_batch_size=8, max_steps=4,
)
trainer.train()
assert trainer.args.world_size == 2
weights = torch.cat([value.flatten() for value in trainer.model.state_dict().values()])
both = trainer.accelerator.gather(weights[None])
assert both.isfinite().all() and torch.equal(both[0], both[1])


class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.05)
        if state.global_step == 5 and args.process_index == 0:
            open(os.path.join(folder, "under way"), "w").close()


trainer = make_trainer(
    os.path.join(folder, "run"), native_vit(), data, data_collator=ImageCollator(10), per_device_train_batch_size=8,
    max_steps=2000, dataloader_num_workers=1, dataloader_persistent_workers=True, callbacks=[Tell()],
)
trainer.train()
"""


def test_a_group_of_processes_saves_one_checkpoint_and_ends(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(tests=str(Path(__file__).parent)))
    with (tmp_path / "log").open("w") as log:
        # torchrun hands the signal on to all processes of each group, DataLoader workers among them.
        run = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdout=log,
            stderr=log,
        )
        deadline = time.monotonic() + 240
        while not (tmp_path / "under way").exists():
            assert run.poll() is None, (tmp_path / "log").read_text()[-4000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.1)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=120) != 0
    said = (tmp_path / "log").read_text()
    assert said.count("SIGTERM came: the run is saved as") == 1, said[-4000:]
    assert "DataLoader worker" not in said
    assert said.count("is not finite") == 2  # one process knows why, the other that there is a reason
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    assert fault_of(str(checkpoint)) is None
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}


def test_the_handler_of_others_is_left_alone(tmp_path):
    previous = signal.signal(signal.SIGTERM, lambda *args: None)
    try:
        with Sigterm(world_size=1) as sigterm:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not sigterm.came()
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


def test_a_second_signal_ends_the_process():
    code = """
import os, signal
from nkd_hf.sigterm import Sigterm
with Sigterm(1):
    os.kill(os.getpid(), signal.SIGTERM)
    print("noted", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted\n")
