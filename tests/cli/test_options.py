"""The names of options, which are checked before PyTorch and transformers are imported."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_runs import run

from nkd_hf import DataArguments, DistillationTrainingArguments, RecipeArguments, cli
from nkd_hf.cli import _COMMANDS, _known_options, evaluate, export, options, teacher_logits
from nkd_hf.cli.options import DISTILL, PLAN, RECIPE, check_options, check_values, read_command, read_fields
from nkd_hf.cli.plan import PlanArguments
from nkd_hf.recipe.distill import DISTILL_ARGUMENTS
from nkd_hf.recipe.parser import _Parser
from nkd_hf.recipe.plan import PlannedTrainingArguments

ROOT = Path(__file__).parents[2]
SCRIPT = (RecipeArguments, DataArguments, DistillationTrainingArguments)


@pytest.mark.parametrize(
    ("classes", "types"),
    [
        (RECIPE, SCRIPT),
        (DISTILL, DISTILL_ARGUMENTS),
        (PLAN, (RecipeArguments, DataArguments, PlannedTrainingArguments, PlanArguments)),
    ],
)
def test_fields_are_the_options_of_the_parser(classes, types):
    assert read_fields(classes) == set(_Parser(types)._option_string_actions)


@pytest.mark.parametrize("command", [evaluate, export, teacher_logits])
def test_options_of_a_command_are_those_of_its_parser(command):
    file = f"{command.__name__.rpartition('.')[2]}.py"
    assert read_command(file) == set(command._make_parser()._option_string_actions)


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_names_an_unknown_option(command, capsys):
    assert _known_options(command) is not None
    code, out, error = run(capsys, command, "--no_such_option=1", "--an_other", "2")
    assert (code, out) == (2, "")
    assert error.startswith(f"nkd-hf {command}: error: unknown argument --no_such_option")
    assert error.endswith(" (--help lists the arguments)\n")


@pytest.mark.parametrize(
    "token", ["--learning_rat", "--image-siz", "--no_dataloader_pin_memori", "--zzzz", "--studnt=1"]
)
def test_the_message_is_that_of_the_parser(token, capsys):
    parser = _Parser(SCRIPT)
    with pytest.raises(SystemExit) as full:
        parser.parse_into_dataclasses(["--student", "resnet18", token, "1"])
    expected = capsys.readouterr().err
    with pytest.raises(SystemExit) as early:
        check_options(parser.prog, ["--student", "resnet18", token, "1"], read_fields(RECIPE))
    assert capsys.readouterr().err == expected
    assert early.value.code == full.value.code == 2


@pytest.mark.parametrize(
    "args",
    [
        ["--num_train_epochs", "abc"],
        ["--num-train-epochs=abc"],
        ["--seed", "1.5"],
        ["--bf16", "maybe"],
        ["--streaming=2"],
        ["--disable_tqdm", "maybe"],
        ["--finetune_teacher", "maybe"],
        ["--teacher_dtype", "int8"],
        ["--on_bad_image", "ignore"],
        ["--image_size", "small"],
        ["--eval_strategy", "foo"],
        ["--logging-strategy=foo"],
        ["--save_strategy", "Epoch"],
        ["--hub_strategy", "foo"],
        ["--lr_scheduler_type", "foo"],
        ["--optim", "adam"],
        ["--optim"],
        ["--student"],
    ],
)
def test_a_wrong_value_has_the_message_of_the_parser(args, capsys):
    parser = _Parser(SCRIPT)
    with pytest.raises(SystemExit) as full:
        parser.parse_into_dataclasses(["--output_dir", "out", *args])
    expected = capsys.readouterr().err
    with pytest.raises(SystemExit) as early:
        check_values(parser.prog, ["--output_dir", "out", *args], RECIPE)
    assert capsys.readouterr().err == expected
    assert early.value.code == full.value.code == 2


@pytest.mark.parametrize(
    ("args", "fault"), [(["--seed", "high"], "--seed"), (["--teacher-dtype=int8"], "--teacher_dtype")]
)
def test_a_store_of_logits_has_a_wrong_value_of_the_recipe_answered_before_libraries_are_loaded(
    args, fault, capsys, monkeypatch
):
    """Its own `--push_to_hub` takes a repository, where a recipe's is a bool."""
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("libraries are loaded"))
    own = ["--output", "store", "--epochs", "2", "--push_to_hub", "owner/name"]
    code, out, error = run(capsys, "teacher-logits", *own, *args)
    assert (code, out) == (2, "")
    assert error.startswith(f"nkd-hf teacher-logits: error: argument {fault}")
    started = []
    monkeypatch.setattr(cli, "load", lambda *names: started.append(names) or SimpleNamespace(main=started.append))
    cli.main(["teacher-logits", *own, "--seed", "1"])
    assert started == [("nkd-hf teacher-logits", "nkd_hf.cli.teacher_logits"), [*own, "--seed", "1"]]


@pytest.mark.parametrize(
    "args",
    [
        ["evaluate", "--model", "m", "--dataset", "d", "--batch_size", "x"],
        ["evaluate", "--model", "m", "--dataset", "d", "--on_bad_image", "ignore"],
        ["evaluate", "--model", "m"],
        ["export", "--model", "m", "--format", "tflite"],
        ["export", "--model", "m", "--format", "onnx", "--max_int8_drop", "1%"],
        ["convert", "--timm", "f", "--output", "d"],
        ["push", "folder"],
        ["teacher-logits", "--output", "d", "--epochs", "x"],
        ["teacher-logits", "--output", "d"],
        ["teacher-logits", "--output", "d", "--epochs", "2", "--temperatures", "1", "hot"],
    ],
)
def test_a_wrong_or_missing_value_of_a_command_has_the_message_of_its_parser_before_libraries_are_loaded(
    args, capsys, monkeypatch
):
    name = args[0]
    with pytest.raises(SystemExit) as full:
        importlib.import_module(f"nkd_hf.cli.{name.replace('-', '_')}").main(args[1:])
    expected = capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(cli, "load", lambda *_: pytest.fail("libraries are loaded"))
    code, out, error = run(capsys, *args)
    assert (code, out) == (full.value.code, "")
    assert error == f"{expected} (--help lists the arguments)\n"


@pytest.mark.parametrize(
    "args",
    [
        [
            "evaluate",
            "--model",
            "m",
            "--dataset",
            "d",
            "--batch_size",
            "8",
            "--per_class",
            "--json",
            "false",
            "--streaming",
        ],
        ["export", "--checkpoint", "c", "--output", "d"],
        ["convert", "--mmcls", "f", "--architecture", "a", "--output", "d", "--overwrite"],
        ["push", "folder", "--private", "owner/name"],
        [
            "teacher-logits",
            "--output",
            "d",
            "--epochs",
            "2",
            "--top_k",
            "all",
            "--temperatures",
            "1",
            "4",
            "--config",
            "f",
        ],
        ["teacher-logits", "--help"],
    ],
)
def test_right_values_of_a_command_reach_it(args, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "load", lambda *_: SimpleNamespace(main=started.append))
    cli.main(args)
    assert started == [args[1:]]


def test_right_values_and_those_of_other_types_are_left_to_the_parser():
    right = [
        "--num_train_epochs",
        "1e1",
        "--seed",
        "-1",
        "--bf16",
        "--fp16",
        "no",
        "--streaming=T",
        "--no_dataloader_pin_memory",
    ]
    right += ["--teacher", "a", "b", "--loss_args", "{}", "--image_mean", "0.1", "x"]
    right += ["--finetune_teacher", "auto", "--learning_rate", "-3"]
    check_values("nkd-hf", right, RECIPE)
    check_values("nkd-hf", ["--seed", "x", "--help"], RECIPE)
    check_values("nkd-hf", ["--seed", "x"], {"Own": ("nkd_hf", "own.py")})  # there is no such file


def read_settings() -> dict[str, dict]:
    known = {}
    parser = SimpleNamespace(add_argument=lambda *names, dest, **settings: known.setdefault(dest, settings))
    for node, tree in options._read_definitions(DISTILL):
        options._add_field(parser, node, tree)
    return known


def test_the_choices_are_those_of_the_parser():
    full = {action.dest: action.choices for action in _Parser(DISTILL_ARGUMENTS)._actions}
    read = {name: settings["choices"] for name, settings in read_settings().items() if settings.get("choices")}
    assert {name: [*full[name]] for name in read} == read
    assert {"eval_strategy", "save_strategy", "hub_strategy", "optim", "lr_scheduler_type"} <= read.keys()


@pytest.mark.parametrize(
    "source",
    [
        None,
        "",
        "class OptimizerNames(ExplicitEnum):\n    pass",
        "class OptimizerNames(StrEnum):\n    SGD = 'sgd'",
        "class OptimizerNames(ExplicitEnum):\n    SGD = auto()",
        "class OptimizerNames(ExplicitEnum):\n    SGD = 'sgd'\n    def _missing_(cls, value): return cls.SGD",
        "@alias\nclass OptimizerNames(ExplicitEnum):\n    SGD = 'sgd'",
        "OptimizerNames = ExplicitEnum('OptimizerNames', names)",
        "OptimizerNames = 3",
        "OptimizerNames = {**others}",
    ],
)
def test_an_enum_that_is_written_differently_takes_any_value(tmp_path, monkeypatch, source):
    monkeypatch.setattr(options, "_PACKAGE", tmp_path)
    monkeypatch.setitem(options._CHOICES, "OptimizerNames", ("nkd_hf", "enums.py"))
    if source is not None:
        (tmp_path / "enums.py").write_text(source)
    assert options._read_named("OptimizerNames", None) is None
    (tmp_path / "own.py").write_text("class Own:\n    optim: OptimizerNames | str = field(default='sgd')")
    check_values("nkd-hf", ["--optim", "adam"], {"Own": ("nkd_hf", "own.py")})


def test_most_fields_are_checked():
    known = read_settings()
    assert sum("type" in settings for settings in known.values()) > 0.8 * len(known)


@pytest.mark.parametrize(
    "args",
    [["--gama", "1", "--help"], ["--", "--gama"], ["--gama is a value"], ["-1"], ["gama"], ["--student=--gama"]],
)
def test_uncertain_tokens_are_left_to_the_parser(args):
    check_options("nkd-hf", args, read_fields(RECIPE))


@pytest.mark.parametrize(
    "source",
    [
        None,
        "class Own:",
        "class Other:\n    gamma: int = 1",
        "class Own(Mixin):\n    gamma: int = 1",
        "class Own:\n    gamma: int = field(default=1, metadata={'aliases': ['-g']})",
        "class Own:\n    gamma: int = field(default=1, init=False)",
        "class Own:\n    gamma: ClassVar[int] = 1",
    ],
)
def test_a_source_that_is_read_differently_checks_nothing(tmp_path, monkeypatch, source):
    monkeypatch.setattr(options, "_PACKAGE", tmp_path)
    if source is not None:
        (tmp_path / "own.py").write_text(source)
    known = read_fields({"Own": ("nkd_hf", "own.py")})
    assert known is None
    check_options("nkd-hf", ["--gama"], known)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dataset_name", "dataset"),
        ("dataset_config", "dataset_config_name"),
        ("datase", "dataset"),
        ("modell", "model"),
    ],
)
def test_the_nearest_name_is_one_that_the_wrong_one_begins_with_or_a_similar_one(name, near):
    assert options.suggest(name, ["dataset_config_name", "dataset", "model"]) == f": did you mean {near!r}?"


def test_a_wrong_option_is_answered_and_a_right_one_announced_before_libraries_are_loaded():
    code = """
import runpy, sys
import nkd_hf.cli.options
heavy = lambda: {"torch", "transformers"} & set(sys.modules)
sys.argv = ["distill_cnn.py", "--learning_rat", "1"]
try:
    runpy.run_path(SCRIPT, run_name="__main__")
except SystemExit as exit:
    print(exit.code, heavy())
sys.argv[1:] = ["--learning_rate", "high"]
try:
    nkd_hf.cli.options.start_recipe()
except SystemExit as exit:
    print(exit.code, heavy())
sys.argv[1:] = ["--learning_rate", "1"]
start_recipe = nkd_hf.start_recipe
nkd_hf.cli.options.importlib.import_module = lambda name: print(name, heavy(), file=sys.stderr)
start_recipe()
"""
    script = str(ROOT / "recipes" / "distill_cnn.py")
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SCRIPT", repr(script))], capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 set()\n" * 2
    assert done.stderr == (
        "distill_cnn.py: error: unknown argument --learning_rat: did you mean '--learning_rate'? (--help lists the arguments)\n"
        "distill_cnn.py: error: argument --learning_rate/--learning-rate: invalid float value: 'high' (--help lists the arguments)\n"
        "distill_cnn.py: loading PyTorch and transformers ...\n"
        "nkd_hf.recipe.recipe set()\n"
    )
