"""`nkd-hf convert --timm`: checkpoints of timm become folders with timm's logits, and nothing in them is run."""

import argparse
import functools
import re

import pytest
import safetensors.torch
import timm
import torch
from command_runs import run
from model_folders import Malicious
from tiny import native_vit

from nkd_hf import create_student, load_image_processor, load_teacher
from nkd_hf.models.loading import open_classifier
from nkd_hf.models.saving import save_student

PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ARCHITECTURE = "mobilenetv3_small_050"


@functools.cache
def model(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, num_classes=7).eval()


def training_checkpoint(**extra):
    """What timm's train.py writes: timm/utils/checkpoint_saver.py."""
    args = argparse.Namespace(model=ARCHITECTURE, lr=0.1)
    return {"epoch": 1, "arch": ARCHITECTURE, "state_dict": model().state_dict(), "optimizer": {}, "version": 2} | {
        "args": args,
        "metric": 71.5,
        **extra,
    }


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


# By name: the file, what is saved in it, and the seed of the model that is expected.
CHECKPOINTS = {
    "safetensors": ("model.safetensors", lambda: model().state_dict(), 0),
    "weights alone": ("weights.pth", lambda: model().state_dict(), 0),
    "training": ("model_best.pth.tar", training_checkpoint, 0),
    "average": ("model_best.pth.tar", lambda: training_checkpoint(state_dict_ema=model(1).state_dict()), 1),
    "average of DeiT": ("best.pth", lambda: {"model": model().state_dict(), "model_ema": model(1).state_dict()}, 1),
    "of DDP": ("a.pth", lambda: {"state_dict": prefixed("module.", model().state_dict())}, 0),
    "compiled": ("a.pth", lambda: prefixed("_orig_mod.", model().state_dict()), 0),
    "compiled in DDP": ("a.pth", lambda: prefixed("module._orig_mod.", model().state_dict()), 0),
}


def save(state, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_converted_folder_gives_the_logits_of_timm(tmp_path, capsys, kind):
    name, state, seed = CHECKPOINTS[kind]
    save(state(), tmp_path / name)
    labels = [f"kind {i}" for i in range(7)]
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    folder = tmp_path / "student"
    options = ["--architecture", ARCHITECTURE, "--labels", str(tmp_path / "labels.txt"), "--output", str(folder)]
    code, out, error = run(capsys, "convert", "--timm", str(tmp_path / name), *options)
    assert code == 0, error
    assert "mobilenetv3_small_050 as TimmWrapperForImageClassification, 7 classes" in out
    with torch.no_grad():
        expected = model(seed)(PIXELS)
        assert (expected - model(1 - seed)(PIXELS)).abs().max() > 1e-5
        for opened in (load_teacher(str(folder)).model, create_student(str(folder)).eval()):
            torch.testing.assert_close(opened(PIXELS).logits, expected, rtol=1e-4, atol=1e-7)
            assert opened.config.id2label == dict(enumerate(labels))
        by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(by_timm(PIXELS), expected, rtol=1e-4, atol=1e-7)
    # The preprocessing is timm's for the architecture, and not the paper's.
    settings = load_image_processor(open_classifier(str(folder))).data_config
    assert settings == timm.data.resolve_data_config(pretrained_cfg=model().pretrained_cfg)
    assert settings["interpolation"] == "bicubic"


def test_names_of_imagenet_and_names_that_are_not_known(tmp_path, capsys):
    for num_classes, name in ((1000, "tench, Tinca tinca"), (6, "LABEL_0")):
        save(timm.create_model(ARCHITECTURE, num_classes=num_classes).state_dict(), tmp_path / "a.pth")
        options = ["--timm", str(tmp_path / "a.pth"), "--architecture", ARCHITECTURE, "--overwrite"]
        assert run(capsys, "convert", *options, "--output", str(tmp_path / "student"))[0] == 0
        config = open_classifier(str(tmp_path / "student")).config
        assert (config.id2label[0], config.num_labels) == (name, num_classes)


def test_checkpoints_that_are_refused(tmp_path, capsys):
    marker = tmp_path / "made"
    infinite = model().state_dict()
    infinite["classifier.bias"] = torch.full((7,), float("inf"))
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    cases = {
        "evil.pth": (training_checkpoint(hook=Malicious(marker)), [], "must hold tensors and plain values alone, got"),
        "whole.pth": (model(), [], "must hold tensors and plain values alone, got"),
        "broken.pth": (b"PK\x03\x04", [], "is no checkpoint that timm can read"),
        "broken.safetensors": (b"{}", [], "is no checkpoint that timm can read"),
        "list.pth": ([torch.ones(2)], [], "is no checkpoint|must hold tensors by their names"),
        "empty.pth": ({}, [], "must hold tensors by their names, got nothing"),
        "none.pth": (None, [], "no file"),
        "backbone.pth": ({"conv_stem.weight": torch.ones(2)}, [], "whose classifier is"),
        "infinite.pth": (infinite, [], "1 not finite: classifier.bias"),
        "other.pth": (model().state_dict(), ["--architecture", "resnet18"], "whose classifier is fc"),
        "larger.pth": (model().state_dict(), ["--architecture", "mobilenetv3_small_100"], "of another shape: "),
        "unknown.pth": (
            model().state_dict(),
            ["--architecture", "resnet19"],
            "architecture must be one of timm.list_models",
        ),
        "tag.pth": (
            model().state_dict(),
            ["--architecture", f"{ARCHITECTURE}.none"],
            "a tag that timm knows",
        ),
        "labels.pth": (model().state_dict(), ["--labels", str(tmp_path / "labels.txt")], "must name 7 classes, got 2"),
        "mmcls.pth": (model().state_dict(), ["--mmcls", "a.pth"], "not allowed with argument"),
    }
    for name, (state, options, message) in cases.items():
        file = tmp_path / name
        if isinstance(state, bytes):
            file.write_bytes(state)
        elif state is not None:
            torch.save(state, file)
        options = ["--architecture", ARCHITECTURE, *options, "--output", str(tmp_path / "student")]
        code, _, error = run(capsys, "convert", "--timm", str(file), *options)
        assert code == 2, (name, error)
        assert re.search(message, error), (name, error)
        assert "Traceback" not in error
        assert not (tmp_path / "student").exists()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model_best.pth.tar", "weights.pth"])
def test_a_file_in_place_of_a_folder_names_the_command(tmp_path, monkeypatch, capsys, name):
    save(model().state_dict(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / name), name, str(tmp_path)):
        message = (
            rf"Convert a checkpoint of timm with `nkd-hf convert --timm \S*{name} --architecture NAME --output DIR`"
        )
        for opened in (load_teacher, create_student, open_classifier):
            with pytest.raises(ValueError, match=message):
                opened(path)
    code, _, error = run(capsys, "evaluate", "--dataset", "digits", "--device", "cpu", "--model", name)
    assert code == 2
    assert "nkd-hf convert --timm" in error


def test_a_folder_with_a_configuration_is_opened_as_such(tmp_path):
    save_student(native_vit(), str(tmp_path))
    torch.save({}, tmp_path / "model_best.pth.tar")
    assert open_classifier(str(tmp_path)).config.num_labels == 10
