"""A store of the largest logits for every loss of logits: what is exact, what is approximated, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny import make_trainer, timm_cnn

from nkd_hf import (
    DataArguments,
    DistillationTrainingArguments,
    DISTLoss,
    DKDLoss,
    ImageCollator,
    KDLoss,
    NKDLoss,
    Recipe,
    RecipeArguments,
    RLDLoss,
    WSLDLoss,
    WTTMLoss,
    cli,
    create_student,
    parse_args,
)
from nkd_hf.hub.teacher_logits import store_card
from nkd_hf.losses.base import loss_inputs
from nkd_hf.losses.top_k import read_top_k_view
from nkd_hf.models.saving import save_student
from nkd_hf.recipe.logit_writer import _check_finite
from nkd_hf.recipe.run_folder import read_history
from nkd_hf.recipe.store_size import choose_temperatures
from nkd_hf.teacher_logits.compression import softmax_logits, sparse_logits
from nkd_hf.teacher_logits.info import STORE, StoreInfo, TeacherDescription
from nkd_hf.teacher_logits.store import TeacherLogits, shard_path, write_shard
from nkd_hf.trainer.distillation_model import DistillationModel
from nkd_hf.trainer.teacher_source import open_stored_logits

pytestmark = pytest.mark.usefixtures("no_curves")
CLASSES = 50
LOSSES = {
    "nkd": NKDLoss(temperature=2.0),
    "kd": KDLoss(),
    "kd, standardised": KDLoss(temperature=2.0, standardize=True),
    "dkd": DKDLoss(),
    "dkd, standardised": DKDLoss(temperature=2.0, standardize=True),
    "wsld": WSLDLoss(),
    "dist": DISTLoss(),
    "wttm": WTTMLoss(),
    "rld": RLDLoss(),
    "rld, standardised": RLDLoss(beta=8.0, temperature=4.0, target_temperature=4.0, standardize=True),
}


def make_logits(rest: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [64, 50] of steps that float16 keeps, and targets; with `rest`, all but the ten largest have this logit."""
    generator = torch.Generator().manual_seed(0)
    logits = (32 * torch.randn(64, CLASSES, generator=generator)).round() / 16
    target = torch.randint(CLASSES, (64,), generator=generator)
    logits[torch.arange(64), target] += 4
    if rest is not None:
        smallest = logits.scatter(1, target[:, None], math.inf).topk(CLASSES - 11, largest=False).indices
        logits = logits.scatter(1, smallest, rest)
    return logits, target


def make_student() -> torch.Tensor:
    return (2 * torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(1))).requires_grad_()


def make_store(folder: Path, logits: torch.Tensor, target: torch.Tensor, top_k: int | None, losses) -> TeacherLogits:
    views = [view for view in map(read_top_k_view, losses) if view is not None]
    plain = sorted({1.0, *(view.temperature for view in views if not view.standardized)})
    standardized = sorted({view.temperature for view in views if view.standardized})
    info = StoreInfo(
        logits.shape[1], len(logits), 1, top_k, plain, 32, {}, TeacherDescription(None, "a", 1),
        standardized_temperatures=standardized,
    )  # fmt: skip
    folder.mkdir()
    info.write(folder)
    for shard in range(info.num_shards):
        part = slice(32 * shard, 32 * shard + 32)
        write_shard(
            shard_path(folder, 0, shard), sparse_logits(logits[part], target[part], top_k, plain, standardized)
        )
    return TeacherLogits(folder)


def value_and_gradient(loss, student, target, **teacher) -> tuple[dict[str, float], torch.Tensor]:
    given = {"student_logits": student, "labels": target, "logit_moments": None, "label_smoothing": None, **teacher}
    components = loss(**{name: given[name] for name in loss_inputs(loss)})
    (gradient,) = torch.autograd.grad(sum(components.values()), student)
    return {name: value.item() for name, value in components.items()}, gradient


@pytest.mark.parametrize("name", LOSSES)
def test_a_rest_that_is_even_is_exact_for_every_loss(name, tmp_path):
    """Value and gradient are those of all logits, for those losses that read two temperatures, too."""
    loss, (logits, target) = LOSSES[name], make_logits(rest=-6.0)
    store = make_store(tmp_path / "store", logits, target, 10, [loss])
    rows = store.read(0, range(64))
    teacher = store.rebuild(rows, read_top_k_view(loss))
    assert ("mean" in rows) == ("logit_moments" in teacher) == ("standardised" in name)
    stored = value_and_gradient(loss, make_student(), target, **teacher)
    exact = value_and_gradient(loss, make_student(), target, teacher_logits=logits)
    assert stored[0] == pytest.approx(exact[0], rel=2e-5)
    torch.testing.assert_close(stored[1], exact[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_nears_that_of_all_logits_as_k_grows(name, tmp_path):
    loss, (logits, target) = LOSSES[name], make_logits()
    exact, exact_gradient = value_and_gradient(loss, make_student(), target, teacher_logits=logits)
    errors = []
    for top_k in (2, 10, 30, 49):
        store = make_store(tmp_path / str(top_k), logits, target, top_k, [loss])
        teacher = store.rebuild(store.read(0, range(64)), read_top_k_view(loss))
        value, gradient = value_and_gradient(loss, make_student(), target, **teacher)
        errors.append(((gradient - exact_gradient).norm() / exact_gradient.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < min(1, errors[0]) / 2
    assert errors[-1] < 1e-4  # float16 keeps these logits
    assert sum(value.values()) == pytest.approx(sum(exact.values()), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_probabilities_at_the_temperature_are_the_teachers(temperature):
    logits, target = make_logits()
    logits += 1000.0  # large logits cancel
    rows = sparse_logits(logits, target, 10, [1.0, temperature], [temperature])
    mean, deviation = rows["mean"][:, None], rows["std"][:, None]
    torch.testing.assert_close(rows["std"], logits.std(1), rtol=1e-5, atol=0)
    peak = rows["peak_logit"][:, None]
    torch.testing.assert_close(rows["mean"], (logits - peak).mean(1), rtol=1e-5, atol=1e-5)
    known = torch.cat([rows["classes"].long(), target[:, None]], 1)
    for standardized in (False, True):
        dense = softmax_logits(rows, CLASSES, [1.0, temperature], temperature) if not standardized else None
        exact = logits - peak
        if standardized:
            dense = (softmax_logits(rows, CLASSES, [temperature], temperature, True) - mean) / deviation
            exact = (exact - mean) / deviation
        stored, exact = ((values.double() / temperature).softmax(1) for values in (dense, exact))
        torch.testing.assert_close(stored.gather(1, known), exact.gather(1, known), rtol=1e-5, atol=1e-9)
        rest = stored.scatter(1, known, 0)
        torch.testing.assert_close(rest.sum(1), exact.scatter(1, known, 0).sum(1), rtol=1e-5, atol=1e-9)
        assert (rest.amax(1) / (rest.sum(1) / (CLASSES - 11))).max() < 1 + 1e-5  # evenly


def test_logits_that_are_all_equal_are_stored():
    rows = sparse_logits(torch.full((2, 6), 3.0), torch.tensor([0, 5]), 2, [1.0], [2.0])
    assert rows["std"].tolist() == [0, 0]
    logits = softmax_logits(rows, 6, [2.0], 2.0, True)
    moments = torch.stack([rows["mean"], rows["std"]], 1)
    student = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    loss = KDLoss(temperature=2.0, standardize=True)
    expected = loss(student, torch.full((2, 6), 3.0))["kd"]
    torch.testing.assert_close(loss(student, logits, moments)["kd"], expected)


def test_a_store_that_needs_nothing_new_is_as_before(tmp_path):
    """The fields of a shard and the keys of store.json are those of earlier stores, which earlier releases read."""
    logits, target = make_logits()
    store = make_store(tmp_path / "store", logits, target, 10, [NKDLoss()])
    fields = {"target", "target_logit", "peak_logit", "log_odds", "classes", "values", "rest_logsumexp"}
    assert set(store.read(0, [0])) == fields
    values = json.loads((store.folder / STORE).read_text())
    assert "standardized_temperatures" not in values
    assert store.info.standardized_temperatures == []
    fault = store.find_missing(read_top_k_view(KDLoss(temperature=2.0, standardize=True)))
    assert fault.endswith("which has none, got 2.0: write a store with this loss")
    for wrong in ([0.0], 1, [None]):
        (store.folder / STORE).write_text(json.dumps(values | {"standardized_temperatures": wrong}))
        with pytest.raises(ValueError, match=r"is damaged, its standardized_temperatures is .*write it again"):
            TeacherLogits(store.folder)


def test_the_temperatures_of_a_store():
    def choose(top_k, *given, **recipe):
        return tuple(choose_temperatures(RecipeArguments("a", teacher="b", **recipe), top_k, given).values())

    assert choose(3, distillation_loss="kd+nkd") == ([1.0, 4.0], [])
    assert choose(3, 3.0, distillation_loss="wttm") == ([1.0, 3.0, 5.0], [])
    standardized = {"distillation_loss": "dkd", "loss_args": {"temperature": 2.0, "standardize": True}}
    assert choose(3, **standardized) == ([1.0], [2.0])
    assert choose(3, 5.0, **standardized) == ([1.0, 5.0], [2.0, 5.0])
    # All logits serve any loss: such a store says what it said before.
    assert choose(None, distillation_loss="kd") == ([1.0], [])
    assert choose(None, **standardized) == ([1.0], [])
    assert choose(None, loss_args={"temperature": 3.0}) == ([1.0, 3.0], [])


def test_a_masked_class_cannot_be_standardised(tmp_path):
    logits = make_logits()[0]
    logits[3, 7] = -math.inf
    info = make_store(tmp_path / "store", *make_logits(), 10, [KDLoss()]).info
    _check_finite(logits, 0, range(64), info)
    info = dataclasses.replace(info, standardized_temperatures=[2.0])
    with pytest.raises(
        ValueError, match=r"must be finite for standardize, got -inf in epoch 0 .*Set standardize to false"
    ):
        _check_finite(logits, 0, range(64), info)


def test_each_loss_of_a_run_reads_its_own_logits(tmp_path, monkeypatch):
    logits, target = make_logits()
    losses = {"nkd": NKDLoss(temperature=2.0), "kd": KDLoss(temperature=2.0, standardize=True), "dkd": DKDLoss()}
    store = make_store(tmp_path / "store", logits, target, 10, losses.values())
    student = create_student("resnet18", num_labels=CLASSES, image_size=32, model_args={"channels": [4, 4, 8, 8]})
    model = DistillationModel(student, losses)
    rows, pixels = store.read(0, range(8)), torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calls = []
    monkeypatch.setattr(
        TeacherLogits, "rebuild", lambda *args, rebuild=TeacherLogits.rebuild: calls.append(args) or rebuild(*args)
    )
    teacher = open_stored_logits(store, model).outputs({"teacher_logits": rows})
    assert len(calls) == 3
    output = model(pixels, target[:8], teacher)
    for name, loss in losses.items():
        own = store.rebuild(rows, read_top_k_view(loss))
        expected, _ = value_and_gradient(loss, output.logits, target[:8], **own)
        assert {key: output.losses[key].item() for key in expected} == expected, name


@pytest.mark.parametrize("top_k", [10, 49])
def test_a_run_says_once_which_losses_are_approximated(tmp_path, caplog, top_k):
    logits, target = make_logits()
    store = make_store(tmp_path / "store", logits, target, top_k, [KDLoss()])
    student = create_student("resnet18", num_labels=CLASSES, image_size=32, model_args={"channels": [4, 4, 8, 8]})
    for _ in range(2):
        collator = ImageCollator(CLASSES, teacher_logits=store)
        make_trainer(
            tmp_path / "run", student, data_collator=collator, distillation_loss={"kd": KDLoss(), "nkd": NKDLoss()}
        )
    said = [record.getMessage() for record in caplog.records if "approximated" in record.getMessage()]
    if top_k == 49:  # the others are those K
        assert not said
    else:
        assert len(said) == 1
        assert said[0].startswith("KDLoss, NKDLoss are approximated: of 50 classes, ")
        assert said[0].endswith("the other classes. Above temperature 1, this is far from the exact logits")
        assert "\n" not in said[0]


# --- the command, and training from what it wrote ---


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("teacher") / "resnet"
    teacher = timm_cnn(seed=1)
    with torch.no_grad():
        teacher.timm_model.fc.weight *= 20  # its answers differ
    save_student(teacher, str(folder))
    return [
        "--student", "resnet18", "--student_args", '{"channels": [4, 8, 8, 8]}', "--image_size", "32", "--seed", "0",
        "--max_train_samples", "32", "--max_eval_samples", "16", "--use_cpu", "true", "--disable_tqdm", "true",
        "--report_to", "none", "--per_device_train_batch_size", "8", "--num_train_epochs", "1", "--logging_steps", "1",
        "--save_strategy", "no", "--mixup_alpha", "0.8", "--teacher", str(folder),
        "--distillation_loss", "nkd+kd+wttm", "--loss_args", '{"kd": {"temperature": 2.0, "standardize": true}}',
    ]  # fmt: skip


def train(folder: Path, *given: str) -> list[dict]:
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    recipe = Recipe(*parse_args(types, args=[*given, "--output_dir", str(folder)]))
    recipe.train_teacher()
    recipe.train_baseline()
    recipe.train_student()
    return read_history(folder / "student")


@pytest.fixture(scope="module")
def live(settings, tmp_path_factory) -> list[dict]:
    return train(tmp_path_factory.mktemp("live"), *settings, "--mix_pairs", "true")


@pytest.mark.parametrize(("top_k", "tolerance"), [("3", 0.2), ("9", 1e-3)])
def test_training_from_a_store_is_near_to_live_training(settings, live, tmp_path, top_k, tolerance):
    folder = tmp_path / "store"
    options = ["--output", str(folder), "--epochs", "1", "--batch_size", "8", "--top_k", top_k]
    cli.main(["teacher-logits", *options, *settings])
    info = StoreInfo.read(folder)
    assert (info.temperatures, info.standardized_temperatures) == ([1.0, 5.0], [2.0])
    said = f"the {top_k} largest logits but the target's, float16, for losses at temperature 1 or 5, of standardised logits at 2"
    assert said in store_card(info, "store")
    log = train(tmp_path / "run", *settings, "--teacher_logits", str(folder))
    assert len(log) == len(live) > 4
    names = ("task", "nkd_target", "nkd_non_target", "kd", "wttm")
    for name in names:
        values, live_values = ([entry[name] for entry in each if name in entry] for each in (log, live))
        assert values == pytest.approx(live_values, rel=tolerance), name
    if top_k == "3":
        assert log[0]["kd"] != pytest.approx(live[0]["kd"], rel=1e-6)  # it is an approximation
        with pytest.raises(SystemExit, match=r"standardized_temperatures: store \[2.0\], run \[\]"):
            cli.main(["teacher-logits", *options, *settings, "--loss_args", "{}"])
        stored = ["--teacher_logits", str(folder), "--compare_with_baseline", "true"]
        with pytest.raises(
            ValueError, match=r"WTTMLoss's temperature must be one of 1.0, 5.0, .* got 10.0: write a store"
        ):
            train(
                tmp_path / "other",
                *settings,
                *stored,
                "--loss_args",
                '{"wttm": {"exponent": 0.1}, "kd": {"temperature": 1.0}}',
            )
        assert not (tmp_path / "other" / "baseline").exists()
