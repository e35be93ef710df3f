"""Writes the results of comparison.py and comparison_longer.py into COMPARISON.md, docs/which-loss.md and the README: `python benchmarks/comparison_page.py [--check]`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from comparison_gains import (
    README,
    WHICH_LOSS,
    describe_settings,
    fill_block,
    fill_readme,
    fill_which_loss,
    find_ends,
)
from comparison_runs import CELLS, CONFIDENCE, MAIN, METHODS, NEEDED, ORDERS, TEMPERATURE_1
from comparison_verdicts import (
    FIRST,
    FLAT,
    LONGER,
    RESULT,
    Verdict,
    judge,
    lacks_methods,
    measure_rises,
    read_accuracies,
)
from evidence_page import mean_and_deviation, paired_difference
from tables import markdown

PAGE = Path(__file__).parent / "COMPARISON.md"
ARMS = (TEMPERATURE_1, "nkd", CONFIDENCE)
DECIDING = tuple(
    name for name in CELLS if name.endswith("/cnn")
)  # whether the rule for NKD's temperature becomes an option


_CHOSEN = ["chosen", "top-1 of the search"]


def _chosen_columns(cell: dict[str, Any], method: str) -> list[str]:
    return [describe_settings(cell, method), f"{100 * cell['chosen'][method]['validation']:.2f}"]


def _verdict_columns(verdict: Verdict, is_done: bool) -> list[str]:
    """The difference, p and what it counts as. A cell that is not done has no verdicts, since p depends on their number."""
    p = f"{verdict.p:.3f}" if verdict.p >= 0.0005 else "< 0.001"
    return [f"{verdict.difference}", *([p, verdict.text] if is_done else ["", ""])]


_COMPARED = ["", "top-1 on test", "less the baseline", "p", "verdict", "less NKD", "p", "verdict"]


def _compare(values: dict[str, list[float]], is_done: bool) -> dict[str, list[str]]:
    """The row of each method: its accuracy, and its verdicts against the baseline and NKD."""
    against = [judge(values, name) if name in values else {} for name in ("baseline", "nkd")]
    rows = {}
    for method, tops in values.items():
        rows[method] = [METHODS[method].text, mean_and_deviation(tops)]
        for verdicts in against:
            rows[method] += _verdict_columns(verdicts[method], is_done) if method in verdicts else ["", "", ""]
    return rows


def temperature_text(name: str, cell: dict[str, Any], values: dict[str, list[float]]) -> list[str]:
    """The table of the arms of NKD's temperature; none where the cell lacks one of the three."""
    if not has_arms(values):
        return []
    verdicts = judge({arm: values[arm] for arm in ARMS}, TEMPERATURE_1)
    rows = []
    for arm in ARMS:
        row = [
            METHODS[arm].text,
            mean_and_deviation(values[arm]),
            f"{paired_difference(values[arm], values['baseline'])}",
        ]
        verdict = verdicts.get(arm)
        row += _verdict_columns(verdict, True) if verdict else ["", "", ""]
        row.append(f"{paired_difference(values[arm], values['nkd'])}" if arm == CONFIDENCE else "")
        rows.append([*row, *_chosen_columns(cell, arm)])
    columns = ["", "top-1 on test", "less the baseline", "less temperature 1", "p", "verdict", "less NKD", *_CHOSEN]
    return [markdown(f"{name}, NKD's temperature", columns, rows)]


def reason_text(cell: dict[str, Any], values: dict[str, list[float]]) -> list[str]:
    """What may be the reason where another method is better than NKD, by the protocol's rules."""
    main = {method: tops for method, tops in values.items() if method in MAIN}
    better = (
        [method for method, verdict in judge(main, "nkd").items() if verdict.text == "better"] if "nkd" in main else []
    )
    if not better or not has_arms(values):
        return []
    verdicts = judge({arm: values[arm] for arm in ARMS}, TEMPERATURE_1)
    reasons = []
    if any(verdict.text == "better" for verdict in verdicts.values()):
        reasons.append("temperature")
    if verdicts[CONFIDENCE].text == "better" and cell["confidence"]["temperature"] > 1:
        reasons.append("a confident teacher")
    if "gamma" in find_ends(cell, "nkd"):
        reasons.append("gamma")
    found = f"What may be the reason: {', '.join(reasons)}." if reasons else "The reason is not found."
    return [f"Better than NKD: {', '.join(METHODS[method].text for method in better)}. {found}"]


def has_arms(values: dict[str, list[float]]) -> bool:
    return set(ARMS) <= set(values)


def decision_text(cells: dict[str, dict[str, Any]]) -> list[str]:
    """The answer to whether the rule becomes an option: none before the last of its cells is run."""
    values = {name: read_accuracies(cells[name]) for name in DECIDING if name in cells}
    if len(values) < len(DECIDING) or not all(map(has_arms, values.values())):
        return []
    means = {arm: np.mean([values[name][arm] for name in DECIDING], axis=0).tolist() for arm in ARMS}
    difference = paired_difference(means[CONFIDENCE], means[TEMPERATURE_1])
    worse = [
        name
        for name in DECIDING
        if judge({arm: values[name][arm] for arm in ARMS}, TEMPERATURE_1)[CONFIDENCE].text == "worse"
    ]
    answer = "becomes an option" if difference.low > 0 and not worse else "does not become an option"
    counts_worse = f"counts as worse in {', '.join(worse)}" if worse else "counts as worse in none"
    return [
        "### A temperature by the teacher's confidence",
        f"Over {', '.join(DECIDING)}, NKD with the rule's temperature less NKD at temperature 1: {difference} points. It "
        f"{counts_worse}. By the protocol the rule {answer}.",
    ]


def length_text(cell: dict[str, Any]) -> str:
    """Whether the trainings of a cell were long enough, by the protocol's rule."""
    rises = measure_rises(cell)
    rising = [METHODS[method].text for method, rise in rises.items() if rise >= FLAT]
    verdict = f"Half a point or more, and so too short: {', '.join(rising)}." if rising else "All trained long enough."
    return (
        f"In the last fifth of the epochs the accuracy on the validation part rises by {min(rises.values()):.2f} to "
        f"{max(rises.values()):.2f} points. {verdict}"
    )


def luck_text(cell: dict[str, Any]) -> str:
    """How much of the accuracy that chose the settings was luck: the fresh seeds against the search's, on the validation part."""
    fresh: dict[str, list[float]] = {}
    for run in cell["runs"]:
        fresh.setdefault(run["method"], []).append(run["validation"])
    falls = [100 * (cell["chosen"][method]["validation"] - np.mean(values)) for method, values in fresh.items()]
    return (
        f"On that part the chosen settings reach {np.mean(falls):.2f} points less with the fresh seeds than they did in the "
        f"search (by method {min(falls):.2f} to {max(falls):.2f}): the best mean of a few seeds may be luck."
    )


def cell_text(name: str, cell: dict[str, Any], title: str | None = None) -> str:
    """The part of the page about a cell."""
    every = read_accuracies(cell)
    values = {method: tops for method, tops in every.items() if method in MAIN}
    is_done = not lacks_methods(name, values)
    rows = [[*row, *_chosen_columns(cell, method)] for method, row in _compare(values, is_done).items()]
    absent = [METHODS[method].text for method in ORDERS[name.partition("/")[2]] if method not in values]
    seeds = sorted({run["seed"] for run in cell["runs"]})
    trials = sum(len(search["trials"]) for search in cell["searches"])
    hours = [sum(record["cpu"] for record in cell[key]) / 3600 for key in ("runs", "searches")]
    teacher, confidence = cell["teacher"], cell["confidence"]
    lines = [
        f"### {title or name}",
        f"`{cell['command']}`: {len(cell['runs'])} trainings on {len(seeds)} seeds in {hours[0]:.1f} hours of CPU time, "
        f"and {trials} for the choice of the settings in {hours[1]:.1f}; {_describe_origin(cell)}. The teacher's top-1 is {100 * teacher['validation']:.2f} on the validation part and "
        f"{100 * teacher['test']:.2f} on the test part. On the training images it gives the target {confidence['target']:.2f} on "
        f"average, and of the rest {confidence['largest_other']:.2f} to the largest other class; the rule's temperature is "
        f"{confidence['temperature']:g}. Intervals are those of one comparison, at 95%; p is Holm's. "
        "An asterisk marks a chosen value that is the smallest or the largest of the trials.",
        f"{length_text(cell)} {luck_text(cell)}",
        *([_describe_absent(absent, is_done)] if absent else []),
        markdown(title or name, [*_COMPARED, *_CHOSEN], rows),
        *temperature_text(title or name, cell, every),
        *reason_text(cell, every),
    ]
    return "\n\n".join(lines)


def _describe_origin(cell: dict[str, Any]) -> str:
    machines = "; ".join(f"{each['cpu']}, torch {each['torch']}, timm {each['timm']}" for each in cell["machines"])
    commits = sorted({record["commit"][:12] + record["commit"][40:] for record in [*cell["searches"], *cell["runs"]]})
    return f"at commit {', '.join(commits)}; {machines}"


def longer_text(name: str, cell: dict[str, Any], before: dict[str, Any]) -> str:
    """The part of the page about a cell whose students trained longer than those of `before`."""
    values, earlier = read_accuracies(cell), read_accuracies(before)
    student = name.partition("/")[2]
    absent = [METHODS[method].text for method in ORDERS[student][: NEEDED[student]] if method not in values]
    gains = {method: paired_difference(tops, earlier["baseline"]) for method, tops in earlier.items()}
    rows = [
        [*row, f"{np.mean(earlier[method]):.2f}", "" if method == "baseline" else f"{gains[method]}"]
        for method, row in _compare(values, not lacks_methods(name, values)).items()
    ]
    epochs, shorter = (len(each["runs"][0]["curve"]) for each in (cell, before))
    columns = [*_COMPARED, f"top-1 after {shorter}", f"less the baseline after {shorter}"]
    lines = [
        f"#### {name}, {epochs} epochs",
        f"`{cell['command']}`: {len(cell['runs'])} trainings in {sum(run['cpu'] for run in cell['runs']) / 3600:.1f} hours of CPU "
        f"time; {_describe_origin(cell)}. {length_text(cell)}",
        *([_describe_absent(absent, False)] if absent else []),
        markdown(f"{name}, {epochs} epochs", columns, rows),
    ]
    return "\n\n".join(lines)


def _describe_absent(texts: list[str], is_done: bool) -> str:
    if is_done:
        return f"Not run, by the protocol's order: {', '.join(texts)}."
    return f"The cell is not done, and nothing below counts. Not run yet: {', '.join(texts)}."


def make_page(page: str, result: dict[str, Any], longer: dict[str, Any], first: dict[str, Any]) -> str:
    """The page with the results in their places: those of the protocol, of longer trainings, and by the first protocol."""
    cells = result["cells"]
    texts = [*(cell_text(name, cell) for name, cell in cells.items()), *decision_text(cells)]
    if absent := [name for name in CELLS if name not in cells]:
        texts.insert(0, f"Cells that are not run yet: {', '.join(absent)}.")
    earlier = [cell_text(name, cell, f"{name}, first protocol") for name, cell in first["cells"].items()]
    page = fill_block(page, "results", "\n\n".join(texts))
    more = [longer_text(name, cell, cells[name]) for name, cell in longer["cells"].items()]
    page = fill_block(page, "longer results", "\n\n".join(more) or "Not run yet.")
    return fill_block(page, "first results", "\n\n".join(earlier))


def main() -> None:
    result, longer = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cells": {}} for path in (RESULT, LONGER)
    )
    first = json.loads(FIRST.read_text(encoding="utf-8"))
    writers = {
        PAGE: lambda page: make_page(page, result, longer, first),
        WHICH_LOSS: fill_which_loss,
        README: fill_readme,
    }
    for path, write in writers.items():
        page = path.read_text(encoding="utf-8")
        text = write(page)
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif text != page:
            sys.exit(f"{path} is not what {RESULT.parent} gives")


if __name__ == "__main__":
    main()
