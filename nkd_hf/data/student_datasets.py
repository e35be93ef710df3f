"""Makes the datasets and the collator of a training, with the preprocessing of one student."""

import datasets
from datasets import DatasetDict, IterableDatasetDict
from transformers import BaseImageProcessor, PreTrainedModel

from ..models.preprocessing import load_image_processor, read_preprocessing
from ..teacher_logits.store import TeacherLogits
from .arguments import DataArguments
from .collator import ImageCollator
from .image_datasets import ImageDataset, StreamingImageDataset
from .loading import load_image_dataset
from .transforms import processor_transform, train_transform
from .unlabeled_images import JoinedImageDataset, UnlabeledImageDataset, seed_unlabeled

ImageDatasets = tuple[ImageDataset | None, ImageDataset] | tuple[StreamingImageDataset, StreamingImageDataset]


def make_datasets(
    data_arguments: DataArguments, student: PreTrainedModel, seed: int = 42
) -> tuple[ImageDataset | StreamingImageDataset, ImageDataset | StreamingImageDataset, ImageCollator]:
    """Makes the training images, the evaluation images and the collator for a [`DistillationTrainer`].

    The student's image processor sets the size, normalisation and interpolation of the images.

    Args:
        data_arguments ([`DataArguments`]): the dataset, its augmentation, mixup and CutMix.
        student (`PreTrainedModel`): the model that is trained on the images, such as a model of [`create_student`].
        seed (`int`, *optional*, defaults to 42): draws the validation split where it must be made, the augmentation
            and the mixing. Set it to the `seed` of the training arguments.

    Returns:
        `(train_dataset, eval_dataset, data_collator)`, the arguments of [`DistillationTrainer`] of these names.

    Raises:
        ValueError: the dataset cannot be loaded, as in [`load_image_dataset`], or the student has no image processor.

    With `unlabeled_dataset`, the samples of the training images include images without labels, and the trainer needs a
    distillation loss with a teacher.

    Example:
        >>> from nkd_hf import DataArguments, create_student, make_datasets
        >>> student = create_student("resnet18", num_labels=10, image_size=32)
        >>> train, evaluation, collator = make_datasets(DataArguments(dataset_name="digits", mixup_alpha=0.2), student)
        >>> len(train), len(evaluation)
        (1437, 360)
        >>> batch = collator([train[0], train[1]])
        >>> batch["pixel_values"].shape, batch["labels"].shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 10]))
    """
    splits = load_image_dataset(data_arguments, seed)
    train, evaluation = make_image_datasets(splits, data_arguments, student, seed)
    return train, evaluation, make_collator(data_arguments, student.config.num_labels, seed)


def make_image_datasets(
    splits: DatasetDict | IterableDatasetDict,
    data_arguments: DataArguments,
    student: PreTrainedModel,
    seed: int,
    with_unlabeled: bool = True,
) -> ImageDatasets:
    """Makes the images of training and of evaluation from the splits of [`load_image_dataset`].

    Args:
        splits: the splits of the dataset.
        data_arguments: the augmentation.
        student: sets the preprocessing of the images.
        seed: the seed of the augmentation.
        with_unlabeled: whether the training images include images without labels. If it is False and no training image
            has a label, the training images are None.
    """
    processor = load_image_processor(student)
    pixels = read_preprocessing(student, processor)
    transform = train_transform(
        data_arguments, pixels.size, pixels.mean, pixels.std, pixels.interpolation, pixels.channel_order
    )
    evaluation = make_evaluation_images(splits["validation"], data_arguments, processor, seed)
    if data_arguments.streaming:
        return StreamingImageDataset(splits["train"], transform, seed, data_arguments.on_bad_image), evaluation
    options = {"on_bad_image": data_arguments.on_bad_image}
    if data_arguments.trains_without_labels:
        train = UnlabeledImageDataset(splits["train"], transform, seed, **options) if with_unlabeled else None
        return train, evaluation
    balanced = {"balanced_sampling": data_arguments.balanced_sampling}
    if not with_unlabeled or "unlabeled" not in splits:
        crops = {"crops_per_image": data_arguments.crops_per_image}
        return ImageDataset(splits["train"], transform, seed, **options, **balanced, **crops), evaluation
    unlabeled = UnlabeledImageDataset(splits["unlabeled"], transform, seed_unlabeled(seed), **options)
    joined = {"unlabeled": unlabeled, "ratio": data_arguments.unlabeled_ratio}
    return JoinedImageDataset(splits["train"], transform, seed, **options, **balanced, **joined), evaluation


def make_evaluation_images(
    split: datasets.Dataset | datasets.IterableDataset,
    data_arguments: DataArguments,
    processor: BaseImageProcessor,
    seed: int = 0,
) -> ImageDataset | StreamingImageDataset:
    """Makes the evaluation images of a split, with or without labels, with the preprocessing of an image processor."""
    kind = StreamingImageDataset if data_arguments.streaming else ImageDataset
    if "label" not in (split.column_names or ["label"]):
        kind = UnlabeledImageDataset
    return kind(split, processor_transform(processor), seed, data_arguments.on_bad_image, training=False)


def make_collator(
    data_arguments: DataArguments,
    num_labels: int,
    seed: int,
    mix_pairs: bool = False,
    teacher_logits: TeacherLogits | None = None,
) -> ImageCollator:
    """Makes the collator with the mixing of the arguments; `mix_pairs` also switches mixing in pairs on."""
    return ImageCollator(
        num_labels,
        data_arguments.mixup_alpha,
        data_arguments.cutmix_alpha,
        seed,
        mix_pairs=data_arguments.mix_pairs or mix_pairs,
        teacher_logits=teacher_logits,
    )
