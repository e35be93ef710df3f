"""The figures of a report, against values by hand, scikit-learn's, and labels drawn from known probabilities."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from nkd_hf.recipe.calibration import calibration_error, confidences, predictions, reliability
from nkd_hf.recipe.figures import (
    accuracy_difference,
    agreement,
    confused_pairs,
    confusion,
    disagreements,
    fit_temperature,
    likely_label_errors,
    model_figures,
    per_class,
    unique_names,
)

NAN = float("nan")


def draw(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax: the logits are calibrated."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, classes)) * 2
    return logits, (logits + random.gumbel(size=logits.shape)).argmax(axis=1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accuracies_are_those_of_scikit_learn(dtype):
    logits, labels = draw(400, 7)
    is_used = labels != 3  # a class without images
    logits, labels = logits[is_used].astype(dtype), labels[is_used]
    predicted = logits.argmax(axis=1)
    figures = model_figures(logits, labels)
    assert list(figures) == ["top1", "top5", "balanced_accuracy", "ece"]
    assert figures["top1"] == round(np.mean(predicted == labels), 4)
    assert figures["top5"] == round(top_k_accuracy_score(labels, logits, k=5, labels=range(7)), 4)
    recalls = [np.mean(predicted[labels == number] == number) for number in (0, 1, 2, 4, 5, 6)]
    assert figures["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=5e-5)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert figures["balanced_accuracy"] == round(balanced_accuracy_score(labels, predicted), 4)
    assert "top5" not in model_figures(logits[:, :5], np.zeros(len(labels), int))


def test_calibration_error_by_hand():
    # Ten images at 90%, of which 7 are right, and 30 at 60%, of which 24 are: 0.25 * 0.2 + 0.75 * 0.2.
    logits = np.log([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 30)
    labels = np.array([0] * 7 + [1] * 3 + [1] * 24 + [0] * 6)
    assert model_figures(logits, labels)["ece"] == 0.2
    counts, confidence, accuracy = reliability(logits, labels)
    assert {n: c for n, c in enumerate(counts) if c} == {8: 30, 13: 10}  # (8/15, 9/15] and (13/15, 14/15]
    assert confidence[[8, 13]] == pytest.approx([0.6, 0.9])
    assert accuracy[[8, 13]] == pytest.approx([0.8, 0.7])
    logits, labels = draw(20000, 10)
    assert model_figures(logits, labels)["ece"] < 0.015 < 0.1 < model_figures(3 * logits, labels)["ece"]


def test_rows_with_nan_are_wrong_and_images_without_a_class_are_ignored():
    logits = np.array([[2.0, 1.0], [NAN, 1.0], [0.0, 3.0], [5.0, 0.0]])
    labels = np.array([0, 1, 1, -100])
    assert predictions(logits).tolist() == [0, -1, 1, 0]
    assert model_figures(logits, labels) | {"ece": 0} == {"top1": 0.6667, "balanced_accuracy": 0.75, "ece": 0}
    assert confusion(logits, labels).tolist() == [[1, 0], [0, 1]]
    assert agreement(logits, logits) == 0.75
    assert disagreements(logits, -logits, labels).tolist() == [2, 0]
    assert likely_label_errors(logits, logits, np.array([1, 0, 0, -100])).tolist() == [2, 0]
    infinite = np.array([[np.inf, 0.0], [-np.inf, 0.0], [np.inf, np.inf]])
    assert confidences(infinite) == pytest.approx([1, 1, 0.5])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"arrays \[N, C\] and \[N\], got \[2, 3\] and \[3\]"):
        model_figures(np.zeros((2, 3)), np.zeros(3, int))
    with pytest.raises(ValueError, match="labels must be classes from 0 to 2, got 3"):
        model_figures(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(ValueError, match="labels must contain a class, got none"):
        fit_temperature(np.zeros((2, 3)), np.full(2, -100))


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_temperature_undoes_a_scale(scale):
    logits, labels = draw(20000, 10)
    temperature = fit_temperature(scale * logits, labels)
    assert temperature == pytest.approx(scale, rel=0.03)

    def loss(divisor: float) -> float:
        scaled = np.exp(scale * logits / divisor)
        return log_loss(labels, scaled / scaled.sum(axis=1, keepdims=True))

    assert loss(temperature) < min(loss(1.01 * temperature), loss(0.99 * temperature))
    assert calibration_error(reliability(scale * logits, labels, temperature)) < 0.015


def test_temperature_at_its_ends():
    logits = np.eye(3)[[0, 1, 2]] * 4
    assert fit_temperature(logits, np.array([0, 1, 2])) == pytest.approx(0.05, abs=1e-3)
    assert fit_temperature(logits, np.array([1, 2, 0])) == pytest.approx(20, abs=1e-3)
    assert fit_temperature(logits * 1e30, np.array([1, 2, 0])) == pytest.approx(20, abs=1e-3)
    assert fit_temperature(np.full((3, 3), NAN), np.array([0, 1, 2])) == 1
    assert fit_temperature(np.concatenate([np.log([[0.9, 0.1]] * 4), [[NAN, 0]]]), np.array([0, 0, 0, 1, 0])) == 2


def test_difference_of_two_models():
    labels = np.zeros(100, int)
    right, wrong = [[1.0, 0.0]], [[0.0, 1.0]]
    student, baseline = np.array(right * 90 + wrong * 10), np.array(wrong * 15 + right * 80 + wrong * 5)
    # Right alone: the student on 15 images, the baseline on 5.
    difference, margin = accuracy_difference(student, baseline, labels)
    assert difference == 0.1
    assert margin == pytest.approx(1.96 * np.sqrt((0.2 - 0.1**2) / 100) + 0.01, abs=1e-4)
    assert accuracy_difference(baseline, student, labels) == (-0.1, margin)
    assert accuracy_difference(student, student, labels) == (0, 0.01)


@pytest.mark.parametrize(("better", "worse"), [(1, 0), (5, 0), (6, 0), (9, 2), (10, 2), (40, 22), (42, 22)])
def test_few_images_prove_as_much_as_the_exact_test_says(better, worse):
    own, other = np.zeros((2, 100, 2))
    own[:better, 0] = other[better : better + worse, 0] = 1
    difference, margin = accuracy_difference(own - [0.5, 0], other - [0.5, 0], np.zeros(100, int))
    assert difference == (better - worse) / 100
    assert (difference > margin) == (binomtest(better, better + worse).pvalue < 0.05)


def test_classes_by_name():
    student = np.eye(4)[[0, 1, 1, 2, 2]]
    teacher = np.eye(4)[[0, 0, 0, 2, 2]]
    labels = np.array([0, 0, 1, 2, 2])
    assert per_class({"teacher": teacher, "student": student}, labels, ["crane", "hen", "crane", "cat"]) == {
        "crane (class 0)": {"support": 2, "teacher": 1.0, "student": 0.5},
        "hen": {"support": 1, "teacher": 0.0, "student": 1.0},
        "crane (class 2)": {"support": 2, "teacher": 1.0, "student": 1.0},
        "cat": {"support": 0, "teacher": None, "student": None},
    }
    assert unique_names(["a", "b"]) == ["a", "b"]


def test_confusion():
    logits, labels = draw(500, 6)
    expected = confusion_matrix(labels, logits.argmax(axis=1), labels=range(6))
    assert (confusion(logits, labels) == expected).all()
    assert (confusion(logits, labels, [4, 1]) == expected[[4, 1]][:, [4, 1]]).all()
    np.fill_diagonal(expected, 0)
    pairs = confused_pairs(logits, labels, 100)
    assert [count for *_, count in pairs] == sorted(expected[expected > 0], reverse=True)
    assert all(expected[label, predicted] == count for label, predicted, count in pairs)
    assert confused_pairs(logits, labels, 2) == pairs[:2]


def test_disagreements_begin_with_the_surest():
    teacher = np.log([[0.8, 0.2], [0.9, 0.1], [0.3, 0.7], [0.6, 0.4]])
    student = np.log([[0.3, 0.7], [0.2, 0.8], [0.1, 0.9], [0.05, 0.95]])
    assert disagreements(teacher, student, np.array([0, 1, 1, 0])).tolist() == [1, 0, 3]
    assert agreement(teacher, student) == 0.25


def test_label_errors_need_two_models_that_are_as_sure_as_usual():
    # Both are 90% sure of each class on average.
    sure, usual, unsure = [0.98, 0.02], [0.9, 0.1], [0.7, 0.3]
    first, second = np.array([usual, sure, unsure, usual, sure]), np.array([usual, sure, sure, sure, [0.1, 0.9]])
    images = np.concatenate([np.tile(usual, (50, 1)), np.tile(usual[::-1], (50, 1))])
    labels = np.array([0] * 50 + [1] * 50 + [1] * 5)
    teacher, student = np.log(np.concatenate([images, first])), np.log(np.concatenate([images, second]))
    # 100 to 104: usual and usual, sure and sure, unsure and sure, usual and sure, disagreement.
    assert likely_label_errors(teacher, student, labels).tolist() == [101, 100, 103]
