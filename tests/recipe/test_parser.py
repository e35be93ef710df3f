import dataclasses
import doctest
import math
import re
import sys
from enum import Enum
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

import nkd_hf.metrics
import nkd_hf.recipe.parser
from nkd_hf.recipe.parser import parse_args, parse_with_defaults


class Interpolation(Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


@dataclasses.dataclass
class ModelArguments:
    student: str = "resnet18"
    teacher: str | None = "resnet34"
    gamma: float = 1.5
    image_size: int | None = 32
    pretrained: bool = True
    strict: bool | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    scales: list[float] | None = None
    student_args: dict | None = None
    distillation_loss: Literal["nkd", "uskd", "none"] = "nkd"
    interpolation: Interpolation = "bilinear"
    num_copies: Literal[1, 2] = 1

    def __post_init__(self):
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")


@dataclasses.dataclass
class DataArguments:
    dataset_name: str | None = None


@dataclasses.dataclass
class RequiredArguments:
    folder: str
    num_classes: int


@pytest.fixture
def config(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def error(capsys):
    """The message with which the parser exits."""

    def run(*args, types=ModelArguments, **kwargs):
        with pytest.raises(SystemExit) as exit_info:
            parse_args(types, args=args, **kwargs)
        message = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert len(message.splitlines()) == 1
        return message

    return run


def parse(*args):
    return parse_args(ModelArguments, args=args)[0]


def test_defaults_then_yaml_then_command_line(config):
    file = config("gamma: 2\nstudent: deit\nimage_size: 64\n")
    assert parse() == ModelArguments()
    arguments = parse("--config", file, "--student", "swin", "--image-size=16")
    assert arguments == ModelArguments(gamma=2.0, student="swin", image_size=16)
    assert type(arguments.gamma) is float
    assert parse("--gamma", "3", f"--config={file}").gamma == 3  # whatever the order
    assert parse() == ModelArguments()  # nothing stays behind


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("gamma: 1e-3", 1e-3),
        ("gamma: 1.5E+2", 150.0),
        ("gamma: .5", 0.5),
        ("gamma: 1", 1.0),
        ("gamma: .inf", math.inf),
        ("image_size: -1", -1),
        ("image_size: null", None),
        ("teacher:", None),
        ("teacher: --starts-with-a-dash", "--starts-with-a-dash"),
        ("teacher: 50% off %(prog)s", "50% off %(prog)s"),
        ("teacher: '1e-3'", "1e-3"),
        ("teacher: no", "no"),
        ("student: größer", "größer"),
        ("pretrained: false", False),
        ("pretrained: no", False),
        ("strict: on", True),
        ("names: [a, '-b']", ["a", "-b"]),
        ("names: []", []),
        ("scales: [1, 2e-1]", [1.0, 0.2]),
        ("student_args: {drop_path_rate: 1e-1, norm: {eps: 1e-6}}", {"drop_path_rate": 0.1, "norm": {"eps": 1e-6}}),
        ("student_args: {}", {}),
        ("distillation_loss: none", "none"),
        ("interpolation: bicubic", "bicubic"),
    ],
)
def test_values_of_a_yaml(config, line, value):
    name = line.split(":")[0]
    arguments = parse("--config", config(line))
    assert getattr(arguments, name) == value
    assert type(getattr(arguments, name)) is type(value)
    assert dataclasses.replace(arguments, **{name: getattr(ModelArguments(), name)}) == ModelArguments()


# PyYAML writes the string 1e3 without quotes, since it reads it as a string too.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20).filter(
    lambda text: not re.fullmatch(r"[-+.\d]+[eE][-+]?\d+", text)
)
FLOATS = st.floats(allow_nan=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "student": TEXT,
            "gamma": st.floats(min_value=0),
            "image_size": st.none() | INTEGERS,
            "pretrained": st.booleans(),
            "strict": st.none() | st.booleans(),
            "names": st.lists(TEXT, max_size=3),
            "scales": st.none() | st.lists(FLOATS, max_size=3),
            "student_args": st.dictionaries(TEXT, st.none() | st.booleans() | INTEGERS | FLOATS | TEXT, max_size=3),
        },
    )
)
def test_a_dumped_yaml_gives_the_same_values(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("dumped") / "config.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    assert parse("--config", str(file)) == ModelArguments(**values)


@pytest.mark.parametrize(
    ("line", "expected", "got"),
    [
        ("gamma: fast", "a number", "the string 'fast'"),
        ("gamma: '1e-3'", "a number", "the string '1e-3': remove the quotes"),
        ("gamma: [1, 2]", "a number", r"the list \[1, 2\]"),
        ("gamma: {a: 1}", "a number", "the mapping {'a': 1}"),
        ("gamma: true", "a number", "the boolean true"),
        ("gamma:", "a number", "null: omit it"),
        ("image_size: 1.5", "an integer or null", "the number 1.5"),
        ("image_size: 32.0", "an integer or null", "the number 32.0"),
        ("image_size: true", "an integer or null", "the boolean true"),
        ("pretrained: 3", "true or false", "the number 3"),
        ("pretrained: 'true'", "true or false", "the string 'true': remove the quotes"),
        ("pretrained: maybe", "true or false", "the string 'maybe'"),
        ("student: 18", "a string", "the number 18: put it in quotes"),
        ("student: true", "a string", "the boolean true: put it in quotes"),
        ("student: 2024-02-01", "a string", "the date .*: put it in quotes"),
        ("student: [a]", "a string", r"the list \['a'\]"),
        ("names: a", "a list, each item a string", "the string 'a'"),
        ("names: [a, 1]", "a list, each item a string", r"the list \['a', 1\]"),
        ("student_args: [a]", "a mapping or null", r"the list \['a'\]"),
        ("student_args: {1: a}", "a mapping or null", "the mapping {1: 'a'}"),
        ("distillation_loss: nkb", "one of 'nkd', 'uskd', 'none'|Literal", "the string 'nkb'"),
        ("num_copies: true", "one of 1, 2|Literal", "the boolean true"),
        ("interpolation: cubic", "one of 'bilinear', 'bicubic'|Interpolation", "the string 'cubic'"),
    ],
)
def test_wrong_type_in_a_yaml(config, error, line, expected, got):
    file = config(line)
    pattern = f"{re.escape(file)}: {line.split(':')[0]}: expected ({expected}), got {got}"
    assert re.search(pattern, error("--config", file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama: 1", "unknown key 'gama': did you mean 'gamma'?"),
        ("image-size: 1", "unknown key 'image-size': did you mean 'image_size'?"),
        ("1: 1", "unknown key 1"),
        ("config: other.yaml", "unknown key 'config'"),
        ("gamma: 1\nstudent: a\ngamma: 2", "line 3: not valid YAML: the key 'gamma' occurs twice"),
        ("student_args: {a: 1, a: 2}", "line 1: not valid YAML: the key 'a' occurs twice"),
        ("gamma: [", "line 1: not valid YAML"),
        ("gamma: !!python/name:os.system", "line 1: not valid YAML: could not determine a constructor"),
        ("? [a]\n: 1", "not valid YAML: found unhashable key"),
        ("gamma: 2024-02-31", "not valid YAML: day is out of range"),
        ("gamma: 1\n---\ngamma: 2", "not valid YAML"),
        ("gamma: \x07", "not valid YAML"),
        ("- gamma", "expected a mapping such as `gamma: 1.5`, got the list ['gamma']"),
        ("gamma", "expected a mapping such as `gamma: 1.5`, got the string 'gamma'"),
        ("base: 1", "base: expected the name of a YAML file, got the number 1"),
    ],
)
def test_faulty_yaml(config, error, text, message):
    file = config(text)
    text = error("--config", file)
    assert file in text
    assert message in text


def test_unreadable_yaml(config, error, tmp_path):
    assert "none.yaml: No such file or directory" in error("--config", str(tmp_path / "none.yaml"))
    assert "Is a directory" in error("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("student: größer".encode("latin-1"))
    assert "latin.yaml, line 1: not valid YAML: not UTF-8" in error("--config", str(tmp_path / "latin.yaml"))
    base = config("base: none.yaml")
    assert f"none.yaml, the base of {base}: No such file" in error("--config", base)
    assert "--config: expected one argument" in error("--config")


@pytest.mark.parametrize("text", ["", "# gamma: 3\n", "---\n", "{}"])
def test_empty_yaml(config, text):
    assert parse("--config", config(text)) == ModelArguments()


def test_base(config, error, tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    config("gamma: 2\nimage_size: 64\nstudent_args: {a: 1}\nteacher: x", "shared/root.yaml")
    config("base: root.yaml\nimage_size: 128", "shared/cnn.yaml")
    file = config("base: shared/cnn.yaml\nstudent: swin\nstudent_args: {b: 2}\nteacher: null")
    monkeypatch.chdir("/")  # a base is relative to the file that names it
    expected = ModelArguments(gamma=2.0, image_size=128, student="swin", student_args={"b": 2}, teacher=None)
    assert parse("--config", file) == expected

    config("gama: 2", "shared/root.yaml")
    assert f"{tmp_path / 'shared' / 'root.yaml'}: unknown key 'gama'" in error("--config", file)
    config("base: ../shared/cnn.yaml", "shared/root.yaml")
    assert "cannot be its own base" in error("--config", file)
    assert "cannot be its own base" in error("--config", config("base: config.yaml"))


def test_anchors_are_no_duplicates(config):
    file = config("student_args: &a {x: 1, y: 2}\nnames: [a]\n")
    assert parse("--config", file).student_args == {"x": 1, "y": 2}
    assert parse("--config", config("student_args: {a: &a {x: 1}, b: {<<: *a, x: 2}}")).student_args["b"] == {"x": 2}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gama", "1"], "unknown argument --gama: did you mean '--gamma'?"),
        (["--gama=1"], "unknown argument --gama: did you mean '--gamma'?"),
        (["--gam", "1"], "unknown argument --gam: did you mean '--gamma'?"),  # no abbreviations
        (["--zzz"], "unknown argument --zzz"),
        (["--gamma", "1", "2"], "unexpected value '2'"),
        (["config.yaml"], "unexpected value 'config.yaml'"),
        (["--gamma", "fast"], "argument --gamma: invalid float value: 'fast'"),
        (["--image_size", "1.5"], "invalid int value: '1.5'"),
        (["--pretrained", "3"], "got 3"),
        (["--student_args", "[1]"], "expected a mapping in JSON such as '{\"a\": 1}', got '[1]'"),
        (["--student_args", "{a"], "expected a mapping in JSON such as '{\"a\": 1}', got '{a'"),
        (["--distillation_loss", "nkb"], "invalid choice: 'nkb'"),
        (["--gamma", "-1"], "gamma must be at least 0, got -1.0"),  # from __post_init__
    ],
)
def test_faults_at_the_command_line(error, args, message):
    assert message in error(*args)


def test_values_at_the_command_line():
    assert parse("--student_args", '{"a": {"b": 1e-3}}').student_args == {"a": {"b": 0.001}}
    assert parse("--scales", "1", "2").scales == [1.0, 2.0]
    assert not parse("--pretrained", "false").pretrained
    assert not parse("--no_pretrained").pretrained
    assert parse("--strict", "true").strict is True


def test_command_line_overrides_every_kind_of_yaml_value(config):
    file = config("pretrained: false\nnames: [a, b]\nstudent_args: {a: 1}\ndistillation_loss: uskd\nstrict: true")
    arguments = parse(
        *["--config", file, "--pretrained", "--names", "c", "--student_args", '{"b": 2}', "--strict", "false"],
        *["--distillation_loss", "nkd"],
    )
    assert arguments == ModelArguments(names=["c"], student_args={"b": 2}, strict=False)


def test_required_arguments(config, error):
    file = config("folder: x")
    assert "required: --folder, --num_classes" in error(types=RequiredArguments)
    assert "required: --num_classes" in error("--config", file, types=RequiredArguments)
    arguments = parse_args(RequiredArguments, args=["--config", file, "--num_classes", "3"])
    assert arguments == (RequiredArguments("x", 3),)


def test_default_config(config, error, tmp_path):
    types = (ModelArguments, DataArguments)
    demo, other = config("gamma: 9", "demo.yaml"), config("image_size: 9", "other.yaml")

    def gamma(*args, **kwargs):
        return parse_args(types, default_config=demo, args=args, **kwargs)[0].gamma

    assert gamma() == gamma("--image_size", "3") == 9
    assert gamma("--gamma", "1") == 1
    assert gamma("--config", other) == 1.5
    assert gamma("--dataset_name", "x") == gamma("--dataset-name=x") == 1.5
    assert gamma("--dataset_name", "x", default_config_unless=()) == 9
    assert gamma("--student", "x", default_config_unless=("student",)) == 1.5
    assert "none.yaml: No such file" in error(default_config=tmp_path / "none.yaml")
    arguments = parse_args(types, default_config=demo, args=["--config", demo, "--dataset_name", "x"])
    assert arguments == (ModelArguments(gamma=9.0), DataArguments("x"))


def test_a_group_of_the_default_config_that_holds_for_other_data(config):
    demo = config("distillation_loss: uskd\nstudent_args: {a: 1}\ngamma: 9")

    def parsed(*args):
        keeps = [("distillation_loss", "student_args")]
        found = parse_args(
            (ModelArguments, DataArguments), default_config=demo, default_config_keeps=keeps, args=args
        )[0]
        return found.distillation_loss, found.student_args, found.gamma

    assert parsed() == ("uskd", {"a": 1}, 9)
    assert parsed("--dataset_name", "x") == ("uskd", {"a": 1}, 1.5)
    assert parsed("--dataset_name", "x", "--distillation_loss", "uskd") == ("uskd", {"a": 1}, 1.5)
    # Another loss doesn't inherit the arguments of the first one.
    assert parsed("--dataset_name", "x", "--distillation_loss=none") == ("none", None, 1.5)


def test_arguments_of_the_process(config, monkeypatch, tmp_path):
    (tmp_path / "recipe.args").write_text("--gamma 7")  # HfArgumentParser would read it
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "recipe.py"), "--student", "deit"])
    assert parse_args(ModelArguments) == (ModelArguments(student="deit"),)


def test_help(config, capsys):
    file = config("gamma: 8.25")
    with pytest.raises(SystemExit) as exit_info:
        parse_args((ModelArguments, TrainingArguments), args=["--config", file, "--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "--config FILE" in text
    assert "--learning_rate" in text
    assert "8.25" in text  # the values that would be used


def test_training_arguments(config, error, tmp_path):
    file = config(
        f"output_dir: {tmp_path}\nlearning_rate: 1e-3\nmax_steps: -1\nsave_strategy: no\nreport_to: [tensorboard]\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\noptim: sgd\nuse_cpu: true\n"
        "dataloader_pin_memory: false\nlabel_names: [labels]\n"
    )
    args = ["--config", file, "--weight-decay", "0.05", "--max_grad_norm=5"]
    arguments, model = parse_args((TrainingArguments, ModelArguments), args=args)
    expected = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=1e-3,
        save_strategy="no",
        report_to=["tensorboard"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5},
        optim="sgd",
        use_cpu=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
        weight_decay=0.05,
        max_grad_norm=5.0,
    )
    assert arguments.to_dict() == expected.to_dict()
    assert model == ModelArguments()

    for line, message in [
        ("learning_rate: fast", "learning_rate: expected a number, got the string 'fast'"),
        ("max_steps: 1.5", "max_steps: expected an integer, got the number 1.5"),
        ("bf16: 3", "bf16: expected true or false, got the number 3"),
        ("optim: adamw_torsh", "did you mean 'adamw_torch'?"),
        ("learning_rat: 1", "unknown key 'learning_rat': did you mean 'learning_rate'?"),
    ]:
        assert message in error("--config", config(line), types=TrainingArguments)
    given = ["--lr_scheduler_kwargs", '{"min_lr": 1e-4}', "--use_cpu", "--output_dir", str(tmp_path)]
    assert parse_args(TrainingArguments, args=given)[0].lr_scheduler_kwargs == {"min_lr": 1e-4}


def test_field_names_must_not_clash():
    other = dataclasses.make_dataclass("OtherArguments", [("gamma", float, 1.0)])
    with pytest.raises(ValueError, match="ModelArguments and OtherArguments both have a field 'gamma'"):
        parse_args((ModelArguments, other), args=[])
    for name in ("config", "base"):
        with pytest.raises(ValueError, match=f"OtherArguments.{name}"):
            parse_args(dataclasses.make_dataclass("OtherArguments", [(name, str, "")]), args=[])


@pytest.mark.parametrize("module", [nkd_hf.recipe.parser, nkd_hf.metrics])
def test_examples_of_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_key_of_the_config_counts_as_set(tmp_path):
    """Defaults of a command are for the fields that neither the YAML nor the command line has."""
    config = tmp_path / "own.yaml"
    config.write_text("gamma: 1.0\n")
    asked = []

    def choose(given: set[str]) -> dict[str, object]:
        asked.append(given)
        return {"gamma": 9.0, "image_size": 9, "teacher": "resnet50"}

    args = ["--config", str(config), "--image_size", "40"]
    (model,), given = parse_with_defaults([ModelArguments], choose, required=("gamma",), args=args)
    assert asked == [given] == [{"gamma", "image_size"}]
    assert (model.gamma, model.image_size, model.teacher) == (1.0, 40, "resnet50")
