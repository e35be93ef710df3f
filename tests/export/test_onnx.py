"""Each family becomes an ONNX file that onnxruntime runs as PyTorch does, for batches of any size."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import DIGITS, native_vit, timm_cnn
from trained import digit_batches
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput

from nkd_hf import create_student, load_image_processor
from nkd_hf.errors import MissingExtraError
from nkd_hf.export import export_onnx, export_student
from nkd_hf.export.metadata import read_metadata, save_preprocessing
from nkd_hf.models.saving import save_student

# Narrow and shallow, with each kind of layer of the family. torch's exporter takes seconds for each.
FAMILIES = {
    "shufflenet_v2_x1_0": {"stages_repeats": [1, 1, 1], "stages_out_channels": [8, 16, 32, 64, 64]},
    "resnet18_cifar": {"layers": [1, 1, 1, 1]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 32, 64]},
    "deit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4},
}
DEIT = FAMILIES["deit_tiny_patch16_224"]
SLOW_FAMILIES = {
    "resnet18": {"channels": [8, 16, 32, 64], "layers": [1, 1, 1, 1]},
    "mobilenetv1_100": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_035": {},
    "efficientnet_lite0": {},
    "efficientnet_b0": {},
    "regnetx_002": {},
    "regnety_002": {},
}
IMAGES = digit_batches(0, 24)[0]["pixel_values"]


def shorten(model) -> None:
    """Leaves one residual block in each stage, where the architecture has no argument for it."""
    model = getattr(model, "timm_model", model)
    for stage in getattr(model, "blocks", []):
        if isinstance(stage, torch.nn.Sequential):
            kept = next((i for i, block in enumerate(stage) if getattr(block, "has_skip", False)), len(stage))
            del stage[kept + 1 :]
    for name in ("s1", "s2", "s3", "s4"):
        for block in list(getattr(model, name, torch.nn.Module())._modules)[2:]:
            delattr(getattr(model, name), block)


def settle(model):
    """Gives a model with random weights the activations and logits of a trained one: of the order of 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(IMAGES)
        spread = model.eval()(IMAGES).logits.std()
        classifier = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
        classifier.weight /= spread
    return model


def run(path, pixels) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"pixel_values": pixels.numpy()})[0]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "model_args"),
    [*FAMILIES.items(), *(pytest.param(*family, marks=pytest.mark.slow) for family in SLOW_FAMILIES.items())],
)
def test_families(tmp_path, name, model_args):
    torch.manual_seed(0)
    model = create_student(name, id2label=DIGITS, image_size=32, model_args=model_args)
    shorten(model)
    settle(model)
    report = export_onnx(model, tmp_path / "onnx" / "model.onnx", IMAGES)
    with torch.no_grad():
        logits = model(IMAGES).logits.numpy()
    assert 0.5 < logits.std() < 5
    assert report.max_difference < 1e-4
    for size in (1, 5, 24):
        np.testing.assert_allclose(run(report.path, IMAGES[:size]), logits[:size], atol=2e-4)
    ops = {node.op_type for node in onnx.load(report.path).graph.node}
    assert "BatchNormalization" not in ops
    assert report.size_bytes == report.path.stat().st_size
    assert [path.name for path in report.path.parent.iterdir()] == ["model.onnx"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = create_student("deit_tiny_patch16_224", id2label=DIGITS, image_size=32, model_args=DEIT).train()
    folder = tmp_path_factory.mktemp("student")
    save_student(model, str(folder))
    report = export_student(model, folder, IMAGES[:2]).onnx
    assert model.training
    return model, folder, report


@pytest.mark.runs
def test_the_file_describes_itself_and_not_this_machine(exported):
    _, folder, report = exported
    proto = onnx.load(report.path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["id2label"]) == {str(number): name for number, name in DIGITS.items()}
    assert json.loads(metadata["preprocessing"]) == {
        "size": [32, 32],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "channel_order": "RGB",
    }
    assert metadata["nkd_hf_version"]
    (pixels,), (logits,) = proto.graph.input, proto.graph.output
    assert [dim.dim_param or dim.dim_value for dim in pixels.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    assert [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim] == ["batch", 10]
    content = report.path.read_bytes()
    # The paths of Python and of torch, which torch's exporter writes into each node.
    assert not any(path.encode() in content for path in (sys.prefix, "site-packages", torch.__file__, str(folder)))


def test_transformers_reads_the_preprocessing_of_timm_from_its_config(exported):
    model, folder, _ = exported
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 36}
    assert settings["crop_size"] == {"height": 32, "width": 32}
    image = torch.rand(3, 40, 50)
    before, after = load_image_processor(model), AutoImageProcessor.from_pretrained(folder)
    assert type(before) is type(after)
    assert torch.equal(before(image)["pixel_values"], after(image)["pixel_values"])


def test_preprocessing_of_other_processors(tmp_path):
    native_vit().save_pretrained(tmp_path)
    processor = BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, resample=3, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path)
    (tmp_path / "copy").mkdir()
    save_preprocessing(model, tmp_path / "copy")
    assert AutoImageProcessor.from_pretrained(tmp_path / "copy").to_dict() == processor.to_dict()
    preprocessing = json.loads(read_metadata(model)["preprocessing"])
    assert preprocessing["crop_pct"] == pytest.approx(0.8, abs=0.005)
    assert (preprocessing["interpolation"], preprocessing["mean"]) == ("bicubic", [0.1, 0.2, 0.3])


def test_weights_that_change_take_their_onnx_files_with_them(tmp_path):
    save_student(timm_cnn(), str(tmp_path))
    (tmp_path / "onnx").mkdir()
    for name in ("model.onnx", "model_int8.onnx", "other.onnx"):
        (tmp_path / "onnx" / name).touch()
    save_student(timm_cnn(), str(tmp_path))
    assert len(list((tmp_path / "onnx").iterdir())) == 3
    save_student(timm_cnn(seed=1), str(tmp_path))
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["other.onnx"]


class Branching(PreTrainedModel):
    """Decides by the pixels which way it goes, which a graph of one way cannot do."""

    config_class = ViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.classifier = torch.nn.Linear(3 * 32 * 32, config.num_labels)
        self.post_init()

    def forward(self, pixel_values):
        if pixel_values.sum() > 0:
            pixel_values = pixel_values * 2
        return ImageClassifierOutput(logits=self.classifier(pixel_values.flatten(1)))


class Unstable(Branching):
    """Its logits depend on rounding: the sine of a huge number."""

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=torch.sin(self.classifier(pixel_values.flatten(1)) * 1e9))


def test_what_cannot_be_exported_is_said_in_a_line(tmp_path):
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    path = tmp_path / "model.onnx"
    for kind, message in (
        (Branching, r"^Branching cannot be exported to ONNX \(.*\)\. Take another architecture\.$"),
        (
            Unstable,
            r"^the logits of Unstable in onnxruntime must be within 0.0001 of PyTorch's, got a difference of \d",
        ),
    ):
        model = kind(ViTConfig(num_labels=10))
        model.name_or_path = str(tmp_path)
        with pytest.raises(ValueError, match=message) as error:
            export_onnx(model, path, IMAGES)
        assert "\n" not in str(error.value)
        assert not path.exists()
    with pytest.raises(ValueError, match=r"^pixel_values must be \[N, 3, H, W\] with N > 1, got \[1, 3, 32, 32\]"):
        export_onnx(timm_cnn(), path, IMAGES[:1])


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"package onnxscript must .* Run `pip install 'nkd_hf\[onnx\]'`\."):
        export_onnx(timm_cnn(), tmp_path / "model.onnx", IMAGES[:2])
