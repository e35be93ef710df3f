"""Two real processes on the CPU, launched as users launch them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
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

RESUME = """
import json, os, sys
import torch
sys.path.insert(0, {tests!r})
from tiny import make_trainer, timm_deit
from nkd_hf import DataArguments, ImageCollator, ImageDataset, USKDLoss, load_image_dataset, train_transform

folder = sys.argv[1]
data = load_image_dataset(DataArguments(max_train_samples=96))
transform = train_transform(DataArguments(horizontal_flip=0.0), 32, [0.5] * 3, [0.5] * 3)

def run(**kwargs):
    torch.manual_seed(0)
    trainer = make_trainer(
        folder, timm_deit(drop_path=0.1), ImageDataset(data["train"], transform), distillation_loss=USKDLoss(32, 10),
        data_collator=ImageCollator(10, mixup_alpha=0.8), per_device_train_batch_size=8, max_steps=15,
        save_strategy="steps", save_steps=8,
    )
    trainer.train(**kwargs)
    return {{key: value.clone() for key, value in trainer.model.state_dict().items()}}, trainer

whole, _ = run()
resumed, trainer = run(resume_from_checkpoint=os.path.join(folder, "checkpoint-8"))  # in the second epoch of 6 steps
if trainer.is_world_process_zero():
    differ = [key for key in whole if not torch.equal(whole[key], resumed[key])]
    json.dump({{"world_size": trainer.args.world_size, "differ": differ}}, open(os.path.join(folder, "result.json"), "w"))
"""

STATISTICS = """
import json, os, sys
import torch
sys.path.insert(0, {tests!r})
from tiny import digits, make_trainer, timm_cnn

folder = sys.argv[1]
trainer = make_trainer(
    folder, timm_cnn(), digits(0, 64), digits(64, 95), per_device_train_batch_size=8, max_steps=2, optim="sgd",
    learning_rate=0.05, base_batch_size=32, precise_bn_images=64, ema_decay=0.9, lr_scheduler_type="constant",
)
trainer.train()
trainer.evaluate()
student = trainer.student
network = student.timm_model
with torch.no_grad():
    outputs = network.conv1(torch.stack([sample["pixel_values"] for sample in digits(0, 64)]))
means = outputs.mean(dim=(0, 2, 3))
states = torch.cat([value.double().flatten() for value in student.state_dict().values()])
everywhere = trainer.accelerator.gather(states[None])
result = {{
    "world_size": trainer.args.world_size,
    "equal": bool((everywhere == everywhere[0]).all()),
    "error": ((network.bn1.running_mean - means).abs().max() / means.abs().max()).item(),
    "learning_rate": trainer.state.log_history[0]["learning_rate"],
}}
if trainer.is_world_process_zero():
    json.dump(result, open(os.path.join(folder, "result.json"), "w"))
"""


def torchrun(processes: int, *command: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def launch(folder: Path, processes: int, source: str) -> dict:
    script = folder / "train.py"
    script.write_text(source.format(tests=str(Path(__file__).parent)))
    torchrun(processes, script, str(folder))
    return json.loads((folder / "result.json").read_text())


def test_two_processes_train_one_head_and_evaluate_each_sample_once(tmp_path):
    result = launch(tmp_path, 2, TRAIN)
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


def test_two_processes_resume_in_the_middle_of_an_epoch_bit_for_bit(tmp_path):
    assert launch(tmp_path, 2, RESUME) == {"world_size": 2, "differ": []}


def test_two_processes_share_statistics_average_and_a_scaled_rate(tmp_path):
    result = launch(tmp_path, 2, STATISTICS)
    assert result["world_size"] == 2
    assert result["equal"]
    # The 64 images are divided between the two, and their mean is that of all of them.
    assert result["error"] < 1e-5
    assert result["learning_rate"] == pytest.approx(0.05 * 16 / 32)


def test_recipe_in_two_processes_writes_all_its_results(tmp_path):
    recipes = Path(__file__).parents[1] / "recipes"
    torchrun(
        2, recipes / "distill_cnn.py", "--config", recipes / "configs" / "digits_distill_cnn.yaml", "--use_cpu", "true",
        "--max_train_samples", "64", "--max_eval_samples", "41", "--num_train_epochs", "1", "--output_dir", tmp_path,
    )  # fmt: skip
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"teacher", "baseline", "student", "results.json", "accuracy.png", "example.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    for accuracy in results.values():  # of 41 images, none counted twice
        assert accuracy * 41 == pytest.approx(round(accuracy * 41))
