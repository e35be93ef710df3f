"""What a run is built of: models from the seed, and the steps of a stream."""

from types import SimpleNamespace

import pytest
from transformers import IntervalStrategy

from nkd_hf import DataArguments, DistillationTrainingArguments
from nkd_hf.recipe.build import count_epochs, images_per_epoch, passed_epochs, set_stream_steps


def stream(**settings) -> DataArguments:
    return DataArguments(streaming=True, **settings)


def training(**settings) -> DistillationTrainingArguments:
    defaults = {"per_device_train_batch_size": 64, "report_to": "none", "use_cpu": True}
    return DistillationTrainingArguments("unused", **(defaults | settings))


def test_epochs_of_a_stream_become_steps():
    args = training(num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch", logging_strategy="steps")
    assert set_stream_steps(stream(num_train_images=96), args) == 2
    assert args.max_steps == 3
    assert (args.eval_strategy, args.eval_steps) == (IntervalStrategy.STEPS, 2)
    assert (args.save_strategy, args.save_steps) == (IntervalStrategy.STEPS, 2)
    assert args.logging_steps == 500


def test_a_stream_of_unknown_length_needs_steps():
    with pytest.raises(ValueError, match="num_train_images must be positive to know the length"):
        set_stream_steps(stream(), training(num_train_epochs=2))
    args = training(max_steps=7)
    assert set_stream_steps(stream(), args) is None
    assert args.max_steps == 7
    assert passed_epochs({"epoch": 1.0, "step": 7}, stream(), args) == 7


def test_a_limit_of_images_is_the_length_of_a_stream():
    assert images_per_epoch(stream(num_train_images=96, max_train_samples=64)) == 64
    assert images_per_epoch(stream(num_train_images=96, max_train_samples=640)) == 96
    assert images_per_epoch(stream(max_train_samples=64)) is None


@pytest.mark.parametrize(
    ("max_steps", "epochs", "expected"), [(-1, 2.5, 3), (-1, 2, 2), (4, 99, 2), (5, 99, 3), (1, 99, 1)]
)
def test_epochs_that_a_store_must_have(max_steps, epochs, expected):
    args = SimpleNamespace(max_steps=max_steps, num_train_epochs=epochs, global_batch_size=lambda: 16)
    assert count_epochs(args, num_images=32) == expected
