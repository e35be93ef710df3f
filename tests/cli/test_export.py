"""`nkd-hf export --format onnx`; `--checkpoint` is tested in test_cli.py."""

import os
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
from command_runs import run
from tiny import DIGITS
from trained import digit_batches
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from nkd_hf import DataArguments
from nkd_hf.cli.evaluate import evaluate
from nkd_hf.files import new_folder
from nkd_hf.models.labels import invert_labels


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A ViT of one block whose classes stand in another order than the dataset's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export") / "student"
    names = dict(enumerate(reversed(DIGITS.values())))
    config = ViTConfig(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=96, id2label=names, label2id=invert_labels(names))  # fmt: skip
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in digit_batches(0, 1280) * 4:
        pixels = batch["pixel_values"]
        torch.nn.functional.cross_entropy(model(pixels).logits, 9 - batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    # The pixels of digit_batches: -1 to 1.
    ViTImageProcessor(size={"height": 32, "width": 32}, resample=0).save_pretrained(folder)
    return folder


def test_onnx_and_int8_of_a_saved_classifier(student):
    command = os.path.join(os.path.dirname(sys.executable), "nkd-hf")
    arguments = [
        "--model",
        student,
        "--format",
        "onnx",
        "--int8",
        "--calibration_data",
        "digits",
        "--num_workers",
        "0",
    ]
    done = subprocess.run([command, "export", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    path = student / "onnx" / "model.onnx"
    assert first.startswith(f"{path}: 0.1 MB; logits within ")
    assert first.endswith(" of PyTorch's in batches of 1, 5 and 16 images")
    model = AutoModelForImageClassification.from_pretrained(student)
    top1 = evaluate(model, DataArguments(dataset_name="digits"))["top1"]
    assert top1 > 0.6
    assert second.startswith(f"{student / 'onnx' / 'model_int8.onnx'}: 0.")
    assert f", float {100 * top1:.2f} %, 360 images; calibrated by minmax" in second
    assert sorted(os.listdir(student)) == ["config.json", "model.safetensors", "onnx", "preprocessor_config.json"]
    assert sorted(os.listdir(student / "onnx")) == ["model.onnx", "model_int8.onnx"]
    onnx.checker.check_model(path, full_check=True)
    batch = digit_batches(1300, 1400)[0]
    for name in ("model.onnx", "model_int8.onnx"):
        session = onnxruntime.InferenceSession(student / "onnx" / name, providers=["CPUExecutionProvider"])
        logits = session.run(None, {"pixel_values": batch["pixel_values"].numpy()})[0]
        assert (9 - logits.argmax(1) == batch["labels"].numpy()).mean() > 0.6
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
