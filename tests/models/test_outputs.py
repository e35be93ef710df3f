"""Models that need more than pixels, and models that return no logits, are refused with a message."""

import pytest
import timm
import torch
from model_folders import change_config
from tiny import DIGITS, digits, make_trainer, native_resnet, native_vit, timm_cnn
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    ImageGPTConfig,
    ImageGPTForImageClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2ImageProcessor,
)
from transformers.utils import ModelOutput

from nkd_hf import DataArguments, NKDLoss, create_student, load_image_processor, load_teacher
from nkd_hf.cli.evaluate import evaluate
from nkd_hf.models.loading import open_classifier, open_image_processor
from nkd_hf.models.saving import save_student


def siglip2():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = {**small, "num_patches": 16, "patch_size": 8}
    config = Siglip2Config(vision_config=vision, text_config={**small, "vocab_size": 8}, id2label=DIGITS)
    return Siglip2ForImageClassification(config)


def image_gpt():
    config = ImageGPTConfig(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=513, id2label=DIGITS)
    return ImageGPTForImageClassification(config)


NEEDS = {"spatial_shapes": siglip2, "input_ids": image_gpt}


@pytest.mark.parametrize("needed", NEEDS)
def test_models_that_need_more_than_pixels(tmp_path, needed):
    model = NEEDS[needed]()
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    train = digits(0, 16)
    for opened in (
        lambda: load_teacher(str(tmp_path)),
        lambda: load_teacher(model),
        lambda: open_classifier(str(tmp_path)),
        lambda: create_student(str(tmp_path)),
        lambda: make_trainer(tmp_path, model, train),
        lambda: make_trainer(tmp_path, timm_cnn(), train, teacher=model, distillation_loss=NKDLoss()),
        lambda: evaluate(model, DataArguments(dataset_name="digits")),
    ):
        with pytest.raises(ValueError, match=rf"must need pixel_values alone, got \w+, which also needs .*{needed}"):
            opened()


def test_an_image_processor_of_a_model_that_needs_more_than_pixels(tmp_path):
    native_vit().save_pretrained(tmp_path)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path)
    for opened in (
        lambda: load_teacher(str(tmp_path)),
        lambda: load_image_processor(create_student(str(tmp_path))),
        lambda: open_image_processor(str(tmp_path)),
    ):
        with pytest.raises(ValueError, match="must make pixel_values alone, got Siglip2ImageProcessor"):
            opened()


def test_the_image_processor_of_a_model_that_was_built_here():
    with pytest.raises(
        ValueError, match=r"got a ResNetForImageClassification that was built here.* Save the model and"
    ):
        load_image_processor(native_resnet())


class Returns(nn.Module):
    """A teacher that returns what it is told to make of its logits."""

    def __init__(self, change):
        super().__init__()
        self.model, self.change = timm_cnn(), change

    def forward(self, x):
        return self.change(self.model(x).logits)


WRONG = {
    "a tuple": (lambda logits: (logits, logits), "must return logits as a tensor .*, got tuple. Set return_dict"),
    "a list": (lambda logits: [logits], "must return logits as a tensor .*, got list"),
    "another dict": (lambda logits: {"scores": logits}, "must return logits as a tensor .*, got dict"),
    "another output": (
        lambda logits: ModelOutput(scores=logits),
        "must return logits as a tensor .*, got ModelOutput",
    ),
    "nothing": (lambda logits: None, "must return logits as a tensor .*, got NoneType"),
    "maps": (lambda logits: logits[..., None, None], r"must return logits \[\d+, C\] .*, got \[\d+, 10, 1, 1\]"),
    "one image": (lambda logits: logits[:1], r"must return logits \[\d+, C\] .*, got \[1, 10\]"),
    "one vector": (lambda logits: logits[0], r"must return logits \[\d+, C\] .*, got \[10\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_teachers_that_return_no_logits(tmp_path, wrong):
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=f"teacher Returns {message}"):
        load_teacher(Returns(change))(torch.randn(4, 3, 32, 32))
    train = digits(0, 16)
    trainer = make_trainer(tmp_path, timm_cnn(), train, teacher=Returns(change), distillation_loss=NKDLoss())
    with pytest.raises(ValueError, match=f"teacher Returns {message}"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("change", [lambda logits: logits, lambda logits: {"logits": logits}])
def test_teachers_that_return_logits(change):
    pixels = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(load_teacher(Returns(change))(pixels), load_teacher(timm_cnn())(pixels))


def test_a_teacher_of_another_number_of_classes_than_its_names():
    teacher = native_vit()
    teacher.classifier = nn.Linear(32, 9)
    with pytest.raises(ValueError, match=r"must return logits \[2, 10\] for 2 images, got \[2, 9\]"):
        load_teacher(teacher)(torch.randn(2, 3, 32, 32))


def test_a_folder_whose_model_returns_tuples(tmp_path):
    model = timm_cnn()
    save_student(model, str(tmp_path))
    change_config(tmp_path, return_dict=False)
    pixels = torch.randn(2, 3, 32, 32)
    assert isinstance(AutoModelForImageClassification.from_pretrained(tmp_path)(pixels), tuple)
    expected = model.eval()(pixels).logits
    for opened in (load_teacher(str(tmp_path)).model, open_classifier(str(tmp_path)), create_student(str(tmp_path))):
        torch.testing.assert_close(opened.eval()(pixels).logits, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "compile_", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 3, 32, 32))]
)
def test_a_teacher_of_torchscript(compile_):
    model, pixels = timm.create_model("resnet18", num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load_teacher(compile_(model))(pixels), model(pixels))
