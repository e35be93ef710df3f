"""Writes the results of comparison.py into COMPARISON.md: `python benchmarks/comparison_page.py [--check]`."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from comparison import METHODS
from evidence_page import Difference, mean_and_deviation, paired_difference
from scipy import stats
from tables import markdown

FOLDER = Path(__file__).parent
PAGE, RESULT = FOLDER / "COMPARISON.md", FOLDER / "results" / "comparison.json"
LEVEL, EQUAL = 0.05, 0.5  # of the test; in points


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
        same = np.ptp(np.subtract(values[name], values[reference])) == 0
        p_values.append(1.0 if same else float(stats.ttest_rel(values[name], values[reference]).pvalue))
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


def cell_text(name: str, cell: dict[str, Any]) -> str:
    """The part of the page about a cell."""
    values = read_accuracies(cell)
    against_baseline, against_nkd = (judge(values, name) if name in values else {} for name in ("baseline", "nkd"))
    rows = []
    for method, tops in values.items():
        row = [METHODS[method].text, mean_and_deviation(tops)]
        for verdicts in (against_baseline, against_nkd):
            verdict = verdicts.get(method)
            row += [f"{verdict.difference}", f"{verdict.p:.3f}", verdict.text] if verdict else ["", "", ""]
        chosen = cell["chosen"][method]
        settings = ", ".join(f"{key} {value:.3g}" for key, value in chosen["params"].items())
        rows.append([*row, settings.replace("learning_rate", "rate"), f"{100 * chosen['validation']:.2f}"])
    columns = ["", "top-1 on test", "less the baseline", "p", "is", "less NKD", "p", "is"]
    columns += ["chosen", "its validation"]
    seeds = sorted({run["seed"] for run in cell["runs"]})
    trials = sum(len(search["trials"]) for search in cell["searches"])
    hours = [sum(record["cpu"] for record in cell[key]) / 3600 for key in ("runs", "searches")]
    machine, teacher = cell["machine"], cell["teacher"]
    commits = sorted({record["commit"][:12] + record["commit"][40:] for record in [*cell["searches"], *cell["runs"]]})
    lines = [
        f"### {name}",
        f"`{cell['command']}`: {len(cell['runs'])} trainings on {len(seeds)} seeds in {hours[0]:.1f} hours of CPU time, "
        f"and {trials} for the choice of the settings in {hours[1]:.1f}; at commit {', '.join(commits)}; "
        f"{machine['cpu']}, torch {machine['torch']}, timm {machine['timm']}. The teacher's top-1 is "
        f"{100 * teacher['validation']:.2f} on the validation part and {100 * teacher['test']:.2f} on the test part. Intervals "
        "are those of one comparison, at 95%; p is Holm's.",
        markdown(name, columns, rows),
    ]
    return "\n\n".join(lines)


def make_page(page: str, result: dict[str, Any]) -> str:
    """The page with the results in their place."""
    text = "\n\n".join(cell_text(name, cell) for name, cell in result["cells"].items()) or "No cell has been run yet."
    return re.sub(
        r"(<!-- results -->\n\n).*(\n\n<!-- end -->)", lambda match: match[1] + text + match[2], page, flags=re.S
    )


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"cells": {}}
    page = make_page(PAGE.read_text(encoding="utf-8"), result)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if page == PAGE.read_text(encoding="utf-8") else f"{PAGE} is not what {RESULT} gives")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
