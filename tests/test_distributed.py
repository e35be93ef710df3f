"""Two real processes on the CPU, launched as users launch them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
import torch
sys.path.insert(0, {tests!r})
from tiny import accuracy, digits, make_trainer, native_vit, timm_cnn
from nkd_hf import NKDLoss, USKDLoss

folder = sys.argv[1]
loss = {{"nkd": NKDLoss(), "uskd": USKDLoss(32, 10)}}
trainer = make_trainer(
    folder, native_vit(), digits(0, 64), digits(64, 95), teacher=timm_cnn(seed=1), distillation_loss=loss, optim="sgd",
    learning_rate=0.05, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=3, save_strategy="steps",
    save_steps=3, compute_metrics=accuracy, train_sampling_strategy="sequential",
)
trainer.train()
metrics = trainer.evaluate()
head = loss["uskd"].head.weight
heads = trainer.accelerator.gather(head[None].clone())
result = {{
    "world_size": trainer.args.world_size,
    "heads_equal": bool((heads == heads[0]).all()),
    "head_norm": head.norm().item(),
    "log": trainer.state.log_history[0],
    "accuracy": metrics["eval_accuracy"],
}}
if trainer.is_world_process_zero():
    json.dump(result, open(os.path.join(folder, "result.json"), "w"))
"""


def launch(folder: Path, processes: int) -> dict:
    script = folder / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_two_processes_train_one_head_and_evaluate_each_sample_once(tmp_path):
    result = launch(tmp_path, processes=2)
    assert result["world_size"] == 2
    assert result["heads_equal"]
    # 31 held-out images: a fraction of 31 and no image counted twice
    assert (result["accuracy"] * 31) == pytest.approx(round(result["accuracy"] * 31))
    log = result["log"]
    components = [name for name in log if name.startswith(("task", "nkd_", "uskd_"))]
    assert len(components) == 6
    assert log["loss"] == pytest.approx(sum(log[name] for name in components), rel=1e-5)
    assert (tmp_path / "checkpoint-3" / "distillation_losses.safetensors").is_file()
    assert not (tmp_path / "checkpoint-3" / "training_args.bin").exists()
