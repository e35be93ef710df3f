"""Distils a pretrained teacher into a student for a user's own images, from data to deployment."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate import PartialState
from torch import nn

from ..data.arguments import DataArguments
from ..data.decoding import read_image, read_sample
from ..data.loading import load_image_dataset
from ..errors import BadSampleError
from ..models.architectures import is_architecture
from ..models.preprocessing import load_image_processor, read_preprocessing
from ..models.teacher_loading import load_teacher
from ..options import suggest
from ..trainer.arguments import DistillationTrainingArguments
from .announcement import describe_run
from .arguments import RecipeArguments
from .build import create_model, runs_teacher, set_up_process
from .defaults import fixed_defaults, set_defaults
from .deployment import deploy, write_card
from .recipe import Recipe
from .report import say
from .run_folder import RESULTS
from .stage import find_trained

# Images of each split that are opened before the first step.
_SAMPLE = 64
# Bytes of a trained model in its folder: weights, two checkpoints and one that is being written, with AdamW's two moments.
_BYTES_PER_PARAMETER = 4 + 3 * 12


@dataclass
class ExportArguments:
    """How a student is exported.

    Raises:
        ValueError: a value is out of its range.
    """

    max_int8_drop: float = field(
        default=1.0, metadata={"help": "Points of top-1 that the int8 version of the student may lose."}
    )

    def __post_init__(self):
        if not self.max_int8_drop >= 0:
            raise ValueError(
                f"max_int8_drop must be 0 points or more, got {self.max_int8_drop}. Set it to 1, for example"
            )


DISTILL_ARGUMENTS = (RecipeArguments, DataArguments, DistillationTrainingArguments, ExportArguments)


def distill(
    dataset_name: str,
    *,
    student: str,
    output_dir: str | os.PathLike,
    teacher: str | list[str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Distils a teacher into a student for images of one's own: what `nkd-hf distill` does, as a function.

    The teacher is fine-tuned first if its classes are not those of the data. The student is saved, exported to ONNX and int8,
    measured and described in `report.html`. A call that was interrupted continues when it is made again.

    Args:
        dataset_name: a folder of images, a Hub id, or `digits`.
        student: Hub id or folder (pretrained), or the name of an architecture (random weights).
        output_dir: for the results.
        teacher: Hub id, folder or name of an architecture; a list of Hub ids and folders for several as one; None for a loss without a teacher (`uskd`).
        **arguments: any argument of `nkd-hf distill`, by its name.

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        ValueError: an argument is unknown, or arguments, data and models do not fit each other. Nothing was trained.
        SystemExit: with a message, when a file cannot be written.

    Example:

    ```python
    results = distill("photos", teacher="timm/convnext_tiny.in12k_ft_in1k", student="timm/mobilenetv4_conv_small.e2400_r224_in1k", output_dir="out")
    print(results["models"]["student"]["top1"])
    ```
    """
    given = {
        "dataset_name": dataset_name,
        "student": student,
        "teacher": teacher,
        "output_dir": str(output_dir),
        **arguments,
    }
    names = {field.name for cls in DISTILL_ARGUMENTS for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(given.keys() - names):
        raise ValueError(f"distill has no argument {unknown[0]!r}{suggest(unknown[0], names)}")
    values = fixed_defaults(set(given)) | given
    parts = [
        cls(
            **{
                field.name: values[field.name]
                for field in dataclasses.fields(cls)
                if field.init and field.name in values
            }
        )
        for cls in DISTILL_ARGUMENTS
    ]
    return run_distillation(*parts, given=set(given))


def run_distillation(
    recipe: RecipeArguments,
    data: DataArguments,
    training: DistillationTrainingArguments,
    export: ExportArguments,
    given: set[str],
) -> dict[str, Any]:
    """Runs `nkd-hf distill` with parsed arguments.

    Args:
        recipe, data, training, export: the arguments; those that the user has not set get their defaults.
        given: the names of the arguments that the user has set.

    Returns:
        `dict`: the content of `results.json`.

    Raises:
        ValueError: arguments, data and models do not fit each other.
        SystemExit: with a message, when a file cannot be written or a push failed.
    """
    if recipe.distillation_loss == "none":
        raise ValueError(
            "distillation_loss must be a loss, got 'none'. Set compare_with_baseline to true for the same training without one"
        )
    prepare(recipe, data, training, given)
    run = Recipe(recipe, data, training)
    if not run.is_trained:
        _check_disk(run)
        run.check()
        say(training, "\n".join(describe_run(run)))
    run.train_teacher()
    run.train_baseline()
    run.train_student()
    if not run.is_trained:
        if training.should_save:
            deploy(run, export.max_int8_drop)
            write_card(run)
        PartialState().wait_for_everyone()
    run.report()
    return json.loads((run.folder / RESULTS).read_text(encoding="utf-8"))


def prepare(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments, given: set[str]
) -> None:
    """Opens data and models, checks what a recipe does not check, and sets the defaults that depend on them.

    Raises:
        ValueError: images cannot be read, or a model cannot be opened.
    """
    set_up_process(training)
    with training.main_process_first(desc="loading the data"):
        splits = load_image_dataset(data, training.seed)
    if not data.streaming and data.on_bad_image == "error":
        for name, split in splits.items():
            _check_sample(split, name, training.seed)
    student = create_model(recipe, recipe.student, recipe.student_args, {0: "a", 1: "b"}, training.seed)
    size = max(read_preprocessing(student, load_image_processor(student)).size)
    num_images = None if data.streaming else len(splits["train"])
    models: dict[str, nn.Module] = {"student": student}
    is_tunable = runs_teacher(recipe) and len(recipe.teachers) == 1 and recipe.teacher_prompts is None
    needs_rate = recipe.finetune_teacher != "never" and "teacher_learning_rate" not in given
    if is_tunable and needs_rate and not is_architecture(recipe.teacher):
        hub = {"allow_pickle": recipe.allow_pickle, "trust_remote_code": recipe.trust_remote_code}
        models["teacher"] = load_teacher(recipe.teacher, **hub).model
    with_batch_norm = [
        name for name, model in models.items() if any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    ]
    set_defaults(recipe, data, training, given, num_images, size, with_batch_norm)


def _check_disk(run: Recipe) -> None:
    """Raises ValueError if the models that are yet to be trained do not fit on the disk."""
    student = run.create(run.args.student, run.args.student_args)
    needed = 0
    for name in run.stages:
        if not run.goes_on or find_trained(run.folder / name) is None:
            model = run.create_teacher() if name == "teacher" else student
            needed += _BYTES_PER_PARAMETER * model.num_parameters()
    existing = next(path for path in (run.folder, *run.folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"output_dir must have {needed / 2**30:.2f} GiB of free disk for the checkpoints, got {free / 2**30:.2f} GiB in "
            f"{existing}. Free some, or set another output_dir"
        )


def _check_sample(split: Any, name: str, seed: int) -> None:
    """Opens some images of a split, and raises ValueError with those that cannot be read."""
    rows = sorted(np.random.default_rng(seed).permutation(len(split))[:_SAMPLE].tolist())
    faults = list(_find_faults(split, rows, name))
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"the {name} split must have images that can be read, got {len(faults)} of {len(rows)} that cannot: "
            f"{'; '.join(faults[:3])}{more}. Mend or remove them, or set on_bad_image to skip"
        )


def _find_faults(split: Any, rows: list[int], name: str) -> Iterator[str]:
    for row in rows:
        sample = split[row]
        path = (sample["image"] or {}).get("path")
        try:
            read = read_sample if "label" in sample else read_image
            read(sample, f"row {row} of {name}" + (f" ({path})" if path else ""))
        except BadSampleError as error:
            yield str(error)
