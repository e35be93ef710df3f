"""The measured gains of docs/which-loss.md and of the README, from the result of comparison.py; comparison_page.py writes them."""

import json
from pathlib import Path
from typing import Any

from comparison_runs import MAIN, METHODS
from comparison_verdicts import FLAT, LEVEL, LONGER, RESULT, judge, lacks_methods, measure_rises, read_accuracies

ROOT = Path(__file__).parents[1]
README, WHICH_LOSS = ROOT / "README.md", ROOT / "docs" / "which-loss.md"
# The titles of the cells: in the README of rows, in which-loss.md, with the number of the source, of columns.
TITLES = {
    "fashion/cnn": "Fashion-MNIST, CNN",
    "pretrained/cnn": "Fashion-MNIST, CNN, ImageNet teacher",
    "numbers/cnn": "100 classes, CNN",
    "fashion/deit": "Fashion-MNIST, DeiT",
    "numbers/deit": "100 classes, DeiT",
}
SOURCE, NOT_YET = "[14]", "not yet"
# By the first column of which-loss.md: the method of comparison_runs.METHODS.
ROWS = {"none": "baseline", "label smoothing": "label_smoothing", "`kd`, `standardize`": "kd_standardized"} | {
    f"`{name}`": name for name in ("kd", "dkd", "dist", "wttm", "rld", "nkd", "uskd", "tfkd")
}
# The columns of the README's table.
SHOWN = ("baseline", "nkd", "dkd", "wttm", "dist", "kd", "uskd")
# The columns of which-loss.md's table of what is certain.
VERDICTS = {
    "better than the student alone": ("baseline", "better"),
    "better than `nkd`": ("nkd", "better"),
    "equal to `nkd`": ("nkd", "equal"),
    "worse than `nkd`": ("nkd", "worse"),
}
# The losses of which-loss.md's table of settings.
ADVISED = ("dkd", "nkd", "wttm")
RISING = "still improving at the end"


def read_cell(name: str, path: Path = RESULT) -> dict[str, str]:
    """The text of each method: the baseline's top-1, the others' gain with half its interval, bold where it is certain."""
    cell = json.loads(path.read_text(encoding="utf-8"))["cells"].get(name, {"runs": []})
    values = _read_main(cell)
    if lacks_methods(name, values):
        return dict.fromkeys(MAIN, NOT_YET)
    texts = {"baseline": f"{sum(values['baseline']) / len(values['baseline']):.2f}"}
    for method, (difference, p, _) in judge(values, "baseline").items():
        text = f"{difference.mean:+.2f} ± {(difference.high - difference.low) / 2:.2f}"
        texts[method] = f"**{text}**" if p < LEVEL else text
    return texts


def fill_which_loss(page: str) -> str:
    """docs/which-loss.md with the columns of the cells filled.

    Raises:
        ValueError: its table lacks the row of a method.
    """
    start, end = _find_block(page, "gains")
    header, rule, *lines = page[start:end].split("\n")
    titles = _cells(header)
    columns = {titles.index(f"{TITLES[name]} {SOURCE}"): read_cell(name) for name in TITLES}
    rows = []
    if missing := set(ROWS) - {_cells(line)[0] for line in lines}:
        raise ValueError(
            f"{WHICH_LOSS} must have a row for each method, lacks {', '.join(sorted(missing))}: add it to the table"
        )
    for line in lines:
        row = _cells(line)
        for place, texts in columns.items():
            row[place] = texts.get(ROWS.get(row[0], ""), "")
        rows.append(_row(row))
    page = fill_block(page, "gains", "\n".join([header, rule, *rows]))
    return fill_block(fill_block(page, "settings", write_settings()), "verdicts", write_verdicts())


def fill_readme(page: str) -> str:
    """The README with its table of the cells that count."""
    header = ["student, data", *(METHODS[method].text for method in SHOWN)]
    lines = [_row(header), "|---" * len(header) + "|"]
    for name, title in TITLES.items():
        texts = read_cell(name)
        if texts["baseline"] == NOT_YET:
            continue
        lines.append(_row([title, *(texts.get(method, "not run") for method in SHOWN)]))
    return fill_block(page, "gains", "\n".join(lines))


def write_verdicts() -> str:
    """The table of what counts in each cell, with the students that were still improving at its end."""
    names = {method: row.replace(", ", " with ") for row, method in ROWS.items()} | {"baseline": "the student alone"}
    header = ["student, data", *VERDICTS, RISING]
    lines = [_row(header), "|---" * len(header) + "|"]
    for path, title in ((RESULT, "{}"), (LONGER, "{}, twice the epochs")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for name in TITLES:
            values = _read_main(cells.get(name, {"runs": []}))
            if lacks_methods(name, values):
                continue
            columns = [
                [method for method, verdict in judge(values, reference).items() if verdict.text == text]
                for reference, text in VERDICTS.values()
            ]
            rises = measure_rises(cells[name])
            columns.append([method for method in values if rises[method] >= FLAT])
            texts = [", ".join(names[method] for method in methods) or "none" for methods in columns]
            lines.append(_row([title.format(TITLES[name]), *texts]))
    return "\n".join(lines)


def write_settings() -> str:
    """The table of the settings that won, for the losses of the advice."""
    lines = [_row(["student, data", *(f"`{method}`" for method in ADVISED)]), "|---" * (1 + len(ADVISED)) + "|"]
    cells = json.loads(RESULT.read_text(encoding="utf-8"))["cells"]
    for name, title in TITLES.items():
        if name in cells and set(ADVISED) <= set(cells[name]["chosen"]):
            lines.append(_row([title, *(describe_settings(cells[name], method) for method in ADVISED)]))
    return "\n".join(lines)


def describe_settings(cell: dict[str, Any], method: str) -> str:
    """The chosen settings of a method; an asterisk marks the smallest and the largest value of the trials."""
    stars = dict.fromkeys(find_ends(cell, method), " \\*")
    texts = [f"{key} {value:.3g}{stars.get(key, '')}" for key, value in cell["chosen"][method]["params"].items()]
    return ", ".join(texts).replace("learning_rate", "rate")


def find_ends(cell: dict[str, Any], method: str) -> list[str]:
    """The settings of a method whose chosen value is the smallest or the largest of its trials."""
    # All seeds of the search have the same points.
    trials = next(search["trials"] for search in cell["searches"] if search["method"] == method)
    ends = []
    for key, value in cell["chosen"][method]["params"].items():
        tried = [trial["params"][key] for trial in trials]
        if value in (min(tried), max(tried)):
            ends.append(key)
    return ends


def _read_main(cell: dict[str, Any]) -> dict[str, list[float]]:
    """The accuracies without the arms of NKD's temperature."""
    return {method: tops for method, tops in read_accuracies(cell).items() if method in MAIN}


def fill_block(page: str, mark: str, text: str) -> str:
    """A page with a text between `<!-- mark -->` and the next `<!-- end -->`."""
    start, end = _find_block(page, mark)
    return page[:start] + text + page[end:]


def _find_block(page: str, mark: str) -> tuple[int, int]:
    start = page.index(f"<!-- {mark} -->\n\n") + len(f"<!-- {mark} -->\n\n")
    return start, page.index("\n\n<!-- end -->", start)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
