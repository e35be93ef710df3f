"""Rebuilds the tables of IMAGENET.md: `python benchmarks/imagenet_page.py [--check | --rate FLOAT32 BF16]`.

What stands between `<!-- NAME -->` and `<!-- end -->` is made of the files in recipes/configs: the record that each opens
with, its settings, and its models' multiplications, counted as `nkd-hf plan` counts them. Nothing is measured: hours are
images x epochs x (3 x the student's GMACs + the teacher's) / rate, and the rate is an assumption, as the speed of input is.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tables import markdown

from nkd_hf import DataArguments, RecipeArguments, parse_args
from nkd_hf.losses import sd_nkd_loss, uskd_loss
from nkd_hf.losses.base import loss_inputs
from nkd_hf.models.architectures import is_architecture
from nkd_hf.recipe.plan import PlannedTrainingArguments
from nkd_hf.recipe.plan_costs import forward_gmacs
from nkd_hf.recipe.plan_models import open_student, open_teachers
from nkd_hf.recipe.yaml_file import read_config

PAGE = Path(__file__).parent / "IMAGENET.md"
CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
VALIDATION_IMAGES = {"ILSVRC/imagenet-1k": 50_000, "uoft-cs/cifar100": 10_000}
# GMACs a ms that a GPU keeps up over a whole step, in float32 with TF32 and in bf16: assumptions.
RATES = (10.0, 30.0)
# Images a second of one DataLoader worker: an assumption, too.
INPUT = 300.0
# What a row has and its baseline has not.
_OF_DISTILLATION = {"teacher", "teacher_args", "distillation_loss", "loss_args", "output_dir"}


class Row(NamedTuple):
    """One file of recipes/configs."""

    name: str
    title: str
    record: dict[str, list[str]]  # by the labels of its first lines
    recipe: RecipeArguments
    data: DataArguments
    training: PlannedTrainingArguments
    student_gmacs: float
    teacher_gmacs: float  # of one forward pass; 0 where there is no teacher

    @property
    def figures(self) -> tuple[float | None, float] | None:
        """Top-1 that was reported, in percent: baseline, where it is known, and result."""
        found = re.match(r"(?:baseline ([\d.]+), )?[^,;]+ ([\d.]+) \(top-1\)", self.record["paper"][0])
        return found and (found[1] and float(found[1]), float(found[2]))

    @property
    def launch(self) -> str:
        return self.record["launch"][0].partition(" (on the second machine")[0]

    @property
    def num_classes(self) -> int:
        return 100 if "cifar" in self.data.dataset_name else 1000

    def gmacs(self) -> tuple[float, float]:
        """GMACs of a training image: the student's, which are also the baseline's, and the teacher's."""
        # One that is named by its architecture is trained first, on as many images.
        trains_teacher = self.recipe.teacher is not None and is_architecture(self.recipe.teacher)
        return 3 * self.student_gmacs, (4 if trains_teacher else 1) * self.teacher_gmacs

    def hours(self, gmacs: float, rate: float) -> float:
        return self.data.num_train_images * self.training.num_train_epochs * gmacs / rate / 3.6e6


def read_row(path: Path) -> Row:
    title, record = read_record(path)
    types = (RecipeArguments, DataArguments, PlannedTrainingArguments)
    recipe, data, training = parse_args(types, args=["--config", str(path)])
    with torch.device("meta"):
        student, pixels = open_student(recipe, data)
        opened = open_teachers(recipe, data, student, pixels, [])
        teacher_gmacs = sum((forward_gmacs(teacher, wanted.size) for teacher, wanted in opened if teacher), start=0.0)
        return Row(
            path.stem, title, record, recipe, data, training, forward_gmacs(student, pixels.size), teacher_gmacs
        )


def read_record(path: Path) -> tuple[str, dict[str, list[str]]]:
    """The first lines of a configuration: its title, and what stands behind each label."""
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    record: dict[str, list[str]] = {}
    label = None
    for line in lines:
        if not line.startswith("#"):
            break
        if entry := re.match(r"# (\w+) +(.*)", line):
            label = entry[1]
            record.setdefault(label, []).append(entry[2])
        elif label is not None:
            record[label][-1] += " " + line.lstrip("# ")
    return first.removeprefix("# "), record


def read_rows() -> list[Row]:
    paths = (path for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("digits"))
    return [read_row(path) for path in sorted(paths, key=_order)]


def _order(path: Path) -> tuple:
    """NKD, USKD, then what is not the paper's own table: ViTKD beside NKD, CIFAR-100, and the rows of other papers."""
    name = path.stem
    return not name.startswith(("nkd", "uskd")), "cifar" in name, "vitkd" in name, path


def baselines(rows: list[Row]) -> dict[str, str]:
    """For each row the first one that has the same baseline."""
    first: dict[str, str] = {}
    result = {}
    for row in rows:
        settings = {key: value for key, (value, _) in read_config(CONFIGS / f"{row.name}.yaml").items()}
        key = repr(sorted((name, value) for name, value in settings.items() if name not in _OF_DISTILLATION))
        result[row.name] = first.setdefault(key, row.name)
    return result


def table_of_rows(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        images = VALIDATION_IMAGES[row.data.dataset_name]
        cells = ["not at hand", "", ""]
        if row.figures:
            baseline, result = row.figures
            error = 100 * math.sqrt(result / 100 * (1 - result / 100) / images)
            if baseline is None:
                cells = [f"{result:.2f}", "", f"{error:.2f}"]
            else:
                cells = [f"{baseline:.2f} -> {result:.2f}", f"{result - baseline:+.2f}", f"{error:.2f}"]
        batch = f"{row.recipe.num_processes} x {row.training.per_device_train_batch_size}"
        if row.training.gradient_accumulation_steps > 1:
            batch += f" x {row.training.gradient_accumulation_steps}"
        lines.append([f"`{row.name}`", *cells, batch, f"{row.training.num_train_epochs:g}"])
    columns = ["row", "top-1: baseline -> result", "gain", "standard error", "GPUs x batch", "epochs"]
    return markdown("Top-1 in percent", columns, lines)


def table_of_hours(rows: list[Row], rates: tuple[float, float] = RATES) -> str:
    lines, total = [], [0.0, 0.0]
    for row in rows:
        student, teacher = row.gmacs()
        cells = [f"{row.student_gmacs:.2f}", f"{row.teacher_gmacs:.2f}" if teacher else ""]
        for i, rate in enumerate(rates):
            both = row.hours(student + teacher, rate)
            total[i] += both
            cells += [_hours(row.hours(student, rate)), _hours(row.hours(teacher, rate)) if teacher else ""]
            cells += [_hours(both), _hours(both / row.recipe.num_processes)]
        workers = row.recipe.num_processes * row.training.dataloader_num_workers
        images = row.data.num_train_images * row.training.num_train_epochs
        # CIFAR's images are small.
        cells.append(_hours(images / INPUT / workers / 3600) if "cifar" not in row.data.dataset_name else "")
        lines.append([f"`{row.name}`", *cells])
    shared = baselines(rows)
    alone = [sum(row.hours(row.gmacs()[0], rate) for row in rows if shared[row.name] == row.name) for rate in rates]
    lines.append(["all rows", "", "", *(cell for hours in total for cell in ("", "", _hours(hours), "")), ""])
    lines.append([
        f"the {len(set(shared.values()))} different baselines", "", "",
        *(cell for hours in alone for cell in (_hours(hours), "", "", "")), "",
    ])  # fmt: skip
    columns = ["row", "GMACs, student", "teacher"]
    for name in ("float32", "bf16"):
        columns += [f"GPU-hours, {name}: student", "teacher", "together", "hours"]
    title = (
        f"By arithmetic, not measured, at an assumed {rates[0]:g} GMACs a ms and GPU in float32 (TF32) and "
        f"{rates[1]:g} in bf16, and {INPUT:g} images a second and worker; hours are those of the row's GPUs"
    )
    return markdown(title, [*columns, "hours of input"], lines)


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours < 10 else f"{hours:,.0f}"


def table_of_first_losses(rows: list[Row]) -> str:
    """The loss of a student that takes all classes for equally likely, by the losses themselves."""
    lines = {}
    for row in rows:
        # A teacher that knows nothing, and one that is certain.
        labels = torch.tensor([0, 1])
        teachers = torch.zeros(2, row.num_classes), torch.zeros(2, row.num_classes).scatter(1, labels[:, None], 100.0)
        task, low = first_loss(row, teachers[0], labels)
        _, high = first_loss(row, teachers[1], labels)
        loss = " to ".join(dict.fromkeys((f"{low:.2f}", f"{high:.2f}")))
        vitkd = ", and ViTKD's" if "vitkd" in row.recipe.distillation_loss else ""
        lines.setdefault((f"{task:.2f}", f"{loss}{vitkd}"), []).append(f"`{row.name}`")
    columns = ["rows", "`task`", "`loss`"]
    table = [[", ".join(names), *figures] for figures, names in lines.items()]
    return markdown("Of a student that takes all classes for equally likely", columns, table)


def first_loss(row: Row, teacher_logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Task loss and whole loss of a student whose logits are equal, without ViTKD's part."""
    student_logits = torch.zeros_like(teacher_logits)
    inputs = {"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels}
    task, total = math.log(row.num_classes), 0.0
    for name, loss_class in row.recipe.losses.items():
        args = row.recipe.loss_args if len(row.recipe.losses) == 1 else row.recipe.loss_args[name]
        if name == "uskd":
            total += uskd_loss(student_logits, student_logits, labels, **args).item()
        elif name == "sdnkd":
            # A region is like another where all logits are equal.
            args = {key: value for key, value in args.items() if key != "scales"}
            total += sd_nkd_loss(student_logits[..., None], teacher_logits[..., None], labels, **args).item()
        elif name != "vitkd":
            loss = loss_class(**args)
            task *= loss.task_weight
            given = {key: value for key, value in inputs.items() if key in loss_inputs(loss)}
            total += sum(value.item() for value in loss(**given).values())
    return task, task + total


def commands(rows: list[Row]) -> str:
    shared = baselines(rows)
    parts = []
    for row in rows:
        parts.append(f"### `{row.name}`")
        parts.append(f"{row.title}.")
        facts = [f"figures: {text}" for text in row.record["paper"]]
        facts += [f"teacher: {text}" for text in row.record.get("teacher", [])]
        facts += [f"student: {text}" for text in row.record["student"]]
        facts += [f"differs: {text}" for text in row.record.get("differs", [])]
        if shared[row.name] != row.name:
            facts.append(f"baseline: that of `{shared[row.name]}`, which has the same settings")
        parts.append("\n".join(f"- {fact}" for fact in facts))
        lines = [row.launch]
        if shared[row.name] == row.name:
            lines.append(f"{row.launch} --distillation_loss none --output_dir {row.training.output_dir}_baseline")
        parts.append("\n".join(["```bash", *lines, "```"]))
    return "\n\n".join(parts)


PARTS = {"rows": table_of_rows, "hours": table_of_hours, "first losses": table_of_first_losses, "commands": commands}


def rebuilt(page: str, rows: list[Row]) -> str:
    def fill(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n\n{PARTS[match[1]](rows)}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(PARTS)}) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is not what would be written")
    parser.add_argument(
        "--rate", type=float, nargs=2, metavar=("FLOAT32", "BF16"),
        help=f"print the hours at these GMACs a ms and GPU, and write nothing (the page's: {RATES[0]:g} {RATES[1]:g})",
    )  # fmt: skip
    options = parser.parse_args(args)
    if options.rate and min(options.rate) <= 0:
        parser.error(f"--rate must be positive, got {options.rate}")
    rows = read_rows()
    if options.rate:
        print(table_of_hours(rows, tuple(options.rate)))
        return
    before = PAGE.read_text(encoding="utf-8")
    after = rebuilt(before, rows)
    if options.check:
        sys.exit(0 if before == after else f"{PAGE} is not of recipes/configs: run python benchmarks/imagenet_page.py")
    PAGE.write_text(after, encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
