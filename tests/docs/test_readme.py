"""The README's Python runs as it is written, block after block."""

import re
from pathlib import Path

import datasets
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    row = names["data"]["validation"].cast_column("image", datasets.Image())[0]
    answer = names["classifier"](row["image"])
    assert {entry["label"] for entry in answer} <= set(names["id2label"].values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_the_pages_run(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


def test_links_to_the_pages_lead_somewhere():
    linked = set(re.findall(r"\]\((docs/[\w./-]+\.md)\)", README))
    assert {str(page.relative_to(ROOT)) for page in PAGES} == linked


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:recipes|tests|benchmarks)/[\w./-]+\.(?:py|yaml|ipynb)", README)))
)
def test_named_files_exist(path):
    assert (ROOT / path).is_file()


def test_every_config_parses():
    from nkd_hf import DataArguments, DistillationTrainingArguments, RecipeArguments, parse_args

    for config in (ROOT / "recipes" / "configs").glob("*.yaml"):
        recipe, _, training = parse_args(
            (RecipeArguments, DataArguments, DistillationTrainingArguments),
            args=["--config", str(config), "--bf16", "false", "--use_cpu", "true"],
        )
        assert recipe.student
        assert training.num_train_epochs >= 1
        first_lines = config.read_text().splitlines()[:3]
        assert all(line.startswith("#") for line in first_lines), config
