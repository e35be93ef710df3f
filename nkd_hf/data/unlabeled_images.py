"""Defines datasets of training images without labels: alone, or joined to labelled images."""

import copy
import functools
import math
from fractions import Fraction
from typing import Any

import torch
from datasets import Dataset

from .decoding import read_image, takes_tensors, transform_image
from .image_datasets import ImageDataset
from .sampler import epoch_order
from .seeding import derived_seeds

# The key in a sample, and in a batch, of the pixels of images without labels.
UNLABELED = "unlabeled_pixel_values"


class UnlabeledImageDataset(ImageDataset):
    """Decodes and transforms images without labels, as [`ImageDataset`] does with labelled images.

    Args:
        dataset: a `datasets.Dataset` with the column `image`; other columns are ignored.
        transform, seed, on_bad_image, training: see [`ImageDataset`].

    A sample of training is `{"unlabeled_pixel_values": [3, H, W] float32}` with `epoch`, `index` and `draw`, which
    [`~nkd_hf.data.collator.ImageCollator`] puts behind the labelled images. Without `training` it has `pixel_values`.

    Raises:
        ValueError: the dataset is empty or has no column `image`; on access: the image is bad, or all images are bad.

    Example:
        >>> from nkd_hf.data.arguments import DataArguments
        >>> from nkd_hf.data.transforms import train_transform
        >>> from nkd_hf.data.unlabeled import load_unlabeled_images
        >>> data = DataArguments(unlabeled_dataset="digits")
        >>> transform = train_transform(data, 32, mean=[0.5] * 3, std=[0.5] * 3)
        >>> sample = UnlabeledImageDataset(load_unlabeled_images(data), transform)[(2, 10)]
        >>> sample["unlabeled_pixel_values"].shape, sample["epoch"], sample["index"]
        (torch.Size([3, 32, 32]), 2, 10)
    """

    @staticmethod
    def _check_columns(dataset: Dataset) -> None:
        if "image" not in dataset.column_names:
            raise ValueError(
                f"expected the column image, got {', '.join(dataset.column_names)}: load the dataset with "
                "load_image_dataset, or rename its column"
            )

    def check_labels(self) -> None:
        """Does nothing: there are no labels."""

    @property
    def kind(self) -> str:
        """The name of the images in messages."""
        return "unlabelled"

    def _read(self, sample: dict, name: str, key: tuple[int, ...]) -> dict:
        image = read_image(sample, name, takes_tensors(self.transform))
        pixels = transform_image(image, name, self.transform, key)
        return {UNLABELED if self.training else "pixel_values": pixels}


class JoinedImageDataset(ImageDataset):
    """Adds to each labelled image the images without labels that join it in a batch.

    The sample at position p of epoch e is number n = e * len(self) + p of the training. It has the unlabelled images
    with the numbers from floor(n * ratio) to floor((n + 1) * ratio) - 1. So B samples have `ratio` * B on average, and
    exactly `ratio` * B if that is an integer. Number m is at position m modulo U in the order of pass m // U through
    the U unlabelled images. This order is a function of the pass and of the seed of `unlabeled`, unless
    [`in_order_of`] sets another seed. The augmentation is a function of the seed of `unlabeled`, the pass and the row.
    So the samples do not depend on the number of processes and workers, or on the step at which a run was resumed.

    Args:
        dataset, transform, seed, on_bad_image, balanced_sampling: see [`ImageDataset`].
        unlabeled: the images without labels.
        ratio: number of unlabelled images for each labelled image, > 0.

    A sample of training is a sample of [`ImageDataset`] with `unlabeled`, a list of samples of
    [`UnlabeledImageDataset`]. A key without a position (see [`~nkd_hf.data.sampler.EpochDataset`]) returns only the
    labelled image.

    Raises:
        ValueError: see [`ImageDataset`]; or the ratio is not positive.
    """

    needs_positions = True

    def __init__(
        self, dataset: Dataset, *args: Any, unlabeled: UnlabeledImageDataset, ratio: float = 1.0, **kwargs: Any
    ):
        super().__init__(dataset, *args, **kwargs)
        if not 0 < ratio < math.inf:
            raise ValueError(
                f"ratio must be a finite number > 0, got {ratio}: omit the images without labels to use none"
            )
        self.unlabeled = unlabeled
        self._order_seed = unlabeled.seed
        # The ratio is exact, since 0.29 * 100 is less than 29 as a float.
        self.ratio = Fraction(ratio).limit_denominator(1_000_000)

    def in_order_of(self, seed: int) -> "JoinedImageDataset":
        """Returns a copy whose images without labels have the order for a seed of the labelled images' order."""
        images = copy.copy(self)  # the copy shares the bad images
        images._order_seed = seed_unlabeled(seed)
        return images

    def __getitem__(self, key: Any) -> dict:
        sample = super().__getitem__(key)
        if not isinstance(key, tuple) or len(key) < 3 or key[2] is None:
            return sample
        number = key[0] * len(self) + key[2]
        keys = range(math.floor(number * self.ratio), math.floor((number + 1) * self.ratio))
        return sample | {"unlabeled": [self._unlabeled_sample(number) for number in keys]}

    def _unlabeled_sample(self, number: int) -> dict:
        passed, position = divmod(number, len(self.unlabeled))
        order = _order(len(self.unlabeled), self._order_seed, passed)
        return self.unlabeled[passed, int(order[position])]


def seed_unlabeled(seed: int) -> int:
    """Returns the seed of images without labels, so that their places and augmentations differ from labelled rows'."""
    return derived_seeds(seed, -1, -1)[0]


@functools.lru_cache(maxsize=2)  # a batch may read the end of one pass and the start of the next one
def _order(num_images: int, seed: int, passed: int) -> torch.Tensor:
    return torch.tensor(epoch_order(num_images, seed, passed))
