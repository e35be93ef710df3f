"""Import directions, lazy imports, the length of files, and the examples of every public docstring."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nkd_hf

PACKAGE = Path(nkd_hf.__file__).parent
ROOT = PACKAGE.parent
MODULES = [
    module.name for module in pkgutil.walk_packages(nkd_hf.__path__, "nkd_hf.") if not module.name.endswith("__main__")
]
# The rooms of the package, from the bottom: each may import from the lines above its own, which are the layers below it.
LAYERS = """
    errors files metrics losses
    models
    teacher_logits
    data hub export
    trainer
    recipe
    cli
"""


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, those of the package from its top."""
    package = ("nkd_hf", *path.relative_to(PACKAGE).parts[:-1]) if path.is_relative_to(PACKAGE) else ()
    return find_imports(path.read_text(), package)


def find_imports(code: str, package: tuple[str, ...]) -> set[str]:
    names = set()
    tree = ast.parse(code)
    # What type checkers alone import is in none of these statements.
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (parent, node.module) if part)
            if module == "nkd_hf" and package:  # a room, or the room of a public name
                names |= {f"{module}.{nkd_hf._MODULE_OF.get(alias.name, alias.name)}" for alias in node.names}
            elif node.module is None:  # `from . import x` names a module, or a name of the package
                names |= {f"{module}.{alias.name}" for alias in node.names}
            else:
                names.add(module)
        elif package and isinstance(node, ast.Constant) and node.value in MODULES:  # for importlib.import_module
            names.add(node.value)
    return names


@pytest.mark.parametrize(
    "code",
    [
        "import nkd_hf.trainer.trainer", "from nkd_hf.trainer import trainer", "from ..trainer.trainer import Trainer",
        "from .. import trainer", "from nkd_hf import trainer", "from nkd_hf import DistillationTrainer",
        "def f():\n    from nkd_hf import DistillationTrainer", "importlib.import_module('nkd_hf.trainer')",
    ],
)  # fmt: skip
def test_every_spelling_of_an_import_is_found(code):
    assert any(name.startswith("nkd_hf.trainer") for name in find_imports(code, ("nkd_hf", "models")))


def test_imports_go_down():
    layers = [line.split() for line in LAYERS.split("\n")]
    layer = {room: number for number, rooms in enumerate(layers) for room in rooms}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(file):
            assert name != "nkd_hf" or room == "__init__", f"{file} imports nkd_hf, which may be any of its rooms"
            other = name.removeprefix("nkd_hf.").split(".")[0]
            if room != "__init__" and name.startswith("nkd_hf.") and other != room:
                assert layer.get(other, -1) < layer[room], f"{file} imports {name}"


def test_files_of_a_room_import_each_other_in_one_direction():
    graph = {}
    for file in PACKAGE.rglob("*.py"):
        module = "nkd_hf." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = imports(file)
    TopologicalSorter({module: names & graph.keys() for module, names in graph.items()}).prepare()


def test_files_are_short():
    lengths = {path.relative_to(PACKAGE).as_posix(): path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    long = {name: count for name, count in lengths.items() if count > 350}
    assert len(long) <= 3, long
    assert max(long.values()) <= 450, long


def test_losses_and_features_import_torch_alone():
    allowed = {"torch", "nkd_hf"} | sys.stdlib_module_names
    for file in [PACKAGE / "models" / "features.py", *(PACKAGE / "losses").glob("*.py")]:
        assert {name.split(".")[0] for name in imports(file)} <= allowed, file


def test_recipes_import_the_public_names_alone_and_nothing_imports_recipes():
    for file in (ROOT / "recipes").glob("*.py"):
        assert {name for name in imports(file) if name.startswith("nkd_hf")} == {"nkd_hf"}
    for file in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] == "recipes" for name in imports(file))


@pytest.mark.runs
def test_losses_load_no_transformers():
    code = "import sys; from nkd_hf.losses import nkd_loss; print({'transformers', 'timm', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names_resolve():
    for name in nkd_hf.__all__:
        assert getattr(nkd_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = nkd_hf.nothing_of_the_kind


@pytest.mark.parametrize("module", ["nkd_hf", *MODULES])
def test_examples_of_docstrings(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
