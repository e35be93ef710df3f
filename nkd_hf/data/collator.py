"""Makes batches of samples, with mixup, CutMix and a teacher's stored logits."""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from ..teacher_logits.store import TeacherLogits
from .sampler import check_positions
from .seeding import seeded
from .unlabeled_images import UNLABELED


class ImageCollator:
    """Stacks samples into a batch, checks the labels, and mixes the batch with mixup or cutmix.

    With both alphas set, each batch gets mixup or cutmix, with equal chance. Every image is mixed with its predecessor in
    the batch (so batches must be shuffled) and one ratio holds for the whole batch. Labels are not smoothed. Samples
    with `epoch` and `index` are mixed as a pure function of the seed, `epoch` and `index`; other samples draw from
    torch's global generator.

    With `mix_pairs`, the samples at the positions 2k and 2k + 1 of the epoch's permutation are mixed with each other: for
    each pair, mixup or cutmix and its ratio are drawn from the seed, the epoch and the positions. The mix of an image is
    then a function of seed and epoch alone. It does not depend on the number of workers and processes, or on the batch
    of each process, which must be even. The last sample of an odd dataset, which comes twice, is not mixed.

    Images without labels, from samples of [`~nkd_hf.data.unlabeled_images.JoinedImageDataset`], are mixed among
    themselves, with a ratio of their own. Where all images are without labels, `mix_pairs` and `teacher_logits` apply
    to them.

    The collator checks labels, since that needs no GPU synchronisation: on a GPU, a label out of range is an
    unreadable device-side assertion.

    Args:
        num_labels: number of classes.
        mixup_alpha: parameter of mixup's Beta(alpha, alpha); 0 switches mixup off.
        cutmix_alpha: the same for cutmix.
        seed: integer.
        mix_pairs: see above; samples must have `epoch` and `position`, which [`EpochSampler`] with `positions` sets.
        teacher_logits: a store, whose rows are added to the batch; samples must have `epoch` and `position`.

    Call it with a list of samples `{"pixel_values": [3, H, W] float, "labels" or "label": int}`, with or without
    `epoch`, `index` and `position`. It returns `pixel_values` [B, 3, H, W]; `labels`, [B] int64 or, after mixing, [B,
    num_labels] float32; `index` [B] int64 if the samples have it (training samples do); and with a store
    `teacher_logits`, the dict of [`~nkd_hf.teacher_logits.store.TeacherLogits.read`]. U images without labels add
    `unlabeled_pixel_values` [U, 3, H, W], and `index` [B + U] ends with -1 - row for each of them; B may be 0.

    Raises:
        ValueError: an argument is out of range; a label is not an integer from 0 to `num_labels - 1`; a pair is split, or a
            target differs from the store's.

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
        """Returns the same collator for evaluation: integer labels, no mixing."""
        return ImageCollator(self.num_labels, seed=self.seed)

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        unlabeled = [
            each for sample in samples for each in ([sample] if UNLABELED in sample else sample.get("unlabeled", ()))
        ]
        if not unlabeled:
            return self._collate(samples)
        labeled = [sample for sample in samples if UNLABELED not in sample]
        pixel_values = self._mix_unlabeled(unlabeled, in_pairs=self.mix_pairs and not labeled)
        batch = {"pixel_values": pixel_values[:0], "labels": torch.empty(0, dtype=torch.int64)}
        batch |= self._collate(labeled) if labeled else {}
        batch[UNLABELED] = pixel_values
        if self.teacher_logits is not None:
            check_positions(unlabeled)
            epoch, positions = unlabeled[0]["epoch"], [sample["position"] for sample in unlabeled]
            batch["teacher_logits"] = self.teacher_logits.read(epoch, positions)
        if "index" in batch or not labeled:
            rows = torch.tensor([-1 - sample["index"] for sample in unlabeled])
            batch["index"] = torch.cat([batch.get("index", rows[:0]), rows])
        return batch

    def _mix_unlabeled(self, samples: list[dict], in_pairs: bool) -> Tensor:
        pixel_values = torch.stack([sample[UNLABELED] for sample in samples])
        if self._mix is None:
            return pixel_values
        # torchvision needs labels to mix, too; these are not read.
        labels = torch.zeros(len(samples), dtype=torch.int64)
        if in_pairs:
            check_positions(samples)
            self._mix_in_pairs(pixel_values, labels, samples)
            return pixel_values
        with seeded(self.seed, *_mixing_key(samples)):
            return self._mix(pixel_values, labels)[0]

    def _collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        if self._mix is None and not any("labels" in sample or "label" in sample for sample in samples):
            return {"pixel_values": pixel_values}  # `Trainer.predict` on images without labels
        labels = torch.tensor([self._label(row, sample) for row, sample in enumerate(samples)], dtype=torch.int64)
        known = all("epoch" in sample and "index" in sample for sample in samples)
        if self.mix_pairs or self.teacher_logits is not None:
            check_positions(samples)
        if self.mix_pairs:
            labels = self._mix_in_pairs(pixel_values, labels, samples)
        elif self._mix is not None:
            if known:
                with seeded(self.seed, *_mixing_key(samples)):
                    pixel_values, labels = self._mix(pixel_values, labels)
            else:
                pixel_values, labels = self._mix(pixel_values, labels)
        batch = {"pixel_values": pixel_values, "labels": labels}
        if self.teacher_logits is not None:
            batch["teacher_logits"] = self._read_teacher_logits(labels, samples)
        return batch | ({"index": torch.tensor([sample["index"] for sample in samples])} if known else {})

    def _mix_in_pairs(self, pixel_values: Tensor, labels: Tensor, samples: list[dict]) -> Tensor:
        """Mixes the pixels in place, and returns the labels [B, num_labels]."""
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
                    # torchvision rolls the samples by one, which makes two samples partners.
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


def _mixing_key(samples: list[dict]) -> list[int]:
    key = [part for sample in samples for part in (sample["epoch"], sample["index"])]
    return key + [sample["draw"] for sample in samples if sample.get("draw")]


def without_mixing(collator: Callable) -> Callable:
    """Returns a collator that mixes no images."""
    return collator.without_mixing() if isinstance(collator, ImageCollator) else collator
