"""Import directions, lazy imports, and the examples of every public docstring."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import nkd_hf

PACKAGE = Path(nkd_hf.__file__).parent
ROOT = PACKAGE.parent
MODULES = [module.name for module in pkgutil.walk_packages(nkd_hf.__path__, "nkd_hf.")]
# What a module of the package may import of the package.
ALLOWED = {
    "losses": {"losses"},
    "feature_layers": set(),
    "feature_layout": {"feature_layers"},
    "features": {"feature_layers", "feature_layout"},
    "preprocessing": {"errors", "model_config", "opening"},
    "architectures": {"modeling_resnet_cifar", "modeling_shufflenet_v2"},
    "modeling_resnet_cifar": set(),
    "modeling_shufflenet_v2": set(),
    "batches": {"teacher_logits"},
    "access": set(),
    "agreement": set(),
    "repo_ids": {"redaction"},
    "errors": {"redaction"},
    "redaction": set(),
    "model_config": {"labels"},
    "build_limit": {"model_config"},
    "outputs": set(),
    "opening": {"access", "architectures", "build_limit", "errors", "folders", "model_config", "outputs", "repo_ids"},
    "data": {"access", "errors", "folders", "labels", "redaction", "repo_ids", "row_paths"},
    "row_paths": {"redaction"},
    "images": {"batches", "errors", "stream_parts"},
    "stream_parts": set(),
    "dataset_classes": {"data", "images", "labels"},
    "sampler": {"batches"},
    "bad_images": {"images"},
    "transforms": {"data", "errors", "preprocessing"},
    "optimization": {"losses"},
    "batch_norm": {"batches", "images"},
    "training_args": {"optimization", "repo_ids"},
    "config_file": set(),
    "parser": {"config_file"},
    "metrics": {"metrics"},
    "modeling": {"feature_layers", "features", "labels", "losses", "outputs"},
    "labels": set(),
    "label_check": {"losses"},
    "teacher": {"features", "labels", "model_config", "opening", "outputs", "preprocessing", "repo_ids"},
    "teacher_accuracy": {"metrics", "preprocessing", "teacher", "transforms"},
    "teacher_logits": {"errors"},
    "store_fingerprint": {
        "architectures",
        "data",
        "images",
        "preprocessing",
        "recipe_args",
        "teacher",
        "teacher_logits",
        "training_args",
        "transforms",
    },
    "store_hub": {"access", "errors", "folders", "hub", "teacher_logits", "repo_ids"},
    "image_sizes": set(),
    "student_preprocessing": {"image_sizes", "preprocessing"},
    "students": {
        "architectures",
        "feature_layers",
        "feature_layout",
        "image_sizes",
        "labels",
        "model_config",
        "opening",
        "preprocessing",
        "student_preprocessing",
        "repo_ids",
    },
    "cli": {"errors"},
    "folders": set(),
    "publishing": {"redaction"},
    "hub": {"model_card", "publishing", "repo_ids"},
    "checkpoint_trainer": {"agreement", "batches", "checkpoints", "errors", "folders", "hub_trainer", "sigterm"},
    "checkpoints": set(),
    "finite_trainer": {"batch_norm", "checkpoint_trainer", "checkpoints", "non_finite"},
    "hub_trainer": {"folders", "hub", "publishing"},
    "optimizer_groups": set(),
    "image_losses": set(),
    "non_finite": set(),
    "run_folder": {"checkpoints", "data", "recipe_args", "redaction", "training_args"},
    "sigterm": set(),
    "model_card": {"losses", "model_card", "redaction", "teacher", "teacher_logits", "training_args"},
    "mmcls_checkpoint": set(),
    "export": {"folders", "modeling", "opening", "students"},
    "timm_checkpoint": {"labels"},
    "convert": {"export", "folders", "labels", "mmcls_checkpoint", "modeling", "students", "timm_checkpoint"},
    "evaluation": {
        "data",
        "errors",
        "images",
        "labels",
        "metrics",
        "opening",
        "outputs",
        "preprocessing",
        "redaction",
        "transforms",
    },
    "recipe_args": {"features", "losses", "students", "repo_ids"},
    "plan_costs": {"modeling", "optimization", "training_args", "errors"},
    "plan_models": {
        "architectures",
        "build_limit",
        "data",
        "errors",
        "folders",
        "model_config",
        "opening",
        "preprocessing",
        "recipe_args",
        "student_preprocessing",
    },
    "plan_text": set(),
    "plan": {
        "architectures",
        "data",
        "features",
        "modeling",
        "optimization",
        "parser",
        "plan_costs",
        "plan_models",
        "plan_text",
        "preprocessing",
        "recipe_args",
        "training_args",
    },
    "trainer": {
        "agreement",
        "batch_norm",
        "batches",
        "checkpoints",
        "dataset_classes",
        "features",
        "finite_trainer",
        "image_losses",
        "images",
        "label_check",
        "labels",
        "losses",
        "metrics",
        "model_card",
        "modeling",
        "optimization",
        "optimizer_groups",
        "preprocessing",
        "publishing",
        "sampler",
        "teacher",
        "teacher_logits",
        "training_args",
        "transforms",
    },
}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, those of the package from its top."""
    names = set()
    package = ("nkd_hf", *path.relative_to(PACKAGE).parts[:-1]) if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names.add(".".join(part for part in (parent, node.module) if part))
    return names


@pytest.mark.parametrize("module", ALLOWED)
def test_import_directions(module):
    files = (
        [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else list((PACKAGE / module).glob("*.py"))
    )
    assert files
    inside = {name.split(".")[1] for file in files for name in imports(file) if name.startswith("nkd_hf.")}
    assert inside <= ALLOWED[module]


def test_losses_and_features_import_torch_alone():
    allowed = {"torch", "nkd_hf"} | sys.stdlib_module_names
    for file in [PACKAGE / "features.py", *(PACKAGE / "losses").glob("*.py")]:
        assert {name.split(".")[0] for name in imports(file)} <= allowed, file


def test_recipes_import_the_public_names_alone_and_nothing_imports_recipes():
    for file in (ROOT / "recipes").glob("*.py"):
        assert {name for name in imports(file) if name.startswith("nkd_hf")} == {"nkd_hf"}
    for file in PACKAGE.rglob("*.py"):
        assert not any(name.split(".")[0] == "recipes" for name in imports(file))


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
