"""The verdicts of comparison.py: which differences count, by the protocol of COMPARISON.md."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from comparison_runs import METHODS, NEEDED, ORDERS
from evidence_page import Difference, paired_difference
from scipy import stats

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "comparison.json"
LONGER = RESULTS / "comparison-longer.json"  # by comparison_longer.py
FIRST = RESULTS / "comparison-first.json"  # by the first protocol
LEVEL, EQUAL = 0.05, 0.5  # of the test; in points
FLAT, LAST = 0.5, 0.2  # in points; share of the epochs


class Verdict(NamedTuple):
    """A method against a reference: the difference, Holm's adjusted p, and what it counts as."""

    difference: Difference
    p: float
    text: str


def adjust_by_holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of the given ones."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = np.empty(len(p_values)), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted.tolist()


def judge(values: dict[str, list[float]], reference: str) -> dict[str, Verdict]:
    """Compares all methods of a cell with one of them: top-1 in percent, seed by seed."""
    others = [name for name in values if name != reference]
    p_values = []
    for name in others:
        differences = np.subtract(values[name], values[reference])
        is_constant = np.ptp(differences) == 0  # No t: the test would divide by 0.
        p_values.append(float(differences[0] == 0 if is_constant else stats.ttest_1samp(differences, 0).pvalue))
    verdicts = {}
    for name, p in zip(others, adjust_by_holm(p_values), strict=True):
        difference = paired_difference(values[name], values[reference])
        text = "undecided"
        if p < LEVEL:
            text = "better" if difference.mean > 0 else "worse"
        elif difference.low >= -EQUAL and difference.high <= EQUAL:
            text = "equal"
        verdicts[name] = Verdict(difference, p, text)
    return verdicts


def read_accuracies(cell: dict[str, Any]) -> dict[str, list[float]]:
    """Top-1 on the test part in percent by method, seed by seed."""
    values: dict[str, list[float]] = {}
    for run in sorted(cell["runs"], key=lambda run: run["seed"]):
        values.setdefault(run["method"], []).append(100 * run["test"])
    return {name: values[name] for name in METHODS if name in values}


def measure_rises(cell: dict[str, Any]) -> dict[str, float]:
    """By method: the points that the mean curve on the validation part gains in the last fifth of the epochs."""
    curves: dict[str, list[list[float]]] = {}
    for run in cell["runs"]:
        curves.setdefault(run["method"], []).append(run["curve"])
    rises = {}
    for method in METHODS:
        if method in curves:
            mean = 100 * np.mean(curves[method], axis=0)
            rises[method] = float(mean[-1] - mean[max(0, len(mean) - 1 - max(1, round(LAST * len(mean))))])
    return rises


def lacks_methods(name: str, values: dict[str, list[float]]) -> bool:
    """Whether a cell does not count, since methods are missing that it must have."""
    student = name.partition("/")[2]
    return not set(ORDERS[student][: NEEDED[student]]) <= set(values)
