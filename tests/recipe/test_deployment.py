"""The end of `nkd-hf distill`, where something goes wrong or goes elsewhere: the Hub, a full disk, a signal, a refused int8."""

import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from command_runs import run
from processes import in_a_process
from tiny import digit_folder

from nkd_hf import create_student, distill
from nkd_hf.models.saving import save_student
from nkd_hf.recipe import distill as distill_module

pytestmark = pytest.mark.usefixtures("no_curves")
MODEL = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
QUICK = {
    "student": "resnet18", "student_args": MODEL, "image_size": 32, "num_train_epochs": 3, "dataloader_num_workers": 0,
    "dataloader_persistent_workers": False, "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """A folder of three classes, and a teacher of the same ones."""
    folder = tmp_path_factory.mktemp("inputs")
    images = digit_folder(folder / "images", ["zero", "one", "two"], train=20, validation=6)
    torch.manual_seed(0)
    teacher = create_student("resnet18", id2label=["one", "two", "zero"], image_size=32, model_args=MODEL)
    save_student(teacher, str(folder / "teacher"))
    return {"dataset_name": images, "teacher": str(folder / "teacher"), **QUICK}


@pytest.mark.runs
def test_what_is_pushed_is_what_was_measured(hub, tmp_path, inputs, capsys):
    results = distill(**inputs, output_dir=tmp_path / "out", push_to_hub=True, hub_model_id="me/digits")
    files = hub.repos["models/me/digits"].files()
    assert "onnx/model.onnx" in files
    assert ("onnx/model_int8.onnx" in files) == ("student_int8" in results["models"])
    assert "| `onnx/model.onnx` |" in files["README.md"].decode()
    assert "teacher_epochs" not in results["settings"]  # the teacher was used as it is
    capsys.readouterr()
    for name, model in {"student": "me/digits", "teacher": inputs["teacher"]}.items():
        dataset = ["--dataset", inputs["dataset_name"]]
        code, printed, _ = run(capsys, "evaluate", "--model", model, *dataset, "--json", "--per_class")
        assert code == 0
        measured = json.loads(printed)
        assert measured["top1"] == pytest.approx(results["models"][name]["top1"], abs=1e-4)
        accuracies = {row["name"]: row["top1"] for row in measured["per_class"]}
        assert accuracies == pytest.approx({key: row[name] for key, row in results["per_class"].items()}, abs=1e-4)


def test_a_store_takes_the_place_of_the_teacher(tmp_path, inputs, capsys):
    without = {name: value for name, value in inputs.items() if name != "teacher"}
    config = tmp_path / "store.yaml"
    # The augmentation of small images in `nkd-hf distill`; the store's command has that of a recipe.
    config.write_text(yaml.safe_dump({**inputs, "random_resized_crop": [0.5, 1.0]}))
    store = ["--output", str(tmp_path / "store"), "--epochs", "3"]
    code, _, error = run(capsys, "teacher-logits", *store, "--config", str(config))
    assert code == 0, error
    results = distill(**without, teacher_logits=str(tmp_path / "store"), output_dir=tmp_path / "out")
    assert [*results["models"]][:2] == ["student", "student_onnx"]
    assert "agreement_with_teacher" not in results
    assert results["teacher"] is not None
    assert "does not run: its logits come from" in capsys.readouterr().out


def test_a_signal_and_a_full_disk_in_the_export_and_an_int8_file_that_loses_too_much(
    tmp_path, inputs, capsys, monkeypatch
):
    """Three starts of one command: the first two end in the export, the third exports and keeps no int8 file."""
    folder = tmp_path / "out"

    def fill_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def send_signal(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    def start(in_export=None):
        with monkeypatch.context() as patch:
            if in_export is not None:
                patch.setattr("nkd_hf.export.student.export_onnx", in_export)
            return distill(**inputs, output_dir=folder)

    assert in_a_process(lambda: start(send_signal), tmp_path / "log") == -signal.SIGTERM
    weights = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(
        SystemExit, match=r"error: the export could not be written to .*student .*No space left on device"
    ):
        start(fill_disk)
    assert not (folder / "results.json").exists()
    capsys.readouterr()

    monkeypatch.setattr("nkd_hf.export.int8._is_good", lambda report, max_drop: False)
    results = start()
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == weights, "nothing is trained again"
    assert "student_onnx" in results["models"]
    assert "student_int8" not in results["models"]
    assert results["int8"]["kept"] is False
    assert results["int8"]["reason"].startswith("int8 must lose at most 1 points of top-1")
    assert f"int8 is not kept: {results['int8']['reason']}" in capsys.readouterr().out
    assert [path.name for path in (folder / "student" / "onnx").iterdir()] == ["model.onnx"]
    assert "model_int8" not in (folder / "student" / "README.md").read_text()
    assert f"It has no int8 version: {results['int8']['reason']}." in (folder / "report.html").read_text()


@pytest.mark.runs
def test_the_disk_must_hold_all_models_that_are_yet_to_be_trained(tmp_path, inputs, monkeypatch):
    """The teacher's fine-tuning counts, too."""
    one = create_student("resnet18", id2label=["a", "b", "c"], image_size=32, model_args=MODEL).num_parameters() * 40
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1.5 * one))
    monkeypatch.setattr(distill_module, "describe_run", lambda *args: 1 / 0)  # after the check
    with pytest.raises(ZeroDivisionError):
        distill(**inputs, output_dir=tmp_path / "student")
    with pytest.raises(ValueError, match=r"output_dir must have .* of free disk for the checkpoints"):
        distill(**inputs, output_dir=tmp_path / "both", finetune_teacher="always")
    assert not list(tmp_path.rglob("model.safetensors"))
