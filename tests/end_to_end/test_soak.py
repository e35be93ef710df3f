"""A long run with evaluation, saving and workers uses no more memory and files at its end than at its beginning."""

import gc
import json
from pathlib import Path

import psutil
import pytest
from digit_rows import rows_of_digits
from processes import in_a_process
from tiny import accuracy, make_trainer, timm_cnn
from transformers import TrainerCallback

from nkd_hf import DataArguments, ImageCollator, ImageDataset, NKDLoss, USKDLoss, load_image_dataset, train_transform


class Usage(TrainerCallback):
    """Memory (MiB) and open files of this process, and memory of its workers, every so many steps."""

    def __init__(self, steps: int):
        self.steps, self.seen = steps, {}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step and state.global_step % self.steps == 0:
            gc.collect()
            process = psutil.Process()
            workers = [worker.memory_info().rss for worker in process.children()]
            self.seen[state.global_step] = {
                "memory": process.memory_info().rss / 2**20,
                "workers": sum(workers) / 2**20,
                "num_workers": len(workers),
                "files": process.num_fds(),
            }


def soak(folder: Path, steps: int, every: int) -> None:
    usage = Usage(every)
    held_out = load_image_dataset(DataArguments(max_eval_samples=64))["validation"]
    transform = train_transform(DataArguments(horizontal_flip=0.0), 32, [0.5] * 3, [0.5] * 3)
    trainer = make_trainer(
        folder, timm_cnn(), rows_of_digits(512), ImageDataset(held_out, transform, training=False), teacher=timm_cnn(1),
        distillation_loss={"nkd": NKDLoss(), "uskd": USKDLoss(32, 10)}, data_collator=ImageCollator(10, mixup_alpha=0.2),
        max_steps=steps + 1, ema_decay=0.99, eval_strategy="steps", eval_steps=every // 2, save_strategy="steps",
        save_steps=every // 2, save_total_limit=2, logging_steps=10, dataloader_num_workers=1,
        dataloader_persistent_workers=True, compute_metrics=accuracy, callbacks=[usage],
    )  # fmt: skip
    trainer.train()
    (folder / "usage.json").write_text(json.dumps(usage.seen))


@pytest.mark.runs
@pytest.mark.parametrize(
    ("steps", "every", "settled"),
    [pytest.param(120, 20, 40, id="short"), pytest.param(2000, 100, 200, id="long", marks=pytest.mark.slow)],
)
def test_memory_and_files_stay_flat(tmp_path, steps, every, settled):
    log = tmp_path / "log"
    assert in_a_process(lambda: soak(tmp_path, steps, every), log) == 0, log.read_text()[-3000:]
    usage = {int(step): seen for step, seen in json.loads((tmp_path / "usage.json").read_text()).items()}
    assert max(usage) == steps
    first, last = usage[settled], usage[steps]
    print(f"\nstep {settled}: {first}\nstep {steps}: {last}")
    assert first["num_workers"] == last["num_workers"] == 2  # one trains, one evaluates
    assert last["memory"] < 1.05 * first["memory"]
    assert last["workers"] < 1.05 * first["workers"]
    assert last["files"] <= first["files"]
