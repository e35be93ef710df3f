"""torchcodec's decoder in the place of Pillow's: the same values and the same faults."""

import io
import itertools
import random

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from nkd_hf.data import decoding
from nkd_hf.data.arguments import DataArguments
from nkd_hf.data.decoding import draws_from_torch, read_sample, takes_tensors
from nkd_hf.data.seeding import seeded
from nkd_hf.data.transforms import train_transform
from nkd_hf.errors import BadSampleError

PHOTO = PIL.Image.fromarray(load_sample_image("flower.jpg")).resize((301, 203))


def jpeg(image: PIL.Image.Image = PHOTO, orientation: int | None = None, **keywords) -> bytes:
    exif, buffer = PIL.Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    image.save(buffer, "JPEG", exif=exif, **keywords)
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, "PNG")
    return buffer.getvalue()


def flipped_bits(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def row(content: bytes) -> dict:
    return {"image": {"bytes": content, "path": None}, "label": 3}


# Content, and whether torchcodec decodes it.
READ = {
    "plain": (jpeg(quality=92), True),
    "full colour": (jpeg(quality=95, subsampling=0), True),
    "quarter colour": (jpeg(subsampling=2), True),
    "progressive": (jpeg(progressive=True), True),
    "RGB in Adobe's way": (jpeg(keep_rgb=True), True),
    "upright by its tag": (jpeg(orientation=1), True),
    "junk after it": (jpeg() + b"junk" * 9, True),
    "flipped bits": (flipped_bits(jpeg()), True),
    "turned by its tag": (jpeg(orientation=6), False),
    "gray": (jpeg(PHOTO.convert("L")), False),
    "CMYK": (jpeg(PHOTO.convert("CMYK")), False),
    "PNG": (png(), False),
}


@pytest.mark.parametrize("name", READ)
def test_values_are_pillows(tmp_path, name):
    content, is_tensor = READ[name]
    (tmp_path / "image").write_bytes(content)
    for sample in (row(content), {"image": {"bytes": None, "path": str(tmp_path / "image")}, "label": 3}):
        image, _ = read_sample(sample, "it")
        decoded, label = read_sample(sample, "it", as_tensor=True)
        assert label == 3
        assert isinstance(decoded, torch.Tensor) == is_tensor
        values = decoded.permute(1, 2, 0).numpy() if is_tensor else np.asarray(decoded)
        assert values.dtype == np.uint8
        np.testing.assert_array_equal(values, np.asarray(image))


@pytest.mark.parametrize("name", READ)
def test_values_and_layout_are_the_same_without_torchcodec(monkeypatch, name):
    given, _ = read_sample(row(READ[name][0]), "it", as_tensor=True)
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    image, _ = read_sample(row(READ[name][0]), "it", as_tensor=True)
    assert isinstance(image, torch.Tensor) == READ[name][1]
    if READ[name][1]:
        assert torch.equal(image, given)
        assert image.stride() == given.stride()  # the transforms round alike
    else:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(given))


@pytest.mark.parametrize("content", [jpeg()[:-2], jpeg()[: len(jpeg()) // 2], jpeg()[:200], b""])
def test_faults_are_pillows(content):
    faults = []
    for as_tensor in (False, True):
        with pytest.raises(BadSampleError) as error:
            read_sample(row(content), "it", as_tensor)
        faults.append(str(error.value))
    assert faults[0] == faults[1]


@pytest.mark.parametrize("arguments", [{}, {"pca_lighting": 0.1}, {"random_crop_padding": 4}])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_pixels_differ_by_few_steps_of_8_bits(arguments, interpolation):
    transform = train_transform(DataArguments(**arguments), 96, [0.5] * 3, [0.5] * 3, interpolation)
    assert takes_tensors(transform)
    content = jpeg(quality=92)
    differences = []
    for key in range(20):
        pixels = []
        for as_tensor in (False, True):
            with seeded(key):
                pixels.append(transform(read_sample(row(content), "it", as_tensor)[0]))
        assert type(pixels[1]) is torch.Tensor
        assert (pixels[1].dtype, pixels[1].shape) == (torch.float32, (3, 96, 96))
        differences.append((pixels[0] - pixels[1]).abs() * 127.5)
    differences = torch.stack(differences)
    assert differences.max() < (2.01 if interpolation == "bilinear" else 3.01)
    assert differences.mean() < 0.05  # steps of 256


def test_transforms_that_want_images_get_them():
    assert not takes_tensors(v2.ToImage())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("arguments", [{"auto_augment": "rand-m9-n2-mstd0.5-inc1"}, {"random_erasing": 0.5}])
def test_what_follows_the_crop_is_timms(arguments, as_tensor):
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    ours = train_transform(DataArguments(**arguments), (64, 48), mean, std, "bicubic")
    names = {"re_prob" if name == "random_erasing" else name: value for name, value in arguments.items()}
    timms = timm.data.create_transform(
        (64, 48), is_training=True, color_jitter=None, interpolation="bicubic", mean=mean, std=std, re_mode="pixel",
        **names,
    ).transforms  # fmt: skip
    image, _ = read_sample(row(jpeg()), "it", as_tensor)
    changed = 0
    for key in range(40):
        with seeded(key):
            pixels = ours(image)
        with seeded(key):
            cropped = ours.crop(image)
            expected = v2.functional.to_pil_image(cropped) if as_tensor else cropped
            plain = expected = timms[1](expected)  # the flip
            for step in timms[2:]:
                expected = step(expected)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
        bare = v2.functional.to_dtype(v2.functional.to_image(plain), torch.float32, scale=True)
        changed += not torch.allclose(pixels, v2.functional.normalize(bare, mean, std), atol=1e-5)
    assert 10 < changed < 40, "some are augmented, some are not"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_transform_is_that_of_torchvisions_classes(interpolation, as_tensor):
    arguments = DataArguments(random_resized_crop=[0.3, 1.0], horizontal_flip=0.4)
    transform = train_transform(arguments, (64, 48), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], interpolation)
    classes = v2.Compose(
        [
            v2.RandomResizedCrop((64, 48), scale=(0.3, 1.0), interpolation=v2.InterpolationMode(interpolation)),
            v2.RandomHorizontalFlip(0.4),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]),
            v2.ToPureTensor(),
        ]
    )
    image, _ = read_sample(row(jpeg()), "it", as_tensor)
    seen = []
    for key in range(12):
        pixels = []
        for each in (transform, classes):
            with seeded(key):
                pixels.append(each(image))
        assert torch.equal(*pixels)
        assert type(pixels[0]) is torch.Tensor
        seen.append(pixels[0])
    assert len(torch.stack(seen).unique(dim=0)) == 12


@pytest.mark.parametrize("size", [(375, 500), (30, 31), (1, 1), (300, 9), (9, 300), (3, 4)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crops_are_those_of_torchvision_in_images_of_any_shape(size, scale):
    ours, theirs = (
        train_transform(DataArguments(random_resized_crop=list(scale)), 8, [0.5] * 3, [0.5] * 3).crop,
        v2.RandomResizedCrop(8, scale=scale),
    )
    pixels = torch.arange(3 * size[0] * size[1]).remainder(251).to(torch.uint8).view(3, *size)
    for key, image in itertools.product(range(10), (pixels, v2.functional.to_pil_image(pixels))):
        crops = []
        for each in (ours, theirs):
            with seeded(key, torch_only=True):
                crops.append((v2.functional.to_image(each(image)), torch.rand(1)))
        assert all(torch.equal(*pair) for pair in zip(*crops, strict=True)), "the same crop, and as many draws"


@pytest.mark.parametrize("arguments", [{}, {"random_crop_padding": 4}, {"pca_lighting": 0.1}, {"random_erasing": 1.0}])
def test_transforms_that_draw_from_torch_draw_from_nothing_else(arguments):
    transform = train_transform(DataArguments(**arguments), 32, [0.5] * 3, [0.5] * 3)
    assert draws_from_torch(transform) == ("random_erasing" not in arguments)
    if not draws_from_torch(transform):
        return
    image, _ = read_sample(row(jpeg()), "it", True)
    before, state = random.getstate(), str(np.random.get_state())
    pixels = []
    for kwargs in ({}, {"torch_only": True}):
        with seeded(3, **kwargs):
            pixels.append(transform(image))
    assert torch.equal(*pixels), "the same draws whether the others are seeded or not"
    transform(image)
    assert (random.getstate(), str(np.random.get_state())) == (before, state)
