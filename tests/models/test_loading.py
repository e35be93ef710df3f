"""What could run foreign code is refused unless it is asked for; what the Hub does not give out is said."""

import json
import os
import shutil
import sys

import pytest
import safetensors.torch
import torch
from command_runs import run
from datasets.exceptions import DatasetNotFoundError
from hub_server import OTHERS_TOKEN
from model_folders import Malicious, change_config
from tiny import DIGITS, native_resnet, native_vit, timm_cnn, timm_deit
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    LevitConfig,
    LevitForImageClassification,
)

from nkd_hf import DataArguments, RecipeArguments, create_student, load_image_dataset, load_teacher
from nkd_hf.cli.export import export
from nkd_hf.models.loading import open_classifier
from nkd_hf.models.saving import save_student

CODE = """import os
from transformers import ResNetConfig, ResNetForImageClassification

open({marker!r}, "w").close()

class OwnConfig(ResNetConfig):
    model_type = "own_resnet"

class OwnResNet(ResNetForImageClassification):
    config_class = OwnConfig
"""


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


# ---- weights that are not those of the model


def rename_weights(folder, rename):
    """Renames the weights of a folder; those whose new name is None are removed."""
    file = folder / "model.safetensors"
    state = {rename(key): value for key, value in safetensors.torch.load_file(file).items()}
    state.pop(None, None)
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})


MODELS = {"timm cnn": timm_cnn, "timm deit": timm_deit, "native cnn": native_resnet, "native vit": native_vit}


def finished_openers(folder, tmp_path):
    """All that open a finished classifier."""
    return (
        lambda: load_teacher(str(folder)),
        lambda: open_classifier(str(folder)),
        lambda: export(str(folder), str(tmp_path / "exported")),
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "_orig_mod."])
def test_weights_under_a_foreign_prefix_are_no_random_model(tmp_path, model, prefix):
    save_student(MODELS[model](), str(tmp_path / "model"))
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "model")
    rename_weights(tmp_path / "model", lambda key: prefix + key)
    message = rf"got \d+ missing keys of \d+, .* Remove the prefix '{prefix}' from the keys of its weights"
    for opened in (*finished_openers(tmp_path / "model", tmp_path), lambda: create_student(str(tmp_path / "model"))):
        with pytest.raises(ValueError, match=message):
            opened()


@pytest.mark.parametrize("model", MODELS)
def test_a_backbone_is_no_teacher_but_starts_a_student(tmp_path, model):
    whole = MODELS[model]()
    save_student(whole, str(tmp_path / "model"))
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "model")
    heads = ("fc.", "head.", "classifier.")
    rename_weights(tmp_path / "model", lambda key: None if key.startswith(heads) else key)
    for opened in finished_openers(tmp_path / "model", tmp_path):
        with pytest.raises(ValueError, match=r"a whole image classifier, got 2 missing keys of \d+, .*bias first"):
            opened()
    student = create_student(str(tmp_path / "model"), num_labels=3)
    assert student.starts_with_new_head
    expected = {key: value for key, value in whole.state_dict().items() if not key.split(".", 1)[1].startswith(heads)}
    expected = {key: value for key, value in expected.items() if not key.startswith(heads)}
    assert len(expected) == len(whole.state_dict()) - 2
    got = {key: student.state_dict()[key] for key in expected}
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_backbone_of_transformers_is_no_teacher(tmp_path):
    native_vit().vit.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"2 missing keys of \d+, classifier\.bias first"):
        load_teacher(str(tmp_path))
    assert create_student(str(tmp_path), id2label=DIGITS).config.num_labels == 10


def test_a_student_whose_backbone_lacks_a_weight_is_refused(tmp_path):
    native_vit().save_pretrained(tmp_path / "missing")
    rename_weights(
        tmp_path / "missing", lambda key: None if key.endswith("patch_embeddings.projection.weight") else key
    )
    with pytest.raises(ValueError, match=r"all layers but the classifier, got 1 missing keys of \d+, vit\.embeddings"):
        create_student(str(tmp_path / "missing"), num_labels=3)
    native_vit().save_pretrained(tmp_path / "mismatched")
    change_config(tmp_path / "mismatched", patch_size=4)
    with pytest.raises(
        ValueError, match=r"all layers but the classifier, got 2 mismatched keys of \d+, vit\.embeddings"
    ):
        create_student(str(tmp_path / "mismatched"), num_labels=3)


def test_a_teacher_with_more_layers_than_its_configuration_is_refused(tmp_path):
    native_vit().save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    change_config(tmp_path, num_hidden_layers=2)
    for opened in finished_openers(tmp_path, tmp_path):
        with pytest.raises(ValueError, match=r"a whole image classifier, got 32 unexpected keys"):
            opened()


def test_tables_of_an_old_file_that_the_model_computes_for_itself_are_ignored(tmp_path):
    sizes = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
    model = LevitForImageClassification(LevitConfig(image_size=64, **sizes, id2label=DIGITS)).eval()
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(tmp_path)
    tables = {name: table for name, table in model.named_buffers() if name.endswith("attention_bias_idxs")}
    file, pixels = tmp_path / "model.safetensors", torch.randn(2, 3, 64, 64)
    state = safetensors.torch.load_file(file)
    assert tables
    assert not tables.keys() & state.keys()
    safetensors.torch.save_file(state | tables, file, metadata={"format": "pt"})
    torch.testing.assert_close(load_teacher(str(tmp_path))(pixels), model(pixels).logits)
