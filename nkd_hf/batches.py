"""From samples to batches: epoch-aware sampling, reproducible randomness, and a collator with mixup and cutmix.

`set_epoch` on a dataset never reaches persistent DataLoader workers, so here the epoch travels with each index: the
sampler asks for `(epoch, index)` and the dataset keys its augmentation by it, whatever the number of workers. With pairs
that are mixed, or with stored teacher logits, the position in the epoch's permutation travels with them.

What changes the order, the draws or the mixing of training images raises `PIXELS_VERSION` of transforms.py.
"""

import hashlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from .teacher_logits import TeacherLogits

__all__ = ["EpochDataset", "EpochSampler", "ImageCollator", "epoch_order", "seeded"]


def derived_seeds(*key: int) -> tuple[int, int, int]:
    """Three independent 64-bit seeds that depend on the integers alone. A hash, since nearby keys must not correlate."""
    digest = hashlib.blake2b(repr([operator.index(part) for part in key]).encode(), digest_size=24).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in (0, 8, 16))


@contextmanager
def seeded(*key: int, torch_only: bool = False) -> Iterator[None]:
    """Makes `random`, numpy's global generator and torch's CPU generator a pure function of the integers.

    They are put back on leaving, also after an exception: with `num_workers=0` the samples are made in the process
    that trains, whose own draws (dropout, drop path) must not depend on them. (One thing is lost: the second half of a
    pair of normals that `np.random.randn` had in store.) No other generator, such as a GPU's, is touched.

    Args:
        key: any integers, for example `seed, epoch, index`.
        torch_only: leave `random` and numpy alone, whose states are large, where nothing draws from them; torch's draws are
            the same in either case.

    Example:
        >>> import torch
        >>> with seeded(0, 3, 17):
        ...     first = torch.rand(2)
        >>> with seeded(0, 3, 17):
        ...     second = torch.rand(2)
        >>> torch.equal(first, second)
        True
    """
    python_seed, numpy_seed, torch_seed = derived_seeds(*key)
    torch_state = torch.get_rng_state()
    torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed would seed the accelerators as well
    try:
        if torch_only:
            yield
        else:
            with _python_and_numpy_seeded(python_seed, numpy_seed):
                yield
    finally:
        torch.set_rng_state(torch_state)


@contextmanager
def _python_and_numpy_seeded(python_seed: int, numpy_seed: int) -> Iterator[None]:
    python_state = random.getstate()
    # Exchanging the generator, since np.random.get_state and set_state would double the cost of all this.
    numpy_generator = np.random.get_bit_generator()
    random.seed(python_seed)
    np.random.set_bit_generator(np.random.PCG64(numpy_seed))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_bit_generator(numpy_generator)


class EpochDataset(Dataset):
    """A map-style dataset whose items are asked for as `(epoch, index)`, `(epoch, index, position)` or `(epoch, index,
    position, draw)`.

    Subclasses define `__len__` and `get_sample(epoch, index)`, whose result should be a pure function of the two. A plain
    index means epoch 0, or what `plain_key` makes of it. A position goes into the sample. A draw that is not 0 is another
    sample of the same row in the same epoch: `get_sample(epoch, index, draw)`.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def get_sample(self, epoch: int, index: int) -> dict:
        """The sample at `index` (0 <= index < len(self)) as it is in `epoch`."""
        raise NotImplementedError

    def plain_key(self, index: int) -> tuple[int, int]:
        """The epoch and the draw of the sample that a plain index (0 <= index < len(self)) asks for."""
        return 0, 0

    def __getitem__(
        self, key: int | tuple[int, int] | tuple[int, int, int] | tuple[int, int, int | None, int]
    ) -> dict:
        epoch, index, position, draw = (*key, None, 0)[:4] if isinstance(key, tuple) else (None, key, None, 0)
        draw = draw or 0
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for a dataset of {len(self)} samples")
        index = index % len(self)
        if epoch is None:
            epoch, draw = self.plain_key(index)
        sample = self.get_sample(epoch, index, draw) if draw else self.get_sample(epoch, index)
        return sample if position is None else sample | {"position": position}


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The permutation of an epoch: a pure function of the arguments.

    Args:
        num_samples: length of the dataset.
        seed: integer.
        epoch: integer.
        shuffle: `False` keeps the order of the dataset.

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=2)), epoch_order(4, seed=0, epoch=2, shuffle=False)
        ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    if not shuffle:
        return list(range(num_samples))
    generator = torch.Generator().manual_seed(derived_seeds(seed, epoch)[2])
    return torch.randperm(num_samples, generator=generator).tolist()


class EpochSampler(Sampler[tuple[int, ...]]):
    """Hands `(epoch, index)` pairs to an [`EpochDataset`], each index once an epoch.

    The order is a pure function of `(seed, epoch)`: it is the same in all processes, reads no global generator, and a
    resumed epoch gets the order that it had.

    Args:
        num_samples: length of the dataset.
        seed: integer.
        shuffle: `False` keeps the order of the dataset.
        positions: hands out `(epoch, index, position)`, the position being that in the epoch's permutation.
        pairs: the positions 2k and 2k + 1 belong together: the last sample of an odd dataset comes twice, so that no pair
            is torn when the last batches are filled up with the first samples.

    Raises:
        ValueError: `num_samples` is not positive.

    Example:
        >>> sampler = EpochSampler(3, seed=0, shuffle=False)
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 0), (5, 1), (5, 2)]
    """

    def __init__(
        self, num_samples: int, seed: int, shuffle: bool = True, positions: bool = False, pairs: bool = False
    ):
        if num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}: the dataset is empty")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.positions = positions
        self.pairs = pairs
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples + (self.num_samples % 2 if self.pairs else 0)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch, order = self.epoch, epoch_order(self.num_samples, self.seed, self.epoch, self.shuffle)
        positions = [min(position, self.num_samples - 1) for position in range(len(self))]
        if self.positions:
            return ((epoch, order[position], position) for position in positions)
        return ((epoch, order[position]) for position in positions)


class ImageCollator:
    """Stacks samples into a batch, checks the labels, and mixes the batch when asked.

    With both alphas set, each batch gets mixup or cutmix, with equal chance. Every image is mixed with its predecessor in
    the batch (so batches must be shuffled) and one ratio holds for the whole batch. Labels are not smoothed. Samples that
    carry `epoch` and `index` are mixed as a pure function of the seed and of these; others draw from torch's global
    generator.

    With `mix_pairs`, the samples at the positions 2k and 2k + 1 of the epoch's permutation are mixed with each other: for
    each pair, mixup or cutmix and its ratio are drawn from the seed, the epoch and the positions. What becomes of an image
    is then a function of seed and epoch alone, whatever the number of workers and processes, and whatever the batch of each
    process, which must be even. The last sample of an odd dataset, which stands twice, is not mixed.

    Labels are checked here because it costs no GPU synchronisation: a label out of range would otherwise be an
    unreadable device-side assertion.

    Args:
        num_labels: number of classes.
        mixup_alpha: parameter of mixup's Beta(alpha, alpha); 0 switches mixup off.
        cutmix_alpha: the same for cutmix.
        seed: integer.
        mix_pairs: see above; samples must carry `epoch` and `position`, as those of [`EpochSampler`] with `positions` do.
        teacher_logits: a store, whose rows come with the batch; samples must carry `epoch` and `position`.

    Call with a list of samples `{"pixel_values": [3, H, W] float, "labels" or "label": int}`, with or without `epoch`,
    `index` and `position`. Returns `pixel_values` [B, 3, H, W], `labels`: [B] int64, or [B, num_labels] float32 after
    mixing, with samples that carry it, as those of training do, `index` [B] int64, and with a store `teacher_logits`, the
    dict of [`~nkd_hf.teacher_logits.TeacherLogits.read`].

    Raises:
        ValueError: an argument is out of range; a label is not an integer from 0 to `num_labels - 1`; a pair is torn, or
            a target is not that of the store.

    Example:
        >>> import torch
        >>> samples = [{"pixel_values": torch.zeros(3, 8, 8), "labels": label} for label in (1, 0, 2)]
        >>> ImageCollator(num_labels=3)(samples)["labels"]
        tensor([1, 0, 2])
        >>> ImageCollator(num_labels=3, mixup_alpha=0.8, cutmix_alpha=1.0)(samples)["labels"].shape
        torch.Size([3, 3])
    """

    def __init__(
        self,
        num_labels: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        seed: int = 0,
        mix_pairs: bool = False,
        teacher_logits: TeacherLogits | None = None,
    ):
        if num_labels < 1:
            raise ValueError(f"num_labels must be positive, got {num_labels}: pass the number of classes")
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {alpha}: 0 switches it off")
        self.num_labels = num_labels
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.seed = seed
        mixings = []
        if mixup_alpha > 0:
            mixings.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_labels))
        if cutmix_alpha > 0:
            mixings.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_labels))
        self._mix = v2.RandomChoice(mixings) if mixings else None
        # Without mixing there are no pairs.
        self.mix_pairs = mix_pairs and self._mix is not None
        self.teacher_logits = teacher_logits
        if teacher_logits is None:
            return
        if teacher_logits.info.num_classes != num_labels:
            raise ValueError(
                f"{teacher_logits.folder} has the logits of {teacher_logits.info.num_classes} classes, and there are "
                f"{num_labels} labels: write a store for this dataset"
            )
        if self._mix is not None and not mix_pairs:
            raise ValueError("stored teacher logits are of images that were mixed in pairs: set mix_pairs")

    def without_mixing(self) -> "ImageCollator":
        """The same collator for evaluation: integer labels, no mixing."""
        return ImageCollator(self.num_labels, seed=self.seed)

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        if self._mix is None and not any("labels" in sample or "label" in sample for sample in samples):
            return {"pixel_values": pixel_values}  # `Trainer.predict` on images without labels
        labels = torch.tensor([self._label(row, sample) for row, sample in enumerate(samples)], dtype=torch.int64)
        known = all("epoch" in sample and "index" in sample for sample in samples)
        if self.mix_pairs or self.teacher_logits is not None:
            _check_positions(samples)
        if self.mix_pairs:
            labels = self._mix_in_pairs(pixel_values, labels, samples)
        elif self._mix is not None:
            if known:
                key = [part for sample in samples for part in (sample["epoch"], sample["index"])]
                key += [sample["draw"] for sample in samples if sample.get("draw")]
                with seeded(self.seed, *key):
                    pixel_values, labels = self._mix(pixel_values, labels)
            else:
                pixel_values, labels = self._mix(pixel_values, labels)
        batch = {"pixel_values": pixel_values, "labels": labels}
        if self.teacher_logits is not None:
            batch["teacher_logits"] = self._read_teacher_logits(labels, samples)
        return batch | ({"index": torch.tensor([sample["index"] for sample in samples])} if known else {})

    def _mix_in_pairs(self, pixel_values: Tensor, labels: Tensor, samples: list[dict]) -> Tensor:
        """Mixes the pixels in place; the labels [B, num_labels] are returned."""
        mixed_labels = F.one_hot(labels, self.num_labels).float()
        for row in range(0, len(samples), 2):
            pair = slice(row, row + 2)
            epochs, positions = ([sample[key] for sample in samples[pair]] for key in ("epoch", "position"))
            first = positions[0]
            if positions not in ([first & ~1, first | 1], [first, first]) or len(set(epochs)) > 1:
                raise ValueError(
                    f"the local batch must be even: of the {len(samples)} samples of this one, row {row} is at position "
                    f"{first} of the epoch and lacks its partner in the row below. Set an even "
                    "per_device_train_batch_size, or mix_pairs to false"
                )
            if len(set(positions)) == 2:
                with seeded(self.seed, epochs[0], *positions):
                    # On two samples, torchvision's roll by one makes them partners.
                    pixel_values[pair], mixed_labels[pair] = self._mix(pixel_values[pair], labels[pair])
        return mixed_labels

    def _read_teacher_logits(self, labels: Tensor, samples: list[dict]) -> dict[str, Tensor]:
        epoch, positions = samples[0]["epoch"], [sample["position"] for sample in samples]
        rows = self.teacher_logits.read(epoch, positions)
        target = labels if labels.ndim == 1 else labels.argmax(-1)
        for row in (rows["target"] != target).nonzero().flatten().tolist():
            raise ValueError(
                f"{self.teacher_logits.folder} has the target class {rows['target'][row]} at position {positions[row]} of "
                f"epoch {epoch}, and this run has {target[row]}: the store was written for other data or other mixing"
            )
        return rows

    def _label(self, row: int, sample: dict) -> int:
        label = sample["labels"] if "labels" in sample else sample.get("label")
        where = f"row {row} of the batch" + (f" (index {sample['index']})" if "index" in sample else "")
        try:
            label = operator.index(label)
        except TypeError:
            raise ValueError(
                f"{where} has the label {label!r}, expected an integer from 0 to {self.num_labels - 1}: "
                "map label names to integers (datasets: `class_encode_column`)"
            ) from None
        if not 0 <= label < self.num_labels:
            raise ValueError(
                f"{where} has the label {label}, expected 0 to {self.num_labels - 1}: "
                "build the student with the dataset's number of labels, or drop unlabelled rows (-1)"
            )
        return label


def _check_positions(samples: list[dict]) -> None:
    if not all("epoch" in sample and "position" in sample for sample in samples):
        raise ValueError(
            "mixing in pairs and stored teacher logits need samples that carry epoch and position, got "
            f"{', '.join(samples[0])}: train on an ImageDataset with DistillationTrainer, not on a stream or a list"
        )
    if len({sample["epoch"] for sample in samples}) > 1:
        raise ValueError("a batch holds samples of several epochs: take EpochSampler's order")
