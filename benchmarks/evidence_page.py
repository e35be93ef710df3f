"""Rebuilds EVIDENCE.md and its pictures from results/evidence.json: `python benchmarks/evidence_page.py [--check]`.

What stands between `<!-- NAME -->` and `<!-- end -->` is replaced; no figure of the page is typed by hand.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
from evidence_losses import ABLATIONS
from scipy import stats
from tables import markdown

FOLDER = Path(__file__).parent
PAGE = FOLDER / "EVIDENCE.md"
RESULT = FOLDER / "results" / "evidence.json"
NAMES = {
    "baseline": "baseline", "kd": "KD", "dkd": "DKD", "dist": "DIST", "wttm": "WTTM", "nkd": "NKD", "uskd": "USKD"
}  # fmt: skip
COLORS = {
    "baseline": "black", "kd": "tab:green", "dkd": "tab:olive", "dist": "tab:cyan", "wttm": "tab:purple",
    "nkd": "tab:red", "uskd": "tab:blue",
}  # fmt: skip
TEXTS = {name: ablation.text for name, ablation in ABLATIONS.items()}
# What the paper says: the first is better than the second. Of methods for each student, of ablations on the CNN.
CLAIMS = [
    *[("nkd", "baseline"), ("nkd", "kd"), ("nkd", "dkd")],
    *[("uskd", "baseline"), ("nkd", "nkd-target"), ("nkd", "nkd-non-target")],
    *[("uskd", name) for name in TEXTS if name.startswith("uskd") and name != "uskd-rank"],
]


class Difference(NamedTuple):
    """A mean difference with its 95% interval, in points."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_difference(values: list[float], others: list[float]) -> Difference:
    """The mean of the differences, seed by seed, with Student's 95% interval."""
    differences = np.subtract(values, others)
    if len(differences) < 2:
        return Difference(float(differences.mean()), -math.inf, math.inf)
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences))
    mean = float(differences.mean())
    return Difference(mean, mean - float(half), mean + float(half))


def mean_and_deviation(values: list[float]) -> str:
    deviation = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


class Result:
    """The JSON of evidence.py, by cells."""

    def __init__(self, raw: dict[str, Any]):
        self.raw = raw
        self.runs: dict[tuple[str, str, str], dict[int, dict]] = {}
        for run in raw["runs"]:
            self.runs.setdefault((run["data"], run["student"], run["method"]), {})[run["seed"]] = run

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Data and student, in order."""
        return list(dict.fromkeys((data, student) for data, student, _ in self.runs))

    def methods(self, data: str, student: str) -> list[str]:
        return [name for name in NAMES if (data, student, name) in self.runs]

    def values(self, data: str, student: str, method: str) -> list[float]:
        """Top-1 on the test part in percent, by seed."""
        runs = self.runs[data, student, method]
        return [100 * runs[seed]["test"] for seed in sorted(runs)]

    def difference(self, data: str, student: str, method: str, other: str) -> Difference:
        return paired_difference(self.values(data, student, method), self.values(data, student, other))

    def chosen(self, data: str, student: str, method: str) -> dict[str, Any]:
        return self.raw["chosen"][f"{data}/{student}/{method}"]


def setup_text(result: Result) -> str:
    raw, lines = result.raw, []
    machine = raw["machine"]
    versions = f"Python {machine['python']}, " + ", ".join(
        f"{name} {machine[name]}"
        for name in ("torch", "torchvision", "transformers", "timm", "datasets", "numpy", "scikit-learn")
    )
    runs = [run for runs in result.runs.values() for run in runs.values()]
    seeds = ", ".join(map(str, raw["seeds"]))
    trials = [trial for chosen in raw["chosen"].values() for trial in chosen["tried"]]
    minutes, trial_minutes = (sum(run["cpu"] for run in group) / 60 for group in (runs, trials))
    commits = Counter(run["commit"] for run in runs)
    at = ", ".join(f"{number} trainings at commit {name[:12]}{name[40:]}" for name, number in commits.items())
    lines.append(
        f"`{raw['command']}`: seeds {seeds}, settings chosen on seed {raw['selection_seed']}; {at}; "
        f"{machine['cpu']}, {machine['cores']} cores, {versions}. "
        f"The {len(runs)} trainings below took {minutes:.0f} minutes of CPU time, the {len(trials)} of the choice of "
        f"settings {trial_minutes:.0f}; the teachers, their logits and the images come on top."
    )
    rows = []
    for data, settings in raw["settings"]["data"].items():
        sizes = [str(settings["images"][name]) for name in ("train", "validation", "test")]
        teacher = [raw["teachers"][data][name] for name in ("validation", "test")]
        error = math.sqrt(teacher[1] * (1 - teacher[1]) / settings["images"]["test"])
        rows.append([data, *sizes, str(settings["epochs"]), *(f"{100 * value:.2f}" for value in (*teacher, error))])
    columns = [
        "",
        "training",
        "validation",
        "test images",
        "epochs",
        "teacher's top-1, validation",
        "test",
        "its error",
    ]
    return "\n\n".join([*lines, markdown("Data", columns, rows)])


def main_text(result: Result) -> str:
    parts = []
    for data, student in result.groups:
        rows = []
        for method in result.methods(data, student):
            values, chosen = result.values(data, student, method), result.chosen(data, student, method)
            gain = "" if method == "baseline" else str(result.difference(data, student, method, "baseline"))
            args = ", ".join(f"{name} {value:g}" for name, value in chosen["loss_args"].items())
            lead = "" if method == "nkd" else str(result.difference(data, student, "nkd", method))
            rows.append([NAMES[method], mean_and_deviation(values), gain, lead, f"{chosen['learning_rate']:g}", args])
        columns = ["", "top-1 on test", "less the baseline, 95% interval", "NKD less it", "learning rate", "weights"]
        parts.append(markdown(f"{data}, {student}", columns, rows))
    return "\n\n".join(parts)


def ablation_text(result: Result) -> str:
    parts = []
    for data, student in result.groups:
        for method in ("nkd", "uskd"):
            names = [name for name in TEXTS if name.startswith(method) and (data, student, name) in result.runs]
            if not names:
                continue
            args = ", ".join(
                f"{name} {value:g}" for name, value in result.chosen(data, student, method)["loss_args"].items()
            )
            rows = []
            for name in (method, *names):
                text = f"{NAMES[method]} as chosen ({args})" if name == method else TEXTS[name]
                of_whole = "" if name == method else str(result.difference(data, student, name, method))
                of_baseline = str(result.difference(data, student, name, "baseline"))
                rows.append([text, mean_and_deviation(result.values(data, student, name)), of_baseline, of_whole])
            columns = ["", "top-1 on test", "less the baseline", f"less {NAMES[method]} as chosen"]
            parts.append(markdown(f"{data}, {student}: {NAMES[method]}", columns, rows))
    return "\n\n".join(parts)


def claim_text(result: Result) -> str:
    """Each thing that the paper says, and what came out."""
    rows = []
    for better, worse in CLAIMS:
        for data, student in result.groups:
            if (data, student, better) in result.runs and (data, student, worse) in result.runs:
                difference = result.difference(data, student, better, worse)
                name = NAMES.get(worse) or f"its variant, {TEXTS[worse]}"
                where = f"{NAMES[better]} above {name}", f"{data}, {student}"
                rows.append([*where, str(difference), verdict(difference)])
    counts = [sum(row[3] == answer for row in rows) for answer in ("yes", "no", "undecided")]
    title = (
        "Of {} comparisons, {} come out as the paper says, {} the other way round, and {} are undecided. Were there nothing "
        "behind any, {:.1f} would come out one way and as many the other."
    ).format(len(rows), *counts, 0.025 * len(rows))
    return markdown(title, ["the paper says", "data, student", "difference, 95% interval", "came out"], rows)


def verdict(difference: Difference) -> str:
    """Whether 0 lies below, above or in the interval."""
    if difference.low > 0:
        return "yes"
    return "no" if difference.high < 0 else "undecided"


def chosen_text(result: Result) -> str:
    rows = []
    for cell, chosen in result.raw["chosen"].items():
        tried, rates = [], [candidate["learning_rate"] for candidate in chosen["tried"]]
        for candidate in chosen["tried"]:
            args = "".join(f", {name} {value:g}" for name, value in candidate["loss_args"].items())
            text = f"{candidate['learning_rate']:g}{args}: {100 * candidate['validation']:.2f}"
            is_chosen = all(candidate[name] == chosen[name] for name in ("learning_rate", "loss_args"))
            star = " \\*" if candidate["learning_rate"] in (min(rates), max(rates)) else ""
            tried.append(f"**{text}**{star}" if is_chosen else text)
        rows.append([cell, "; ".join(tried)])
    return markdown("Learning rate, weights: top-1 on the validation part", ["", "tried"], rows)


def draw_curves(result: Result) -> matplotlib.figure.Figure:
    figure, panels = _panels(result)
    for (data, student), axes in panels.items():
        for method in result.methods(data, student):
            curves = 100 * np.array([run["curve"] for run in result.runs[data, student, method].values()])
            epochs, mean = np.arange(1, curves.shape[1] + 1), curves.mean(0)
            deviation = curves.std(0, ddof=1) if len(curves) > 1 else 0 * mean
            axes.plot(epochs, mean, color=COLORS[method], label=NAMES[method], linewidth=1.2)
            axes.fill_between(
                epochs, mean - deviation, mean + deviation, color=COLORS[method], alpha=0.12, linewidth=0
            )
        # The steep beginning would leave no room for the differences.
        low, high = axes.get_ylim()
        axes.set(ylim=(low + 0.5 * (high - low), min(high, 100)), xlabel="epoch", ylabel="top-1, validation part (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    next(iter(panels.values())).legend(fontsize=7)
    return figure


def draw_gains(result: Result) -> matplotlib.figure.Figure:
    figure, panels = _panels(result)
    for (data, student), axes in panels.items():
        methods = [method for method in result.methods(data, student) if method != "baseline"]
        _bars(axes, {NAMES[name]: result.difference(data, student, name, "baseline") for name in methods}, methods)
        axes.set(ylabel="gain over the baseline (points)")
    return figure


def draw_ablations(result: Result) -> matplotlib.figure.Figure | None:
    groups = [
        (data, student, method)
        for method in ("nkd", "uskd")
        for data, student in result.groups
        if any((data, student, name) in result.runs for name in TEXTS if name.startswith(method))
    ]
    if not groups:
        return None
    figure = matplotlib.figure.Figure(figsize=(10, 2.8 * len(groups)), layout="constrained")
    for axes, (data, student, method) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        names = [method, *(name for name in TEXTS if name.startswith(method) and (data, student, name) in result.runs)]
        gains = {
            TEXTS.get(name, f"{NAMES[method]} as chosen"): result.difference(data, student, name, "baseline")
            for name in names
        }
        for place, gain in enumerate(gains.values()):
            color = COLORS[method] if place == 0 else "0.6"
            axes.barh(place, gain.mean, xerr=[[gain.mean - gain.low], [gain.high - gain.mean]], color=color, capsize=3)
        axes.set_yticks(range(len(gains)), list(gains))
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=f"{data}, {student}", xlabel="gain over the baseline (points), 95% interval")
    return figure


def draw_labels(result: Result) -> matplotlib.figure.Figure | None:
    """The soft labels of some training images: a row for each, a column for teacher, NKD and USKD."""
    runs = [run for cell in result.runs.values() for run in cell.values() if "soft_labels" in run]
    if not runs:
        return None
    run = runs[-1]
    labels = run["soft_labels"]
    number = len(labels["labels"])
    figure = matplotlib.figure.Figure(figsize=(10, 1.5 * number + 0.5), layout="constrained")
    titles = ["teacher", "NKD: target; others on their own", "USKD: target; others on their own"]
    grid = figure.subplots(number, 4, squeeze=False, width_ratios=[1, 3, 3, 3])
    for row in range(number):
        label = labels["labels"][row]
        grid[row][0].imshow(labels["images"][row], cmap="gray", vmin=0, vmax=255)
        grid[row][0].set_axis_off()
        grid[row][0].set_title(f"{label}: {labels['classes'][label]}", fontsize=8)
        columns = [
            (labels["teacher"][row], labels["teacher"][row][label]),
            (labels["nkd_others"][row], labels["nkd_target"][row]),
            (labels["uskd_others"][row], labels["uskd_target"][row]),
        ]
        for axes, (others, target) in zip(grid[row][1:], columns, strict=True):
            classes = np.arange(len(others))
            heights = np.array(others)
            heights[label] = target
            axes.bar(classes, heights, color=["tab:red" if place == label else "tab:blue" for place in classes])
            axes.set(ylim=(0, max(1.05, heights.max() * 1.05)), xticks=classes)
            axes.tick_params(labelsize=7)
    for axes, title in zip(grid[0][1:], titles, strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def _panels(result: Result) -> tuple[matplotlib.figure.Figure, dict]:
    rows = list(dict.fromkeys(data for data, _ in result.groups))
    columns = list(dict.fromkeys(student for _, student in result.groups))
    figure = matplotlib.figure.Figure(figsize=(5 * len(columns), 3.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    panels = {group: grid[rows.index(group[0])][columns.index(group[1])] for group in result.groups}
    for (data, student), axes in panels.items():
        axes.set_title(f"{data}, {student}")
    return figure, panels


def _bars(axes, gains: dict[str, Difference], methods: list[str]) -> None:
    errors = [[gain.mean - gain.low for gain in gains.values()], [gain.high - gain.mean for gain in gains.values()]]
    means = [gain.mean for gain in gains.values()]
    axes.bar(list(gains), means, yerr=errors, capsize=4, color=[COLORS[name] for name in methods], alpha=0.8)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3, axis="y")


BLOCKS = {
    "setup": setup_text, "main": main_text, "claims": claim_text, "ablations": ablation_text, "chosen": chosen_text
}  # fmt: skip
PICTURES = {"curves": draw_curves, "gains": draw_gains, "ablations": draw_ablations, "labels": draw_labels}


def filled(page: str, result: Result | None) -> str:
    """The page with its blocks made again."""

    def fill(match: re.Match) -> str:
        name = match[1]
        content = "Not measured yet: results/evidence.json." if result is None else BLOCKS[name](result)
        return f"<!-- {name} -->\n\n{content}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(BLOCKS)}) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not what would be written")
    parser.add_argument("--result", type=Path, default=RESULT, help="(default: %(default)s)")
    parser.add_argument("--page", type=Path, default=PAGE, help="(default: %(default)s)")
    options = parser.parse_args(args)
    result = None
    if options.result.is_file():
        result = Result(json.loads(options.result.read_text(encoding="utf-8")))
    before = options.page.read_text(encoding="utf-8")
    after = filled(before, result)
    if options.check:
        sys.exit(
            0 if before == after else f"{options.page} is not of its result: run python benchmarks/evidence_page.py"
        )
    options.page.write_text(after, encoding="utf-8")
    print(f"wrote {options.page}")
    for name, draw in PICTURES.items() if result is not None else ():
        figure = draw(result)
        if figure is not None:
            path = options.result.with_name(f"{options.result.stem}-{name}.png")
            figure.savefig(path, dpi=100)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
