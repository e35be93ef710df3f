"""The two families that neither timm nor transformers has: torchvision's networks, in folders that carry their code."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_image
from tiny import DIGITS, digits, make_trainer, timm_cnn
from torch import nn
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForImageClassification, BitImageProcessor, set_seed

from nkd_hf import NKDLoss, USKDLoss, create_student, load_image_processor, load_teacher
from nkd_hf.models.architectures import ARCHITECTURES
from nkd_hf.models.features import FeatureTap
from nkd_hf.models.preprocessing import read_preprocessing
from nkd_hf.models.saving import save_student


def shufflenet(seed: int = 0):
    set_seed(seed)
    args = {"stages_repeats": [1, 2, 1], "stages_out_channels": [8, 16, 24, 32, 48]}
    return create_student("shufflenet_v2_x1_0", id2label=DIGITS, image_size=64, model_args=args)


def resnet(seed: int = 0):
    set_seed(seed)
    return create_student("resnet18_cifar", id2label=DIGITS, model_args={"layers": [1, 1, 1, 1]})


def randomised(model):
    """No value is left that an initialisation could give."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(7))
    return model


def assert_same_weights(model, other):
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(load_sample_image("china.jpg"))


def torchvision_cifar(depth):
    model = {18: torchvision.models.resnet18, 34: torchvision.models.resnet34}[depth](num_classes=100)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("name", "reference", "parameters", "num_labels", "size"),
    [
        ("shufflenet_v2_x1_0", torchvision.models.shufflenet_v2_x1_0, 2_278_604, 1000, 224),
        ("resnet18_cifar", lambda: torchvision_cifar(18), 11_220_132, 100, 32),
        ("resnet34_cifar", lambda: torchvision_cifar(34), 21_328_292, 100, 32),
    ],
)
def test_logits_and_keys_are_torchvisions(name, reference, parameters, num_labels, size):
    student, reference = create_student(name), reference()
    assert student.num_parameters() == parameters
    assert student.config.num_labels == num_labels
    assert read_preprocessing(student).size == (size, size)
    student.base_model.load_state_dict(reference.state_dict())
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        for mode in (True, False):
            assert torch.equal(student.train(mode)(pixels).logits, reference.train(mode)(pixels))


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [("shufflenet_v2_x1_0", "shufflenet.stage4", (2, 464)), ("resnet18_cifar", "resnet.layer3", (2, 256))],
)
def test_tap_finds_the_papers_layer(name, layer, shape):
    student = create_student(name, num_labels=10)
    tap = FeatureTap(student)
    assert tap.layer == layer
    student(torch.randn(2, 3, 32, 32))
    assert tap.take().shape == shape


def test_labels_give_cross_entropy():
    for student in (shufflenet(), resnet()):
        pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 9])
        output = student.eval()(pixels, labels=labels)
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
        assert student(pixels).loss is None


def test_weights_start_as_in_the_official_code():
    set_seed(0)
    weights = create_student("shufflenet_v2_x1_0").base_model.state_dict()
    stds = {"conv1.0": 0.01, "stage2.0.branch1.0": 1.0, "stage2.0.branch1.2": 1 / 24, "conv5.0": 1 / 464, "fc": 0.01}
    for name, std in stds.items():
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.1), name
    assert not any(weights[name].any() for name in ("fc.bias", "conv1.1.bias", "stage3.0.branch2.1.bias"))
    weights = create_student("resnet18_cifar").base_model.state_dict()
    stds = {"conv1": (2 / 576) ** 0.5, "layer2.0.conv1": (2 / 1152) ** 0.5, "layer2.0.downsample.0": (2 / 128) ** 0.5}
    for name, std in stds.items():
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.1), name
    assert not any(weights[f"layer{i}.{j}.bn2.weight"].any() for i in (1, 2, 3, 4) for j in (0, 1))
    assert (weights["layer1.0.bn1.weight"] == 1).all()


@pytest.mark.parametrize("build", [shufflenet, resnet])
def test_folder_opens_as_student_and_as_teacher(tmp_path, build):
    student, folder = randomised(build()), str(tmp_path)
    save_student(student, folder)
    load_image_processor(student).save_pretrained(folder)
    again = create_student(folder)
    assert type(again) is type(student)
    assert again.config.id2label == DIGITS
    assert_same_weights(again, student)
    assert_same_weights(AutoModelForImageClassification.from_pretrained(folder), student)
    assert_same_weights(load_teacher(folder).model, student)
    assert load_teacher(folder).preprocessing == read_preprocessing(again) == read_preprocessing(student)
    assert load_image_processor(again).to_dict() == load_image_processor(student).to_dict()
    head = create_student(folder, num_labels=3).base_model.fc
    assert head.weight.shape[0] == 3
    assert head.weight.abs().max() < 0.1
    assert not head.bias.any()


def test_two_classes_without_names_are_saved_too(tmp_path):
    student = create_student("resnet18_cifar", num_labels=2, model_args={"layers": [1, 1, 1, 1]})
    save_student(student, str(tmp_path))
    assert_same_weights(create_student(str(tmp_path)), student)


@pytest.mark.parametrize("crop", [{}, {"image_size": 95, "crop_pct": 0.95, "interpolation": "bicubic"}])
def test_processor_is_resize_and_central_crop(image, crop):
    student = create_student("shufflenet_v2_x1_0", num_labels=10, **crop)
    processor = load_image_processor(student)
    assert isinstance(processor, BitImageProcessor)
    size, resized = crop.get("image_size", 224), 100 if crop else 256
    # Where half of an odd rest is cut off, torchvision rounds to even and transformers down; here there is no such rest.
    image = image.crop((0, 0, 638, 427))
    mode = v2.InterpolationMode(crop.get("interpolation", "bilinear"))
    expected = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(resized, interpolation=mode, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )(image)
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"][0], expected, rtol=0, atol=1e-6)
    wanted = read_preprocessing(student)
    assert wanted.size == (size, size)
    assert wanted.interpolation == mode.value
    assert wanted == read_preprocessing(nn.Identity(), processor)


def test_cifar_images_pass_unresized(image):
    processor = load_image_processor(create_student("resnet18_cifar"))
    image = image.crop((100, 100, 132, 132))
    mean, std = [129.304 / 255, 124.070 / 255, 112.434 / 255], [68.170 / 255, 65.392 / 255, 70.418 / 255]
    expected = v2.functional.normalize(v2.functional.pil_to_tensor(image) / 255, mean, std)
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"][0], expected, rtol=0, atol=1e-6)


# Opens a pushed folder where this package is not, saves what came, and opens that.
ELSEWHERE = """
import gc, json, sys
gc.disable()  # a fifth of the time of the imports
sys.modules["nkd_hf"] = None
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
answers = {}
for folder in sys.argv[1:]:
    classify = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")
    first = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    for name in ("again", "and again"):
        first.save_pretrained(f"{folder} {name}")
        second = AutoModelForImageClassification.from_pretrained(f"{folder} {name}", trust_remote_code=True)
        assert all(torch.equal(value, first.state_dict()[key]) for key, value in second.state_dict().items())
        first = second
    pixels = AutoImageProcessor.from_pretrained(folder)("china.png", return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = second.eval()(pixels).logits
    answers[folder] = [classify("china.png", top_k=1), logits.tolist(), type(second).__module__]
print(json.dumps(answers))
"""


@pytest.mark.runs
def test_pushed_folder_opens_without_this_package(tmp_path, image):
    image.save(tmp_path / "china.png")
    trained = {}
    for folder, build in (("shufflenet", shufflenet), ("resnet", resnet)):
        trainer = make_trainer(tmp_path / "run", build(), digits(0, 32), max_steps=1)
        trainer.processing_class = load_image_processor(trainer.student)
        trainer.train()
        for _ in range(2):
            trainer.save_model(str(tmp_path / folder))
        trained[folder] = trainer.student.eval()
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *trained], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for folder, student in trained.items():
        code = f"{type(student).__module__.rpartition('.')[2]}.py"
        files = {"config.json", "model.safetensors", code}
        written = {name for name in os.listdir(tmp_path / folder) if not name.startswith("training_args")}
        assert written == files | {"preprocessor_config.json"}
        for name in (folder, f"{folder} again", f"{folder} and again"):
            assert files <= set(os.listdir(tmp_path / name))
            config = json.loads((tmp_path / name / "config.json").read_text())
            assert str(tmp_path) not in str(config)
            assert {value.partition(".")[0] + ".py" for value in config["auto_map"].values()} == {code}
            assert config["preprocessing"] == student.config.pretrained_cfg
        processor = AutoImageProcessor.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            logits = student(processor(image, return_tensors="pt")["pixel_values"]).logits
        (best,), theirs, module = answers[folder]
        assert module.startswith("transformers_modules.")
        torch.testing.assert_close(torch.tensor(theirs), logits, rtol=1e-5, atol=1e-6)
        assert best["label"] == DIGITS[logits.argmax().item()]
        assert best["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-5)
        # What was saved there is a student here.
        assert_same_weights(create_student(str(tmp_path / f"{folder} again")), student)


def test_trains_with_a_mid_feature_and_resumes(tmp_path):
    def build(folder):
        return make_trainer(folder, shufflenet(), digits(0, 64), distillation_loss=USKDLoss(32, 10), max_steps=4,
                            save_strategy="steps", save_steps=2)  # fmt: skip

    whole = build(tmp_path / "whole")
    before = {key: value.clone() for key, value in whole.model.state_dict().items()}
    whole.train()
    assert all(not torch.equal(value, before[key]) for key, value in whole.model.state_dict().items())
    resumed = build(tmp_path / "resumed")
    randomised(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_weights(resumed.model, whole.model)


def test_student_and_teacher_of_nkd(tmp_path):
    for student, teacher in ((resnet(), timm_cnn()), (timm_cnn(), resnet())):
        trainer = make_trainer(
            tmp_path, student, digits(0, 16), teacher=teacher, distillation_loss=NKDLoss(), max_steps=1
        )
        # Each wants the pixels normalised in its own way.
        assert trainer.teacher.scale is not None
        trainer.train()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "shufflenet_v2_x1_0",
            {"model_args": {"width": 2}},
            "shufflenet_v2_x1_0 does not take model_args={'width': 2}: expected some of ['stages_repeats', "
            "'stages_out_channels'], got ['width']",
        ),
        ("shufflenet_v2_x1_0", {"model_args": {"stages_repeats": [1]}}, "expected stages_repeats as list of 3"),
        (
            "resnet18_cifar",
            {"model_args": {"layers": [1, 1]}},
            "expected layers as the number of blocks of four stages",
        ),
        ("resnet18_cifar", {"model_args": {"depth": 18}}, "expected some of ['layers'], got ['depth']"),
        ("resnet18_cifar", {"crop_pct": 1.5}, "expected 0 < crop_pct <= 1"),
        ("shufflenet_v2_x1.0", {}, "'shufflenet_v2_x1.0' is neither a timm architecture (near: shufflenet_v2_x1_0"),
        ("resnet50_cifar", {}, "(near: resnet34_cifar, resnet18_cifar"),
        ("nothing of the kind", {}, f"see timm.list_models() and {[*ARCHITECTURES]}"),
    ],
)
def test_arguments_out_of_range_are_errors(name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_student(name, **arguments)
