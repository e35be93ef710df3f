"""The epoch of augmentation, whatever the sampler, the loader and the wrapper of the dataset."""

import copy
import doctest
import pickle

import pytest
import torch
from tiny import make_trainer, timm_cnn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, Sampler, Subset, WeightedRandomSampler
from transformers import Trainer, TrainingArguments, default_data_collator

import nkd_hf.data.sampler
from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageCollator,
    ImageDataset,
    load_image_dataset,
    train_transform,
)
from nkd_hf.data.sampler import EpochDataset, EpochIndices, EpochSampler, training_sampler

WORKERS = [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


@pytest.fixture(scope="module")
def rows():
    return load_image_dataset(DataArguments(max_train_samples=40))["train"]


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    """A trainer makes its output folder."""
    monkeypatch.chdir(tmp_path)


def images(rows, **kwargs) -> ImageDataset:
    transform = train_transform(DataArguments(random_crop_padding=4), 32, [0.5] * 3, [0.5] * 3)
    return ImageDataset(rows, transform, **kwargs)


def views(loaders) -> list[dict[int, list[float]]]:
    """The sums of the pixels of each row, by epoch."""
    epochs = []
    for loader in loaders:
        epochs.append({})
        for batch in loader:
            for index, pixels in zip(batch["index"].tolist(), batch["pixel_values"], strict=True):
                epochs[-1].setdefault(index, []).append(float(pixels.sum()))
    return epochs


def assert_fresh(epochs: list[dict[int, list[float]]]) -> None:
    """No row looks twice alike, but for the few whose crops happen to fall together."""
    seen = {}
    for epoch in epochs:
        for index, sums in epoch.items():
            seen.setdefault(index, []).extend(sums)
    draws, different = sum(map(len, seen.values())), sum(len(set(sums)) for sums in seen.values())
    assert different > 0.9 * draws > 0.9 * len(seen)


class Weighted(DistillationTrainer):
    """Draws rows with replacement, as users do against classes of different sizes."""

    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler(torch.ones(40), 80)


def weighted(rows, **kwargs) -> DistillationTrainer:
    args = DistillationTrainingArguments(
        **{"output_dir": "unused", "save_strategy": "no"} | kwargs,
        use_cpu=True, report_to="none", per_device_train_batch_size=8, num_train_epochs=2,
    )  # fmt: skip
    return Weighted(timm_cnn(), args, ImageCollator(10), images(rows))


def test_docstring_example():
    assert doctest.testmod(nkd_hf.data.sampler) == (0, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_is_drawn_twice_gets_two_views(rows, workers):
    loader = weighted(rows, dataloader_num_workers=workers).get_train_dataloader()
    epochs = views([loader, loader])
    assert max(map(len, epochs[0].values())) > 2
    assert epochs[0].keys() != epochs[1].keys()
    assert_fresh(epochs)
    # The views are a function of the seed, whatever has been drawn before, and so is the order.
    torch.manual_seed(5)
    again = weighted(rows).get_train_dataloader()
    assert views([again, again]) == epochs


def test_a_collator_that_stacks_every_column_takes_rows_that_are_drawn_twice(rows):
    trainer = weighted(rows)
    trainer.data_collator = default_data_collator
    draws = torch.cat([batch["draw"] for batch in trainer.get_train_dataloader()])
    assert {0, 1} <= set(draws.tolist())


def test_training_tells_the_sampler_its_epoch_when_it_resumes(rows, tmp_path):
    class Seen(ImageCollator):
        def __call__(self, samples):
            keys.append([(sample["epoch"], sample["index"], sample["draw"]) for sample in samples])
            return super().__call__(samples)

    def run(resume=None):
        keys.clear()
        trainer = weighted(rows, save_strategy="steps", save_steps=13, output_dir=str(tmp_path))
        trainer.data_collator = Seen(10)
        trainer.train(resume_from_checkpoint=resume)
        return list(keys)

    keys = []
    whole, resumed = run(), run(str(tmp_path / "checkpoint-13"))
    assert {key[0] for batch in whole for key in batch} == {0, 1}
    assert len(whole) == 20
    assert resumed == whole[13:]


@pytest.mark.runs
@pytest.mark.parametrize("keywords", WORKERS)
def test_a_loader_that_knows_no_epoch_gets_fresh_views(rows, keywords):
    dataset = images(rows)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=ImageCollator(10), **keywords)
    epochs = views([loader, loader, loader])
    assert_fresh(epochs)
    # The first request for a row is that of epoch 0.
    sampler = EpochSampler(40, seed=3)
    assert views([DataLoader(images(rows), 8, sampler=sampler, collate_fn=ImageCollator(10))])[0] == epochs[0]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_the_workers_of_a_copy_count_together(rows, copied):
    loader = DataLoader(copied(images(rows)), batch_size=8, collate_fn=ImageCollator(10), num_workers=2)
    assert_fresh(views([loader, loader]))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_plain_trainer_gets_fresh_views(rows, workers):
    args = TrainingArguments(
        "unused", use_cpu=True, report_to="none", remove_unused_columns=False, dataloader_num_workers=workers
    )
    loader = Trainer(timm_cnn(), args, ImageCollator(10), images(rows)).get_train_dataloader()
    assert_fresh(views([loader, loader]))


class Wrapped(Dataset):
    def __init__(self, inner):
        self.inner = inner

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return dict(self.inner[index])


def test_a_dataset_around_images_gets_fresh_views(rows, tmp_path):
    for dataset in (Wrapped(images(rows)), Wrapped(ConcatDataset([Subset(images(rows), range(20))] * 2))):
        trainer = make_trainer(tmp_path, timm_cnn(), dataset, data_collator=ImageCollator(10))
        loader = trainer.get_train_dataloader()
        assert_fresh(views([loader, loader]))


def test_processes_that_exchange_their_rows_get_views_of_their_own(rows, monkeypatch):
    first, second = images(rows), images(rows)
    mine = [first[row]["pixel_values"] for row in range(40)]
    assert torch.equal(mine[3], second[(0, 3)]["pixel_values"])
    monkeypatch.setenv("RANK", "1")
    others = [second[row]["pixel_values"] for row in range(40)]
    assert sum(torch.equal(one, other) for one, other in zip(mine, others, strict=True)) < 4


def test_evaluation_counts_nothing(rows):
    dataset = images(rows, training=False)
    assert torch.equal(dataset[3]["pixel_values"], dataset[3]["pixel_values"])


def test_looking_at_a_sample_disturbs_no_generator(rows):
    state = torch.get_rng_state()
    dataset = images(rows)
    assert not torch.equal(dataset[0]["pixel_values"], dataset[0]["pixel_values"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrap", [lambda d: Subset(ConcatDataset([d, d]), [1]), lambda d: Subset(Subset(d, [1]), [0])])
def test_nested_parts_of_an_image_dataset_are_refused(rows, tmp_path, wrap):
    with pytest.raises(ValueError, match="train_dataset must be an ImageDataset itself, got a Subset of one"):
        make_trainer(tmp_path, timm_cnn(), wrap(images(rows))).train()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_strategies_of_lengths_are_refused(rows, tmp_path, strategy):
    trainer = make_trainer(tmp_path, timm_cnn(), images(rows), train_sampling_strategy=strategy)
    with pytest.raises(ValueError, match=f"must be random or sequential, got {strategy}"):
        trainer.train()


def test_pairs_need_the_order_of_the_epoch(rows):
    trainer = weighted(rows)
    trainer.data_collator = ImageCollator(10, mixup_alpha=0.8, mix_pairs=True)
    with pytest.raises(ValueError, match="need the order of EpochSampler with positions, got WeightedRandomSampler"):
        trainer.train()


class Keys(EpochDataset):
    def __len__(self):
        return 200


class Biased(Sampler):
    """Draws from a generator that is the process's, an index at a time, for ever."""

    def __iter__(self):
        while True:
            yield torch.randint(200, ())


def test_processes_share_the_order_of_a_sampler_that_draws_from_their_generator():
    def first(num, seed, sampler):
        torch.manual_seed(seed)
        iterator = iter(sampler)
        taken = []
        for _ in range(num):
            torch.rand(seed + 1)  # a process's own dropout
            taken.append(next(iterator))
        return taken

    for dataset in (Keys(), list(range(200))):
        orders = [first(150, seed, training_sampler(Biased(), dataset, 0, num_processes=2)) for seed in (0, 1)]
        assert orders[0] == orders[1]
        assert len(set(map(str, orders[0]))) > 80
    assert {len(key) for key in first(150, 0, training_sampler(Biased(), Keys(), 0))} == {2, 4}
    # accelerate sees to a RandomSampler, and one process to itself.
    for sampler, processes in ((RandomSampler(range(200)), 2), (Biased(), 1)):
        assert training_sampler(sampler, list(range(200)), 0, processes) is sampler


def test_the_sampler_of_its_own_is_told_the_epoch():
    class Ordered(list):
        def set_epoch(self, epoch):
            self.reverse()

    sampler = EpochIndices(Ordered([0, 1, -1]), 0, 3)
    assert list(sampler) == [(0, 0), (0, 1), (0, -1)]
    sampler.set_epoch(2)
    assert list(sampler) == [(2, -1), (2, 1), (2, 0)]
    assert list(EpochIndices([(4, 1), 7], 0, 3)) == [(4, 1), (0, 7)]
