"""The command line: dispatch, `evaluate` and `export`; `convert` has a file of its own."""

import json
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import timm
import torch
from command_runs import run
from huggingface_hub import HfApi
from PIL import Image
from tiny import DIGITS, digits, make_trainer, native_vit, timm_cnn
from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

from nkd_hf import DataArguments, USKDLoss, cli, create_student, load_image_dataset
from nkd_hf.cli.evaluate import _print_classes, evaluate
from nkd_hf.data.decoding import read_sample
from nkd_hf.files import new_folder
from nkd_hf.models.saving import save_student


def save_parquet(path, label: datasets.Dataset | object, labels: list) -> str:
    images = [{"bytes": None, "path": None}] * len(labels)
    for i in range(len(labels)):
        file = path.parent / f"{i}.png"
        Image.fromarray(np.full((16, 16, 3), 20 * i, dtype=np.uint8)).save(file)
        images[i] = {"bytes": file.read_bytes(), "path": None}
    features = datasets.Features(image=datasets.Image(decode=False), label=label)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    # Trained a little: an untrained student's scores are so near to each other that rounding ranks them.
    make_trainer(folder, model := timm_cnn(), digits(0, 256), max_steps=20, learning_rate=1e-2).train()
    save_student(model, str(folder / "student"))
    return str(folder / "student")


# --- dispatch ---


def test_help_is_fast_and_lists_the_commands(capsys):
    code = "import sys; from nkd_hf.cli import main; main([]); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    for command in ("plan", "evaluate", "export", "convert"):
        assert re.search(rf"^  {command} +\w", done.stdout, re.MULTILINE)
    assert run(capsys, "--help")[:2] == (0, done.stdout.removesuffix("set()\n"))
    assert run(capsys, "--version")[1].startswith("nkd_hf 0.")


@pytest.mark.parametrize(
    ("command", "message"),
    [("distill", "nkd-hf distill: interrupted: the same command continues"), ("plan", "nkd-hf plan: interrupted\n")],
)
def test_ctrl_c_ends_in_one_line(capsys, monkeypatch, command, message):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"nkd_hf.cli.{command}.main", interrupt)
    code, _, error = run(capsys, command)
    assert code == 130
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_unknown_command(capsys):
    code, _, error = run(capsys, "evalute", "--model", "x")
    assert code == 2
    assert (
        error
        == "nkd-hf: error: unknown command 'evalute': did you mean 'evaluate'? (nkd-hf --help lists the commands)\n"
    )


@pytest.mark.parametrize("command", ["evaluate", "export", "convert"])
def test_help_of_a_command(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"usage: nkd-hf {command}" in out


def test_wrong_input_is_said_in_a_line_and_bugs_keep_their_traceback(capsys, tmp_path, monkeypatch):
    code, _, error = run(capsys, "export", "--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "out"))
    assert (code, error) == (2, f"nkd-hf export: error: there is no folder {tmp_path / 'none'}\n")
    code, _, error = run(capsys, "convert", "--mmcls", str(tmp_path / "none.pth"), "--architecture", "resnet18",
                         "--output", str(tmp_path / "out"))  # fmt: skip
    assert code == 2
    assert "No such file or directory" in error
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr("nkd_hf.cli.export.export", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["export", "--checkpoint", "a", "--output", "b"])


# --- evaluate ---


@pytest.mark.runs
def test_evaluate_command_agrees_with_a_pipeline(tmp_path, student):
    command = os.path.join(os.path.dirname(sys.executable), "nkd-hf")
    done = subprocess.run(
        [command, "evaluate", "--model", student, "--dataset", "digits", "--max_samples", "90", "--batch_size", "32",
         "--num_workers", "1", "--device", "cpu", "--output", tmp_path / "results.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    rows = load_image_dataset(DataArguments(dataset_name="digits", max_eval_samples=90))["validation"]
    classifier = pipeline("image-classification", model=student, device="cpu")
    top1 = top5 = 0
    for row in rows:
        image, label = read_sample(row, "a digit")
        names = [answer["label"] for answer in classifier(image, top_k=5)]
        top1 += names[0] == DIGITS[label]
        top5 += DIGITS[label] in names
    assert (results["images"], results["top1"], results["top5"]) == (90, top1 / 90, top5 / 90)
    assert results["images_per_second"] > 0
    assert results["preprocessing"]["input_size"] == [3, 32, 32]
    assert results["preprocessing"]["crop_pct"] == 0.875
    assert f"top-1          {100 * top1 / 90:.2f} %\n" in done.stdout
    assert "split validation, 90 images\n" in done.stdout
    assert "images/s on cpu, batch 32, 1 workers (reading, preprocessing and forward pass" in done.stdout


def test_an_output_that_cannot_be_written_is_refused_before_the_evaluation(tmp_path, student, capsys):
    arguments = ["evaluate", "--model", student, "--dataset", "digits", "--max_samples", "20", "--num_workers", "0"]
    for output, message in (
        (tmp_path / "no" / "x.json", "there is no such folder"),
        (tmp_path, "--output must be a file, got the folder"),
        ("/proc/x.json", "cannot be written"),
    ):
        code, out, err = run(capsys, *arguments, "--output", str(output))
        assert code == 2
        assert message in err
        assert "top-1" not in out
    # One that is there is replaced, and stays as it is until then.
    (tmp_path / "x.json").write_text("earlier")
    assert run(capsys, *arguments, "--device", "warp", "--output", str(tmp_path / "x.json"))[0] == 2
    assert (tmp_path / "x.json").read_text() == "earlier"
    assert sorted(os.listdir(tmp_path)) == ["x.json"]


def test_classes_and_json(tmp_path, student, capsys):
    arguments = ["evaluate", "--model", student, "--dataset", "digits", "--num_workers", "0", "--max_samples", "120"]
    arguments += ["--device", "cpu", "--output", str(tmp_path / "out.json")]
    code, out, _ = run(capsys, *arguments, "--per_class", "--json", "true")
    assert code == 0
    results = json.loads(out)
    assert results == json.loads((tmp_path / "out.json").read_text())
    classes = results["per_class"]
    assert sum(row["images"] for row in classes) == 120
    assert sum(row["images"] * row["top1"] for row in classes) == pytest.approx(120 * results["top1"])
    assert [row["top1"] for row in classes] == sorted(row["top1"] for row in classes)
    _, out, _ = run(capsys, *arguments, "--per_class")
    assert [line.split()[-1] for line in out.splitlines()[-len(classes) :]] == [row["name"] for row in classes]
    _, out, _ = run(capsys, *arguments)
    assert "per_class" not in json.loads((tmp_path / "out.json").read_text())
    assert "top-1 of each class" not in out


@pytest.mark.parametrize("match_names", [True, False])
def test_a_class_keeps_its_name_in_another_order(tmp_path, student, match_names):
    model = AutoModelForImageClassification.from_pretrained(student)
    with torch.no_grad():
        model.timm_model.fc.bias[3] += 1e6  # whatever it sees, it sees a three
    names = [str(i) for i in (3, 1, 4, 5, 9, 2, 6, 8, 7, 0)]
    parquet = save_parquet(tmp_path / "a.parquet", datasets.ClassLabel(names=names), [0, 0, 1, 2, 2])
    data = DataArguments(dataset_name=parquet, validation_split="train")
    rows = evaluate(model, data, match_names=match_names, per_class=True)["per_class"]
    assert sorted(rows[:2], key=lambda row: row["name"]) == [
        {"name": "1", "images": 1, "top1": 0.0},
        {"name": "4", "images": 2, "top1": 0.0},
    ]
    assert rows[2:] == [{"name": "3", "images": 2, "top1": 1.0}]


def test_many_classes_are_shortened_in_the_text_alone(capsys):
    _print_classes([{"name": f"class {i}", "images": 1, "top1": i / 50} for i in range(50)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith("class 19")
    assert lines[-1] == "30 more classes are in the JSON of --json or --output"


def test_a_revision_is_of_a_model_and_its_preprocessing(hub, tmp_path, student, capsys):
    repo = hub.create("me/vit")
    native_vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.25] * 3).save_pretrained(tmp_path / "vit")
    HfApi().upload_folder(repo_id="me/vit", folder_path=tmp_path / "vit")
    repo.branches["v1"] = repo.branches["main"]
    native_vit(seed=1).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.75] * 3).save_pretrained(tmp_path / "vit")
    HfApi().upload_folder(repo_id="me/vit", folder_path=tmp_path / "vit")
    arguments = ["evaluate", "--dataset", "digits", "--max_samples", "20", "--num_workers", "0", "--device", "cpu"]
    found = {}
    for revision in ("v1", "main"):
        code, out, error = run(capsys, *arguments, "--model", "me/vit", "--revision", revision, "--json")
        assert code == 0, error
        found[revision] = json.loads(out)
        assert found[revision]["revision"] == revision
    assert found["v1"]["preprocessing"]["image_mean"] == [0.25] * 3
    assert found["main"]["preprocessing"]["image_mean"] == [0.75] * 3
    code, _, error = run(capsys, *arguments, "--model", student, "--revision", "v1")
    assert code == 2
    assert f"--revision must be of a model on the Hub, got 'v1' for the folder {student}. Omit --revision" in error


def test_one_batch_is_not_timed(student, capsys):
    code, out, _ = run(capsys, "evaluate", "--model", student, "--dataset", "digits", "--num_workers", "0",
                       "--device", "cpu", "--max_samples", "10")  # fmt: skip
    assert code == 0
    assert "throughput     not measured" in out


@pytest.mark.runs
def test_native_model_and_a_stream(tmp_path, capsys):
    native_vit().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    whole = evaluate(model, DataArguments(dataset_name="digits"))
    stream = evaluate(model, DataArguments(dataset_name="digits", streaming=True))
    for key in ("top1", "top5", "images", "split"):
        assert stream[key] == whole[key]
    assert whole["preprocessing"]["size"] == {"height": 32, "width": 32}


def test_classes_are_matched_by_name(tmp_path, student):
    model = AutoModelForImageClassification.from_pretrained(student)
    with torch.no_grad():
        model.timm_model.fc.bias[3] += 1e6  # whatever it sees, it sees a three
    shuffled = [str(i) for i in (3, 1, 4, 5, 9, 2, 6, 8, 7, 0)]
    parquet = save_parquet(tmp_path / "a.parquet", datasets.ClassLabel(names=shuffled), [0, 0, 1, 2])
    data = DataArguments(dataset_name=parquet, validation_split="train")
    assert evaluate(model, data)["top1"] == 0.5
    # Names that are numbers are those of the classes; others count by their position.
    assert evaluate(model, data, match_names=False)["top1"] == 0.5
    parquet = save_parquet(tmp_path / "letters.parquet", datasets.ClassLabel(names=list("dcbajihgfe")), [0, 0, 0, 3])
    data = DataArguments(dataset_name=parquet, validation_split="train")
    assert evaluate(model, data, match_names=False)["top1"] == 0.25
    # Text labels and integers without names.
    text = [str(i) for i in (3, 3, *range(10))]
    parquet = save_parquet(tmp_path / "b.parquet", datasets.Value("string"), text)
    assert evaluate(model, DataArguments(dataset_name=parquet, validation_split="train"))["top1"] == 3 / 12
    parquet = save_parquet(tmp_path / "c.parquet", datasets.Value("int64"), [3, 3, 1, 5])
    data = DataArguments(dataset_name=parquet, validation_split="train")
    assert evaluate(model, data)["top1"] == 0.5

    parquet = save_parquet(tmp_path / "d.parquet", datasets.ClassLabel(names=["cat", "dog"]), [0, 1])
    data = DataArguments(dataset_name=parquet, validation_split="train")
    with pytest.raises(
        ValueError, match=r"the model has 10 classes and the dataset 2; .* 'cat' \(dataset\).* by their"
    ):
        evaluate(model, data)
    with pytest.raises(ValueError, match=r"the dataset must have the model's 10 classes, .* by their numbers, got 2"):
        evaluate(model, data, match_names=False)
    with pytest.raises(ValueError, match=r"there is no split 'validation', only train: set the split to evaluate on"):
        evaluate(model, DataArguments(dataset_name=parquet))
    parquet = save_parquet(tmp_path / "e.parquet", datasets.Value("int64"), [3, 12])
    with pytest.raises(ValueError, match=r"the model has 10 classes and the dataset 13"):
        evaluate(model, DataArguments(dataset_name=parquet, validation_split="train"))
    with pytest.raises(ValueError, match=r"the labels go up to 12, but the model has 10 classes"):
        evaluate(model, DataArguments(dataset_name=parquet, validation_split="train"), match_names=False)


def test_a_model_that_gives_nan_predicts_nothing(tmp_path, student, capsys, caplog):
    model = AutoModelForImageClassification.from_pretrained(student)
    with torch.no_grad():
        model.timm_model.fc.bias[0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    code, out, _ = run(capsys, "evaluate", "--model", str(tmp_path / "nan"), "--dataset", "digits", "--max_samples",
                         "50", "--num_workers", "0", "--device", "cpu", "--output", str(tmp_path / "out.json"))  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert (results["top1"], results["top5"], results["no_predictions"]) == (0, 0, 50)
    assert "no prediction  50 images, whose logits are NaN: they count as wrong\n" in out
    assert "predicts nothing for 50 of 50 samples" in caplog.text


def test_a_dataset_of_one_split_and_bad_images(tmp_path, student, capsys):
    folder = tmp_path / "data" / "test"
    for label in DIGITS.values():
        (folder / label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((16, 16, 3), 100 * i, dtype=np.uint8)).save(folder / label / f"{i}.png")
    args = [
        "evaluate",
        "--model",
        student,
        "--dataset",
        str(tmp_path / "data"),
        "--device",
        "cpu",
        "--num_workers",
        "0",
    ]
    code, out, _ = run(capsys, *args, "--batch_size", "8")
    assert code == 0
    assert "split test, 20 images\n" in out
    (folder / "3" / "0.png").write_bytes(b"no image")
    code, _, error = run(capsys, *args)
    assert code == 2
    assert "cannot be decoded" in error
    assert "Traceback" not in error
    code, out, _ = run(capsys, *args, "--on_bad_image", "skip")
    assert "20 images, 1 of them bad and replaced" in out


def test_models_that_do_not_open(tmp_path, student, capsys):
    args = ["evaluate", "--dataset", "digits", "--device", "cpu"]
    code, _, error = run(capsys, *args, "--model", str(tmp_path))
    assert code == 2
    assert f"{tmp_path} could not be opened as a folder or a Hub id" in error
    # A head that the file lacks is no head of random weights.
    native = native_vit()
    native.vit.save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless" / "config.json").read_text()) | {"id2label": DIGITS}
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    code, _, error = run(capsys, *args, "--model", str(tmp_path / "headless"))
    assert code == 2
    assert "its weights must be a whole image classifier, got 2 missing keys of 72, classifier.bias first" in error
    assert run(capsys, *args, "--model", student, "--batch_size", "0")[0] == 2
    code, _, error = run(capsys, *args, "--model", student, "--device", "warp")
    assert code == 2
    assert "device 'warp' cannot be used" in error


# --- export ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        folder, timm_cnn(), digits(0, 64), distillation_loss=USKDLoss(32, 10), save_strategy="steps", save_steps=2
    )
    trainer.train()
    return folder, trainer.student


def test_exported_checkpoint_is_the_student_alone(tmp_path, run_folder, capsys):
    folder, student = run_folder
    assert (folder / "checkpoint-4" / "distillation_losses.safetensors").exists()
    output = tmp_path / "exports" / "student"
    code, out, _ = run(capsys, "export", "--checkpoint", str(folder / "checkpoint-4"), "--output", str(output))
    assert code == 0
    assert out == f"{output}: TimmWrapperForImageClassification, 10 classes; files: config.json, model.safetensors\n"
    assert sorted(os.listdir(output)) == ["config.json", "model.safetensors"]
    assert os.listdir(output.parent) == ["student"]
    opened = AutoModelForImageClassification.from_pretrained(output)
    torch.testing.assert_close(opened.state_dict(), student.state_dict(), rtol=0, atol=0)
    assert opened.config.id2label == DIGITS
    timm.create_model(f"local-dir:{output}", pretrained=True)
    image = Image.new("RGB", (40, 30))
    assert (
        pipeline("image-classification", model=str(output), device="cpu")(image, top_k=1)[0]["label"]
        in DIGITS.values()
    )


def test_export_picks_no_checkpoint_by_itself(tmp_path, run_folder, capsys):
    code, _, error = run(capsys, "export", "--checkpoint", str(run_folder[0]), "--output", str(tmp_path / "student"))
    assert code == 2
    assert "no config.json: name one of its checkpoints, checkpoint-2, checkpoint-4" in error
    assert os.listdir(tmp_path) == []


def test_exported_native_and_custom_students_open_with_a_pipeline(tmp_path, capsys, caplog):
    native = native_vit()
    native.save_pretrained(tmp_path / "native")
    custom = create_student("resnet18_cifar", id2label=DIGITS)
    save_student(custom, str(tmp_path / "custom"))
    assert run(capsys, "export", "--checkpoint", str(tmp_path / "native"), "--output", str(tmp_path / "out"))[0] == 0
    assert "native holds no preprocessing, so that pipeline() cannot open" in caplog.text
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "native")
    for name, student in (("native", native), ("custom", custom)):
        output = str(tmp_path / f"exported-{name}")
        assert run(capsys, "export", "--checkpoint", str(tmp_path / name), "--output", output)[0] == 0
        opened = AutoModelForImageClassification.from_pretrained(output)
        torch.testing.assert_close(opened.state_dict(), student.state_dict(), rtol=0, atol=0)
        pipeline("image-classification", model=output, device="cpu")(Image.new("RGB", (40, 30)))


def test_new_folder_is_whole_or_nothing(tmp_path):
    output = tmp_path / "student"

    def write(text, overwrite=False):
        with new_folder(str(output), overwrite) as folder:
            for name in ("config.json", f"modeling_{text}.py"):
                with open(os.path.join(folder, name), "w") as file:
                    file.write(text)
            if text == "fault":
                raise RuntimeError("half-written")

    with pytest.raises(RuntimeError, match="half-written"):
        write("fault")
    assert os.listdir(tmp_path) == []
    output.mkdir()
    write("one")
    with pytest.raises(ValueError, match=r"student is not empty: name another folder, or replace it with --overwrite"):
        write("two")
    with pytest.raises(RuntimeError, match="half-written"):
        write("fault", overwrite=True)
    assert sorted(os.listdir(output)) == ["config.json", "modeling_one.py"]
    write("two", overwrite=True)
    assert sorted(os.listdir(output)) == ["config.json", "modeling_two.py"]
    assert os.listdir(tmp_path) == ["student"]
    (output / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match=r"holds more than a saved student and is not replaced"):
        write("three", overwrite=True)
    (tmp_path / "file").touch()
    output = tmp_path / "file"
    with pytest.raises(ValueError, match=r"file is a file: name a folder"):
        write("four", overwrite=True)


def test_a_checkpoint_or_foreign_files_are_never_replaced(tmp_path, run_folder, capsys):
    checkpoint = run_folder[0] / "checkpoint-2"
    before = sorted(os.listdir(checkpoint))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (foreign / "results.csv").write_text("x")
    for output in (checkpoint, foreign):
        code, _, err = run(capsys, "export", "--checkpoint", str(checkpoint), "--output", str(output), "--overwrite")
        assert code == 2
        assert "holds more than a saved student" in err
    assert sorted(os.listdir(checkpoint)) == before
    assert (foreign / "results.csv").read_text() == "x"
