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
    extras = config["options.extras_require"]
    lists = [config["options"]["install_requires"], extras["benchmarks"], extras["onnx"]]
    bounds = "".join(lists).strip().splitlines()
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


def nodes_of_package() -> list[ast.AST]:
    return [node for file in (ROOT / "nkd_hf").rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]


def read_tables() -> list[list[str]]:
    """The private names in each table of the page: those of Trainer, and others."""
    page = (ROOT / "docs" / "development.md").read_text()
    tables = re.findall(r"^\| name \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [re.findall(r"^\| `(_\w+)` \|", table, re.MULTILINE) for table in tables]


def test_private_names_of_trainer_are_listed():
    nodes = nodes_of_package()
    used = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", None) for node in nodes}
    assert read_tables()[0] == sorted(used & private_names_of_trainer())
    assert hasattr(HfApi, "_validate_yaml")


def test_other_private_names_of_libraries_are_listed():
    nodes, own = nodes_of_package(), {"_asdict", "_replace"}  # public, of named tuples
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {node.arg for node in nodes if isinstance(node, ast.keyword) and node.arg}
    named = used | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    (trainers, others) = read_tables()
    assert others == sorted(others)
    assert {name for name in used - own if re.match(r"_(?!_)", name)} <= {*trainers, *others}
    assert set(others) <= named


def test_each_hook_of_the_trainer_says_why_it_is_overridden():
    path = ROOT / "nkd_hf" / "trainer" / "trainer.py"
    code = path.read_text()
    (trainer,) = (node for node in ast.parse(code).body if isinstance(node, ast.ClassDef))
    methods = [node for node in trainer.body if isinstance(node, ast.FunctionDef) and hasattr(Trainer, node.name)]
    assert len(methods) == len({method.name for method in methods}) > 20
    for method in methods:
        lines = ast.get_source_segment(code, method).splitlines()
        text = " ".join(line.partition("# ")[2] for line in lines) + (ast.get_docstring(method) or "")
        assert method.name == "__init__" or "Trainer" in text, method.name
