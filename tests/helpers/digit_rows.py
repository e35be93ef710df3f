"""Digits as an ImageDataset, and a collator that breaks one of them."""

from nkd_hf import (
    DataArguments,
    ImageCollator,
    ImageDataset,
    load_image_dataset,
    train_transform,
)

NAN = float("nan")


def rows_of_digits(num_samples: int = 32) -> ImageDataset:
    data = load_image_dataset(DataArguments(max_train_samples=num_samples))["train"]
    return ImageDataset(data, train_transform(DataArguments(horizontal_flip=0.0), 32, [0.5] * 3, [0.5] * 3))


class Collator(ImageCollator):
    """Makes the batch with one sample a broken one."""

    def __init__(self, index: int, value: float = NAN):
        super().__init__(10)
        self.index, self.value = index, value

    def __call__(self, samples):
        batch = super().__call__(samples)
        batch["pixel_values"][batch["index"] == self.index] = self.value
        return batch
