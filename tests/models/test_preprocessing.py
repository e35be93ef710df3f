"""Training, the teacher and evaluation see the same pixels, whatever the image processor; or it is refused."""

import logging
import pickle
import re

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from tiny import digits, make_trainer, native_vit, timm_cnn
from torch import nn
from transformers import BaseImageProcessor, EfficientNetImageProcessor, MobileViTConfig, ViTImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    ImageDataset,
    NKDLoss,
    create_student,
    load_image_dataset,
    load_image_processor,
    load_teacher,
    processor_transform,
    train_transform,
)
from nkd_hf.models.preprocessing import Preprocessing, read_preprocessing, read_processor
from nkd_hf.models.teacher import Teacher
from nkd_hf.recipe.fingerprint import compare_fingerprints

PROCESSORS = sorted(
    {
        name
        for model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        for name in (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).values()
    }
    - {"TimmWrapperImageProcessor"}  # of timm's configurations, below
)
# Models that take other things than an image.
NOT_IMAGES = ("ImageGPT", "Siglip2")
# As large as a sheet of paper.
SETTINGS = {"Donut": {"size": {"height": 160, "width": 120}}}
WHOLE = DataArguments(random_resized_crop=[1.0, 1.0], horizontal_flip=0.0)


def picture(height: int, width: int) -> Image.Image:
    """Another colour in each quarter, so that no two channels and no two sides are alike."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    pixels = pixels.repeat((height + 1) // 2, axis=0).repeat((width + 1) // 2, axis=1)[:height, :width]
    return Image.fromarray(pixels)


def in_the_quarters(pixels: torch.Tensor) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    return torch.stack([pixels[..., y, x] for y in (height // 5, -height // 5) for x in (width // 5, -width // 5)])


class Keeps(nn.Module):
    """A model that keeps what it gets."""

    def forward(self, pixel_values):
        self.pixels = pixel_values
        return pixel_values.mean((2, 3))


def assert_same_pixels(processor, wanted: Preprocessing):
    """Through training's transform, and through the teacher's arithmetic from two other students' pixels."""
    image = picture(*wanted.size)
    expected = in_the_quarters(processor_transform(processor)(image))
    tolerance = {"rtol": 0, "atol": 1.01 / 255 / min(map(abs, wanted.std))}
    transform = train_transform(
        WHOLE, wanted.size, wanted.mean, wanted.std, wanted.interpolation, wanted.channel_order
    )
    torch.testing.assert_close(in_the_quarters(transform(image)), expected, **tolerance)
    for mean, std, order in (
        ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], (0, 1, 2)),
        ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], (2, 1, 0)),
    ):
        student = Preprocessing(mean, std, wanted.size, "bicubic", order)
        pixels = train_transform(WHOLE, student.size, mean, std, "bicubic", order)(image)
        teacher = Teacher(Keeps(), wanted).align(student, None)
        teacher(pixels[None])
        torch.testing.assert_close(in_the_quarters(teacher.model.pixels[0]), expected, **tolerance)


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_of_an_image_classifier(name):
    settings = next((value for part, value in SETTINGS.items() if name.startswith(part)), {})
    processor = getattr(transformers, name)(**settings)
    if name.startswith(NOT_IMAGES):
        with pytest.raises(
            ValueError, match=r"the image processor must give `pixel_values` of \[3, height, width\], but"
        ):
            read_processor(processor)
    else:
        assert_same_pixels(processor, read_processor(processor))


HALF = {"image_mean": 0.5, "image_std": 0.25}


@pytest.mark.parametrize(
    ("processor", "mean", "std", "size"),
    [
        (ViTImageProcessor(), [0.5] * 3, [0.5] * 3, (224, 224)),
        (ViTImageProcessor(**HALF, size=48), [0.5] * 3, [0.25] * 3, (48, 48)),
        (ViTImageProcessor(do_normalize=False, size={"height": 40, "width": 64}), [0.0] * 3, [1.0] * 3, (40, 64)),
        (ViTImageProcessor(do_rescale=False, do_normalize=False), [0.0] * 3, [1 / 255] * 3, (224, 224)),
        (ViTImageProcessor(do_rescale=False, image_mean=[127.5] * 3, image_std=[51.0] * 3), [0.5] * 3, [0.2] * 3, (224, 224)),
        (ViTImageProcessor(do_center_crop=True, crop_size=48), [0.5] * 3, [0.5] * 3, (48, 48)),
        (ViTImageProcessor(do_resize=False, do_center_crop=True, crop_size=100), [0.5] * 3, [0.5] * 3, (100, 100)),
        (ViTImageProcessor(do_resize=False, size={"height": 32, "width": 32}), [0.5] * 3, [0.5] * 3, (32, 32)),
        (ViTImageProcessor(size={"shortest_edge": 64}), [0.5] * 3, [0.5] * 3, (64, 64)),
        (ViTImageProcessor(size={"height": 8, "width": 7}, resample=3), [0.5] * 3, [0.5] * 3, (8, 7)),
        # Its crop comes before its resizing.
        (transformers.PerceiverImageProcessor(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], (224, 224)),
        (EfficientNetImageProcessor(include_top=False, image_std=[0.2] * 3), [0.5] * 3, [0.2] * 3, (346, 346)),
        (EfficientNetImageProcessor(image_std=[0.2, 0.3, 0.4]), [0.5] * 3, [0.04, 0.09, 0.16], (346, 346)),
        (
            EfficientNetImageProcessor(do_normalize=False, rescale_offset=True, rescale_factor=1 / 127.5, include_top=False),
            [0.5] * 3,
            [0.5] * 3,
            (346, 346),
        ),
    ],
)  # fmt: skip
def test_settings_of_a_processor(processor, mean, std, size):
    wanted = read_processor(processor)
    assert wanted.mean == pytest.approx(tuple(mean), abs=1e-6)
    assert wanted.std == pytest.approx(tuple(std), rel=1e-5)
    assert wanted.size == size
    assert_same_pixels(processor, wanted)


def test_mobilevit_sees_red_where_evaluation_does():
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    wanted = read_preprocessing(nn.Module(), processor)
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    # Size, mean and std are what everybody passes. The order of the channels comes with the mean, to workers as well.
    mean = pickle.loads(pickle.dumps(wanted)).mean
    transform = train_transform(DataArguments(), wanted.size, mean, wanted.std)
    assert transform(red).mean((1, 2)).tolist() == processor_transform(processor)(red).mean((1, 2)).tolist()
    assert transform(red).mean((1, 2)).tolist() == [0.0, 0.0, 1.0]


class Odd(BaseImageProcessor):
    """ViT's processor, and then a step of its own."""

    def __init__(self, step, **kwargs):
        super().__init__()
        self.step, self.inner = step, ViTImageProcessor(size={"height": 32, "width": 32}, **kwargs)

    def to_dict(self):
        return self.inner.to_dict()

    def __call__(self, image, **kwargs):
        return {"pixel_values": self.step(self.inner(image, **kwargs)["pixel_values"])}


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Odd(lambda pixels: pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)), "mixes colour channels"),
        (Odd(lambda pixels: pixels.mean(1, keepdim=True)), r"those of Odd are \[1, 32, 32\]"),
        (Odd(lambda pixels: pixels.movedim(1, -1)), r"those of Odd are \[32, 32, 3\]"),
        (Odd(lambda pixels: pixels.round()), "does more to colours than to shift and scale each channel"),
        (Odd(lambda pixels: pixels.clip(max=0.5)), "does more to colours"),
        (Odd(lambda pixels: pixels.flip(-1)), "flips, turns or pads"),
        (Odd(lambda pixels: pixels.mT), "flips, turns or pads"),
        (Odd(lambda pixels: pixels * 0), "does more to colours"),
        (ViTImageProcessor(image_std=[0.0, 1.0, 1.0]), "Set its image_std above 0"),
        (ViTImageProcessor(do_pad=True, pad_size={"height": 500, "width": 500}), "flips, turns or pads the picture"),
        (ViTImageProcessor(size={"longest_edge": 64}), "ViTImageProcessor raised ValueError: Size must contain"),
        (transformers.DetrImageProcessor(size={"max_height": 64, "max_width": 64}, do_pad=False), "the size of Detr"),
    ],
)
def test_what_training_cannot_do_is_refused(processor, message):
    with pytest.raises(ValueError, match=message):
        read_processor(processor)


@pytest.mark.parametrize(
    ("resample", "name", "near"),
    [(0, "nearest", "bilinear"), (1, "lanczos", "bicubic"), (4, "box", "bilinear"), (5, "hamming", "bilinear")],
)
def test_other_kernels_are_said(caplog, resample, name, near):
    class Other(transformers.ViTImageProcessorPil):  # torchvision itself has neither box nor hamming for tensors
        """Of a name of its own, since a warning is said once."""

    Other.__name__ = f"Other{name}"
    with caplog.at_level(logging.WARNING):
        assert read_processor(Other(resample=resample)).interpolation == near
        assert read_processor(Other(resample=resample)).interpolation == near
    said = f"Other{name} resizes by {name}, which training's crops and the teacher's pixels can't"
    assert caplog.text.count(said) == 1


def test_sizes_that_depend_on_the_image_are_said(caplog):
    class Free(ViTImageProcessor):
        """Of a name of its own, since a warning is said once."""

    with caplog.at_level(logging.WARNING):
        assert read_processor(Free(do_resize=False, size={"height": 40, "width": 32})).size == (40, 32)
    assert "Free does not make all images 40 x 32" in caplog.text


TIMM = {
    "input_size": [3, 32, 48],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "crop_pct": 0.9,
    "interpolation": "bicubic",
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (32, 48), "bicubic")),
        ({"crop_mode": "squash"}, Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (32, 48), "bicubic")),
        ({"crop_mode": "border"}, Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (32, 48), "bicubic")),
        ({"test_input_size": [3, 64, 64]}, Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (32, 48), "bicubic")),
        ({"mean": [0.5], "std": [0.25]}, Preprocessing((0.5,) * 3, (0.25,) * 3, (32, 48), "bicubic")),
        ({"interpolation": "nearest"}, Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (32, 48), "bilinear")),
        ({"input_size": [1, 32, 32]}, r"its input_size \[1, 32, 32\] has not 3 channels"),
        ({"interpolation": "random"}, "must be bilinear or bicubic, got 'random'"),
        ({"std": [0.0, 1.0, 1.0]}, "division by zero"),
        ({"input_size": 32}, "describes no preprocessing"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_preprocessing_of_timm(settings, expected, device):
    model = nn.Module()
    model.pretrained_cfg = TIMM | settings
    with torch.device(device):  # `nkd-hf plan` opens models on the meta device
        if isinstance(expected, Preprocessing):
            assert read_preprocessing(model) == expected
        else:
            with pytest.raises(ValueError, match=expected):
                read_preprocessing(model)


def test_timms_own_configurations_are_read():
    different = {}
    for name in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name)
        different.setdefault((cfg.mean, cfg.std, cfg.crop_mode, cfg.interpolation), cfg)
    assert len(different) > 10
    for cfg in different.values():
        model = nn.Module()
        model.pretrained_cfg = cfg.to_dict() | {"input_size": (3, 32, 32)}
        assert read_preprocessing(model) == Preprocessing(cfg.mean, cfg.std, (32, 32), cfg.interpolation)


def test_a_processor_that_contradicts_the_student_is_refused(tmp_path):
    student = timm_cnn()
    with pytest.raises(
        ValueError, match=r"must preprocess as the pretrained_cfg in the model's config, whose mean is"
    ):
        read_preprocessing(student, ViTImageProcessor(size={"height": 32, "width": 32}))
    with pytest.raises(ValueError, match=r"whose size is \[32, 32\], got \[224, 224\]"):
        read_preprocessing(student, ViTImageProcessor())
    wrong = Odd(lambda pixels: pixels.round())
    kwargs = {
        "args": make_trainer(tmp_path, timm_cnn()).args,
        "train_dataset": digits(0, 32),
        "processing_class": wrong,
    }
    for more in ({}, {"teacher": timm_cnn(seed=1), "distillation_loss": NKDLoss()}):
        with pytest.raises(ValueError, match="Odd does more to colours"):
            DistillationTrainer(model=native_vit(), **kwargs, **more)


def test_a_teacher_of_other_channels(tmp_path):
    config = MobileViTConfig(
        image_size=64, hidden_sizes=[16, 20, 24], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16], num_labels=3
    )
    transformers.MobileViTForImageClassification(config).save_pretrained(tmp_path)
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    student = read_preprocessing(create_student("resnet18", num_labels=3, image_size=64))
    image = picture(64, 64)
    for teacher in (
        load_teacher(str(tmp_path)),
        load_teacher(
            transformers.AutoModelForImageClassification.from_pretrained(tmp_path), processing_class=processor
        ),
    ):
        pixels = train_transform(WHOLE, 64, student.mean, student.std)(image)[None]
        with torch.no_grad():
            expected = teacher.model(processor(image, return_tensors="pt")["pixel_values"]).logits
        torch.testing.assert_close(teacher.align(student, None)(pixels), expected, rtol=1e-3, atol=1e-4)


def test_channel_order_is_in_a_stores_fingerprint():
    assert compare_fingerprints({"channel_order": [2, 1, 0]}, {}) == "channel_order: store [2, 1, 0], run None"
    assert compare_fingerprints({}, {"channel_order": [2, 1, 0]}) == "channel_order: store None, run [2, 1, 0]"
    assert compare_fingerprints({"seed": 1}, {}) == ""


@pytest.mark.parametrize(
    ("colours", "wrong"),
    [
        (((0.0,) * 3, (1.0,) * 3, (2, 1, 0)), None),
        (((0.001,) * 3, (1.0,) * 3, (2, 1, 0)), None),
        (((0.0,) * 3, (1.0,) * 3), "channel_order"),
        (((0.5,) * 3, (1.0,) * 3, (2, 1, 0)), "mean"),
        (((0.0,) * 3, (0.5,) * 3, (2, 1, 0)), "std"),
    ],
)
def test_training_and_evaluation_of_a_trainer_see_the_same_colours(tmp_path, colours, wrong):
    data = load_image_dataset(DataArguments(max_train_samples=8))["train"]
    mean, std, *order = colours
    dataset = ImageDataset(data, train_transform(DataArguments(), 32, mean, std, "bilinear", *order))
    size = {"height": 32, "width": 32}
    arguments = {
        "model": native_vit(),
        "args": DistillationTrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        "train_dataset": dataset,
        "processing_class": transformers.MobileViTImageProcessor(size={"shortest_edge": 32}, crop_size=size),
    }
    if wrong is None:
        DistillationTrainer(**arguments)
        return
    with pytest.raises(
        ValueError, match=f"the {wrong} of the train_dataset's transform must be that of processing_class"
    ):
        DistillationTrainer(**arguments)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_timm_student_without_processing_class_says_itself_what_evaluation_sees(tmp_path, caplog, order):
    data = load_image_dataset(DataArguments(max_train_samples=8))["train"]
    student = timm_cnn()
    pixels = read_preprocessing(student)

    def make(mean, channel_order):
        transform = train_transform(DataArguments(), 32, mean, pixels.std, channel_order=channel_order)
        return make_trainer(tmp_path, student, ImageDataset(data, transform))

    if order != pixels.channel_order:
        with pytest.raises(ValueError, match=r"the channel_order of .* must be that of the student"):
            make(pixels.mean, order)
        return
    make(pixels.mean, order)
    assert "pipeline()" not in caplog.text
    make([0.5] * 3, order)
    assert "pipeline() will give the saved student other pixels than training does: the mean of" in caplog.text


def test_a_mean_of_0_to_255_is_refused_wherever_it_stands():
    with pytest.raises(ValueError, match=r"mean and std must be in units of \[0, 1\]"):
        train_transform(DataArguments(), 32, [123.0] * 3, [58.0] * 3)
    with pytest.raises(ValueError, match="std above 0"):
        train_transform(DataArguments(), 32, [0.5] * 3, [0.0] * 3)
    processor = ViTImageProcessor(image_mean=[123.0] * 3, image_std=[58.0] * 3)
    with pytest.raises(ValueError, match=r"which makes all images alike. Divide image_mean and image_std by 255"):
        read_processor(processor)
    processor = ViTImageProcessor(image_mean=[123.0] * 3, image_std=[58.0] * 3, do_rescale=False)
    assert read_processor(processor).mean == pytest.approx((123 / 255,) * 3)


@pytest.mark.parametrize("dataset", ["train", "evaluation", "one of two"])
def test_evaluation_transforms_are_held_against_processing_class_too(tmp_path, dataset):
    data = load_image_dataset(DataArguments(max_train_samples=8))["train"]
    student, wrong = timm_cnn(), load_image_processor(timm_cnn(image_mean=[0.9] * 3))
    right = load_image_processor(student)
    images = {
        name: ImageDataset(data, processor_transform(wrong if name == dataset else right), training=name == "train")
        for name in ("train", "evaluation", "one of two")
    }
    arguments = {
        "model": student,
        "args": DistillationTrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
        "train_dataset": images["train"],
        "eval_dataset": images["evaluation"]
        if dataset != "one of two"
        else {"a": images["evaluation"], "b": images[dataset]},
        "processing_class": right,
    }
    name = {"train": "train_dataset", "evaluation": "eval_dataset", "one of two": "eval_dataset['b']"}[dataset]
    with pytest.raises(
        ValueError, match=re.escape(f"the mean of the {name}'s transform must be that of processing_class")
    ):
        DistillationTrainer(**arguments)


def test_images_of_another_size_than_evaluation_will_have_are_said(tmp_path, caplog):
    data = load_image_dataset(DataArguments(max_train_samples=8))["train"]
    student = timm_cnn()
    pixels = read_preprocessing(student)
    make_trainer(tmp_path, student, ImageDataset(data, train_transform(DataArguments(), 64, pixels.mean, pixels.std)))
    assert (
        "The images of the train_dataset are 64 x 64, and the student's image processor makes 32 x 32" in caplog.text
    )
