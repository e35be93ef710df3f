import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from transformers import EvalPrediction

from nkd_hf import metrics as topk_accuracy
from nkd_hf.metrics import (
    TopKAccuracy,
    compute_balanced_metrics,
    compute_metrics,
    top1_top5_accuracy,
    top5_indices,
)


@settings(deadline=None, max_examples=50)
@given(num_samples=st.integers(1, 30), num_classes=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_agrees_with_counting_row_by_row(num_samples, num_classes, seed):
    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.tile(np.arange(num_classes, dtype=np.float32), (num_samples, 1)), axis=1)
    labels = rng.integers(0, num_classes, num_samples)
    larger = [sum(row > row[label]) for row, label in zip(logits, labels, strict=True)]
    expected = {
        "accuracy": sum(place == 0 for place in larger) / num_samples,
        "top5_accuracy": sum(place < 5 for place in larger) / num_samples,
    }
    indices = top5_indices(torch.from_numpy(logits), torch.from_numpy(labels))
    assert indices.dtype == torch.int64
    assert indices.shape == (num_samples, min(5, num_classes))
    for predictions in (indices.numpy(), logits):
        result = compute_metrics(EvalPrediction(predictions, labels))
        assert result == pytest.approx(expected)
        assert all(type(value) is float for value in result.values())


def test_metric_agrees_with_the_function():
    rng = np.random.default_rng(0)
    predictions = rng.permuted(np.tile(np.arange(9), (40, 1)), axis=1)[:, :5]
    references = rng.integers(0, 9, 40)
    expected = top1_top5_accuracy(predictions, references)
    assert 0 < expected["accuracy"] < expected["top5_accuracy"] < 1
    metric = TopKAccuracy()
    assert metric.compute(predictions=predictions, references=references) == expected
    for rows in (slice(0, 17), slice(17, 40)):
        metric.add_batch(predictions=predictions[rows].tolist(), references=references[rows].tolist())
    result = metric.compute()
    assert result == expected
    assert all(type(value) is float for value in result.values())


def test_balanced_accuracy_is_the_mean_of_the_classes_that_there_are():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 5], 60, p=[0.7, 0.1, 0.15, 0.05])
    logits = rng.normal(size=(60, 7)).astype(np.float32)
    logits[np.arange(60), labels] += 1
    logits[3] = np.nan  # no prediction, which is wrong
    labels = np.append(labels, -100)
    logits = np.append(logits, logits[:1], axis=0)
    kept = np.arange(60) != 3
    predictions = top5_indices(torch.from_numpy(logits)).numpy()
    expected = balanced_accuracy_score(labels[:60], np.where(kept, predictions[:60, 0], 1 - labels[3]))
    for rows in (predictions, logits):
        metrics = compute_balanced_metrics(EvalPrediction(rows, labels))
        assert metrics == compute_metrics(EvalPrediction(rows, labels)) | {
            "balanced_accuracy": pytest.approx(expected)
        }
        assert type(metrics["balanced_accuracy"]) is float
    with pytest.raises(ValueError, match="has no labels"):
        compute_balanced_metrics(EvalPrediction(predictions[:1], np.array([-1])))


def test_only_the_first_five_columns_count():
    assert top1_top5_accuracy([[0, 1, 2, 3, 4, 5]], [5])["top5_accuracy"] == 0
    assert top1_top5_accuracy([[0, 1, 2, 3, 4, 5]], [4]) == {"accuracy": 0.0, "top5_accuracy": 1.0}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0, 1], [0, 1], r"got \[2\] and \[2\]"),
        ([[0, 1]], [0, 1], r"got \[1, 2\] and \[2\]"),
        ([[0, 1]], [[0, 1]], r"got \[1, 2\] and \[1, 2\]"),
        ([[0, 1], [0]], [0, 1], "equally many classes"),
        (np.zeros((0, 5), dtype=int), np.zeros(0, dtype=int), "at least one sample"),
        (np.zeros((3, 0), dtype=int), [0, 1, 2], "at least one sample"),
        ([[0, 1]], [-1], "has no labels"),
        ([[1, 0], [1, 1]], [0, 1], r"different class indices.*got \[1, 1\].*top5_indices"),
        ([[1, 0], [2, -1]], [0, 1], r"got \[2, -1\]"),
        ([[0.5, 0.25]], [0], "integers"),
    ],
)
def test_bad_input_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        top1_top5_accuracy(predictions, references)


def test_metric_refuses_logits():
    # evaluate turns them into integers before the metric sees them.
    logits = np.random.default_rng(0).normal(size=(8, 10))
    with pytest.raises(ValueError, match="top5_indices"):
        TopKAccuracy().compute(predictions=logits, references=[0] * 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [1, 2, 4, 5, 6, 1000])
def test_ties_are_broken_as_argmax_breaks_them(dtype, num_classes):
    # Few values, infinities and both zeros among them, so that nearly all ranks are tied.
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0, torch.inf], dtype=dtype)
    logits = values[torch.randint(len(values), (300, num_classes), generator=torch.Generator().manual_seed(0))]
    logits[::4] = logits[::4].clamp(max=-1)
    logits[0], logits[1], logits[2] = 0, -torch.inf, torch.inf
    expected = np.argsort(-logits.double().numpy(), axis=1, kind="stable")[:, :5]
    indices = top5_indices(logits)
    assert indices.tolist() == expected.tolist()
    assert torch.equal(indices[:, 0], logits.argmax(1))
    labels = torch.zeros(300, dtype=torch.int64)
    accuracy = compute_metrics(EvalPrediction(indices.numpy(), labels.numpy()))["accuracy"]
    assert accuracy == (logits.argmax(1) == 0).double().mean().item()


def test_a_row_with_nan_is_no_prediction_and_that_is_said(caplog):
    logits = torch.eye(8, dtype=torch.float32)
    labels = np.arange(8)
    assert compute_metrics(EvalPrediction(logits.numpy(), labels))["accuracy"] == 1
    assert not caplog.records
    # argmax and topk take NaN for the largest: both rows would be hits.
    logits[0, 0] = torch.nan
    logits[3, 7] = torch.nan
    logits[5] = torch.nan
    assert top5_indices(logits)[[0, 3, 5]].eq(-1).all()
    for predictions in (logits.numpy(), top5_indices(logits).numpy(), logits.numpy().astype(np.float16)):
        caplog.clear()
        result = compute_metrics(EvalPrediction(predictions, labels))
        assert result == {"accuracy": 5 / 8, "top5_accuracy": 5 / 8}
        assert "predicts nothing for 3 of 8 samples, since their logits are NaN" in caplog.text
    result = TopKAccuracy().compute(predictions=top5_indices(logits), references=labels)
    assert result == {"accuracy": 5 / 8, "top5_accuracy": 5 / 8}
    nothing = top5_indices(torch.full((2, 8), torch.nan)).numpy()
    assert compute_metrics(EvalPrediction(nothing, labels[:2])) == {"accuracy": 0, "top5_accuracy": 0}


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(2, 3, 4), (torch.zeros(2, 3),)])
def test_top5_indices_refuses_other_shapes(logits):
    with pytest.raises(ValueError, match=r"logits must be a tensor \[N, C\]"):
        top5_indices(logits)


@pytest.mark.runs
def test_loads_by_path_in_two_processes_without_network(tmp_path):
    # One interpreter that splits in two: imports take seconds, and the race lies behind them. Without transformers, evaluate
    # imports less.
    program = """
import gc, os, socket, sys
gc.disable()  # a fifth of the time of the imports
def refuse(*args, **kwargs):
    raise AssertionError("asked for the network")
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["transformers"] = None
import evaluate
del sys.modules["transformers"]
from transformers import EvalPrediction  # the metric's, as torch
import torch
child = os.fork()
metric = evaluate.load(sys.argv[1])
for _ in range(5):
    result = metric.compute(predictions=[[2, 0, 1], [1, 2, 0]], references=[2, 0])
    assert result == {"accuracy": 0.5, "top5_accuracy": 1.0}, result
if child:
    assert os.waitpid(child, 0)[1] == 0, "the other process failed"
"""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, topk_accuracy.__file__]
    process = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {"home", "work"}
    assert list(work.iterdir()) == []


def test_samples_without_a_label_do_not_count():
    predictions, labels = np.array([[0, 1], [1, 0], [1, 0]]), np.array([0, -100, 0])
    assert compute_metrics(EvalPrediction(predictions, labels)) == {"accuracy": 0.5, "top5_accuracy": 1.0}
    with pytest.raises(ValueError, match="accuracy needs at least one label, got -100 for all samples"):
        compute_metrics(EvalPrediction(predictions, np.full(3, -100)))
