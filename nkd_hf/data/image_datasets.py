"""Defines datasets of decoded and transformed images, map-style and streamed.

Raise `PIXELS_VERSION` of transforms.py with every change that changes the pixels of training.
"""

import copy
import itertools
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePath

import datasets
import PIL.ImageOps
import torch
from datasets import Dataset
from torch import multiprocessing
from torch.utils.data import get_worker_info

from ..errors import BadSampleError
from .decoding import read_pixels
from .kept_rows import KeptRows
from .labels import read_labels
from .sampler import EpochDataset
from .seeding import derived_seeds
from .stream_parts import shuffled_part

logger = logging.getLogger(__name__)

# Number of rows that each worker keeps to shuffle a stream: about 200 MB of ImageNet's JPEGs.
SHUFFLE_BUFFER = 2048
# Number of bad images that a report names.
NUM_NAMED = 20


class ImageDataset(EpochDataset):
    """Decodes and transforms the samples of a dataset on disk when they are read.

    The transform of a sample is a pure function of `(seed, epoch, index)`, whatever the number of workers, when it is read
    as `dataset[(epoch, index)]`. [`~nkd_hf.data.sampler.EpochSampler`] and, for any other sampler,
    [`~nkd_hf.DistillationTrainer`] do so. [`read_sample`] reads the images.

    A plain `dataset[index]`, as in all other loaders and wrapped datasets, has no epoch: in training, the requests for a
    row are counted over all workers; the first one gets epoch 0, the next one epoch 1. Each process counts for itself, and
    a new process, such as that of a resumed run, starts at 0.

    Args:
        dataset: a `datasets.Dataset` with the columns `image` and `label`, such as a split of [`~nkd_hf.data.loading.load_image_dataset`].
        transform: RGB `PIL.Image` -> [3, H, W] float32; with a true attribute `takes_tensors`, from [3, H, W] uint8 too.
        seed: integer.
        on_bad_image: `error`, or `skip`: the next good row replaces a bad one (see [`read_sample`]), so that lengths
            do not change. In evaluation the good row then counts twice: with N bad rows of M, accuracy is off by N / M
            at most. [`~nkd_hf.data.bad_images.BadImageReport`] names the bad rows.
        training: whether samples have `epoch` and `index` (the row that they show), from which mixing draws.
        balanced_sampling: whether the trainer draws the rows of an epoch with replacement, each class with the same
            probability ([`~nkd_hf.data.sampler.balanced_order`]). A row that it draws again gets another augmentation.
        crops_per_image: number of samples of a decoded image that the trainer takes in an epoch, each with another
            augmentation; see [`~nkd_hf.data.orders.crop_order`]. Several samples need a transform that does not change
            the image.

    A sample is `{"pixel_values": [3, H, W] float32, "labels": int}`, in training with `epoch`, `index` and `draw`, which is
    0 for the row's first sample in this epoch.

    Raises:
        ValueError: the dataset is empty, lacks a column or has labels that are no integers; on access: the row is bad (its
            file is named), or all rows are bad.

    Example:
        >>> from nkd_hf.data.arguments import DataArguments
        >>> from nkd_hf.data.loading import load_image_dataset
        >>> from nkd_hf.data.transforms import train_transform
        >>> data = load_image_dataset(DataArguments(dataset_name="digits"))
        >>> transform = train_transform(DataArguments(), 32, mean=[0.5] * 3, std=[0.5] * 3)
        >>> sample = ImageDataset(data["train"], transform)[(2, 10)]
        >>> sample["pixel_values"].shape, sample["epoch"], sample["index"]
        (torch.Size([3, 32, 32]), 2, 10)
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        seed: int = 0,
        on_bad_image: str = "error",
        training: bool = True,
        balanced_sampling: bool = False,
        crops_per_image: int = 1,
    ):
        _check_on_bad_image(on_bad_image)
        self._check_columns(dataset)
        if len(dataset) == 0:
            raise ValueError("the dataset has no rows: name another split")
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.training = training
        self.sampling_labels = read_labels(dataset) if balanced_sampling else None
        self.crops_per_image = crops_per_image
        self._kept = KeptRows(crops_per_image) if crops_per_image > 1 else None
        # One flag per row, in memory that workers share. It needs no lock, since setting a flag twice is harmless.
        self._bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self._requests = torch.zeros(len(dataset), dtype=torch.int32).share_memory_()

    @staticmethod
    def _check_columns(dataset: Dataset) -> None:
        _check_columns(dataset)

    def check_labels(self) -> None:
        """Raises BadSampleError for the first row without a label, unless bad rows are skipped; reads no images."""
        if self.on_bad_image == "skip":
            return
        for row, label in enumerate(self.dataset["label"][:]):
            if label is None or label < 0:
                raise BadSampleError(f"{self.describe_row(row)} has no label ({label}): {_ADVICE}")

    def __setstate__(self, state: dict):
        # deepcopy and plain pickle copy into memory that workers don't share.
        self.__dict__.update(state)
        self._bad.share_memory_()
        self._requests.share_memory_()

    @property
    def num_bad_images(self) -> int:
        """The number of different rows that all workers together found bad so far."""
        return int(self._bad.sum())

    @property
    def bad_rows(self) -> list[int]:
        """The rows that all workers together found bad so far, in order."""
        return self._bad.nonzero().flatten().tolist()

    def describe_row(self, row: int, sample: dict | None = None) -> str:
        """Returns `row 5 of the training data (folder/file.jpg)`; reads the sample if it is not passed."""
        path = ((self.dataset[row] if sample is None else sample)["image"] or {}).get("path")
        return f"row {row} of the {self.kind} data" + (f" ({path})" if path else "")

    @property
    def kind(self) -> str:
        """The name of the images in messages, `training` or `evaluation`."""
        return "training" if self.training else "evaluation"

    def __len__(self) -> int:
        return len(self.dataset)

    def without_crops(self) -> "ImageDataset":
        dataset = copy.copy(self)
        dataset._kept = None
        return dataset

    def plain_key(self, index: int) -> tuple[int, int]:
        if not self.training:
            return 0, 0
        epoch = int(self._requests[index])
        self._requests[index] += 1
        # In the next epoch another process may count its first request for the row. The rank makes its draw another
        # one.
        return epoch, -int(os.environ.get("RANK", 0))

    def get_sample(self, epoch: int, index: int, draw: int = 0) -> dict:
        for row in itertools.chain(range(index, len(self)), range(index)):
            if self._bad[row]:
                continue
            sample = self._kept.take(epoch, row) if self._kept is not None else None
            if sample is None:
                sample = self.dataset[row]
            key = (self.seed, epoch, row, draw) if draw else (self.seed, epoch, row)
            try:
                result = self._read(sample, self.describe_row(row, sample), key)
            except BadSampleError as error:
                if self.on_bad_image == "error":
                    raise BadSampleError(f"{error}: {_ADVICE}") from error.__cause__
                self._bad[row] = True
                logger.warning("%s. The next good row takes its place.", error)
                continue
            if self._kept is not None:
                self._kept.put(row, sample, draw)
            if self.training:
                result |= {"epoch": epoch, "index": row, "draw": draw}
            return result
        raise ValueError(f"all {len(self)} rows are bad: see the warnings above, or set on_bad_image to error")

    def _read(self, sample: dict, name: str, key: tuple[int, ...]) -> dict:
        pixels, label = read_pixels(sample, name, self.transform, key)
        return {"pixel_values": pixels, "labels": label}


class StreamingImageDataset(torch.utils.data.IterableDataset):
    """Decodes and transforms the samples of a streamed dataset.

    In training the stream never ends: pass follows pass, each in another order of the shards and of a buffer. So all
    batches are full, and a run that is resumed by skipping batches reads the same samples as a run without a break.
    Set `max_steps` of the Trainer (see [`~nkd_hf.data.arguments.streaming_max_steps`]). In evaluation there is one
    pass, in order.

    A stream has no row numbers: the transform is a pure function of `(seed, pass, CRC-32 of the encoded image)`, whatever
    the number of workers. If the image is a file of its own, the CRC-32 is of its folder and name. In training, all
    workers of all processes (see [`~StreamingImageDataset.for_process`]) divide each pass into equal parts, by shards
    and, where shards cannot be divided equally, by rows (see [`~nkd_hf.data.stream_parts.shuffled_part`]). Each worker
    reads all of a shard that it shares, but each row is decoded once.

    Args:
        dataset: a `datasets.IterableDataset` with the columns `image` and `label`.
        transform: RGB `PIL.Image` -> [3, H, W] float32; with a true attribute `takes_tensors`, from [3, H, W] uint8 too.
        seed: integer.
        on_bad_image: `error`, or `skip`: a bad sample is skipped, and the stream continues with the next good one.
        training: whether to shuffle, to continue for ever, and to add `epoch` (the pass) and `index` (the CRC-32).

    Samples are as in [`ImageDataset`], without `draw`.

    Raises:
        ValueError: the dataset lacks a column or has labels that are no integers; on iteration: an image is bad (its file
            is named), or all images are bad.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        seed: int = 0,
        on_bad_image: str = "error",
        training: bool = True,
    ):
        _check_on_bad_image(on_bad_image)
        _check_columns(dataset)
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.training = training
        self._process = 0, 1
        # The values are shared with workers. A lock of the fork context cannot be passed to a spawned worker; this
        # lock fits both.
        context = multiprocessing.get_context("spawn")
        self._num_bad = context.Value("q", 0)
        self._epoch = context.Value("q", 0)
        # The names of the first bad images, one per line, in memory of a fixed size: it is allocated before workers start.
        self._bad_names = context.Array("c", 512 * NUM_NAMED)

    @property
    def num_bad_images(self) -> int:
        """The number of bad images that all workers together found so far, each counted once in every pass."""
        return self._num_bad.value

    @property
    def bad_names(self) -> list[str]:
        """The names of the different bad images that all workers found so far; of many, the first ones."""
        return [name.decode(errors="replace") for name in self._bad_names.value.splitlines()]

    def for_process(self, index: int, num_processes: int) -> "StreamingImageDataset":
        """Returns one process' part of the stream; all parts together contain each image of a pass once."""
        stream = copy.copy(self)  # the copy shares counts and epoch
        stream._process = index, num_processes
        return stream

    @property
    def is_part(self) -> bool:
        """Whether this is one process' part of the stream."""
        return self._process[1] > 1

    def set_epoch(self, epoch: int) -> None:
        """Sets the pass at which the next iteration begins, also in persistent workers."""
        self._epoch.value = epoch

    def __iter__(self) -> Iterator[dict]:
        if not self.training:
            for encoded in self.dataset:
                sample = self._sample(0, encoded)
                if sample is not None:
                    yield {"pixel_values": sample["pixel_values"], "labels": sample["labels"]}
            return
        index, num_processes = self._process
        worker = get_worker_info()
        num_workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        num_parts = num_processes * num_workers
        fruitless = 0
        for epoch in itertools.count(self._epoch.value):
            num_rows = num_good = 0
            # A worker reads another part in each pass, so that no worker always reads a part that is a row longer.
            for encoded in self._pass(epoch, (index * num_workers + worker_id + epoch) % num_parts, num_parts):
                num_rows += 1
                sample = self._sample(epoch, encoded)
                if sample is not None:
                    num_good += 1
                    yield sample
            fruitless = 0 if num_good else fruitless + 1
            # A part of a small stream can be empty, or have only bad images, for some passes.
            if fruitless >= (10 * num_parts if num_parts > 1 else 1):
                if num_rows == 0:
                    raise ValueError("the stream has no rows: name another split")
                raise ValueError(f"all {num_rows} images of a pass are bad: see the warnings above")

    def _pass(self, epoch: int, part: int, num_parts: int) -> Iterator[dict]:
        # Each pass has a new seed. `dataset.set_epoch` would set the pass of all workers, which reach their next pass
        # at different times.
        seed = derived_seeds(self.seed, epoch)[1] >> 1
        if num_parts == 1:
            return iter(self.dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
        return shuffled_part(self.dataset, part, num_parts, seed, SHUFFLE_BUFFER)

    def _sample(self, epoch: int, encoded: dict) -> dict | None:
        image = encoded["image"] or {"bytes": None, "path": None}
        if image["bytes"] is not None:
            key = zlib.crc32(image["bytes"])
        else:
            key = zlib.crc32("/".join(PurePath(image["path"] or "").parts[-2:]).encode())
        name = image["path"] or f"the image of CRC-32 {key:#010x}"
        try:
            pixels, label = read_pixels(encoded, name, self.transform, (self.seed, epoch, key))
        except BadSampleError as error:
            if self.on_bad_image == "error":
                raise BadSampleError(f"{error}: {_ADVICE}") from error.__cause__
            if self._note_bad(name):
                logger.warning("%s. The stream continues with the next good sample.", error)
            return None
        return {"pixel_values": pixels, "labels": label, "epoch": epoch, "index": key}

    def _note_bad(self, name: str) -> bool:
        """Counts a bad image, and returns whether its name is new."""
        with self._num_bad.get_lock():
            self._num_bad.value += 1
            names, line = self._bad_names.value, f"{name}\n".encode(errors="replace")
            if line in names.splitlines(keepends=True) or len(names) + len(line) >= len(self._bad_names):
                return False
            self._bad_names.value = names + line
            return True


_ADVICE = "repair or remove it, or set on_bad_image to skip"


def _check_on_bad_image(value: str) -> None:
    if value not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be error or skip, got {value!r}")


def _check_columns(dataset: Dataset | datasets.IterableDataset) -> None:
    if not {"image", "label"} <= set(dataset.column_names):
        raise ValueError(
            f"expected the columns image and label, got {', '.join(dataset.column_names)}: load the dataset with "
            "load_image_dataset, or rename its columns"
        )
    label = dataset.features["label"]
    if not (isinstance(label, datasets.ClassLabel) or (isinstance(label, datasets.Value) and "int" in label.dtype)):
        raise ValueError(
            f"the labels are {label}, expected integers: load the dataset with load_image_dataset, or map names to "
            'integers with `dataset.class_encode_column("label")`'
        )
