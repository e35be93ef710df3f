"""Defines the arguments of a dataset and its augmentation."""

import math
from dataclasses import dataclass, field

from ..models.repo_ids import read_repo_id


@dataclass
class DataArguments:
    """Arguments of the dataset and of the augmentation of training images, for `HfArgumentParser`.

    Raises:
        ValueError: a value is out of its range.
    """

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "Hub id (`uoft-cs/cifar100`), local folder of images or of parquet files, parquet file or quoted glob "
            "(all of it is training data), or `digits`, scikit-learn's 1797 digits, which need no download."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where the Hub has several."}
    )
    train_split: str | None = field(
        default=None,
        metadata={
            "help": "Training split. Default: `train`. `none` trains on `unlabeled_dataset` alone, and reads no label but for "
            "the evaluation."
        },
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on. Default: the first of `validation`, `val`, `valid`, `test` that exists; "
            "otherwise one is made from the training split (`train_val_split`)."
        },
    )
    train_val_split: float = field(
        default=0.1,
        metadata={"help": "Fraction of the training split that becomes the validation split if none exists."},
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Default: `image` or `img`."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "Default: the first of `label`, `labels`, `fine_label` that exists."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many samples, drawn with the seed (streaming: the first ones)."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on this many samples, drawn with the seed (streaming: the first ones)."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset as a stream, with no copy on disk."})
    num_train_images: int | None = field(
        default=None,
        metadata={"help": "Images in an epoch: a stream's number of steps, and `nkd-hf plan`, are computed from it."},
    )
    num_classes: int | None = field(
        default=None,
        metadata={
            "help": "Classes that the dataset must have; `nkd-hf plan` reckons with them. Default for the plan: the "
            "architecture's own, 1000 or CIFAR's 100."
        },
    )
    balanced_sampling: bool = field(
        default=False,
        metadata={
            "help": "Draw the training images of an epoch with replacement, each class with the same probability; an image "
            "that is drawn again gets another augmentation."
        },
    )
    on_bad_image: str = field(
        default="error",
        metadata={
            "help": "Unreadable image or missing label: stop with its name (`error`), or let the next good sample take its "
            "place and count it (`skip`).",
            "choices": ["error", "skip"],
        },
    )
    random_resized_crop: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Smallest and largest part of the image's area that the random crop takes."},
    )
    random_crop_padding: int | None = field(
        default=None,
        metadata={"help": "CIFAR's crop in place of the resized one: pad by this many black pixels, crop the size."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "RandAugment or AutoAugment in timm's syntax, e.g. `rand-m9-n2-mstd0.5-inc1`."}
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability that a rectangle is replaced with noise (timm's `pixel` mode)."}
    )
    pca_lighting: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of AlexNet's lighting noise along the principal axes of ImageNet's colours."
        },
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Beta parameter of mixup; 0 switches it off."})
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Beta parameter of cutmix; 0 switches it off. With mixup: one of them a batch."}
    )
    mix_pairs: bool = field(
        default=False,
        metadata={
            "help": "Mix the samples 2k and 2k + 1 of the epoch's order with each other, a ratio drawn for each pair, as "
            "`nkd-hf teacher-logits` does; the batch of each process must be even."
        },
    )
    unlabeled_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Images without labels that join each batch of the student, named as `dataset_name`: the teacher alone "
            "teaches them, and labels that the dataset has are ignored."
        },
    )
    unlabeled_ratio: float = field(
        default=1.0, metadata={"help": "Images of `unlabeled_dataset` for each labelled image of a batch."}
    )
    crops_per_image: int = field(
        default=1,
        metadata={
            "help": "Samples of each decoded image in an epoch, each with another augmentation; an epoch then decodes "
            "that many times fewer images, for the same number of samples."
        },
    )
    unlabeled_dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of `unlabeled_dataset`, where the Hub has several."}
    )

    def __post_init__(self):
        if not self._is_parquet:  # parquet files may have addresses
            self.dataset_name = read_repo_id(self.dataset_name, "dataset_name", "dataset")
        self._check_unlabeled()
        if self.on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be error or skip, got {self.on_bad_image!r}")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"train_val_split must lie between 0 and 1, got {self.train_val_split}")
        for name in (
            "max_train_samples",
            "max_eval_samples",
            "num_train_images",
            "num_classes",
            "random_crop_padding",
            "crops_per_image",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}: omit it to switch it off")
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("pca_lighting", "mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}: 0 switches it off")
        crop = self.random_resized_crop
        if len(crop) != 2 or not 0 < crop[0] <= crop[1] <= 1:
            raise ValueError(f"random_resized_crop must be two fractions, 0 < smallest <= largest <= 1, got {crop}")
        if self.mix_pairs and self.streaming:
            raise ValueError(
                "mix_pairs must be false with streaming, got true. A stream has no order in which images could be paired: load "
                "the dataset without streaming"
            )
        if self.balanced_sampling and self.streaming:
            raise ValueError(
                "balanced_sampling must be false with streaming, got true. A stream is read in its own order: load the "
                "dataset without streaming"
            )
        if self.crops_per_image > 1:
            self._check_crops()

    def _check_unlabeled(self) -> None:
        if not 0 < self.unlabeled_ratio < math.inf:
            raise ValueError(
                f"unlabeled_ratio must be a finite number > 0, got {self.unlabeled_ratio}: omit unlabeled_dataset to use none"
            )
        if self.unlabeled_dataset is None:
            config = self.unlabeled_dataset_config_name
            needed_by = {
                "train_split=none": self.trains_without_labels,
                f"unlabeled_ratio={self.unlabeled_ratio:g}": self.unlabeled_ratio != 1,
                f"unlabeled_dataset_config_name={config}": config is not None,
            }
            if names := [name for name, is_set in needed_by.items() if is_set]:
                raise ValueError(
                    f"unlabeled_dataset must be set for {names[0]}, got None: name the images without labels, or omit the other"
                )
            return
        if not _is_parquet(self.unlabeled_dataset):
            self.unlabeled_dataset = read_repo_id(self.unlabeled_dataset, "unlabeled_dataset", "dataset")
        if self.trains_without_labels and self.unlabeled_ratio != 1:
            raise ValueError(
                f"unlabeled_ratio must be omitted with train_split=none, got {self.unlabeled_ratio}: there are no labelled images "
                "that it could count"
            )
        # Images that join labelled ones have no order, so they cannot be mixed in pairs.
        for name in ("streaming", "balanced_sampling" if self.trains_without_labels else "mix_pairs"):
            if getattr(self, name):
                raise ValueError(f"{name} must be false with unlabeled_dataset, got true: omit one of the two")

    @property
    def trains_without_labels(self) -> bool:
        """Whether all training images come from `unlabeled_dataset`."""
        return self.train_split == "none"

    def _check_crops(self) -> None:
        others = ("streaming", "balanced_sampling", "unlabeled_dataset")
        if name := next((name for name in others if getattr(self, name)), None):
            raise ValueError(
                f"crops_per_image must be 1 with {name}, which has another order of its images, got {self.crops_per_image}. "
                "Omit one of the two"
            )

    @property
    def _is_parquet(self) -> bool:
        return _is_parquet(self.dataset_name)


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") or any(character in name for character in "*?[")


def streaming_max_steps(num_train_images: int, num_train_epochs: float, global_batch_size: int) -> int:
    """Returns the Trainer's `max_steps` for a stream: the optimiser steps for `num_train_epochs` epochs of images.

    Args:
        num_train_images: images in an epoch.
        num_train_epochs: epochs, fractions allowed.
        global_batch_size: images of one optimiser step (per-device batch x processes x accumulation).

    Example:
        >>> streaming_max_steps(1_281_167, 100, 256)
        500456
    """
    for name, value in (
        ("num_train_images", num_train_images),
        ("num_train_epochs", num_train_epochs),
        ("global_batch_size", global_batch_size),
    ):
        if value is None or value <= 0:
            raise ValueError(f"{name} must be positive to know the length of a streamed run, got {value}: set {name}")
    return math.ceil(num_train_images * num_train_epochs / global_batch_size)
