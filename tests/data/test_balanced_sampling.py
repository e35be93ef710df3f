"""Images drawn with each class equally often: the draws, their augmentation, and a run that goes on in the middle."""

from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from processes import in_processes
from tiny import make_trainer, timm_cnn

from nkd_hf import DataArguments, ImageCollator, ImageDataset, load_image_dataset, make_datasets
from nkd_hf.data.sampler import EpochSampler, balanced_order
from nkd_hf.trainer.batch_norm import estimate_batch_norm

SIZES = [60, 3, 0, 12]
LABELS = np.repeat(np.arange(4), SIZES)


def keys(epoch: int, seed: int = 0, labels: np.ndarray = LABELS, **kwargs) -> list[tuple]:
    sampler = EpochSampler(len(labels), seed, labels=labels, **kwargs)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_class_has_the_same_share_and_each_row_of_a_class():
    counts = np.zeros(len(LABELS))
    for epoch in range(400):
        np.add.at(counts, balanced_order(LABELS, 0, epoch), 1)
    assert counts.sum() == 400 * 75
    shares = np.bincount(LABELS, weights=counts) / counts.sum()
    assert shares[2] == 0
    # A share's standard deviation is sqrt(2 / 9 / 30000) = 0.0027.
    assert shares[[0, 1, 3]] == pytest.approx(1 / 3, abs=0.012)
    for label in (0, 1, 3):
        rows = counts[label == LABELS]
        assert abs(rows / rows.mean() - 1).max() < 5 / np.sqrt(rows.mean())


def test_the_draws_are_a_function_of_seed_and_epoch_alone():
    first = keys(3)
    torch.manual_seed(7)
    np.random.seed(7)
    assert keys(3) == first
    orders = {tuple(key[1] for key in drawn) for drawn in (first, keys(4), keys(3, seed=1))}
    assert len(orders) == 3
    assert {key[0] for key in first} == {3}
    # A class's rows may stand anywhere, and rows without a label are never drawn.
    mixed = np.random.default_rng(0).permutation(np.concatenate([LABELS, np.full(20, -1)]))
    drawn = [key[1] for key in keys(0, labels=mixed)]
    assert len(drawn) == 95
    assert set(mixed[drawn]) == {0, 1, 3}


def test_a_row_that_comes_again_has_a_key_of_its_own():
    for positions in (False, True):
        drawn = keys(0, positions=positions)
        assert len(set(drawn)) == 75
        times = Counter()
        for position, key in enumerate(drawn):
            draw = key[3] if len(key) == 4 else 0
            assert draw == times[key[1]]
            times[key[1]] += 1
            assert (key[2] if len(key) > 2 else None) == (position if positions else None)
        assert max(times.values()) > 5
    # The last sample of an odd epoch comes twice, as it is.
    drawn = keys(0, positions=True, pairs=True)
    assert drawn[:-1] == keys(0, positions=True)
    assert drawn[-1] == drawn[-2]


def test_draws_need_a_random_order():
    with pytest.raises(ValueError, match="shuffle must be True with labels"):
        EpochSampler(75, 0, shuffle=False, labels=LABELS)
    with pytest.raises(ValueError, match="balanced_sampling must be false with streaming"):
        DataArguments(balanced_sampling=True, streaming=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Digits of three classes, 40, 4 and 12, as a folder of parquet files."""
    digits = load_image_dataset(DataArguments())["train"]
    labels = np.array(digits["label"][:])
    rows = np.concatenate([np.flatnonzero(labels == label)[:size] for label, size in ((0, 40), (1, 4), (2, 12))])
    folder = tmp_path_factory.mktemp("digits")
    digits.select(rows).cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")
    digits.select(rows[::2]).cast_column("image", datasets.Image()).to_parquet(folder / "test.parquet")
    return folder


def images(folder: Path) -> tuple[ImageDataset, ImageCollator]:
    train, evaluation, collator = make_datasets(DataArguments(str(folder), balanced_sampling=True), timm_cnn(), seed=0)
    assert evaluation.sampling_labels is None
    return train, collator


class Seen:
    """The collator, which notes the samples and the sums of their pixels."""

    def __init__(self, collator: ImageCollator):
        self.collator, self.samples = collator, []

    def __call__(self, samples):
        self.samples.append(
            [(s["epoch"], s["index"], s["draw"], s["labels"], s["pixel_values"].sum().item()) for s in samples]
        )
        return self.collator(samples)


@pytest.mark.runs
def test_a_training_draws_images_augments_each_draw_and_resumes_in_the_middle_of_an_epoch(folder, tmp_path):
    train, collator = images(folder)

    def run(checkpoint: Path | None = None) -> tuple[list, dict[str, torch.Tensor]]:
        seen = Seen(collator)
        trainer = make_trainer(
            tmp_path, timm_cnn(), train, data_collator=seen, per_device_train_batch_size=8, max_steps=12,
            save_strategy="steps", save_steps=5,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return seen.samples, {name: value.clone() for name, value in trainer.model.state_dict().items()}

    batches, weights = run()
    resumed, resumed_weights = run(tmp_path / "checkpoint-5")
    assert resumed == batches[5:]
    torch.testing.assert_close(resumed_weights, weights, rtol=0, atol=0)
    samples = [sample for batch in batches for sample in batch]
    assert {sample[0] for sample in samples} == {0, 1}
    first = [sample for sample in samples if sample[0] == 0]
    assert len(first) == 56
    assert min(Counter(sample[3] for sample in first).values()) > 10
    # The four images of the rare class come some 19 times, and look different each time.
    rare = [sample for sample in samples if sample[3] == 1]
    assert max(Counter(sample[:2] for sample in rare).values()) > 2
    assert len({sample[4] for sample in rare}) > 0.9 * len(rare)


@pytest.mark.runs
def test_two_processes_share_the_draws_of_one(folder, tmp_path):
    def run(name: str, batch_size: int) -> None:
        train, collator = images(folder)
        seen = Seen(collator)
        trainer = make_trainer(
            tmp_path / name, timm_cnn(), train, data_collator=seen, per_device_train_batch_size=batch_size, max_steps=2
        )
        for _ in trainer.get_train_dataloader():
            pass
        (tmp_path / f"{name}-{trainer.args.process_index}").write_text(repr(seen.samples))

    assert in_processes(1, lambda: run("one", 8), tmp_path / "log") == [0], (tmp_path / "log").read_text()
    assert in_processes(2, lambda: run("two", 4), tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    whole, *parts = (eval((tmp_path / name).read_text()) for name in ("one-0", "two-0", "two-1"))
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_statistics_of_batch_norm_are_of_images_that_are_drawn_in_the_same_way(folder, tmp_path):
    train, collator = images(folder)
    trainer = make_trainer(tmp_path, timm_cnn(), train)
    seen = Seen(collator)
    estimate_batch_norm(trainer.student, train, 40, trainer.accelerator, key=(0, 1), batch_size=8, collate_fn=seen)
    counts = Counter(sample[3] for batch in seen.samples for sample in batch)
    assert min(counts.values()) > 5


def test_a_trainer_refuses_the_order_of_the_dataset(folder, tmp_path):
    train, collator = images(folder)
    trainer = make_trainer(tmp_path, timm_cnn(), train, data_collator=collator, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match="train_sampling_strategy must be random with balanced_sampling"):
        trainer.get_train_dataloader()
