"""The page and the form of the rows that cannot run here."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from nkd_hf import DataArguments, RecipeArguments, parse_args
from nkd_hf.cli import evaluate as evaluation
from nkd_hf.cli import teacher_logits as teacher_run
from nkd_hf.cli.plan import PlanArguments
from nkd_hf.data.image_datasets import SHUFFLE_BUFFER
from nkd_hf.recipe.parser import _Parser
from nkd_hf.recipe.plan import PlannedTrainingArguments

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "benchmarks" / "IMAGENET.md").read_text(encoding="utf-8")
FORM = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "reproduction.yml").read_text(encoding="utf-8"))
CONFIGS = {path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml") if not path.stem.startswith("digits")}
TYPES = (RecipeArguments, DataArguments, PlannedTrainingArguments)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("imagenet_page")


@pytest.fixture(scope="module")
def rows(script):
    return script.read_rows()


@pytest.mark.runs
def test_the_tables_are_those_of_the_configs(script, rows, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "read_rows", lambda: rows)
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--check"])
    assert exit_info.value.code == 0, exit_info.value.code
    # A figure that was typed over is found, and rebuilt.
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    script.PAGE.write_text(PAGE.replace("69.90 -> 71.96", "69.90 -> 71.97"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"is not of recipes/configs: run python benchmarks/imagenet_page\.py"):
        script.main(["--check"])
    script.main([])
    assert script.PAGE.read_text(encoding="utf-8") == PAGE


@pytest.mark.runs
def test_hours(script, rows, capsys, monkeypatch):
    # ResNet-18 has 1.81 GMACs and ResNet-34 3.66.
    (row,) = [row for row in rows if row.name == "nkd_resnet34_resnet18"]
    expected = 1_281_167 * 100 * (3 * 1.81 + 3.66) / 10 / 1000 / 3600
    assert row.hours(sum(row.gmacs()), 10) == pytest.approx(expected, rel=5e-3)
    # CIFAR-100's teacher is trained first; twice the rate is half the hours, and nothing is written.
    (row,) = [row for row in rows if row.name == "nkd_cifar100_resnet34_resnet18"]
    assert row.gmacs() == (3 * row.student_gmacs, 4 * row.teacher_gmacs)
    monkeypatch.setattr(script, "read_rows", lambda: rows)
    script.main(["--rate", "20", "60"])
    slow, fast = (re.search(r"\| all rows .*", text)[0] for text in (PAGE, capsys.readouterr().out))
    slow, fast = ([int(cell.replace(",", "")) for cell in re.findall(r"[\d,]+", line)] for line in (slow, fast))
    assert fast == pytest.approx([hours / 2 for hours in slow], abs=1)


@pytest.mark.runs
def test_the_baseline_of_a_row_has_its_settings(script, rows):
    shared = script.baselines(rows)
    assert shared["uskd_resnet18"] == "nkd_resnet34_resnet18"
    # Its gradients are clipped.
    assert shared["uskd_mobilenet"] == "uskd_mobilenet"
    assert {name for name, first in shared.items() if name == first} == set(
        re.findall(r"--distillation_loss none --output_dir outputs/(\S+)_baseline$", PAGE, re.MULTILINE)
    )


def test_every_row_is_on_the_page_and_in_the_form():
    assert set(re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)) == CONFIGS
    assert {shlex.split(line)[-1] for line in COMMANDS if re.search(r"/[^/ ]+\.py --config \S+$", line)} == {
        f"recipes/configs/{name}.yaml" for name in CONFIGS
    }
    (rows,) = [part["attributes"]["options"] for part in FORM["body"] if part.get("id") == "row"]
    assert sorted(rows) == sorted(CONFIGS)


def test_the_form_is_one_of_github():
    # docs.github.com: "Syntax for issue forms" and "Common validation errors when creating issue forms".
    for key in ("name", "description"):
        assert isinstance(FORM[key], str)
        assert FORM[key].strip()
    assert FORM.keys() <= {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
    fields = [part for part in FORM["body"] if part["type"] != "markdown"]
    assert fields
    for part in FORM["body"]:
        attributes = part["attributes"]
        assert part.keys() <= {"type", "id", "attributes", "validations"}
        allowed = {
            "markdown": {"value"},
            "input": {"label", "description", "placeholder", "value"},
            "textarea": {"label", "description", "placeholder", "value", "render"},
            "dropdown": {"label", "description", "multiple", "options", "default"},
        }[part["type"]]
        assert attributes.keys() <= allowed
        assert {"markdown": "value"}.get(part["type"], "label") in attributes
        texts = [value for key, value in attributes.items() if key != "options"]
        assert all(isinstance(text, str) and text.strip() for text in texts)
    (options,) = [part["attributes"]["options"] for part in fields if part["type"] == "dropdown"]
    assert len(set(options)) == len(options)
    for unique in ([part["id"] for part in fields], [part["attributes"]["label"] for part in fields]):
        assert len(set(unique)) == len(unique)
    assert all(re.fullmatch(r"[\w-]+", part["id"]) for part in fields)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(command, monkeypatch):
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        args.config_file = str(ROOT / args.config_file)
        assert _validate_launch_command(args)[0].multi_gpu
        check_recipe(args.training_script, args.training_script_args, args.module)
    elif words[:2] == ["nkd-hf", "plan"]:
        parse_args((*TYPES, PlanArguments), args=from_root(words[2:]))
    elif words[:2] == ["nkd-hf", "evaluate"]:

        class Opened(Exception):
            pass

        def opened(*args, **kwargs):
            raise Opened

        monkeypatch.setattr(evaluation, "open_classifier", opened)
        with pytest.raises(Opened):
            evaluation.main(words[2:])
    else:
        assert words[0] in ("git", "cat", "pip", "transformers")


def check_recipe(script: str, arguments: list[str], is_module: bool) -> None:
    if is_module:
        assert (script, arguments[0]) == ("nkd_hf.cli", "teacher-logits")
        options, arguments = teacher_run._make_parser().parse_known_args(arguments[1:])
        teacher_run._check_options(options)
    else:
        assert (ROOT / script).is_file()
    recipe, _, _ = parse_args(TYPES, args=from_root(arguments))
    assert ("self_distill" in script) <= (recipe.distillation_loss in ("uskd", "none"))


def from_root(arguments: list[str]) -> list[str]:
    return [str(ROOT / word) if word.startswith("recipes/") else word for word in arguments]


@pytest.mark.runs
def test_what_the_text_names_exists(script, rows):
    options = set(_Parser(TYPES)._option_string_actions)
    options |= {"--rate", "--num_processes", "--machine_rank"}
    named = set(re.findall(r"`[^`\n]*?(--\w+)", PAGE)) | set(re.findall(r" (--\w+)[ `]", PAGE))
    named -= {word for line in COMMANDS for word in shlex.split(line)}
    assert len(named) > 5
    assert named <= options
    images = {f"{row.data.num_train_images:,}" for row in rows} | {f"{n:,}" for n in script.VALIDATION_IMAGES.values()}
    assert all(f" {number} " in PAGE for number in (*images, SHUFFLE_BUFFER))
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", PAGE):
        assert link.startswith("https://") or (ROOT / "benchmarks" / link).is_file(), link
    for heading, page in (("Input", "benchmarks/README.md"), ("The paper's rows", "docs/reproducing.md")):
        assert f"## {heading}\n" in (ROOT / page).read_text(encoding="utf-8")
    assert "\ntest-rows:" in (ROOT / "Makefile").read_text(encoding="utf-8")
