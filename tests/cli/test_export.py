"""`nkd-hf export --format onnx`; `--checkpoint` is tested in test_cli.py."""

import os
import sys

import onnx
import onnxruntime
import pytest
import torch
from command_runs import run
from tiny import DIGITS
from torch.utils.data import DataLoader
from trained import train
from transformers import AutoModelForImageClassification

from nkd_hf import DataArguments, create_student, load_image_dataset, load_image_processor
from nkd_hf.cli.evaluate import evaluate
from nkd_hf.data.student_datasets import make_evaluation_images
from nkd_hf.files import new_folder
from nkd_hf.models.saving import save_student


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A trained student, whose classes stand in another order than the dataset's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export") / "student"
    model_args = {"channels": [8, 16, 32, 64], "layers": [1, 1, 1, 1]}
    model = create_student("resnet18", id2label=list(DIGITS.values())[::-1], image_size=32, model_args=model_args)
    data = DataArguments(dataset_name="digits")
    images = make_evaluation_images(load_image_dataset(data)["train"], data, load_image_processor(model))
    batches = list(DataLoader(images, 64, shuffle=True))
    for batch in batches:
        batch["labels"] = 9 - batch["labels"]
    save_student(train(model, batches), str(folder))
    return folder


def test_onnx_and_int8_of_a_saved_classifier(student, capsys):
    arguments = ["--int8", "--calibration_data", "digits", "--num_workers", "0"]
    code, out, error = run(capsys, "export", "--model", str(student), "--format", "onnx", *arguments)
    assert code == 0, error
    first, second = out.splitlines()
    path = student / "onnx" / "model.onnx"
    assert first.startswith(f"{path}: 0.4 MB; logits within ")
    assert first.endswith(" of PyTorch's in batches of 1, 5 and 16 images")
    model = AutoModelForImageClassification.from_pretrained(student)
    top1 = evaluate(model, DataArguments(dataset_name="digits"))["top1"]
    assert top1 > 0.6
    assert second.startswith(f"{student / 'onnx' / 'model_int8.onnx'}: 0.")
    assert f", float {100 * top1:.2f} %, 360 images; calibrated by minmax" in second
    assert sorted(os.listdir(student)) == ["config.json", "model.safetensors", "onnx", "preprocessor_config.json"]
    assert sorted(os.listdir(student / "onnx")) == ["model.onnx", "model_int8.onnx"]
    onnx.checker.check_model(path, full_check=True)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits.numpy()
    for name, tolerance in (("model.onnx", 1e-4), ("model_int8.onnx", 0.5 * expected.std())):
        session = onnxruntime.InferenceSession(student / "onnx" / name, providers=["CPUExecutionProvider"])
        logits = session.run(None, {"pixel_values": pixels.numpy()})[0]
        assert abs(logits - expected).max() < tolerance
    # A student with ONNX files is a student, which --overwrite replaces.
    with new_folder(str(student), overwrite=True) as folder:
        model.save_pretrained(folder)
    assert sorted(os.listdir(student)) == ["config.json", "model.safetensors"]


def test_wrong_arguments(tmp_path, capsys, monkeypatch):
    onnx_of = ("export", "--format", "onnx", "--model")
    for arguments, message in (
        (("export",), "one of --checkpoint and --model is required"),
        (("export", "--model", "x"), "--model goes with --format onnx, which writes into the folder itself"),
        (("export", "--checkpoint", "x"), "--checkpoint goes with --output DIR, and --model with --format onnx"),
        ((*onnx_of, "x", "--int8"), "calibration_data must name a dataset for int8, got none. Name the dataset"),
        ((*onnx_of, "x", "--max_int8_drop", "-1"), "max_int8_drop must be 0 points or more, got -1."),
        ((*onnx_of, "./none"), "model must be the folder of a saved classifier, but there is no folder './none'"),
        ((*onnx_of, "timm/none"), "model must be the folder of a saved classifier, but 'timm/none' is no folder"),
    ):
        code, _, error = run(capsys, *arguments)
        assert code == 2
        assert message in error
    (tmp_path / "checkpoint-5").mkdir()
    code, _, error = run(capsys, *onnx_of, str(tmp_path / "checkpoint-5"))
    assert (code, len(error.splitlines())) == (2, 1)
    assert "model must be a saved student, got the training checkpoint" in error
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, error = run(capsys, *onnx_of, str(tmp_path))
    assert code == 2
    assert error == (
        "nkd-hf export: error: the package onnxruntime must be installed to export to ONNX, got ModuleNotFoundError. Run "
        "`pip install 'nkd_hf[onnx]'`.\n"
    )
