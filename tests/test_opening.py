"""What could run foreign code is refused unless it is asked for; what the Hub does not give out is said."""

import json
import os
import shutil
import sys

import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from hub_server import OTHERS_TOKEN
from test_cli import run
from tiny import native_resnet, timm_cnn
from transformers import AutoModelForImageClassification, BitImageProcessor

from nkd_hf import DataArguments, RecipeArguments, create_student, load_image_dataset, load_teacher
from nkd_hf.modeling import save_student

CODE = """import os
from transformers import ResNetConfig, ResNetForImageClassification

open({marker!r}, "w").close()

class OwnConfig(ResNetConfig):
    model_type = "own_resnet"

class OwnResNet(ResNetForImageClassification):
    config_class = OwnConfig
"""


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def pickled(tmp_path):
    """A model whose weights are a pickle, as torch.save writes it."""
    folder, model = tmp_path / "pickled", native_resnet()
    model.save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def upload(hub, folder, repo_id, **kwargs):
    return hub.create(repo_id, {path.name: path.read_bytes() for path in folder.iterdir()}, **kwargs)


def openers(name, **kwargs):
    return (
        lambda: load_teacher(name, **kwargs).model,
        lambda: create_student(name, **kwargs),
        lambda: RecipeArguments(name, distillation_loss="none", **kwargs).create(name),
    )


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_pickles_are_refused_unless_asked_for(hub, pickled, tmp_path, monkeypatch, where):
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    upload(hub, pickled, "them/pickled")
    name = str(pickled) if where == "folder" else "them/pickled"
    for opened in openers(name):
        with pytest.raises(
            ValueError, match=r"its weights are a pickle \(pytorch_model.bin\), which can run code when it"
        ):
            opened()
    assert not [path for path in hub.paths("GET") if path.endswith("pytorch_model.bin")]
    for opened in openers(name, allow_pickle=True):
        torch.testing.assert_close(opened().state_dict(), native_resnet().state_dict(), rtol=0, atol=0)
    # transformers would ask for a conversion, in a thread of its own, in the user's name.
    assert not [path for path in hub.paths("GET") + hub.paths("POST") if "discussions" in path]
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


def test_a_pickle_that_runs_code_is_refused_even_then(hub, pickled, tmp_path, capsys):
    marker = tmp_path / "made by the pickle"
    state = native_resnet().state_dict() | {"extra": Malicious(marker)}
    torch.save(state, pickled / "pytorch_model.bin")
    upload(hub, pickled, "them/pickled")
    for name in (str(pickled), "them/pickled"):
        for opened in openers(name, allow_pickle=True):
            with pytest.raises(ValueError, match="its pickle holds more than tensors, and is not opened"):
                opened()
    evaluate = ["evaluate", "--dataset", "digits", "--device", "cpu", "--model", str(pickled)]
    assert "its weights are a pickle" in run(capsys, *evaluate)[2]
    assert "its pickle holds more than tensors" in run(capsys, *evaluate, "--allow_pickle")[2]
    assert not marker.exists()
    torch.load(pickled / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # it would have


def test_safetensors_beside_a_pickle_are_taken(pickled, tmp_path):
    torch.save({"extra": Malicious(tmp_path / "made")}, pickled / "pytorch_model.bin")
    native_resnet(1).save_pretrained(pickled)
    for allow in (False, True):
        model = load_teacher(str(pickled), allow_pickle=allow).model
        torch.testing.assert_close(model.state_dict(), native_resnet(1).state_dict(), rtol=0, atol=0)
    assert not (tmp_path / "made").exists()


def test_code_beside_the_weights_runs_only_when_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, marker = tmp_path / "own", tmp_path / "made by the code"
    native_resnet().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_resnet",
        "architectures": ["OwnResNet"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnResNet"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    upload(hub, folder, "them/own")
    for name in (str(folder), "them/own"):
        for opened in openers(name):
            with pytest.raises(ValueError, match=r"(?s)contains custom code .*`trust_remote_code=True`"):
                opened()
    assert not marker.exists()
    assert type(load_teacher("them/own", trust_remote_code=True).model).__name__ == "OwnResNet"
    assert marker.exists()


def test_gated_teacher(hub, tmp_path, monkeypatch):
    save_student(timm_cnn(), str(tmp_path / "model"))
    upload(hub, tmp_path / "model", "them/gated", gated=True)
    where = rf"them/gated' is not opened: it is gated: accept its terms on {hub.endpoint}/them/gated, then run `hf auth login`"
    for token in (None, OTHERS_TOKEN):
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        for opened in openers("them/gated"):
            with pytest.raises(ValueError, match=where):
                opened()
    hub.users[OTHERS_TOKEN] = "them"
    assert isinstance(load_teacher("them/gated").model, torch.nn.Module)
    with pytest.raises(
        ValueError, match="teacher 'them/none' could not be opened: give the id of an image classifier"
    ):
        load_teacher("them/none")


def test_gated_dataset_without_a_token(hub, monkeypatch):
    # What `datasets` raises then; with another account's token: test_hub_pull.py.
    def load_dataset(*args, **kwargs):
        raise DatasetNotFoundError(
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it."
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=f"it is gated: accept its terms on {hub.endpoint}/datasets/a/b, then run `hf auth"
    ):
        load_image_dataset(DataArguments(dataset_name="a/b"))


def test_cached_teacher_and_student_open_offline(hub, tmp_path, monkeypatch):
    save_student(timm_cnn(), str(tmp_path / "timm"))
    native_resnet().save_pretrained(tmp_path / "native")
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "native")
    for name in ("timm", "native"):
        upload(hub, tmp_path / name, f"them/{name}")
        shutil.rmtree(tmp_path / name)
        load_teacher(f"them/{name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    for name, model in (("timm", timm_cnn()), ("native", native_resnet())):
        teacher = load_teacher(f"them/{name}")
        torch.testing.assert_close(teacher.model.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert teacher.preprocessing.size == (32, 32)
        assert create_student(f"them/{name}", num_labels=3).config.num_labels == 3
    with pytest.raises(
        ValueError, match=r"teacher 'them/none' could not be opened: .*is HF_HUB_OFFLINE unset, is the id"
    ):
        load_teacher("them/none")
    assert len(hub.requests) == before
    assert AutoModelForImageClassification.from_pretrained("them/timm").config.architecture == "resnet18"
