"""What is built, saved and opened again: by transformers, by a pipeline, by timm."""

import json
import logging
import re

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny import DIGITS, digits, make_trainer, native_resnet, native_vit, timm_cnn, timm_deit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PerceiverConfig,
    PerceiverForImageClassificationLearned,
    PvtConfig,
    PvtForImageClassification,
    PvtImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from nkd_hf import USKDLoss, create_student, load_image_processor
from nkd_hf.models.saving import save_student


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.mark.parametrize("student", [timm_cnn, timm_deit])
def test_saved_timm_student_opens_everywhere_with_equal_logits(tmp_path, student, image):
    trainer = make_trainer(tmp_path / "run", student(), digits(0, 64), distillation_loss=USKDLoss(32, 10))
    trainer.train()
    folder = str(tmp_path / "student")
    trainer.save_model(folder)
    processor = load_image_processor(trainer.student)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = trainer.student.eval()(pixels).logits
        opened = AutoModelForImageClassification.from_pretrained(folder).eval()
        by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        # The weights are equal bit for bit; a kernel may still choose another order of summation for other memory.
        torch.testing.assert_close(opened.state_dict(), trainer.student.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(by_timm.state_dict(), trainer.student.timm_model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(opened(pixels).logits, logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(by_timm(pixels), logits, rtol=1e-5, atol=1e-6)
    assert opened.config.id2label == DIGITS
    torch.testing.assert_close(
        AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"], pixels, rtol=0, atol=0
    )
    answer = pipeline("image-classification", model=folder, device="cpu")(image, top_k=10)
    expected = logits.softmax(-1)[0]
    assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(
        {DIGITS[i]: expected[i].item() for i in range(10)}, rel=1e-5
    )


def test_saved_native_student_opens_with_its_processor(tmp_path, image):
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    trainer = make_trainer(tmp_path / "run", native_vit(), digits(0, 64))
    trainer.processing_class = processor
    trainer.train()
    folder = str(tmp_path / "student")
    trainer.save_model(folder)
    with torch.no_grad():
        logits = trainer.student.eval()(processor(image, return_tensors="pt")["pixel_values"]).logits
    answer = pipeline("image-classification", model=folder, device="cpu")(image, top_k=1)
    assert answer[0]["label"] == DIGITS[logits.argmax().item()]
    assert answer[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-5)
    # The folder is a student to go on from, too: its own head, or a new one.
    again = create_student(folder)
    torch.testing.assert_close(again.state_dict(), trainer.student.state_dict(), rtol=0, atol=0)
    assert load_image_processor(again).image_mean == (0.4, 0.4, 0.4)
    assert create_student(folder, num_labels=3).config.num_labels == 3


def test_student_carries_the_papers_preprocessing(image):
    for name, interpolation in (("mobilenetv1_100", "bilinear"), ("deit_tiny_patch16_224", "bicubic")):
        student = create_student(name, num_labels=10)
        transforms = load_image_processor(student).val_transforms.transforms
        assert transforms[0].size == 256
        assert transforms[0].interpolation.value == interpolation
        assert tuple(transforms[1].size) == (224, 224)
        torch.testing.assert_close(transforms[3].mean, torch.tensor([0.485, 0.456, 0.406]))


def test_names_that_open_nothing_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'resnet19' is neither a timm architecture \(near: resnet"):
        create_student("resnet19")
    with pytest.raises(ValueError, match=r"could not be opened as a Hub id or a folder"):
        create_student(str(tmp_path))
    with pytest.raises(ValueError, match=r"model_args are for timm architectures"):
        create_student(str(tmp_path), model_args={"depth": 3})


@pytest.mark.parametrize("names", [["a", "b", "c"], [f"digit {i}" for i in range(10)]])
def test_timm_folder_opens_with_other_names(tmp_path, image, names):
    save_student(timm_cnn(), str(tmp_path / "first"))
    student = create_student(str(tmp_path / "first"), id2label=dict(enumerate(names)))
    assert student(torch.zeros(1, 3, 32, 32)).logits.shape == (1, len(names))
    save_student(student, str(tmp_path / "second"))
    answer = pipeline("image-classification", model=str(tmp_path / "second"), device="cpu")(image, top_k=len(names))
    assert {entry["label"] for entry in answer} == set(names)
    if len(names) == 10:  # the head fits, and stays
        torch.testing.assert_close(student.state_dict(), timm_cnn().state_dict(), rtol=0, atol=0)


def timm_levit():
    args = {"embed_dim": (32, 32), "depth": (1, 1), "num_heads": (2, 2), "key_dim": 8}
    return create_student("levit_128s", id2label=DIGITS, image_size=32, model_args=args)


@pytest.mark.parametrize("build", [timm_cnn, timm_deit, timm_levit, native_vit, native_resnet])
def test_the_same_names_in_another_order_take_their_rows_of_the_head_along(tmp_path, build, caplog):
    saved = build()
    for module in saved.modules():  # LeViT's head starts from a bias of 0
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    save_student(saved, str(tmp_path / "saved"))
    order = [3, 0, 9, 1, 2, 8, 4, 6, 7, 5]
    with caplog.at_level(logging.INFO, "nkd_hf"):
        student = create_student(str(tmp_path / "saved"), id2label=[f"{i:02d}" for i in order])
    assert caplog.text.count("are put in the order of id2label") == 1
    assert list(student.config.id2label.values()) == [f"{i:02d}" for i in order]
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = saved.eval()(pixels).logits[:, order]
        torch.testing.assert_close(student.eval()(pixels).logits, expected)


def test_names_in_another_order_that_cannot_be_followed_are_errors(tmp_path):
    for names, asked, message in (
        (["crane", "b", "crane"], ["crane", "crane", "b"], "must have names that differ, got 'crane' twice"),
        (["a", "b", "c"], ["c", "b", "a"], "no classifier whose rows are its classes is known in Perceiver"),
    ):
        config = PerceiverConfig(
            num_latents=4, d_latents=8, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=1,
            num_cross_attention_heads=1, image_size=32, id2label=dict(enumerate(names)),
        )  # fmt: skip
        PerceiverForImageClassificationLearned(config).save_pretrained(tmp_path / "perceiver")
        with pytest.raises(ValueError, match=message):
            create_student(str(tmp_path / "perceiver"), id2label=asked)


@pytest.mark.parametrize("build", [timm_cnn, timm_levit, native_vit, native_resnet])
def test_a_student_is_not_saved_with_another_number_of_names(tmp_path, build):
    student = build()
    trainer = make_trainer(tmp_path / "run", student, digits(0, 32))
    student.config.id2label = list("abcdefg")
    for save in (trainer.save_model, lambda folder: save_student(student, folder)):
        with pytest.raises(ValueError, match="the student's id2label must name 10 classes, got 7"):
            save(str(tmp_path / "student"))
    with pytest.raises(ValueError, match="the student's id2label must name 10 classes, got 7"):
        make_trainer(tmp_path / "run", student, digits(0, 32))
    assert not (tmp_path / "student" / "config.json").exists()


@pytest.mark.runs
def test_names_are_saved_in_the_order_of_the_classes(tmp_path, image):
    names = {i: f"class {i:02d}" for i in range(12)}
    as_text = json.loads(json.dumps(names, sort_keys=True))
    config = ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=64, id2label={int(key): names[int(key)] for key in sorted(as_text)})  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "native")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "native")
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    (tmp_path / "native" / "config.json").write_text(json.dumps(written, sort_keys=True))
    native = AutoModelForImageClassification.from_pretrained(tmp_path / "native")
    assert list(native.config.id2label)[:3] == [0, 1, 10]
    assert list(create_student(str(tmp_path / "native")).config.id2label.items()) == list(names.items())
    for number, given in enumerate((native.config.id2label, as_text, list(names.values()))):
        students = [
            create_student("resnet18", id2label=given, image_size=32, model_args={"channels": [8, 16, 32, 64]}),
            create_student("resnet18_cifar", id2label=given, model_args={"layers": [1, 1, 1, 1]}),
            create_student(str(tmp_path / "native"), id2label=given),
        ]
        # By hand, after it was built.
        students.append(create_student("resnet18", num_labels=12, image_size=32, model_args={"channels": [8] * 4}))
        students[-1].config.id2label = given
        for kind, student in enumerate(students):
            folder = str(tmp_path / f"{number}-{kind}")
            head = [module for module in student.modules() if isinstance(module, torch.nn.Linear)][-1]
            torch.nn.init.zeros_(head.weight)
            head.bias.data = torch.arange(12.0)
            save_student(student, folder)
            load_image_processor(student).save_pretrained(folder)
            assert list(student.config.id2label.items()) == list(names.items())
            opened = AutoModelForImageClassification.from_pretrained(folder).config
            assert list(opened.id2label.items()) == list(names.items())
            assert opened.label2id == {name: i for i, name in names.items()}
            assert pipeline("image-classification", model=folder, device="cpu")(image)[0]["label"] == "class 11"


@pytest.mark.parametrize("names", [{1: "a", 2: "b"}, {"0": "a", 0: "b"}, {0: "a", 1: 1}, {}, "ab"])
def test_names_that_are_no_classes_are_refused(tmp_path, names):
    save_student(timm_cnn(), str(tmp_path / "timm"))
    for name in ("resnet18", "resnet18_cifar", str(tmp_path / "timm")):
        with pytest.raises(ValueError, match="id2label"):
            create_student(name, id2label=names)
    student = timm_cnn()
    student.config.id2label = names
    with pytest.raises(ValueError, match="student's id2label"):
        save_student(student, str(tmp_path / "student"))
    with pytest.raises(ValueError, match="student's id2label"):
        make_trainer(tmp_path / "run", student, digits(0, 32))
    assert not (tmp_path / "student").exists()
    native_vit().save_pretrained(tmp_path / "native")
    written = json.loads((tmp_path / "native" / "config.json").read_text())
    written["id2label"] = {str(i + 1): "a" for i in range(10)}
    (tmp_path / "native" / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="must number its 10 classes from 0 to 9, got the number 10"):
        create_student(str(tmp_path / "native"))
    assert create_student(str(tmp_path / "native"), id2label=DIGITS).config.id2label == DIGITS


def test_student_from_a_half_precision_file_trains_in_float32(tmp_path):
    native_vit().to(torch.bfloat16).save_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in create_student(str(tmp_path)).parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet18.tv_in1k"}, "write 'timm/resnet18.tv_in1k' for those, or 'resnet18'"),
        ({"crop_pct": 0.0}, "expected 0 < crop_pct <= 1"),
        ({"image_mean": [0.5]}, "image_mean must be three finite numbers, one per channel, got [0.5]"),
        ({"interpolation": "nearest"}, "interpolation must be bilinear or bicubic, got 'nearest'"),
        ({"model_args": {"nope": 1}}, "timm's resnet18 does not take model_args={'nope': 1}"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_student(**({"name": "resnet18", "num_labels": 10} | arguments))


@pytest.mark.parametrize("names", [None, {0: "a", 1: "b", 2: "c"}])
def test_a_new_head_where_the_configuration_counts_classes_apart_from_their_names(tmp_path, names):
    config = PvtConfig(depths=[1, 1, 1, 1], image_size=32, num_labels=3, id2label=names)
    PvtForImageClassification(config).save_pretrained(tmp_path)
    PvtImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    same, student = create_student(str(tmp_path)), create_student(str(tmp_path), num_labels=5)
    assert same.config.id2label == (names or {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    assert student.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
    assert student(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"image_mean": [123.0, 116.0, 103.0], "image_std": [58.0, 57.0, 57.0]},
            r"image_mean must be in units of \[0, 1\]",
        ),
        ({"image_mean": 0.5}, "image_mean must be three finite numbers"),
        ({"image_size": (32, 32)}, "image_size must be one integer"),
        ({"image_size": "32"}, "image_size must be one integer"),
        ({"name": None}, "name must be the name of an architecture, a folder or a Hub id, got None"),
    ],
)
def test_arguments_of_another_kind_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_student(**{"name": "resnet18", "num_labels": 3, "image_size": 32} | arguments)


def test_a_path_opens_as_its_text_does(tmp_path):
    save_student(timm_cnn(), str(tmp_path))
    assert create_student(tmp_path).config.id2label == DIGITS
