import doctest
import pickle
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import nkd_hf.data.sampler
from nkd_hf.data.collator import ImageCollator
from nkd_hf.data.sampler import EpochDataset, EpochSampler
from nkd_hf.data.seeding import seeded


class Keys(EpochDataset):
    """Samples that are their own key."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def get_sample(self, epoch, index):
        return torch.tensor([epoch, index])


def ambient_draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def samples(batch_size, num_labels=10, epoch=0, first=0, keyed=True):
    generator = torch.Generator().manual_seed(0)
    result = []
    for index in range(first, first + batch_size):
        sample = {"pixel_values": torch.rand(3, 8, 8, generator=generator), "labels": index % num_labels}
        result.append(sample | {"epoch": epoch, "index": index} if keyed else sample)
    return result


def test_docstring_examples():
    results = doctest.testmod(nkd_hf.data.sampler)
    assert results.attempted > 5
    assert results.failed == 0


# seeded


def test_seeded_depends_on_the_whole_key_and_nothing_else():
    def draws(*key):
        with seeded(*key):
            return ambient_draws()

    assert draws(0, 1, 2) == draws(np.int64(0), 1, torch.tensor(2))
    keys = [(0, 1, 2), (1, 1, 2), (0, 2, 1), (0, 12), (0, 1, 2, 0), (-1, 1, 2), (2**70, 1, 2)]
    for position in range(3):
        assert len({draws(*key)[position] for key in keys}) == len(keys)


def test_seeded_leaves_the_generators_as_they_were_even_after_an_error():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = [ambient_draws() for _ in range(3)]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    seen = [ambient_draws()]
    with seeded(0):
        ambient_draws()
    seen.append(ambient_draws())
    with pytest.raises(ZeroDivisionError), seeded(0):
        random.seed(ambient_draws()[0] / 0)
    seen.append(ambient_draws())
    assert seen == expected
    np.random.seed(0)  # works again on the way out: numpy can re-seed its own kind of generator only


def test_seeded_can_leave_all_but_torch_alone():
    with seeded(4):
        expected = ambient_draws()[2]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    python, numpy, _ = ambient_draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with seeded(4, torch_only=True):
        assert ambient_draws() == (python, numpy, expected)
    ambient = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(ambient, torch.get_rng_state())


# EpochDataset, EpochSampler


def test_a_plain_index_means_epoch_zero_and_the_range_is_checked():
    dataset = Keys(5)
    assert dataset[3].tolist() == [0, 3]
    assert dataset[(7, 3)].tolist() == [7, 3]
    assert dataset[-1].tolist() == [0, 4]
    with pytest.raises(IndexError, match=r"index 5 .* 5 samples"):
        dataset[5]
    assert len(list(dataset)) == 5


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch, shuffle=True):
        sampler = EpochSampler(50, seed, shuffle)
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {epoch for epoch, _ in pairs} == {epoch}
        return [index for _, index in pairs]

    torch.manual_seed(0)
    first = order(0, 1)
    torch.manual_seed(1)
    assert order(0, 1) == first
    assert sorted(first) == list(range(50))
    assert first != order(0, 2)
    assert first != order(1, 0)
    assert order(0, 1, shuffle=False) == list(range(50))
    assert len(EpochSampler(50, 0)) == 50


def test_an_empty_dataset_is_an_error():
    with pytest.raises(ValueError, match="num_samples must be positive, got 0"):
        EpochSampler(0, 0)


def prepared(num_processes, process_index, batch_size=4, length=23):
    sampler = EpochSampler(length, seed=0)
    loader = DataLoader(Keys(length), batch_size=batch_size, sampler=sampler)
    return sampler, prepare_data_loader(loader, num_processes=num_processes, process_index=process_index)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_accelerate_shards_the_epoch_that_it_sets(num_processes):
    seen = []
    for rank in range(num_processes):
        _, loader = prepared(num_processes, rank)
        loader.set_epoch(4)
        seen += [tuple(pair) for batch in loader for pair in batch.tolist()]
    sampler = EpochSampler(23, seed=0)
    sampler.set_epoch(4)
    assert set(seen) == set(sampler)
    # accelerate fills the last batches up with the first samples of the same epoch.
    assert len(seen) - 23 < 4 * num_processes


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_resumed_epoch_goes_on_with_the_batches_that_were_left(num_processes):
    for rank in range(num_processes):
        _, loader = prepared(num_processes, rank)
        loader.set_epoch(3)
        whole = [batch.tolist() for batch in loader]
        sampler, loader = prepared(num_processes, rank)
        rest = skip_first_batches(loader, 2)
        rest.set_epoch(3)
        # The trainer does this: with several processes accelerate's set_epoch stops at the shard that is wrapped twice.
        sampler.set_epoch(3)
        assert [batch.tolist() for batch in rest] == whole[2:]


# ImageCollator


def test_without_mixing_labels_stay_indices():
    batch = ImageCollator(10)(samples(3))
    assert set(batch) == {"pixel_values", "labels", "index"}
    assert batch["index"].tolist() == [sample["index"] for sample in samples(3)]
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 1, 2]
    torch.testing.assert_close(batch["pixel_values"], torch.stack([sample["pixel_values"] for sample in samples(3)]))


def test_the_label_may_be_called_label_and_be_any_integer():
    pixels = torch.zeros(3, 4, 4)
    batch = ImageCollator(4)(
        [{"pixel_values": pixels, "label": np.int64(3)}, {"pixel_values": pixels, "label": torch.tensor(2)}]
    )
    assert batch["labels"].tolist() == [3, 2]


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@given(batch_size=st.integers(1, 9), epoch=st.integers(0, 5))
def test_mixed_labels_are_two_weights_that_match_the_pixels(alphas, batch_size, epoch):
    # Pixels tell their label: image i is all 2**i, so a mixed image says which images went into it.
    batch = [
        {"pixel_values": torch.full((3, 8, 8), float(2**i)), "labels": i, "epoch": epoch, "index": i}
        for i in range(batch_size)
    ]
    mixed = ImageCollator(10, *alphas)(batch)
    labels = mixed["labels"]
    assert labels.shape == (batch_size, 10)
    assert labels.dtype == torch.float32
    assert (labels >= 0).all()
    assert ((labels > 0).sum(dim=1) <= 2).all()
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(batch_size))
    expected = labels @ 2.0 ** torch.arange(10)
    torch.testing.assert_close(mixed["pixel_values"].mean(dim=(1, 2, 3)), expected)


def test_both_alphas_give_one_of_the_two_for_each_batch():
    collator = ImageCollator(10, mixup_alpha=0.8, cutmix_alpha=1.0)
    originals = torch.stack([sample["pixel_values"] for sample in samples(5)])
    cutmix = 0
    for epoch in range(60):
        mixed = collator(samples(5, epoch=epoch))["pixel_values"]
        pasted = (mixed == originals) | (mixed == originals.roll(1, 0))
        cutmix += bool(pasted.all())
    assert 15 < cutmix < 45


def test_mixing_is_a_pure_function_of_seed_epoch_and_indices():
    def mixed(seed=0, **keywords):
        return ImageCollator(10, 0.8, 1.0, seed=seed)(samples(5, **keywords))["labels"]

    torch.manual_seed(0)
    first = mixed()
    state = torch.get_rng_state()
    assert torch.equal(mixed(), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(mixed(epoch=1), first)
    assert not torch.equal(mixed(first=10), first)
    assert not torch.equal(mixed(seed=1), first)


def test_samples_without_keys_draw_from_the_ambient_generator():
    collator = ImageCollator(10, mixup_alpha=0.8)
    torch.manual_seed(0)
    first, second = (collator(samples(4, keyed=False))["labels"] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(collator(samples(4, keyed=False))["labels"], first)


def test_without_mixing_and_pickle():
    collator = ImageCollator(10, 0.8, 1.0, seed=5)
    assert torch.equal(collator.without_mixing()(samples(3))["labels"], torch.arange(3))
    copy = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copy(samples(4))["labels"], collator(samples(4))["labels"])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (10, r"row 1 of the batch \(index 1\) has the label 10, expected 0 to 9: build the student"),
        (-1, r"row 1 .* has the label -1, expected 0 to 9: .* drop unlabelled"),
        ("cat", r"row 1 .* has the label 'cat', expected an integer from 0 to 9: map label names"),
        (None, r"row 1 .* has the label None, expected an integer"),
        (1.5, r"row 1 .* has the label 1.5, expected an integer"),
    ],
)
@pytest.mark.parametrize("mixup_alpha", [0.0, 0.8])
def test_a_bad_label_is_named(label, message, mixup_alpha):
    batch = samples(3)
    batch[1]["labels"] = label
    with pytest.raises(ValueError, match=message):
        ImageCollator(10, mixup_alpha=mixup_alpha)(batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 0}, "num_labels must be positive, got 0"),
        ({"num_labels": 3, "mixup_alpha": -0.1}, "mixup_alpha must be a finite number >= 0, got -0.1"),
        ({"num_labels": 3, "cutmix_alpha": float("nan")}, "cutmix_alpha must be"),
        ({"num_labels": 3, "cutmix_alpha": float("inf")}, "cutmix_alpha must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageCollator(**arguments)
