"""The measured columns of docs/which-loss.md, from the results of evidence.py and comparison.py; comparison_page.py writes them."""

import json
import re
from pathlib import Path
from typing import Any

from comparison_runs import MAIN
from comparison_verdicts import LEVEL, RESULT, RESULTS, judge, lacks_methods, read_accuracies

PAGE = Path(__file__).parents[1] / "docs" / "which-loss.md"
EVIDENCE = RESULTS / "evidence.json"
# By the title of a column: the result and its cell.
COLUMNS = {
    "Fashion-MNIST, CNN [14]": (RESULT, "fashion/cnn"),
    "100 classes, CNN [14]": (RESULT, "numbers/cnn"),
    "Fashion-MNIST, DeiT [13]": (EVIDENCE, "fashion/deit"),
}
# By the first column: the method of comparison_runs.METHODS.
ROWS = {"none": "baseline", "label smoothing": "label_smoothing", "`kd`, `standardize`": "kd_standardized"} | {
    f"`{name}`": name for name in ("kd", "dkd", "dist", "wttm", "rld", "nkd", "uskd", "tfkd")
}


def read_column(path: Path, name: str) -> dict[str, str]:
    """The text of each method: the baseline's top-1, the others' gain with half its interval, bold where it is certain."""
    result = json.loads(path.read_text(encoding="utf-8"))
    cell = _evidence_cell(result, name) if path == EVIDENCE else result["cells"].get(name, {"runs": []})
    values = {method: tops for method, tops in read_accuracies(cell).items() if method in MAIN}
    if path != EVIDENCE and lacks_methods(name, values):
        return dict.fromkeys(MAIN, "not yet")
    texts = {"baseline": f"{sum(values['baseline']) / len(values['baseline']):.2f}"}
    for method, (difference, p, _) in judge(values, "baseline").items():
        text = f"{difference.mean:+.2f} ± {(difference.high - difference.low) / 2:.2f}"
        texts[method] = f"**{text}**" if p < LEVEL else text
    return texts


def _evidence_cell(result: dict[str, Any], name: str) -> dict[str, Any]:
    # Its ablations are methods that METHODS lacks, and some of its trainings are the choice of a seed apart.
    runs = [run for run in result["runs"] if "test" in run and f"{run['data']}/{run['student']}" == name]
    return {"runs": [run for run in runs if run["method"] in MAIN]}


def fill(page: str) -> str:
    """The page with the columns of COLUMNS filled."""
    match = re.search(r"<!-- gains -->\n\n(.*?)\n\n<!-- end -->", page, flags=re.DOTALL)
    header, rule, *lines = match[1].split("\n")
    titles = _cells(header)
    columns = {titles.index(title): read_column(*source) for title, source in COLUMNS.items()}
    rows = []
    if missing := set(ROWS) - {_cells(line)[0] for line in lines}:
        raise ValueError(
            f"{PAGE} must have a row for each method, lacks {', '.join(sorted(missing))}: add it to the table"
        )
    for line in lines:
        row = _cells(line)
        for place, texts in columns.items():
            row[place] = texts.get(ROWS.get(row[0], ""), "")
        rows.append(f"| {' | '.join(row)} |")
    return page[: match.start(1)] + "\n".join([header, rule, *rows]) + page[match.end(1) :]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
