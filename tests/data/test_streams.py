"""Streams that several processes and workers train on: each image once a pass, decoded once, and resumed exactly."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.utils import gather_object
from digit_rows import rows_of_digits
from processes import in_processes
from tiny import digits, make_trainer, native_vit, timm_cnn, timm_deit
from torch.utils.data import DataLoader, IterableDataset

from nkd_hf import (
    BadImageReport,
    DataArguments,
    DistillationTrainingArguments,
    ImageCollator,
    RecipeArguments,
    load_image_dataset,
)
from nkd_hf.data import decoding
from nkd_hf.data.image_datasets import StreamingImageDataset
from nkd_hf.recipe.run_folder import collect_settings

NUM_ROWS = 121


def stream(num_shards: int, **keywords) -> StreamingImageDataset:
    rows = rows_of_digits(NUM_ROWS).dataset
    return StreamingImageDataset(rows.to_iterable_dataset(num_shards), to_pixels, **keywords)


def to_pixels(image) -> torch.Tensor:
    return torch.rand(3, 32, 32)


def passes_of(parts: list[list[dict]], num_passes: int) -> list[Counter]:
    seen = Counter((sample["epoch"], sample["index"]) for part in parts for sample in part)
    return [Counter({key: count for key, count in seen.items() if key[0] == epoch}) for epoch in range(num_passes)]


# 3 shards on 2 workers: as whole shards, one worker would get twice the rows of the other.
@pytest.mark.runs
@pytest.mark.parametrize(
    ("num_shards", "num_processes", "num_workers"), [(3, 1, 2), (1, 1, 2), (3, 2, 0), (4, 3, 0), (13, 2, 2), (1, 3, 2)]
)
def test_each_image_comes_once_a_pass(num_shards, num_processes, num_workers):
    parts = []
    for process in range(num_processes):
        part = stream(num_shards).for_process(process, num_processes)
        loader = DataLoader(part, batch_size=None, num_workers=num_workers)
        taken = 4 * NUM_ROWS // num_processes
        parts.append([sample for sample, _ in zip(loader, range(taken), strict=False)])
    first, second, third, _ = passes_of(parts, 4)
    # The shards have lengths that differ by a row.
    for seen in (first, second, third):
        assert set(seen.values()) == {1}
        assert len(seen) == NUM_ROWS
    orders = [[sample["index"] for sample in parts[0] if sample["epoch"] == epoch][:20] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_more_workers_than_rows_go_on():
    rows = rows_of_digits(3).dataset.to_iterable_dataset()
    for process in range(5):
        part = StreamingImageDataset(rows, to_pixels).for_process(process, 5)
        epochs = [sample["epoch"] for sample, _ in zip(part, range(6), strict=False)]
        assert epochs == [epoch for epoch in range(10) if (process + epoch) % 5 < 3]


def test_the_first_rows_of_a_stream_are_the_same_for_any_number_of_workers():
    arguments = DataArguments(dataset_name="digits", streaming=True, max_train_samples=30)
    dataset = StreamingImageDataset(load_image_dataset(arguments)["train"], to_pixels)
    seen = [
        {sample["index"] for sample, _ in zip(DataLoader(dataset, None, num_workers=workers), range(30), strict=False)}
        for workers in (0, 3)
    ]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 30


def test_other_workers_are_another_run_of_a_stream_alone(tmp_path):
    recipe, settings = RecipeArguments(student="resnet18", distillation_loss="uskd"), {}
    for streaming in (False, True):
        data = DataArguments(streaming=streaming, num_train_images=10)
        settings[streaming] = [
            collect_settings(
                recipe, data, DistillationTrainingArguments(str(tmp_path), dataloader_num_workers=workers)
            )
            for workers in (0, 1, 2)
        ]
    assert settings[False][0] == settings[False][1] == settings[False][2]
    assert settings[True][0] == settings[True][1] != settings[True][2]


class Stream(IterableDataset):
    def __init__(self, samples: list[dict]):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def without_a_label(row: dict, number: int) -> dict:
    return row if number else row | {"label": None}


def work(folder: Path) -> None:
    """What the processes of the test below do."""
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    collator, rows, decoded, read = ImageCollator(10, mixup_alpha=0.8), [], [], decoding.read_sample

    def collate(samples: list[dict]) -> dict:
        rows.append([(sample["epoch"], sample["index"]) for sample in samples])
        return collator(samples)

    def counted(*args):
        decoded.append(args)
        return read(*args)

    def run(**kwargs) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        trainer = make_trainer(
            folder, timm_deit(drop_path=0.1), stream(3), data_collator=collate, per_device_train_batch_size=8, max_steps=18,
            save_strategy="steps", save_steps=10,
        )  # fmt: skip
        trainer.train(**kwargs)
        return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    decoding.read_sample = counted
    whole = run()
    result = {"rows": gather_object([rows]), "decoded": gather_object([len(decoded)])}
    resumed = run(resume_from_checkpoint=str(folder / "checkpoint-10"))
    result["equal"] = gather_object([all(torch.equal(whole[name], resumed[name]) for name in whole)])
    decoding.read_sample = read

    # A batch that the processes split is the global one, and scales the rate.
    rows = []
    encoded = stream(2).dataset.map(without_a_label, with_indices=True, features=stream(2).dataset.features)
    bad = StreamingImageDataset(encoded, to_pixels, on_bad_image="skip")
    trainer = make_trainer(
        folder, timm_cnn(), bad, data_collator=collate, per_device_train_batch_size=8, max_steps=4, learning_rate=0.1,
        base_batch_size=16, accelerator_config={"split_batches": True}, lr_scheduler_type="constant",
        callbacks=[BadImageReport()], gradient_accumulation_steps=4, precise_bn_images=8,
    )  # fmt: skip
    trainer.train()
    result["split"] = {
        "batches": sorted({len(batch) for batch in rows}),
        "rate": trainer.state.log_history[0]["learning_rate"],
    }
    # A first process that decodes for all would count right. Told not to, each must not count what fills up its batches.
    for split in (False, True):
        trainer = make_trainer(
            folder, native_vit(), per_device_eval_batch_size=8,
            accelerator_config={"dispatch_batches": False, "split_batches": split},
        )  # fmt: skip
        result[f"counted {split}"] = trainer.predict(Stream(digits(64, 105))).label_ids.tolist()
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.runs
def test_two_processes_train_on_their_parts_and_resume(tmp_path):
    log = tmp_path / "log"
    assert in_processes(2, lambda: work(tmp_path), log) == [0, 0], log.read_text()[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    seen = Counter(tuple(key) for rows in result["rows"] for batch in rows for key in batch)
    assert set(seen.values()) == {1}
    # 18 steps of 16 are 288 images, 2.4 passes.
    assert [sum(key[0] == epoch for key in seen) for epoch in (0, 1)] == [NUM_ROWS, NUM_ROWS]
    # A batch is read ahead.
    assert result["decoded"] == pytest.approx([18 * 8 + 8] * 2, abs=8)
    assert result["equal"] == [True, True]
    assert result["split"] == {"batches": [4], "rate": pytest.approx(0.1 * 8 * 4 / 16)}
    assert "bad images were met in the training stream so far" in log.read_text()
    expected = [sample["labels"] for sample in digits(64, 105)]
    assert result["counted False"] == result["counted True"] == expected
