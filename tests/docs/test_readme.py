"""README and pages: their Python runs as it is written, and what they link to, name and list exists."""

import dataclasses
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch import nn
from transformers import TrainingArguments

from nkd_hf import DataArguments, DistillationTrainingArguments, RecipeArguments, losses, parse_args
from nkd_hf.cli import _COMMANDS, main
from nkd_hf.cli.plan import PlanArguments
from nkd_hf.recipe.parser import _Parser

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
ARGUMENTS = (RecipeArguments, DataArguments, DistillationTrainingArguments)
# Options of other programs: accelerate, pytest, pip, hf and the benchmarks.
FOREIGN = {"--config_file", "--quiet", "--no-deps", "--wheel-dir", "--repo-type", "--rounds", "--numbers", "--cpu"}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(page), flags=re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_python(page: Path) -> dict:
    """Runs the Python blocks of a page, one after another in one namespace."""
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    return names


@pytest.mark.runs
def test_python_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_python(README)
    shown = r"^\d+\.\d%$"
    printed = [float(line[:-1]) for line in re.findall(shown, capsys.readouterr().out, re.MULTILINE)]
    (output,) = blocks(README, "text")
    # Another machine sums in another order, and 360 images are few.
    assert printed == pytest.approx([float(line[:-1]) for line in re.findall(shown, output, re.MULTILINE)], abs=4)
    assert (tmp_path / "digits-nkd" / "model.safetensors").is_file()


@pytest.mark.runs
# test_losses_page.py runs the blocks of losses.md, of which one is a file of its own.
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if page.stem != "losses"], ids=name_of)
def test_python_of_a_page_runs(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    names = run_python(page)
    if page.stem == "quickstart":
        row = names["data"]["validation"].cast_column("image", datasets.Image())[0]
        assert {entry["label"] for entry in names["classifier"](row["image"])} <= set(names["id2label"].values())


def test_every_block_names_its_language():
    """As `py` or without a name, a block of Python would run in no test."""
    for page in LINKED:
        fences = re.findall(r"^ *```(.*)$", read(page), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "bash", "text", "yaml", "json", "bibtex", "ini"}, page
        assert set(fences[1::2]) <= {""}, page


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 150
    (example,) = blocks(README, "python")
    assert len(example.splitlines()) <= 15


def anchors(page: Path) -> Iterator[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for link in re.findall(r"""(?:\]\(|(?:src|href)="|^\[[^]]+\]: +)([^)\s"]+)""", text, re.MULTILINE):
        if not re.match(r"https?://", link):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_links_to_every_page():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", read(README)))
    assert linked == {name_of(page) for page in PAGES[1:]}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_named_files_exist(page):
    pattern = r"(?<![\w/.-])(?:recipes|tests|benchmarks|constraints|nkd_hf|docs)/[\w./-]*\w"
    for path in re.findall(pattern, re.sub(r"\]\([^)]*\)", "", read(page))):
        assert (ROOT / path).exists(), path


def test_every_target_that_is_named_exists():
    makefile = read(ROOT / "Makefile")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    assert set(re.findall(r"^([\w-]+):.*  ## \w", makefile, re.MULTILINE)) == targets  # the lines of `make help`
    for page in PAGES:
        for names in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", read(page), re.MULTILINE):
            assert set(names.split()) <= targets, f"{page.name}: make {names}"


def test_every_option_that_is_named_exists(capsys):
    options = set(_Parser((*ARGUMENTS, PlanArguments))._option_string_actions) | FOREIGN | {"--config"}
    for command in _COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for page in PAGES:
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(page))) <= options, page.name


COMMANDS = [
    line
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("accelerate launch") and "-m nkd_hf" not in line
]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_a_launch_line_is_accepted(command, tmp_path):
    (tmp_path / "my.yaml").write_text(f"base: {CONFIGS / 'digits_distill_cnn.yaml'}\n")
    launch = launch_command_parser().parse_args(shlex.split(command)[2:])
    default = CONFIGS / f"digits_{Path(launch.training_script).stem}.yaml"
    given = [str(tmp_path / word) if word == "my.yaml" else word for word in launch.training_script_args]
    given = [str(ROOT / word) if word.startswith("recipes/") else word for word in given]
    recipe, _, _ = parse_args(ARGUMENTS, args=[*given, "--use_cpu", "true"], default_config=default)
    assert recipe.student


def test_every_key_of_a_yaml_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", read(ROOT / "docs" / "recipes.md"), re.MULTILINE)
    listed = {name: default.strip("`") for name, default in rows}
    assert len(listed) == len(rows)
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    expected = {
        field.name: field
        for arguments in ARGUMENTS
        for field in dataclasses.fields(arguments)
        if field.name not in theirs or (arguments is DistillationTrainingArguments and has_changed(field, theirs))
    }
    assert listed.keys() == expected.keys()
    for name, field in expected.items():
        assert listed[name] == shown_default(field), name


def has_changed(field: dataclasses.Field, theirs: dict) -> bool:
    return field.name == "lr_scheduler_type" or field.default != theirs[field.name]


def shown_default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    return "none" if field.default is None else yaml.safe_dump(field.default).splitlines()[0]


def test_every_loss_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|.*?\]\((\S+?)\)", read(README), re.MULTILINE)
    classes = {
        name: loss for name, loss in inspect.getmembers(losses, inspect.isclass)
        if issubclass(loss, nn.Module) and name != "DistillationLoss"
    }  # fmt: skip
    assert {name for _, name, _ in rows} == set(classes)
    for key, name, paper in rows:
        assert key == name.removesuffix("Loss").lower()
        assert paper == classes[name].paper


def test_every_config_parses():
    for config in CONFIGS.glob("*.yaml"):
        recipe, _, training = parse_args(
            ARGUMENTS, args=["--config", str(config), "--bf16", "false", "--use_cpu", "true"]
        )
        assert recipe.student
        assert training.num_train_epochs >= 1
        first_lines = config.read_text().splitlines()[:3]
        assert all(line.startswith("#") for line in first_lines), config
