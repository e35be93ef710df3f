"""Does the order of the losses stay when the students train twice as long? COMPARISON.md has the protocol.

    python benchmarks/comparison_longer.py --cells fashion/deit --json benchmarks/results/comparison-longer.json

Images, teacher, seeds and chosen settings are those of the result of comparison.py. Nothing is searched. comparison_page.py
adds the result to the page.
"""

import common  # first: it sets environment variables

# isort: split
import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison import check_teacher, dump, hash_teacher
from comparison_runs import METHODS, NEEDED, ORDERS, SUITE, ComparisonBench, jobs_of
from comparison_verdicts import LONGER, RESULT
from evidence import commit, in_parallel
from evidence_data import FASHION_FOLDER
from evidence_runs import Job

from nkd_hf.files import write_whole

TIMES = 2
CELLS = ("fashion/deit", "numbers/deit")


def with_longer_trainings(bench: ComparisonBench, name: str) -> ComparisonBench:
    """The bench whose students of a cell train `TIMES` times as long."""
    data, student = name.split("/")
    epochs = {student: TIMES * bench.epochs_of(data, student)}
    longer = bench.suite.data | {data: bench.suite.data[data] | {"epochs": epochs}}
    return bench._replace(epochs=None, suite=bench.suite._replace(data=longer))


def run_cell(
    bench: ComparisonBench,
    name: str,
    result: dict[str, Any],
    known: dict[str, Any] | None,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Trains the methods of a cell, and yields all that is done of it after each of them.

    Args:
        bench: has the settings of the result, and writes images and teacher with them.
        name: of the cell.
        result: what comparison.py gave for the cell.
        known: what `--json` holds of the cell; its methods are kept.
        options: of the command line.
    """
    data, student = name.split("/")
    longer, methods = with_longer_trainings(bench, name), ORDERS[student][: NEEDED[student]]
    chosen, seeds = result["chosen"], sorted({run["seed"] for run in result["runs"]})
    longer.check_settings([data])
    in_parallel([(bench.write_data, data)], options.jobs, "data")
    in_parallel([(bench.write_teacher, data)], options.jobs, "teacher")
    check_teacher(bench, name, result, options.result)
    done = list(known["chosen"]) if known else []
    own = {"teacher": {"sha256": hash_teacher(bench, data)}, "settings": longer.settings([data])}
    if known and (
        any(known[key] != own[key] for key in own) or any(known["chosen"][each] != chosen[each] for each in done)
    ):
        raise SystemExit(f"{name}: {options.json} has it with other settings or another teacher: name another --json")
    for record in known["runs"] if known else []:
        path = longer.path_of(Job(*(record[field] for field in Job._fields)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    if set(methods) <= set(done):
        print(f"{name}: {options.json} has all")
        return
    in_parallel([(longer.prepare, data, student, seed) for seed in seeds], options.jobs, "images and logits")
    machine = {key: value for key, value in common.describe_machine().items() if key != "load_average"}
    machines = [*(each for each in (known["machines"] if known else []) if each != machine), machine]
    for method in methods:
        jobs = jobs_of((data, student, method), chosen[method], seeds)
        in_parallel([(longer.train, job, True) for job in jobs], options.jobs, f"{name}, {METHODS[method].text}")
        if method in done:
            continue
        done.append(method)
        runs = [longer.read(job) for each in done for job in jobs_of((data, student, each), chosen[each], seeds)]
        yield own | {
            "machines": machines, "chosen": {each: chosen[each] for each in done}, "searches": [], "runs": runs,
            "command": f"python benchmarks/comparison_longer.py --cells {name}",
        }  # fmt: skip


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--result", type=Path, default=RESULT, help="of comparison.py (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/comparison-longer"), help="(default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", default=LONGER, help="added to (default: %(default)s)")
    parser.add_argument("--fashion", type=Path, default=FASHION_FOLDER, help="folder of the files of Debian's package "
                        "dataset-fashion-mnist (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, help="(default: both)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread (default: %(default)s)")
    options = parser.parse_args(args)
    results = json.loads(options.result.read_text(encoding="utf-8"))["cells"]
    longer = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"cells": {}}
    for name in options.cells:
        bench = open_bench(name, results.get(name), options)
        for cell in run_cell(bench, name, results[name], longer["cells"].get(name), options):
            longer["cells"][name] = cell
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_whole(options.json, dump(longer))
            print(f"wrote {', '.join(cell['chosen'])} of {name} to {options.json}", flush=True)


def open_bench(name: str, result: dict[str, Any] | None, options: argparse.Namespace) -> ComparisonBench:
    """The bench with the settings of a cell of the result, which may be those of a trial.

    Raises:
        SystemExit: this code has others, or the result lacks a method that is trained longer.
    """
    data, student = name.split("/")
    methods = ORDERS[student][: NEEDED[student]]
    if result is None or not set(methods) <= set(result["chosen"]):
        raise SystemExit(f"{name}: {options.result} must have {', '.join(methods)}: run comparison.py first")
    settings = result["settings"]["data"][data]
    epochs = settings["epochs"] if isinstance(settings["epochs"], int) else None
    images = max(settings["images"].values())
    bench = ComparisonBench(options.output.absolute(), epochs, images, options.fashion, commit(), SUITE)
    if bench.settings([data]) != result["settings"]:
        raise SystemExit(
            f"{name}: {options.result} has other settings than this code: check out the code of its commits"
        )
    return bench


if __name__ == "__main__":
    main()
