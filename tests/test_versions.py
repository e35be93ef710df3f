"""The lower bounds and the files of setup.cfg, and the private names of Trainer that the package uses."""

import ast
import configparser
import inspect
import re
from pathlib import Path

from huggingface_hub import HfApi
from transformers import Trainer

ROOT = Path(__file__).parent.parent


def private_names_of_trainer() -> set[str]:
    """Its methods, and the attributes that it sets."""
    (trainer,) = ast.parse(inspect.getsource(Trainer)).body
    methods = {node.name for node in trainer.body if isinstance(node, ast.FunctionDef)}
    attributes = {
        node.attr
        for node in ast.walk(trainer)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return {name for name in methods | attributes if re.match(r"_(?!_)", name)}


def test_the_oldest_versions_are_the_lower_bounds():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    bounds = config["options"]["install_requires"].strip().splitlines()
    lines = (ROOT / "constraints" / "oldest.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [bound.replace(">=", "==") for bound in bounds]


def test_the_wheel_has_every_file_of_the_package():
    # `packages = find:` takes the folders that have an __init__.py, and package_data what else is named.
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    package = ROOT / "nkd_hf"
    files = [file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {file.parent for file in files} == {file.parent for file in package.rglob("__init__.py")}
    others = {str(file.relative_to(package)) for file in files if file.suffix != ".py"}
    assert others == set(config["options.package_data"]["nkd_hf"].split(", ")) == {"py.typed", "recipe/report.css"}


def test_private_names_of_trainer_are_listed():
    table = re.findall(r"^\| `(_\w+)` \|", (ROOT / "docs" / "development.md").read_text(), re.MULTILINE)
    names = private_names_of_trainer()
    used = set()
    for file in (ROOT / "nkd_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            used.add(getattr(node, "attr", None) if isinstance(node, ast.Attribute) else getattr(node, "name", None))
    assert table == sorted(used & names)
    assert hasattr(HfApi, "_validate_yaml")
