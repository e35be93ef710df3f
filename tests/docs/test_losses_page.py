"""docs/losses.md: its table is the classes', and its loss of one's own works in trainer, recipe, plan and card."""

import contextlib
import inspect
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from processes import in_a_process
from recipe_runs import FEW, IN_PROCESS

from nkd_hf import RecipeArguments, parse_args
from nkd_hf.losses.base import loss_inputs, teacher_inputs
from nkd_hf.losses.registry import LOSSES
from nkd_hf.recipe.report import print_table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "losses.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
OWN = next(block for block in BLOCKS if "class MimicLoss" in block)
SETTINGS = re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[1]
DIGITS = ROOT / "recipes" / "configs" / "digits_distill_cnn.yaml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the loss and a config, as the page has them."""
    (tmp_path / "my_losses.py").write_text(OWN)
    (tmp_path / "mine.yaml").write_text(f"base: {DIGITS}\ncompare_with_baseline: false\n{SETTINGS}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder: Path, script: Path, *arguments: str) -> str:
    """What a script prints in a forked process, whose sys.path has the script's folder, not the working directory."""

    def work() -> None:
        sys.modules.pop("my_losses", None)  # of another test's folder
        sys.path[:] = [str(script.parent), *(path for path in sys.path if path not in ("", str(folder), os.getcwd()))]
        sys.argv = [str(script), *(str(argument) for argument in arguments)]
        with (folder / "stdout").open("w") as stdout, contextlib.redirect_stdout(stdout):
            runpy.run_path(str(script), run_name="__main__")

    assert in_a_process(work, folder / "log") == 0, (folder / "log").read_text()
    return (folder / "stdout").read_text()


def test_table():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*?) \| (.*?) \| \[.*?\]\((.*?)\) \|$", PAGE, flags=re.MULTILINE)
    needs = {name: set(teacher_inputs(loss)) for name, loss in LOSSES.items()}
    words = {
        name: "a teacher and its features" if inputs - {"teacher_logits"} else "a teacher" if inputs else "nothing"
        for name, inputs in needs.items()
    }
    assert rows == [
        (name, loss.__name__, words[name], describe_defaults(loss), loss.paper) for name, loss in LOSSES.items()
    ]


def describe_defaults(loss: type) -> str:
    """The arguments that have a default; the model gives the others."""
    arguments = inspect.signature(loss).parameters.values()
    return ", ".join(f"{each.name} {each.default}" for each in arguments if each.default not in (each.empty, None))


@pytest.mark.parametrize("page", ["losses", "which-loss"])
def test_command_line(page):
    """Each `--loss_args` of a page is that of its loss."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = re.findall(r"--distillation_loss (\S+) --loss_args '(.*?)'", text)
    assert commands
    for loss, text in commands:
        recipe = parse_args(
            (RecipeArguments,),
            args=["--student", "resnet18", "--teacher", "resnet34", "--distillation_loss", loss, "--loss_args", text],
        )[0]
        assert set(recipe.loss_args) <= set(inspect.signature(LOSSES[loss]).parameters)


def test_blocks_with_the_loss_in_a_file_of_its_own(folder, monkeypatch):
    assert len(OWN.strip().splitlines()) <= 30
    monkeypatch.syspath_prepend(folder)
    for block in BLOCKS:
        if block != OWN:
            names = {}  # each is a script of its own
            exec(compile(block, "losses.md", "exec"), names)
    entry = names["trainer"].state.log_history[0]
    components = [entry[name] for name in ("task", "nkd_target", "nkd_non_target", "mimic")]
    assert min(components) > 0
    assert entry["loss"] == pytest.approx(sum(components), rel=1e-5)
    card = (folder / "mimic" / "README.md").read_text()
    assert "[Mimic](https://arxiv.org/abs/1312.6184) (`weight=0.1`)" in card
    assert "@inproceedings{ba2014do" in card
    assert "@inproceedings{yang2023from" in card


def test_plan(folder):
    plan = json.loads(
        run(folder, Path(sys.executable).with_name("nkd-hf"), "plan", "--config", "mine.yaml", "--json", "--num_processes", "1",
            "--num_train_images", "100", "--num_classes", "10")
    )  # fmt: skip
    assert plan["distillation_loss"] == "nkd+my_losses.MimicLoss"
    assert plan["teacher"]["name"] == "resnet34"


@pytest.mark.runs
def test_recipe(folder):
    run(folder, ROOT / "recipes" / "distill_cnn.py", "--config", "mine.yaml", *FEW, *IN_PROCESS,
        "--num_train_epochs", "1", "--output_dir", "out")  # fmt: skip
    state = json.loads(next((folder / "out" / "student").glob("checkpoint-*/trainer_state.json")).read_text())
    assert {"nkd_target", "mimic"} <= state["log_history"][0].keys()
    card = (folder / "out" / "student" / "README.md").read_text()
    assert "[NKD](https://arxiv.org/abs/2303.13005) (`gamma=1.0, temperature=1.0`)" in card
    assert "[Mimic](https://arxiv.org/abs/1312.6184) (`weight=0.1`)" in card
    assert "@inproceedings{ba2014do" in card


def test_the_table_of_a_recipe_calls_losses_by_their_own_names(tmp_path, capsys):
    own = {"one": "class One(NKDLoss):\n    name = 'One'\n", "other": "class Other(NKDLoss):\n    pass\n"}
    for name, code in own.items():
        (tmp_path / f"loss_{name}.py").write_text("from nkd_hf import NKDLoss\n\n\n" + code)
    for name, shown in {
        "nkd+vitkd": "NKD+ViTKD", "sdnkd": "SD-NKD", "loss_one.One": "One", "kd+loss_other.Other": "KD+Other"
    }.items():  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(tmp_path)
            print_table(
                RecipeArguments("resnet18", teacher="resnet34", distillation_loss=name), {"distilled": 0.5}, tmp_path
            )
        assert f"distilled ({shown}) " in capsys.readouterr().out


def test_each_loss_has_its_form_without_labels():
    """The table names each loss once: refused without a teacher, with the teacher's class where it reads labels."""
    section = PAGE.split("## Images without labels\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", section, flags=re.MULTILINE)
    forms = {name: form for names, form in rows for name in re.findall(r"`(\w+)`", names)}
    assert sum(names.count("`") for names, _ in rows) == 2 * len(LOSSES)
    assert forms.keys() == LOSSES.keys()
    for name, loss in LOSSES.items():
        reads_labels = "labels" in loss_inputs(loss)
        assert forms[name].startswith("refused") == (not teacher_inputs(loss)), name
        assert forms[name].startswith("as it is") == (bool(teacher_inputs(loss)) and not reads_labels), name
