"""Rebuilds the tables of README.md from the JSON files in results/: `python benchmarks/tables.py [--check]`.

What stands between `<!-- NAME.json -->` and `<!-- end -->` is replaced by that file's tables, aims, command and
machine; a file that is not there is said to be missing. No figure of the page is typed by hand.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median

from common import describe_aim, difference, ratio, show_ms

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"


def markdown(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def header(result: dict) -> str:
    """Command, machine and settings of a file; what its figures are, as not all are times."""
    machine, settings = result["machine"], result["settings"]
    where = machine["gpu"] if settings["device"] != "cpu" else f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "torchvision", "transformers", "timm", "pillow")
    )
    figures = FIGURES.get(script_of(result), "{clock}, medians of {rounds} rounds")
    figures = figures.format(**settings | {"clock": result["clock"], "rounds": settings["rounds"] or "9 or 3"})
    return (
        f"`{result['command']}`: {where}, threads: {settings['threads']}, {figures}, load average "
        f"{machine['load_average']:.1f}, {versions}{'. **Stopped before its end**' if result.get('is_partial') else ''}"
    )


def script_of(result: dict) -> str:
    """The script that wrote a file of `common.Report`."""
    return Path(result["command"].split()[1]).name


def page_of(result: dict) -> str:
    """A file of `common.Report`, with what its raw figures add to its tables."""
    notes = NOTES.get(script_of(result), lambda result: [])(result)  # first: it may mend the tables
    parts = [header(result)]
    parts += [markdown(table["title"], table["columns"], table["rows"]) for table in result["tables"]]
    notes += [describe_aim(aim) for aim in result["aims"]]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def step_notes(result: dict) -> list[str]:
    """The ratios of the printed medians, which aren't those that are judged."""
    notes = []
    for pair, figures in result["raw"].items():
        ms = {side: median(values) for side, values in figures["ms"].items()}
        nkd, uskd = ms["NKD, trainer"] / ms["NKD, loop"], ms["USKD, trainer"] / ms["CE, trainer"]
        notes.append(f"{pair}: by the medians in ms, NKD's trainer / loop is {nkd:.3f}, USKD / CE {uskd:.3f}")
    return notes


def teacher_notes(result: dict) -> list[str]:
    """Marks rows that are no medians."""
    for table, figures in zip(result["tables"], result["raw"].values(), strict=True):
        for row in table["rows"]:
            row[0] += " (one call)" if row[0] in figures["single_ms"] else ""
    return []


def store_accuracy_notes(result: dict) -> list[str]:
    raw, notes = result["raw"], []
    for side, values in raw["accuracies"].items():
        if side in ("live", "all"):
            continue
        error = difference(values, raw["accuracies"]["live"])[1]
        note = f"stored, {side}: two standard errors are {200 * error:.1f} points: a smaller difference does not show"
        if side in raw["losses"]:
            pairs = zip(raw["losses"][side], raw["losses"]["live"], strict=True)
            first = max(abs(own[0] - live[0]) for own, live in pairs)
            note += f"; the first step's loss is off by at most {first:.1e}"
        notes.append(note)
    return notes


def input_notes(result: dict) -> list[str]:
    # With deit it is an aim, and with crops there is no timm.
    if result["settings"]["augment"] != "crop" or result["settings"].get("crops"):
        return []
    loaders, notes = result["raw"]["loaders"], []
    for source in ("folder", "parquet"):
        value, low, high = ratio(loaders["timm, folder"], loaders[f"nkd_hf, {source}"])
        notes.append(f"images/s of nkd_hf, {source} / timm, folder: {value:.4g} ({low:.3f} to {high:.3f}), no aim")
    return notes


def memory_notes(result: dict) -> list[str]:
    """Says which rows hold the weights, and how the peaks grow."""
    notes = []
    for table, figures in zip(result["tables"], result["raw"].values(), strict=True):
        for row in table["rows"]:
            row[0] += ", above the weights" if "Trainer" in row[0] else ""
        columns = table["columns"][1:]
        shares = [
            column["USKD, DistillationTrainer"] / column["cross-entropy, Trainer"] for column in figures.values()
        ]
        table["rows"].append(["USKD / cross-entropy, above the weights", *(f"{share:.3f}" for share in shares)])
        same = [column for column in columns if column.split(" x ")[1] == columns[0].split(" x ")[1]]
        (few, classes), (many, _) = (map(int, column.split(" x ")) for column in (same[0], same[-1]))
        if few != many:
            grown = [
                (figures[same[-1]][name] - figures[same[0]][name]) / (many - few) / 1e6
                for name in ("peak", "peak of the student alone")
            ]
            notes.append(
                f"{table['title'].partition(',')[0]}, {classes} classes, from batch {few} to {many}: the peak grows by "
                f"{grown[0]:.1f} MB an image, that of the student alone by {grown[1]:.1f}"
            )
    return notes


# By script: what the figures are, where they aren't medians of rounds; and what stands below the tables.
FIGURES = {
    "store_accuracy.py": "{rounds} seeds",
    "any_teacher.py": "{rounds} seeds",
    "input_accuracy.py": "{rounds} seeds",
    "crops_accuracy.py": "{rounds} seeds",
    "top_k.py": "{images} images of each teacher",
    "deploy.py": "{rounds} seeds",
    "plain_command.py": "seeds of the plain command: {rounds}",
    "throughput.py": "{clock}, {rounds} steps",
    "streams.py": "wall clock and CPU time, medians of {rounds} rounds",
    "memory.py": "bytes allocated, one step of each",
    "scale.py": "{clock}, medians over {rounds} x {repeats} steps (rounds x launches)",
}
NOTES = {
    "step.py": step_notes,
    "teacher.py": teacher_notes,
    "store_accuracy.py": store_accuracy_notes,
    "input.py": input_notes,
    "memory.py": memory_notes,
}
LOSSES = ("NKD", "USKD")
SHARED = tuple(f"task + {loss}, {how}" for loss in LOSSES for how in ("apart", "shared"))
OTHERS = ("packed sort", "torch.sort", "NKD, literal", "USKD, literal")


def page_of_losses(result: dict) -> str:
    """The file of losses.py."""
    eager = {
        (table["batch"], table["classes"], table["dtype"]): table["rows"]["cross-entropy"]["ms"]
        for table in result["tables"]
        if not table["compiled"]
    }
    in_memory = ("cross-entropy", *LOSSES, *SHARED, *OTHERS[2:])
    times, floors, beside, kernels, memory, missed = [], [], [], [], {}, []
    for table in result["tables"]:
        mode = "compiled" if table["compiled"] else "eager"
        setting = f"[{table['batch']}, {table['classes']}] {table['dtype']}, {mode}"
        rows, unit = table["rows"], eager.get((table["batch"], table["classes"], table["dtype"]))
        ce = rows["cross-entropy"]
        # Of two tables, hence of two runs: not within a round.
        against_eager = {
            name: rows[name]["ms"] / unit if table["compiled"] and unit else rows[name]["x_cross_entropy"]
            for name in ("cross-entropy", *LOSSES)
        }
        times.append([setting, show_ms(ce["ms"]), f"{against_eager['cross-entropy']:.2f}"])
        for name in LOSSES:
            times[-1] += [
                show_ms(rows[name]["ms"]), f"{rows[name]['x_cross_entropy']:.2f}", f"{against_eager[name]:.2f}"
            ]  # fmt: skip
        floors.append([setting, f"{table['floor_ms']:.3f}"])
        floors[-1] += [f"{rows[name]['x_floor']:.0f}" for name in ("cross-entropy", *LOSSES)]
        beside.append([setting, *(show_ms(rows[name]["ms"]) if name in rows else "" for name in (*SHARED, *OTHERS))])
        if ce.get("device_ms") is not None:
            kernels.append([setting, *(f"{rows[name]['device_ms']:.3f}" for name in ("cross-entropy", *LOSSES))])
        most = memory.setdefault(f"{table['dtype']}, {mode}", dict.fromkeys(in_memory, 0.0))  # of all shapes
        for name in most.keys() & rows.keys():
            most[name] = max(most[name], rows[name]["extra_matrices"])
        missed.append(f"- {setting}: {'; '.join(missed_bounds(table, unit)) or 'none'}")
    of_losses = [column for name in LOSSES for column in (f"{name} ms", "x CE", "x eager CE")]
    names = ["CE", *LOSSES]
    return "\n\n".join(
        [
            header(result),
            markdown("Forward and backward", ["", "CE ms", "x eager CE", *of_losses], times),
            markdown("Against the floor", ["", "floor ms", *(f"{name}, x floor" for name in names)], floors),
            markdown("What else was measured, in ms", ["", *SHARED, *OTHERS], beside),
            *([markdown("The kernels alone, in ms", ["", *names], kernels)] if kernels else []),
            markdown(
                "Peak memory beyond logits and their gradients, in matrices of logits: the most of all shapes",
                ["", *names, *in_memory[3:]],
                [
                    [name, *(f"{value:.1f}" if value or "literal" not in row else "" for row, value in most.items())]
                    for name, most in memory.items()
                ],
            ),
            "Bounds that are missed:\n\n" + "\n".join(missed),
        ]
    )


def missed_bounds(table: dict, eager_ms: float | None) -> list[str]:
    """Names, figures and bounds; a compiled loss's time is judged against either cross-entropy."""
    missed = []
    for check in table["bounds"]:
        is_time = "x cross-entropy" in check["what"]
        if not check["met"]:
            what = check["what"].replace("x cross-entropy", "x compiled CE" if table["compiled"] else "x CE")
            what = what.replace("extra matrices of logits", "matrices")
            missed.append(f"{what}: {check['value']:.2f} > {check['bound']:g}")
        if is_time and table["compiled"] and eager_ms:
            name, _, sort = check["what"].partition(",")[0].partition(" less one ")
            ms = table["rows"][name]["ms"] - (table["rows"][sort]["ms"] if sort else 0)
            if ms / eager_ms > check["bound"]:
                what = check["what"].replace("x cross-entropy", "x eager CE")
                missed.append(f"{what}: {ms / eager_ms:.2f} > {check['bound']:g}")
    return missed


def fill(match: re.Match) -> str:
    path = FOLDER / "results" / match[1]
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        content = page_of_losses(result) if "bounds" in result["tables"][0] else page_of(result)
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
