"""Rough input at random: what is wrong with it is said, and nothing that is not finite passes for a loss.

Each test has a short form, which draws the same examples every time, and a long one (`make test-slow`).
"""

import dataclasses
import math
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from losses_reference import nkd_reference

from nkd_hf import DataArguments, DistillationTrainingArguments, RecipeArguments, parse_args
from nkd_hf.losses import NKDLoss, USKDLoss, ViTKDLoss, nkd_loss, uskd_loss

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
LONG = settings(deadline=None, max_examples=3000, suppress_health_check=CHECKS)


def short(max_examples: int) -> settings:
    return settings(LONG, max_examples=max_examples, derandomize=True, database=None)


# ---- losses

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
POISONS = [math.nan, math.inf, -math.inf]
# What came, what was expected and what to do.
MESSAGE = re.compile(r"(must|expected) .+, got .+: \w", re.DOTALL)


def integer(dtype):
    return lambda labels, num_classes: labels.to(dtype)


def rows(values):
    """Mixup rows, most of whose weight is on the label, changed by a function."""

    def make(labels, num_classes):
        one_hot = F.one_hot(labels, num_classes).double()
        mixed = 0.7 * one_hot + 0.3 * F.one_hot((labels + 1) % num_classes, num_classes)
        return values(one_hot, mixed)

    return make


GOOD_LABELS = {
    **{str(dtype): integer(dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
    "one-hot": rows(lambda one_hot, mixed: one_hot.float()),
    "mixup": rows(lambda one_hot, mixed: mixed),
    "mixup in half precision": rows(lambda one_hot, mixed: mixed.bfloat16()),
}
BAD_LABELS = {
    "indices as floats": lambda labels, num_classes: labels.float(),
    "booleans": lambda labels, num_classes: labels.bool(),
    "negative": lambda labels, num_classes: labels - 100,
    "too large": lambda labels, num_classes: labels + num_classes,
    "too many": lambda labels, num_classes: torch.cat([labels, labels[:1], labels[:1]]),
    "a scalar": lambda labels, num_classes: torch.tensor(0),
    "a list": lambda labels, num_classes: labels.tolist(),
    "one-hot integers": rows(lambda one_hot, mixed: one_hot.long()),
    "another number of classes": rows(lambda one_hot, mixed: torch.cat([mixed, mixed], 1)),
    "wrong sums": rows(lambda one_hot, mixed: 2 * mixed),
    "no label": rows(lambda one_hot, mixed: 0 * mixed),
    "negative weights": rows(lambda one_hot, mixed: 2 * one_hot - mixed - 0.5 * (mixed < 0.5)),
    "nan": rows(lambda one_hot, mixed: mixed * math.nan),
    "inf": rows(lambda one_hot, mixed: mixed / 0),
}


@dataclasses.dataclass
class Case:
    """Logits of a student and of a teacher (or an auxiliary head), labels, and what is wrong with them."""

    student: torch.Tensor
    other: torch.Tensor
    labels: Any
    temperature: float
    is_good: bool
    poison: tuple[str, float] | None
    reach: float  # how far apart the logits may lie, as a part of what the arithmetic's dtype holds


@st.composite
def cases(draw) -> Case:
    batch_size, num_classes = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(2)]
    magnitudes = []

    def logits(dtype):
        largest = torch.finfo(dtype).max
        magnitude = min(draw(st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30, largest / 1e4, largest])), largest)
        magnitudes.append(magnitude)
        shape = batch_size, num_classes
        values = {
            "normal": lambda: torch.randn(shape, generator=generator, dtype=torch.float64),
            "ties": lambda: torch.randint(-1, 2, shape, generator=generator).double(),
            "equal": lambda: torch.ones(shape, dtype=torch.float64),
        }[draw(st.sampled_from(["normal", "ties", "equal"]))]()
        return (values * magnitude).clamp(-largest, largest).to(dtype)

    student, other = logits(dtypes[0]), logits(dtypes[1])
    labels = torch.randint(0, num_classes, (batch_size,), generator=generator)
    kinds = GOOD_LABELS if draw(st.integers(0, 2)) else BAD_LABELS
    labels = kinds[draw(st.sampled_from(sorted(kinds)))](labels, num_classes)
    poison = None
    if batch_size and draw(st.integers(0, 3)) == 0:
        poison = draw(st.sampled_from(["student", "other"])), draw(st.sampled_from(POISONS))
        row, column = draw(st.integers(0, batch_size - 1)), draw(st.integers(0, num_classes - 1))
        (student if poison[0] == "student" else other)[row, column] = poison[1]
    temperature = draw(st.sampled_from([1.0, 3.0, 0.05, 50.0]))
    reach = max(magnitudes) * max(temperature, 1 / temperature)
    reach /= torch.finfo(torch.promote_types(dtypes[0], torch.float32)).max
    is_good = kinds is GOOD_LABELS and batch_size > 0 and num_classes > 1
    return Case(student.requires_grad_(), other, labels, temperature, is_good, poison, reach)


def result(call, is_good: bool, *trained: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
    """The loss and whether its gradients are finite; None after an error, which must be deserved and explained."""
    loss, message = None, ""
    try:
        loss = call()
    except (ValueError, TypeError) as error:
        message = str(error)
    assert (not message) is is_good, message
    if loss is None:
        assert MESSAGE.search(message), message
        return None
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.detach(), all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)


def check_nkd(case: Case) -> None:
    arguments = case.student, case.other, case.labels
    call = [
        lambda: nkd_loss(*arguments, temperature=case.temperature),
        lambda: sum(NKDLoss(temperature=case.temperature)(*arguments).values()),
    ]
    for outcome in (result(function, case.is_good, case.student) for function in call):
        if outcome is None:
            continue
        loss, has_finite_gradients = outcome
        masks = case.poison == ("other", -math.inf)
        if case.poison and not masks:
            assert not loss.isfinite(), "an input that is not finite passes for a loss"
            continue
        with torch.no_grad():
            student, teacher = case.student.double(), case.other.double()
            expected = sum(nkd_reference(student, teacher, case.labels.long() if case.labels.ndim == 1 else case.labels, temperature=case.temperature))  # fmt: skip
        if case.reach < 1e-2 and not masks:
            assert loss.isfinite()
            assert has_finite_gradients
        # Beyond the reach of the arithmetic a loss may overflow, but it is not wrong.
        if loss.isfinite() and expected.isfinite():
            assert loss.item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-2)


def check_uskd(case: Case) -> None:
    case.other.requires_grad_()
    call = lambda: uskd_loss(case.other, case.student, case.labels)  # noqa: E731
    outcome = result(call, case.is_good, case.student, case.other)
    if outcome is not None:
        loss, has_finite_gradients = outcome
        if case.poison:
            assert not loss.isfinite(), "an input that is not finite passes for a loss"
        elif case.reach < 1e-2:
            assert loss.isfinite()
            assert has_finite_gradients


@st.composite
def tokens(draw):
    """ViTKD's module and arguments, and whether a value in them is not finite."""
    dims = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch_size, num_tokens = draw(st.sampled_from([1, 2, 3, 0])), draw(st.sampled_from([1, 4, 9, 5]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    module = ViTKDLoss(*dims, mask_ratio=draw(st.sampled_from([0.5, 1.0, 1e-3])))
    dtype, magnitude = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0.0, 1.0, 1e4, 1e14]))
    magnitude = min(magnitude, torch.finfo(dtype).max / 10)
    shapes = [(batch_size, *layers, num_tokens, dim) for dim in dims for layers in ((2,), ())]
    arguments = [(torch.randn(shape) * magnitude).to(dtype) for shape in shapes]
    is_good, poison = batch_size > 0 and num_tokens != 5, False
    fault = draw(st.sampled_from(["none", "none", "poison", "shape", "integers", "list"]))
    i = draw(st.integers(0, 3))
    if fault == "poison" and is_good:
        poison = True
        arguments[i].view(-1)[draw(st.integers(0, arguments[i].numel() - 1))] = draw(st.sampled_from(POISONS))
    elif fault in ("shape", "integers", "list"):
        is_good = False
        arguments[i] = {
            "shape": lambda tensor: tensor.flatten(),
            "integers": lambda tensor: tensor.nan_to_num().clamp(-9, 9).long(),
            "list": lambda tensor: tensor.tolist(),
        }[fault](arguments[i])
    return module, arguments, is_good, poison


def check_vitkd(drawn) -> None:
    module, arguments, is_good, poison = drawn
    trained = [argument.requires_grad_() for argument in arguments[:2]] if is_good else []
    outcome = result(lambda: sum(module(*arguments).values()), is_good, *trained, *module.parameters())
    if outcome is not None:
        loss, has_finite_gradients = outcome
        assert bool(loss.isfinite()) is not poison
        assert has_finite_gradients or poison


@short(150)
@given(cases())
def test_nkd(case):
    check_nkd(case)


@short(100)
@given(cases())
def test_uskd(case):
    check_uskd(case)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("which", [0, 1])
def test_an_overflow_at_the_label_is_no_perfect_answer(which, temperature):
    logits = torch.randn(2, 2, 5)
    logits[which, 0, 3] = math.inf
    assert nkd_loss(*logits, torch.tensor([3, 1]), temperature=temperature).isnan()


@short(50)
@given(tokens())
def test_vitkd(drawn):
    check_vitkd(drawn)


@pytest.mark.slow
@LONG
@given(cases())
def test_nkd_long(case):
    check_nkd(case)


@pytest.mark.slow
@LONG
@given(cases())
def test_uskd_long(case):
    check_uskd(case)


@pytest.mark.slow
@LONG
@given(tokens())
def test_vitkd_long(drawn):
    check_vitkd(drawn)


@pytest.mark.parametrize(
    "value", [None, "1.5", math.nan, math.inf, -1, True, 10**400, 1e300, [1.0], {}], ids=lambda value: f"{value!s:.9}"
)
def test_weights_and_widths(value):
    for loss, widths, names in (
        (NKDLoss, {}, ("gamma", "temperature")),
        (USKDLoss, {"in_features": 2, "num_classes": 2}, ("alpha", "beta", "mu")),
        (ViTKDLoss, {"student_dim": 2, "teacher_dim": 2}, ("alpha", "beta", "mask_ratio")),
    ):
        for name in (*names, *widths):
            if value == 10**400 and name in widths:
                continue  # an integer, though a large one
            with pytest.raises(ValueError, match=f"^{name} must be .+, got .+: "):
                loss(**widths | {name: value})


# ---- configurations

ARGUMENTS = (RecipeArguments, DataArguments, DistillationTrainingArguments)
TYPES = {
    field.name: get_type_hints(cls)[field.name] for cls in ARGUMENTS for field in dataclasses.fields(cls) if field.init
}
NEEDED = {"student": "resnet18", "distillation_loss": "none"}
# As a YAML file or a command line would have them.
VALUES = [
    *(
        "null",
        "~",
        "true",
        "'true'",
        "yes",
        "off",
        "'1'",
        "''",
        "text",
        "größer",
        "50% %(prog)s",
        "'{a'",
        "'{\"a\": 1}'",
    ),
    *("0", "1", "-1", "+1", "1_000", "0x10", "010", "0o10", "1:30", "9223372036854775808", "9" * 400, "9" * 5000),
    *("1e-3", "'1e-3'", "1.5", "-0.5", ".5", "5.", "1e400", ".nan", "nan", "-.inf", "inf", "0x" + "f" * 5000),
    *(
        "[]",
        "[a]",
        "[1]",
        "[.nan, 1, 1]",
        "[null]",
        "[[a]]",
        "[0.1, 0.2, 0.3]",
        "{}",
        "{a: 1}",
        "{1: a}",
        "{a: {b: .nan}}",
    ),
    *("{a: 010}", "{a: 2026-01-01}", "2026-01-01", "2026-02-31", "2026-01-01 10:00:00", "!!binary aGk=", "!!set {a}"),
    *(
        "&a [*a]",
        "*a",
        "!!bool a",
        "!!python/name:os.system",
        '"\\0"',
        "[",
        "'",
        "@",
        "{a: 1, a: 2}",
        '{"a": NaN}',
        "[" * 999,
    ),
]


def fits(value: Any, type_hint: Any) -> bool:
    origin, type_args = get_origin(type_hint) or type_hint, get_args(type_hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in type_args)
    if origin is Literal:
        return any(value is item for item in type_args)
    if origin is float:
        return type(value) in (int, float) and not math.isnan(value)  # transformers cuts whole steps to int
    if origin is list:
        return isinstance(value, list) and all(fits(item, *type_args) for item in value)
    if origin in (bool, int):
        return type(value) is origin
    return origin is Any or isinstance(value, origin)


def check_configuration(folder, capsys, name: str, value: str, is_in_file: bool) -> None:
    """One value of one field, from a file or from the command line: taken as its type, or an error with its name."""
    needed = [f"--{key}={needed}" for key, needed in NEEDED.items() if key != name]
    file = folder / "config.yaml"
    file.write_text(f"{name}: {value}\n", encoding="utf-8")
    value = value.strip("'")
    try:
        parsed = parse_args(
            ARGUMENTS, args=[*needed, *([f"--config={file}"] if is_in_file else [f"--{name}={value}"])]
        )
    except SystemExit:
        message = capsys.readouterr().err
        assert len(message.splitlines()) == 1
        assert len(message.replace(value, "")) < 3000  # some lists of choices are long
        assert name in message or re.search(r"config.yaml(, line \d)?: not valid YAML", message)
        return
    arguments = {key: item for part in parsed for key, item in vars(part).items()}
    got, type_hint = arguments[name], TYPES[name]
    # transformers makes an object of the one, and [None] of null in the other
    if name != "accelerator_config" and got != [None]:
        assert fits(got, type_hint), f"{name} is {type_hint}, got {got!r}"
    is_number = type(got) in (int, float) and is_in_file
    if is_number and not fits("", type_hint):
        assert float(got) == float({"0x10": "16"}.get(value, value).replace(".inf", "inf"))


EVERY_VALUE = given(st.sampled_from(sorted(TYPES)), st.sampled_from(VALUES), st.booleans())


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.logger.warning", lambda *args: None)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' fields that are deprecated
@short(250)
@EVERY_VALUE
def test_fields(tmp_path, capsys, quiet, name, value, is_in_file):
    check_configuration(tmp_path, capsys, name, value, is_in_file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(LONG, max_examples=4000)
@EVERY_VALUE
def test_fields_long(tmp_path, capsys, quiet, name, value, is_in_file):
    check_configuration(tmp_path, capsys, name, value, is_in_file)


@dataclasses.dataclass
class Settings:
    a: str = ""
    b: float = 0.0
    c: dict | None = None
    d: list[int] = dataclasses.field(default_factory=list)


def check_file(folder, capsys, content: bytes) -> None:
    file = folder / "config.yaml"
    file.write_bytes(content)
    try:
        (parsed,) = parse_args(Settings, args=[f"--config={file}"])
    except SystemExit:
        message = capsys.readouterr().err
        assert f"{file}" in message
    else:
        assert all(fits(getattr(parsed, name), hint) for name, hint in get_type_hints(Settings).items())


# What YAML gives a meaning to, more often than letters.
FILES = st.one_of(
    st.binary(max_size=40),
    st.text("abcd:[]{}&*!-?|>'\"#%@,\\ \t\n0129.eE~<=_+", max_size=40).map(str.encode),
    st.lists(
        st.sampled_from(
            [
                "a: ",
                "b: ",
                "c: ",
                "d: ",
                "\n",
                " ",
                "{",
                "}",
                "[",
                "]",
                "&x ",
                "*x",
                "!!int ",
                "!!float ",
                "!!omap ",
                "!!timestamp ",
                "!!binary ",
                "!!null ",
                "<<: ",
                "? ",
                "- ",
                "x",
                "1",
                "08",
                "1:1",
                "2026-01-01",
                ".nan",
                "base: ",
                "~x",
                "'",
                '"',
                "|",
                ">",
                "\ufeff",
                "\x00",
                "\x85",
                "\r",
                "ö",
                ", ",
                ": ",
            ]
        ),
        max_size=12,
    ).map(lambda parts: "".join(parts).encode()),
)


@short(250)
@given(FILES)
def test_files(tmp_path, capsys, content):
    check_file(tmp_path, capsys, content)


@pytest.mark.slow
@settings(LONG, max_examples=4000)
@given(FILES)
def test_files_long(tmp_path, capsys, content):
    check_file(tmp_path, capsys, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: x\n\tb: 1", "line 2: not valid YAML: found character '\\t'"),
        ("a: x\na: y", "line 2: not valid YAML: the key 'a' occurs twice: keep one"),
        (
            "a: x\nb: 010",
            "line 2: not valid YAML: 010 is 8 in YAML 1.1 and something else in YAML 1.2: write 8, or put it",
        ),
        ("a: x\nc: {x: 1:30}", "line 2: not valid YAML: 1:30 is 90 in YAML 1.1"),
        ("b: 1:30.5", "line 1: not valid YAML: 1:30.5 is 90.5 in YAML 1.1"),
        ("a: x\nb: 2026-02-31", "line 2: not valid YAML: day is out of range for month"),
        ("a: x\nb: .nan", "line 2: not valid YAML: expected a number, got nan"),
        ("a: x\nb: 1e400", "line 2: not valid YAML: 1e400 is too large for a number (at most 1.8e308)"),
        ("d:\n- 9223372036854775808", "line 2: not valid YAML: expected an integer of at most 64 bits"),
        ("a: x\nb: " + "9" * 5000, "line 2: not valid YAML: Exceeds the limit"),
        ("a: 0x" + "f" * 5000, "line 1: not valid YAML: expected an integer of at most 64 bits"),
        ("c: &x {y: *x}", "line 1: not valid YAML: an alias contains itself"),
        ("c: " + "[" * 5000, "not valid YAML: nested too deeply"),
        ("a: x\nb: !!bool x", "line 2: not valid YAML: no bool"),
        (b"a: x\nb: \xff", "line 2: not valid YAML: not UTF-8 (invalid start byte): save it as UTF-8 text"),
        ("a: x".encode("utf-16"), "line 1: not valid YAML: not UTF-8"),
        ("c: {d: 2026-01-01}", "c: expected a mapping or null, got the mapping"),
        ("c: {d: !!binary aGk=}", "c: expected a mapping or null, got the mapping"),
        ("c: {d: {1: 2}}", "c: expected a mapping or null, got the mapping"),
        ("base: ~no-such-user/x.yaml", "the base of {file}: Could not determine home directory"),
        ('base: "\\0"', "the base of {file}: embedded null byte"),
    ],
    ids=range(21),
)
def test_faults_of_a_file(tmp_path, capsys, content, message):
    file = tmp_path / "config.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SystemExit):
        parse_args(Settings, args=[f"--config={file}"])
    text = capsys.readouterr().err
    assert message.replace("{file}", str(file)) in text
    assert str(file) in text


def test_aliases_of_aliases(tmp_path, capsys):
    # 9^9 values in a few lines: written out, they would fill the memory
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 9)]
    (tmp_path / "config.yaml").write_text("c: {" + ", ".join(lines) + "}")
    with pytest.raises(SystemExit):
        parse_args(Settings, args=[f"--config={tmp_path / 'config.yaml'}"])
    assert "line 1: not valid YAML: more than 10000 values" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--b=nan"], "argument --b: expected a number, got nan"),
        (['--c={"x": [1, NaN]}'], "argument --c: expected a number, got nan"),
        (['--c={"x": 1, "x": 2}'], "the key 'x' occurs twice: keep one"),
        (["--c=" + '{"x":' * 100_000], "expected a mapping in JSON"),
        (["--d=99999999999999999999"], "argument --d: expected an integer of at most 64 bits"),
    ],
    ids=range(5),
)
def test_faults_of_the_command_line(capsys, args, message):
    with pytest.raises(SystemExit):
        parse_args(Settings, args=args)
    assert message in capsys.readouterr().err


@dataclasses.dataclass
class Combined:
    a: int = 1
    b: int = 1
    c: int = 1

    def __post_init__(self):
        if self.a != 1 and self.b != 1:
            raise KeyError("deep in a library")
        if self.c == 2:
            raise AssertionError
        if self.c == 3:
            raise ValueError("no name")


def test_what_a_dataclass_raises_names_an_argument(capsys, monkeypatch):
    for args, message in (
        (["--a=2", "--b=2", "--c=4"], "error: a=2, b=2: KeyError: 'deep in a library'"),
        (["--b=2", "--c=2"], "error: c=2: AssertionError: "),
        (["--b=2", "--c=3"], "error: c=3: no name"),
    ):
        with pytest.raises(SystemExit):
            parse_args(Combined, args=args)
        assert message in capsys.readouterr().err
    # What has nothing to do with the values keeps its traceback.
    monkeypatch.setattr(Combined, "__post_init__", lambda self: [][0])
    with pytest.raises(IndexError):
        parse_args(Combined, args=["--a=2"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_processes", 0), ("image_size", 0), ("image_size", 10**9), ("image_mean", [0.5]), ("image_std", [1.0, 1.0, 0.0])),
        *(("image_mean", [math.inf] * 3), ("crop_pct", 1.5), ("crop_pct", -math.inf), ("interpolation", "nearest")),
        *(("student", ""), ("teacher", ""), ("distillation_loss", "nkd+nkd"), ("loss_args", {"gamma": "1"})),
    ],
)  # fmt: skip
def test_recipe_out_of_range(name, value):
    arguments = {"student": "resnet18", "teacher": "resnet34"} | {name: value}
    with pytest.raises(ValueError, match="gamma" if name == "loss_args" else name):
        RecipeArguments(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("multistep", {"milestones": [10**400]}), ("multistep", {"milestones": "30"}), ("multistep", {1: 2})),
        *(("cosine_with_min_lr", {"min_lr": math.nan}), ("cosine_with_min_lr", {"num_cycles": "1"}), ("cosine", {1: 2})),
    ],
)  # fmt: skip
def test_schedules_out_of_range(name, arguments):
    with pytest.raises(ValueError, match=r"^lr_scheduler_kwargs.*(must|read|set)"):
        DistillationTrainingArguments(lr_scheduler_type=name, lr_scheduler_kwargs=arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", math.nan), ("learning_rate", math.inf), ("learning_rate", -1.0), ("num_train_epochs", -1.0),
     ("per_device_train_batch_size", 0), ("weight_decay", -1.0), ("adam_beta1", 1.0), ("seed", -1)],
)  # fmt: skip
def test_training_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .+, got "):
        DistillationTrainingArguments(**{name: value})
