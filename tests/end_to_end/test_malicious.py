"""Nothing that a user downloads is executed: in every place that opens something lies a file that would leave a mark.

| what is opened | by | where it is shown |
| --- | --- | --- |
| weights that are a pickle, code beside them | teacher, student, recipe, `nkd-hf evaluate` | test_opening.py |
| an official checkpoint (`.pth`) | `nkd-hf convert` | test_convert.py |
| a configuration and what it leads to, the index of the weights, an image processor | teacher, student, plan | here |
| the YAML of a recipe, its `student_args` | recipes, `nkd-hf plan` | here |
| a data set: script, pickles, README, archive | recipes, `nkd-hf evaluate` | here |
| a checkpoint: optimiser, scheduler, generators, scaler, arguments, weights | `--resume_from_checkpoint` | here |
| the README of a student | `nkd-hf push` | here |

No path of a metric is ever opened: `nkd_hf.metrics` are the package's own.
"""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import transformers.trainer
import yaml
from model_folders import Malicious
from tiny import digits, make_trainer, native_resnet, timm_cnn
from transformers import AutoModelForImageClassification, BitImageProcessor

from nkd_hf import DataArguments, RecipeArguments, create_student, load_image_dataset, load_teacher, parse_args
from nkd_hf.cli.export import export
from nkd_hf.errors import PushError
from nkd_hf.hub.push import push_student
from nkd_hf.models.preprocessing import load_image_processor
from nkd_hf.models.saving import save_student
from nkd_hf.trainer.distillation_model import DistillationModel


@pytest.fixture
def marker(tmp_path):
    """What the planted files would make, were they executed."""
    marker = tmp_path / "marker"
    yield marker
    assert not marker.exists()


@pytest.fixture
def folder(tmp_path):
    """A student of timm, whose configuration says much."""
    save_student(timm_cnn(), str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def native(tmp_path):
    """A student of transformers, with an image processor."""
    native_resnet().save_pretrained(tmp_path / "native")
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def change(file: Path, **settings) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(name, message: str, **kwargs) -> None:
    """By all that open a model."""
    for opened in (
        lambda: load_teacher(str(name), **kwargs),
        lambda: create_student(str(name), **kwargs),
        lambda: RecipeArguments(str(name), distillation_loss="none", **kwargs).create(str(name)),
    ):
        with pytest.raises(ValueError, match=message):
            opened()


# ---- what a configuration leads to


def test_configurations_that_lead_elsewhere(folder, tmp_path, marker):
    weights = tmp_path / "evil.pth"
    torch.save({"state_dict": Malicious(marker)}, weights)
    for settings, message in (
        ({"model_args": {"checkpoint_path": str(weights)}}, "hold checkpoint_path, by which timm would open other weights"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": str(weights)}}}, "hold pretrained_cfg_overlay"),
        ({"model_args": {"pretrained": True}}, "hold pretrained"),
        ({"architecture": f"local-dir:{tmp_path}"}, "architecture 'local-dir:.*names another folder or repo"),
        ({"architecture": "hf-hub:them/evil"}, "architecture 'hf-hub:them/evil' names another"),
        ({"_attn_implementation": "them/kernel"}, "'them/kernel' is code of a repo: remove it .* or set trust_remote_code"),
        ({"attn_implementation": "them/kernel"}, "'them/kernel' is code of a repo"),
    ):  # fmt: skip
        before = (folder / "config.json").read_text()
        change(folder / "config.json", **settings)
        refused(folder, message)
        with pytest.raises(ValueError, match=message):
            export(str(folder), str(tmp_path / "exported"))
        if "code of a repo" not in message:
            refused(folder, message, allow_pickle=True, trust_remote_code=True)
        (folder / "config.json").write_text(before)
    load_teacher(str(folder))  # as it was, it opens
    # timm itself would have opened the file; its versions before 1.0.26 all of it.
    with pytest.raises(ValueError, match="hold checkpoint_path"):
        create_student("resnet18", model_args={"checkpoint_path": str(weights)})


def test_a_preprocessing_that_names_a_file_is_not_opened(folder, tmp_path, marker):
    torch.save({"state_dict": Malicious(marker)}, tmp_path / "evil.pth")
    settings = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    change(folder / "config.json", pretrained_cfg=settings | {"file": str(tmp_path / "evil.pth"), "url": "evil.pth"})
    expected = timm_cnn().state_dict()
    torch.testing.assert_close(load_teacher(str(folder)).model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": ["resnet"]},
        {"model_type": "../resnet"},
        {"model_type": "os.system"},
        {"hidden_act": "__import__('os').mkdir('marker')"},
        {"depths": "os.system"},
        None,
    ],
    ids=str,
)
def test_odd_configurations(native, marker, monkeypatch, settings):
    monkeypatch.chdir(marker.parent)
    if settings is None:
        (native / "config.json").write_text("[1]")
    else:
        change(native / "config.json", **settings)
    refused(native, f"{native}")


def test_indexes_that_lead_elsewhere(native, tmp_path, marker):
    (native / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = list(native_resnet().state_dict())
    torch.save({"extra": Malicious(marker)}, native / "evil.bin")
    index = native / "model.safetensors.index.json"
    for shard in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "..\\outside.safetensors",
        "evil.bin",
        1,
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
        refused(native, r"index.json names .*, expected the names of \.safetensors files beside it", allow_pickle=True)
    for content in ("[]", "{}", "{", '{"weight_map": 1}'):
        index.write_text(content)
        refused(native, "model.safetensors.index.json is no index of weights")
    index.rename(native / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "../evil.bin")})
    )
    refused(native, r"expected the names of \.bin files beside it", allow_pickle=True)


def test_image_processor_with_code(native, marker):
    (native / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own:\n    pass\n")
    file = native / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}))
    with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True"):
        load_teacher(str(native))
    with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True"):
        load_image_processor(create_student(str(native)))
    file.write_text(json.dumps({"image_processor_type": "os.system"}))
    with pytest.raises(ValueError, match="Unrecognized image processor"):
        load_teacher(str(native))


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_that_leads_to_another_model(native, folder, tmp_path, marker, monkeypatch, with_config):
    # With peft installed, transformers opens the model that adapter_config.json names, and timm that model's pickle.
    monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: True)
    torch.save({"state_dict": Malicious(marker)}, tmp_path / "evil.pth")
    change(folder / "config.json", model_args={"checkpoint_path": str(tmp_path / "evil.pth")})
    if not with_config:
        (native / "config.json").unlink()
    (native / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    message = "it has an adapter_config.json, so its weights are an adapter of another model"
    refused(native, message)
    refused(native, message, allow_pickle=True, trust_remote_code=True)


def test_a_checkpoint_with_an_adapter(native, tmp_path):
    model = DistillationModel(AutoModelForImageClassification.from_pretrained(native), {})
    model.save(str(tmp_path / "checkpoint"), model.state_dict(), with_losses=True)
    model.load(str(tmp_path / "checkpoint"))
    (tmp_path / "checkpoint" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(native)}))
    with pytest.raises(ValueError, match=r"a checkpoint must hold no adapter_config\.json"):
        model.load(str(tmp_path / "checkpoint"))


# ---- the YAML of a recipe


@pytest.mark.parametrize(
    "tag", ["object/apply:os.mkdir [{}]", "object/new:os.mkdir [{}]", "name:os.mkdir", "module:os"]
)
def test_yaml_that_calls(tmp_path, capsys, marker, tag):
    file = tmp_path / "config.yaml"
    file.write_text(f"student: resnet18\nstudent_args: !!python/{tag.format(marker)}\n")
    with pytest.raises(SystemExit):
        parse_args(RecipeArguments, args=["--config", str(file)])
    assert f"{file}, line 2: not valid YAML: could not determine a constructor" in capsys.readouterr().err


# ---- data sets


def data_with(folder: Path, marker: Path) -> None:
    evil = pickle.dumps(Malicious(marker))
    {
        "script": lambda: (folder / f"{folder.name}.py").write_text(f"open({str(marker)!r}, 'w').close()"),
        "pickle": lambda: [
            (folder / f"train.{ending}").write_bytes(evil) for ending in ("pkl", "pickle", "pt", "pth")
        ],
        "readme": lambda: (folder / "README.md").write_text(
            f"---\nconfigs: !!python/object/apply:os.mkdir ['{marker}']\n---\n"
        ),
    }[folder.name]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [("script", "scripts are no longer supported"), ("pickle", "No .* data files found"), ("readme", "a constructor")],
)
def test_data_sets(tmp_path, marker, kind, message):
    folder = tmp_path / kind
    folder.mkdir()
    data_with(folder, marker)
    with pytest.raises((ValueError, yaml.YAMLError), match=message):
        load_image_dataset(DataArguments(dataset_name=str(folder)))


def test_archives_of_a_data_set(tmp_path, marker):
    for ending in ("pth", "pickle", "npy"):
        folder = tmp_path / ending
        folder.mkdir()
        contents = {f"0.{ending}": io.BytesIO(), "0.cls": io.BytesIO(b"1")}
        save = torch.save if ending == "pth" else pickle.dump
        save(Malicious(marker), contents[f"0.{ending}"])
        with tarfile.open(folder / "train.tar", "w") as archive:
            for name, content in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content.getvalue())
                archive.addfile(entry, io.BytesIO(content.getvalue()))
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            load_image_dataset(DataArguments(dataset_name=str(folder)))
        assert not marker.exists()


# ---- checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, timm_cnn(), digits(0, 32), max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


# By file: what the refusal says, or None where the file is never opened.
STATES = {
    "optimizer.pt": "weights_only|posix.mkdir",
    "scheduler.pt": "weights_only|posix.mkdir",
    "rng_state.pth": "weights_only|posix.mkdir",
    "scaler.pt": "posix.mkdir|'NoneType' object has no attribute 'load_state_dict'",  # there is one on a GPU alone
    "training_args.bin": None,
    "pytorch_model.bin": None,
}


@pytest.mark.parametrize("file", STATES)
def test_checkpoints(run, tmp_path, marker, file):
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(run, checkpoint)
    torch.save(Malicious(marker), checkpoint / file)
    record = checkpoint / "checkpoint_files.json"
    if record.is_file():  # who plants a file writes the record too
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path != record}
        record.write_text(json.dumps(sizes))
    trainer = make_trainer(tmp_path / "run", timm_cnn(), digits(0, 32), max_steps=2, weight_decay=0.0)
    if STATES[file] is None:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 2
    else:
        with pytest.raises((ValueError, pickle.UnpicklingError, AttributeError), match=STATES[file]):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_transformers_reads_tensors_alone_from_a_checkpoint():
    # What this machine cannot reach: the scaler of a GPU, shards of FSDP and DeepSpeed are other files.
    source = Path(transformers.trainer.__file__).read_text()
    calls = source.split("torch.load(")[1:]
    assert len(calls) > 5
    assert all("weights_only=True" in call[:300] for call in calls)


# ---- what is pushed


def test_readme_of_a_student_that_is_pushed(hub, folder, marker, monkeypatch):
    monkeypatch.chdir(marker.parent)
    text = "---\nlicense: !!python/object/apply:os.mkdir [marker]\n---\n{{ cycler.__init__.__globals__.os.mkdir('marker') }}\n"
    (folder / "README.md").write_text(text)
    with pytest.raises(PushError, match=r"model card is not valid: .*a constructor"):
        push_student(str(folder), "me/student")


def test_the_malicious_object_works(tmp_path):
    torch.save(Malicious(tmp_path / "made"), tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert os.path.isdir(tmp_path / "made")
