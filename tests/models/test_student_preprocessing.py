"""Preprocessing that is asked for of a student that is opened: what it gets, what it saves, or an error."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny import digits, make_trainer, native_resnet, native_vit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    ViTImageProcessor,
    pipeline,
)

from nkd_hf import create_student, load_image_processor, load_teacher
from nkd_hf.data.arguments import DataArguments
from nkd_hf.models.preprocessing import Preprocessing, read_crop_pct, read_preprocessing
from nkd_hf.models.saving import save_student
from nkd_hf.recipe.arguments import RecipeArguments
from nkd_hf.recipe.plan_models import open_student

NEW = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "crop_pct": 0.8,
    "interpolation": "bilinear",
}


def preprocessing(student) -> tuple[Preprocessing, float]:
    processor = load_image_processor(student)
    return read_preprocessing(student, processor), read_crop_pct(processor)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_resnet", 48),
        ("test_vit", 64),
        ("test_vit_relpos", 64),
        ("test_coatnet", 64),
        ("vit_tiny_patch16_dinov3_qkvb", 64),
        ("swin_tiny_patch4_window7_224", 96),
        ("shufflenet_v2_x1_0", 64),
        ("resnet18_cifar", 48),
    ],
)
def test_a_folder_with_preprocessing_in_its_config(tmp_path, name, size):
    save_student(create_student(name, num_labels=5), str(tmp_path / "first"))
    student = create_student(str(tmp_path / "first"), image_size=size, **NEW).eval()
    expected = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (size, size), "bilinear")
    got, crop_pct = preprocessing(student)
    assert got == expected
    assert crop_pct == pytest.approx(0.8, abs=0.02)
    save_student(student, str(tmp_path / "second"))
    again = create_student(str(tmp_path / "second")).eval()
    assert preprocessing(again) == (got, crop_pct)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, student(pixels).logits, rtol=0, atol=0)


def test_the_weights_stay_those_of_the_folder(tmp_path):
    first = create_student("test_vit", num_labels=5)
    save_student(first, str(tmp_path))
    state = create_student(str(tmp_path), image_size=64).state_dict()
    for key, value in first.state_dict().items():
        if key == "timm_model.pos_embed":
            assert state[key].shape == (1, 17, value.shape[2])
            assert state[key].std() > 0.1 * value.std()  # resampled, not drawn or zero
        else:
            assert torch.equal(state[key], value), key


def saved(folder, model, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("processor", "arguments", "size", "crop_pct"),
    [
        (ViTImageProcessor(size=32), {"image_size": 64}, 64, 1.0),
        (ViTImageProcessor(size=32), {"image_size": 64, "crop_pct": 1.0}, 64, 1.0),
        (BitImageProcessor(size={"shortest_edge": 36}, crop_size=32), {"image_size": 64}, 64, 0.89),
        (BitImageProcessor(size={"shortest_edge": 36}, crop_size=32), {"image_size": 64, "crop_pct": 0.5}, 64, 0.5),
        (DeiTImageProcessor(size=36, crop_size=32), {"crop_pct": 0.5}, 32, 0.5),
        (ConvNextImageProcessor(size={"shortest_edge": 32}), {"image_size": 64}, 64, 0.875),
        (ConvNextImageProcessor(size={"shortest_edge": 32}), {"image_size": 64, "crop_pct": 1.0}, 64, 1.0),
        (transformers.MobileViTImageProcessor(size=36, crop_size=32), {"image_size": 64}, 64, 0.89),
    ],
)
def test_size_and_crop_of_an_image_processor(tmp_path, processor, arguments, size, crop_pct):
    student = create_student(saved(tmp_path, native_resnet(), processor), **arguments)
    before, (got, got_crop_pct) = read_preprocessing(student, processor), preprocessing(student)
    assert got == before._replace(size=(size, size))
    assert got_crop_pct == pytest.approx(crop_pct, abs=0.02)


def test_what_a_native_student_is_trained_with_is_saved_with_it(tmp_path):
    folder = saved(tmp_path / "first", native_resnet(), BitImageProcessor(size={"shortest_edge": 36}, crop_size=32))
    student = create_student(folder, image_size=64, **NEW)
    trainer = make_trainer(tmp_path / "run", student, digits(0, 32), max_steps=1)
    trainer.processing_class = load_image_processor(student)
    trainer.train()
    trainer.save_model(str(tmp_path / "second"))
    again = create_student(str(tmp_path / "second"))
    assert preprocessing(again) == preprocessing(student)
    assert preprocessing(again)[0] == Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64), "bilinear")
    image = Image.fromarray(load_sample_image("china.jpg"))
    with torch.no_grad():
        pixels = AutoImageProcessor.from_pretrained(tmp_path / "second")(image, return_tensors="pt")["pixel_values"]
        expected = AutoModelForImageClassification.from_pretrained(tmp_path / "second")(pixels).logits.softmax(-1)
    answer = pipeline("image-classification", model=str(tmp_path / "second"), device="cpu")(image, top_k=1)
    assert answer[0]["score"] == pytest.approx(expected.max().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("build", "processor", "arguments", "message"),
    [
        (native_vit, ViTImageProcessor(size=32), {"image_size": 60}, r"ViTForImageClassification takes, got 60 .*to 32 or"),
        (native_vit, ViTImageProcessor(size=32), {"crop_pct": 0.9}, r"crop_pct must be None, since ViTImageProcessor of"),
        (native_resnet, transformers.EfficientNetImageProcessor(size=32), {"image_std": [0.2] * 3}, "image_std must be None"),
        (native_resnet, transformers.MobileViTImageProcessor(crop_size=32), {"image_mean": [0.5] * 3}, "image_mean must be"),
        (native_resnet, ConvNextImageProcessor(), {"image_size": 384, "crop_pct": 0.8}, "crop_pct must be None"),
        (native_resnet, ViTImageProcessor(size=32), {"image_size": 0}, "image_size must be from 1 to"),
        (native_resnet, ViTImageProcessor(size=32), {"image_std": [0.0] * 3}, "image_std must be above 0"),
    ],
)  # fmt: skip
def test_what_a_student_cannot_have_is_refused(tmp_path, build, processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_student(saved(tmp_path, build(), processor), **arguments)


def test_position_embeddings_of_another_shape_are_resampled_or_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    wide = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=[16, 32], patch_size=8, **sizes))
    positions = wide.base_model.embeddings.position_embeddings
    student = create_student(saved(tmp_path / "wide", wide, ViTImageProcessor(size=32)), image_size=32)
    grid = positions[:, 1:].view(1, 2, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(student.base_model.embeddings.position_embeddings[:, 1:], expected, atol=1e-6)
    flat = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=[8, 16], **sizes))
    with pytest.raises(ValueError, match="image_size must be a size that ViTForImageClassification takes, got 48"):
        create_student(saved(tmp_path / "flat", flat, ViTImageProcessor(size=32)), image_size=48)


@pytest.mark.parametrize("name", ["ViT", "DeiT"])
@pytest.mark.parametrize("image_size", [16, 48])
def test_position_embeddings_are_resampled_for_another_size(tmp_path, name, image_size):
    config = getattr(transformers, f"{name}Config")(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    own = getattr(transformers, f"{name}ForImageClassification")(config)
    positions = own.base_model.embeddings.position_embeddings
    positions.data.normal_()
    folder = saved(tmp_path / "own", own, ViTImageProcessor(size=32))
    student = create_student(folder, num_labels=3, image_size=image_size)
    assert student.base_model.embeddings.position_embeddings.requires_grad
    others = positions.shape[1] - 16
    found, side = student.base_model.embeddings.position_embeddings, image_size // 8
    assert torch.equal(found[:, :others], positions[:, :others])
    grid = positions[:, others:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    assert torch.allclose(found[:, others:], expected.flatten(2).transpose(1, 2), atol=1e-6)
    pixels = torch.randn(2, 3, image_size, image_size)
    save_student(student, str(tmp_path / "new"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).logits, student.eval()(pixels).logits)
    assert preprocessing(student)[0].size == (image_size, image_size)


def test_without_an_image_processor_there_is_nothing_to_change(tmp_path):
    native_resnet().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"image_size, crop_pct must be None, since .* has no image processor to change"
    ):
        create_student(str(tmp_path), image_size=64, crop_pct=1.0)


def test_weights_of_a_size_that_timm_does_not_resample(tmp_path):
    save_student(create_student("levit_128s", num_labels=5), str(tmp_path))
    with pytest.raises(ValueError, match="the weights of levit_128s are for its own size"):
        create_student(str(tmp_path), image_size=96)
    assert create_student(str(tmp_path), image_size=224).config.num_labels == 5


@pytest.mark.parametrize("timms", [True, False])
def test_a_recipe_and_its_plan_take_the_same(tmp_path, timms):
    folder = str(tmp_path)
    if timms:
        save_student(create_student("test_vit", num_labels=5), folder)
    else:
        saved(folder, native_resnet(), ViTImageProcessor(size=32))
    arguments = NEW | {"crop_pct": 1.0, "image_size": 64}
    recipe = RecipeArguments(student=folder, distillation_loss="uskd", **arguments)
    student = recipe.create(folder)
    with torch.device("meta"):
        planned, pixels = open_student(recipe, DataArguments(num_classes=5))
    assert pixels == preprocessing(student)[0]
    assert pixels == Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (64, 64), "bilinear")
    if timms:
        assert planned.config.model_args == {"img_size": 64}


def test_a_teacher_keeps_its_own(tmp_path):
    folder = saved(tmp_path, native_vit(), ViTImageProcessor(size=32))
    before = read_preprocessing(native_vit(), ViTImageProcessor(size=32))
    student = create_student("test_resnet", num_labels=10, image_size=64, **NEW)
    teacher = load_teacher(folder).align(read_preprocessing(student), None)
    assert teacher.preprocessing == before
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 10)
