"""Rebuilds the tables of README.md from the JSON files in results/: `python benchmarks/tables.py [--check]`.

What stands between `<!-- NAME.json -->` and `<!-- end -->` is replaced by that file's tables, aims, command and
machine; a file that is not there is said to be missing. No figure of the page is typed by hand.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from common import describe_aim

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"


def markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_of(result: dict) -> str:
    """A file of `common.Report`."""
    machine, settings = result["machine"], result["settings"]
    where = machine["gpu"] if settings["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "torchvision", "transformers", "timm", "pillow")
    )
    parts = [
        f"`{result['command']}`: {where}, threads: {settings['threads']}, {result['clock']}, medians of "
        f"{settings['rounds']} rounds, load average {machine['load_average']:.1f}, {versions}",
        *(markdown(table["title"], table["columns"], table["rows"]) for table in result["tables"]),
    ]
    if result["aims"]:
        parts.append("\n".join(f"- {describe_aim(aim)}" for aim in result["aims"]))
    return "\n\n".join(parts)


def page_of_losses(result: dict) -> str:
    """The file of losses.py."""
    rows = []
    for table in result["tables"]:
        setting = (
            f"[{table['batch']}, {table['classes']}] {table['dtype']}, {'compiled' if table['compiled'] else 'eager'}"
        )
        cells = []
        for name in ("cross-entropy", "NKD", "USKD"):
            figures = table["rows"][name]
            cells += [f"{figures['ms']:.2f}", f"{figures['x_cross_entropy']:.2f}", f"{figures['extra_matrices']:.1f}"]
        rows.append([setting, *cells, f"{sum(check['met'] for check in table['bounds'])} of {len(table['bounds'])}"])
    columns = [""]
    for name in ("CE", "NKD", "USKD"):
        columns += [f"{name} ms", "x CE", "extra matrices"]
    title = f"Forward and backward, threads: {result['threads']}"
    return markdown(title, [*columns, "bounds met"], rows)


def fill(match: re.Match) -> str:
    path = FOLDER / "results" / match[1]
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        content = page_of(result) if "machine" in result else page_of_losses(result)
    else:
        content = f"Not measured yet: results/{match[1]}."
    return f"<!-- {match[1]} -->\n\n{content}\n\n<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not what would be written")
    options = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = re.sub(r"<!-- ([\w.-]+\.json) -->.*?<!-- end -->", fill, before, flags=re.DOTALL)
    if options.check:
        sys.exit(0 if before == after else f"{PAGE} is not of its results: run python benchmarks/tables.py")
    PAGE.write_text(after, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
