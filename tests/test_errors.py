"""Wrong input of recipes and commands is one line; a bug keeps its traceback; a reader that leaves ends nothing loudly."""

import os
import re
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from processes import in_a_process
from tiny import timm_cnn
from torch.utils.data import DataLoader

from nkd_hf import cli
from nkd_hf.errors import BadSampleError, one_line_errors, reason
from nkd_hf.files import path_fault
from nkd_hf.models.saving import save_student

ROOT = Path(__file__).parents[1]
OWN = [
    "--student", "resnet18", "--teacher", "resnet18", "--image_size", "32", "--max_steps", "1", "--use_cpu", "true",
    "--report_to", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Folders and files of which none can be used."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, labels in {"one": ["cat"], "two": ["cat", "dog"], "flat": ["."], "only-test": ["cat", "dog"]}.items():
        split = folder / name / ("test" if name == "only-test" else "train")
        for label in labels:
            (split / label).mkdir(parents=True, exist_ok=True)
            for i in range(12):
                Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(split / label / f"{i:02d}.png")
    (folder / "broken" / "train" / "cat").mkdir(parents=True)
    (folder / "broken" / "train" / "dog").mkdir(parents=True)
    for i in range(12):
        (folder / "broken" / "train" / ("cat" if i % 2 else "dog") / f"{i}.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("no data")
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")
    columns = {"image": ["a.png", "b.png"], "other": [0, 1]}
    datasets.Dataset.from_dict(columns).to_parquet(folder / "no-label.parquet")
    save_student(timm_cnn(), str(folder / "student"))
    (folder / "half").mkdir()
    for file in (folder / "student").iterdir():
        (folder / "half" / file.name).write_bytes(file.read_bytes()[: None if file.suffix == ".json" else 100])
    (folder / "yaml.yaml").write_text("student: [1")
    return folder


def check_line(error: str, start: str) -> None:
    """The last line is the error, a sentence; nothing on stderr is a traceback."""
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith(start)
    said = re.sub(r"\.\.\.|(?<=[\s'\"])\.\.?/", "", line.removeprefix(start))
    assert said.strip()
    for pattern in (r"\.\.", r"\.\s*[:,;)]", r"^\s*[:.]", r":\s*[:.,]", r"\(\s*:", r"[:,(]\s*$", r"\?\."):
        assert not re.search(pattern, said), (pattern, line)


BAD_RECIPES = [
    ["--dataset_name", "IN/nowhere"],
    ["--dataset_name", "path/to/foler"],
    ["--dataset_name", "./nowhere"],
    ["--dataset_name", "~/nowhere"],
    ["--dataset_name", "IN/notes.txt"],
    ["--dataset_name", "IN/empty"],
    ["--dataset_name", "IN/flat"],
    ["--dataset_name", "IN/one"],
    ["--dataset_name", "IN/only-test"],
    ["--dataset_name", "IN/broken"],
    ["--dataset_name", "IN/cut.parquet"],
    ["--dataset_name", "IN/no-label.parquet"],
    ["--dataset_name", "IN/nowhere.parquet"],
    ["--dataset_name", "IN/*.csv"],
    ["--dataset_name", "nobody/nothing"],
    ["--dataset_name", "nothing"],
    ["--dataset_name", "digits", "--num_classes", "3"],
    ["--dataset_name", "digits", "--train_split", "trian"],
    ["--dataset_name", "digits", "--auto_augment", "nonsense"],
    ["--dataset_name", "digits", "--mix_pairs", "true", "--mixup_alpha", "1", "--per_device_train_batch_size", "3"],
    ["--teacher", "IN/nowhere"],
    ["--teacher", "IN/notes.txt"],
    ["--teacher", "IN/empty"],
    ["--teacher", "IN/half"],
    ["--teacher", "nobody/nothing"],
    ["--teacher", "resnet_18"],
    ["--teacher_args", '{"chanels": 1}'],
    ["--teacher_logits", "IN/nowhere"],
    ["--teacher_logits", "IN/empty"],
    ["--student", "IN/nowhere"],
    ["--student", "IN/half"],
    ["--student", "nobody/nothing"],
    ["--student", "resnet_18"],
    ["--student_args", '{"chanels": 1}'],
    ["--output_dir", "IN/notes.txt"],
    ["--config", "IN/nowhere.yaml"],
    ["--config", "IN/yaml.yaml"],
    ["--resume_from_checkpoint", "IN/empty"],
    ["--distillation_loss", "srrl", "--teacher", "deit_tiny_patch16_224"],
    ["--lr_scheduler_type", "multistep", "--lr_scheduler_kwargs", '{"milestones": 3}'],
]


@pytest.mark.parametrize("arguments", BAD_RECIPES, ids=" ".join)
def test_wrong_input_of_a_recipe_is_one_line(tmp_path, inputs, monkeypatch, capfd, arguments):
    arguments = [argument.replace("IN/", f"{inputs}/") for argument in arguments]
    defaults = ["--dataset_name", str(inputs / "two"), "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", ["distill_cnn.py", *defaults, *OWN, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "recipes" / "distill_cnn.py"), run_name="__main__")
    error = capfd.readouterr().err
    if isinstance(exit.value.code, str):  # which Python prints
        error, code = error + exit.value.code, 1
    else:
        code = exit.value.code
    assert code in (1, 2)
    check_line(error, "error: " if code == 1 else "distill_cnn.py: error: ")
    path = next((argument for argument in arguments if re.match(r"[./~]|path/", argument)), None)
    if path is not None and not os.path.exists(path) and not re.search(r"\.parquet|csv|yaml", path):
        assert f"there is no folder {path!r}" in error
    assert not any((tmp_path / "run").glob("*/model.safetensors"))


BAD_COMMANDS = [
    ["evaluate", "--model", "IN/nowhere", "--dataset", "digits"],
    ["evaluate", "--model", "IN/half", "--dataset", "digits"],
    ["evaluate", "--model", "IN/empty", "--dataset", "digits"],
    ["evaluate", "--model", "IN/notes.txt", "--dataset", "digits"],
    ["evaluate", "--model", "nobody/nothing", "--dataset", "digits"],
    ["evaluate", "--model", "nothing", "--dataset", "digits"],
    *(
        ["evaluate", "--model", "IN/student", "--dataset", data]
        for data in ("IN/nowhere", "IN/empty", "IN/cut.parquet")
    ),
    *(["evaluate", "--model", "IN/student", "--dataset", data] for data in ("IN/flat", "IN/two", "nobody/nothing")),
    ["evaluate", "--model", "IN/student", "--dataset", "IN/broken", "--split", "train", "--ignore_label_names"],
    *(
        ["evaluate", "--model", "IN/student", "--dataset", "digits", "--device", device]
        for device in ("mps", "meta", "cuda", "warp")
    ),
    *(
        ["evaluate", "--model", "IN/student", "--dataset", "digits", "--output", output]
        for output in ("IN/empty", "IN/no/x.json", "/proc/x.json")
    ),
    ["plan", "--config", "IN/nowhere.yaml"],
    ["plan", "--student", "resnet18", "--distillation_loss", "none"],
    [
        "plan",
        "--student",
        "IN/nowhere",
        "--distillation_loss",
        "none",
        "--num_processes",
        "1",
        "--num_train_images",
        "9",
    ],
    [
        "plan",
        "--student",
        "resnet_18",
        "--distillation_loss",
        "none",
        "--num_processes",
        "1",
        "--num_train_images",
        "9",
    ],
    ["export", "--checkpoint", "IN/nowhere", "--output", "IN/out"],
    ["export", "--checkpoint", "IN/half", "--output", "IN/out"],
    ["convert", "--mmcls", "IN/nowhere.pth", "--architecture", "resnet18", "--output", "IN/out"],
    ["convert", "--mmcls", "IN/notes.txt", "--architecture", "resnet18", "--output", "IN/out"],
    ["push", "IN/nowhere", "me/mine"],
    ["push", "IN/empty", "me/mine"],
    ["teacher-logits", "--output", "IN/logits", "--epochs", "1", "--student", "resnet18", "--teacher", "IN/nowhere"],
    ["teacher-logits", "--output", "IN/notes.txt", "--epochs", "1", "--student", "resnet18", "--teacher", "resnet18"],
]


@pytest.mark.parametrize("arguments", BAD_COMMANDS, ids=" ".join)
def test_wrong_input_of_a_command_is_one_line(inputs, monkeypatch, capfd, arguments):
    monkeypatch.setattr(sys, "argv", ["nkd-hf"])
    arguments = [argument.replace("IN/", f"{inputs}/") for argument in arguments]
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    out, error = capfd.readouterr()
    error = f"{error}{exit.value.code}" if isinstance(exit.value.code, str) else error
    assert "top-1" not in out
    start = next(
        start for start in (f"nkd-hf {arguments[0]}: error: ", "nkd-hf: error: ", "error: ") if start in error
    )
    check_line(error, start)
    assert not (inputs / "out").exists()


def test_what_a_bug_raises_keeps_its_traceback(capsys):
    for bug in (lambda: 1 / 0, lambda: {}["key"], lambda: int("x"), lambda: torch.zeros(2).view(3)):
        with pytest.raises((ZeroDivisionError, KeyError, ValueError, RuntimeError)), one_line_errors():
            bug()
    with pytest.raises(SystemExit, match="3"), one_line_errors("nkd-hf: ", code=3):
        raise FileNotFoundError(2, "No such file or directory", "a.png")
    assert capsys.readouterr().err == "nkd-hf: error: [Errno 2] No such file or directory: 'a.png'\n"


class _Bad(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise BadSampleError("row 1 of the training data (a.png) cannot be decoded: repair or remove it")


def test_an_error_of_a_worker_is_said_without_the_traceback_that_torch_puts_before_it(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        next(iter(DataLoader(_Bad(), num_workers=1)))
    # An iterator that the garbage collector finds waits 5 s for its worker.
    traceback.clear_frames(stop.value.__context__.__traceback__)
    said = "row 1 of the training data (a.png) cannot be decoded: repair or remove it"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_the_text_of_an_error_within_a_sentence():
    assert reason(ValueError("It is\n  no folder.")) == "It is no folder"
    assert reason(ValueError("It goes on...")) == "It goes on..."
    assert reason(ValueError("")) == reason(ValueError(" \n")) == "ValueError"


def test_paths_of_this_machine_and_names_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "file").touch()
    for name in ("data", "./data", str(tmp_path / "data"), "owner/name", "digits", "..", "."):
        assert path_fault(name) is None
    for name in ("./dat", f"{tmp_path}/dat", "a/b/c", "~/nowhere", "~nobody/x", "../nowhere", "a\\b", "C:\\data"):
        assert path_fault(name).startswith(f"there is no folder {name!r}")
    assert path_fault("./dat").endswith(f", did you mean {str(tmp_path / 'data')!r}?")
    assert path_fault("file") == "'file' is a file, and a folder is expected"


NO_READER = [["plan", "--config", str(ROOT / "recipes/configs/uskd_resnet18.yaml")], [], ["plan", "--help"]]


def ends_as_a_tool_of_unix(arguments: list[str], code: int, error: str) -> bool:
    # argparse ignores that its --help could not be written, where it is longer than stdout's buffer.
    return error == "" and (code == 141 or (code == 0 and "--help" in arguments))


def test_a_reader_that_leaves_ends_a_process_of_the_command_as_it_ends_a_tool_of_unix():
    reader, writer = os.pipe()
    os.close(reader)
    command = os.path.join(os.path.dirname(sys.executable), "nkd-hf")
    done = subprocess.run([command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert ends_as_a_tool_of_unix([], done.returncode, done.stderr)


@pytest.mark.parametrize("arguments", NO_READER)
def test_a_reader_that_leaves_ends_a_command_as_it_ends_a_tool_of_unix(arguments, tmp_path):
    def work() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        try:
            cli.main(arguments)
        finally:
            sys.stdout.flush()  # as Python does at its end

    code = in_a_process(work, tmp_path / "log")
    assert ends_as_a_tool_of_unix(arguments, code, (tmp_path / "log").read_text())
