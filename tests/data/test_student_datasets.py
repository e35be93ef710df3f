"""The datasets and the collator of a training, from the arguments and the student alone."""

import pytest
import torch
from tiny import make_trainer, timm_cnn

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageDataset,
    NKDLoss,
    Recipe,
    RecipeArguments,
    create_student,
    load_image_processor,
    make_datasets,
    processor_transform,
)
from nkd_hf.data.image_datasets import StreamingImageDataset

AUGMENTED = {"random_resized_crop": [0.5, 1.0], "mixup_alpha": 0.2, "cutmix_alpha": 1.0}


def test_a_student_is_distilled_in_a_few_lines(tmp_path):
    data = DataArguments(dataset_name="digits", max_train_samples=96, max_eval_samples=40, horizontal_flip=0.0)
    student = create_student("resnet18", num_labels=10, image_size=32, model_args={"channels": [8, 16, 32, 64]})
    train, validation, collator = make_datasets(data, student, seed=0)
    trainer = DistillationTrainer(
        model=student,
        teacher=create_student("resnet18", num_labels=10, image_size=32),
        distillation_loss=NKDLoss(gamma=1.5),
        args=DistillationTrainingArguments(
            str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
    )
    trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < 100
    assert {"task", "nkd_target", "nkd_non_target"} <= trainer.state.log_history[0].keys()


def test_pixels_and_mixing_are_those_of_a_recipe(tmp_path):
    data = DataArguments(max_train_samples=20, max_eval_samples=10, **AUGMENTED)
    training = DistillationTrainingArguments(str(tmp_path), seed=3, report_to="none", use_cpu=True)
    recipe = Recipe(RecipeArguments("resnet18", distillation_loss="none", image_size=32), data, training)
    student = recipe.create("resnet18", None)
    expected, collators = recipe.datasets(student), [recipe.collator()]
    *images, collator = make_datasets(data, student, seed=3)
    collators.append(collator)
    for ours, theirs in zip(images, expected, strict=True):
        torch.testing.assert_close([ours[i] for i in range(10)], [theirs[i] for i in range(10)], rtol=0, atol=0)
    batches = [collate([images[0][(1, i)] for i in range(8)]) for collate in collators]
    torch.testing.assert_close(*batches, rtol=0, atol=0)
    assert batches[0]["labels"].shape == (8, 10)


def test_evaluation_has_the_pixels_of_the_students_processor():
    student = timm_cnn()
    _, validation, _ = make_datasets(DataArguments(max_eval_samples=10), student, seed=0)
    transform = processor_transform(load_image_processor(student))
    expected = ImageDataset(validation.dataset, transform, training=False)
    assert torch.equal(validation[3]["pixel_values"], expected[3]["pixel_values"])
    assert set(validation[3]) == {"pixel_values", "labels"}


def test_the_seed_draws_the_augmentation():
    student = timm_cnn()
    first, again, other = (
        make_datasets(DataArguments(max_train_samples=20), student, seed)[0][(0, 0)]["pixel_values"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_stream_is_streamed():
    train, validation, _ = make_datasets(DataArguments(streaming=True), timm_cnn(), seed=0)
    assert isinstance(train, StreamingImageDataset)
    assert next(iter(validation))["pixel_values"].shape == (3, 32, 32)


def test_a_student_of_other_classes_is_refused_by_the_trainer(tmp_path):
    student = create_student("resnet18", num_labels=7, image_size=32)
    train, validation, collator = make_datasets(DataArguments(), student, seed=0)
    with pytest.raises(ValueError, match="train_dataset must have the student's 7 classes at most, got 10"):
        make_trainer(tmp_path, student, train, validation, data_collator=collator)
