"""Prepares `nkd-hf distill`: opens data and models once, reads a sample of the images, and sets the defaults."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, IterableDatasetDict
from torch import nn

from ..data.arguments import DataArguments
from ..data.decoding import read_image, read_sample
from ..data.labels import label_names
from ..errors import BadSampleError
from ..models.architectures import is_architecture
from ..models.image_sizes import takes_img_size
from ..models.preprocessing import load_image_processor, read_preprocessing
from ..models.student_preprocessing import check_preprocessing
from ..models.students import create_student
from ..models.teacher import Teacher
from ..trainer.agreement import decide_in_first
from ..trainer.arguments import DistillationTrainingArguments
from .arguments import RecipeArguments
from .build import create_model, open_data, runs_teacher
from .checks import check_names
from .defaults import BY_DATA_AND_MODELS, set_defaults
from .run_folder import is_trained, read_record
from .teacher_accuracy import read_geometry
from .teacher_start import open_named_teacher

# Images of each split that are opened before the first step.
_SAMPLE = 64


@dataclass
class Prepared:
    """Data and teacher of a run before it begins.

    Attributes:
        splits: the data; None for a run that has trained all models and needs only its report.
        teacher: the pretrained teacher, if there is one.
        inherited: the settings of the student's preprocessing that come from the teacher.
    """

    splits: DatasetDict | IterableDatasetDict | None = None
    teacher: Teacher | None = None
    inherited: list[str] = field(default_factory=list)


def prepare(
    recipe: RecipeArguments, data: DataArguments, training: DistillationTrainingArguments, given: set[str]
) -> Prepared:
    """Opens data and models, reads a sample of the images, and sets the defaults that depend on data and models.

    Args:
        recipe, data, training: the arguments of the run; the defaults are set in them.
        given: the names of the arguments that the user has set.

    Returns:
        [`Prepared`]

    Raises:
        ValueError: images cannot be read, or a model cannot be opened.
    """
    folder = Path(training.output_dir)
    record, is_over = decide_in_first(lambda: (read_record(folder, training), is_trained(folder)))
    if record and is_over:
        # The defaults come from the record, since the report needs no models and they may be deleted.
        for arguments in (recipe, data, training):
            for name in BY_DATA_AND_MODELS - given & vars(arguments).keys() & record.keys():
                setattr(arguments, name, record[name])
        return Prepared()
    check_names(recipe)
    splits = open_data(data, training)
    if not data.streaming and data.on_bad_image == "error":
        for name, split in splits.items():
            _check_sample(split, name, training.seed)
    student = create_model(recipe, recipe.student, recipe.student_args, {0: "a", 1: "b"}, training.seed)
    teacher = None
    if runs_teacher(recipe) and not recipe.names_new_teacher:
        teacher = open_named_teacher(recipe, dict(enumerate(label_names(splits))), training)
    models: dict[str, nn.Module] = {"student": student}
    if teacher is not None and recipe.finetune_teacher != "never":
        models["teacher"] = teacher
    with_batch_norm = [
        name for name, model in models.items() if any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    ]
    # A run that continues keeps its preprocessing.
    fixed = given | {name for name in recipe.preprocessing if record and record.get(name) is None}
    inherited = []
    size = max(read_preprocessing(student, load_image_processor(student)).size)
    if teacher is not None and is_architecture(recipe.student):
        smaller = None if "image_size" in fixed else _find_smaller_size(recipe, teacher, size)
        if smaller is not None:
            recipe.image_size = size = smaller
            inherited = ["image_size"]
        inherited += _inherit_preprocessing(recipe, teacher, fixed)
    num_images = None if data.streaming else len(splits["train"])
    set_defaults(recipe, data, training, given, num_images, size, with_batch_norm)
    return Prepared(splits, teacher, inherited)


def _find_smaller_size(recipe: RecipeArguments, teacher: Teacher, size: int) -> int | None:
    """Returns the teacher's input size for a student with a larger default, if neither user nor architecture fixes the
    size.

    The images need no more pixels than the teacher sees. Of several teachers, the one with the largest input counts.

    Args:
        recipe: names an architecture as the student.
        teacher: the pretrained teacher.
        size: the default size of the student's architecture.

    Returns:
        The height and width; None where the student keeps its size.
    """
    if recipe.image_size is not None or takes_img_size(recipe.student):
        return None
    sides = {member.preprocessing and member.preprocessing.size for member in teacher.members}
    if any(side is None or side[0] != side[1] for side in sides):
        return None
    largest = max(height for height, _ in sides)
    if largest >= size:
        return None
    try:
        create_student(recipe.student, num_labels=2, model_args=recipe.student_args, image_size=largest)
    except ValueError:  # a size that the architecture does not take
        return None
    return largest


def _inherit_preprocessing(recipe: RecipeArguments, teacher: Teacher, fixed: set[str]) -> list[str]:
    """Sets the teacher's mean, std, crop and interpolation for a student with random weights, and returns their names.

    Random weights fit any preprocessing, and the teacher is most accurate with its own. Of several teachers, the
    student gets the settings in which all agree.
    """
    found = [_read_settings(member) for member in teacher.members]
    inherited = [
        name
        for name, value in found[0].items()
        if name not in fixed and all(each.get(name) == value for each in found)
    ]
    for name in inherited:
        setattr(recipe, name, found[0][name])
    return inherited


def _read_settings(teacher: Teacher) -> dict[str, Any]:
    """Reads the values of a teacher's mean, std, crop and interpolation that a student can have."""
    if teacher.preprocessing is None:
        return {}
    pixels = teacher.preprocessing
    settings = {
        "image_mean": [round(value, 6) for value in pixels.mean],
        "image_std": [round(value, 6) for value in pixels.std],
        "crop_pct": read_geometry(load_image_processor(teacher.model))["crop_pct"],
        "interpolation": pixels.interpolation,
    }
    usable = {}
    for name, value in settings.items():
        try:
            check_preprocessing(**dict.fromkeys(("image_size", *settings)) | {name: value})
        except ValueError:
            continue
        if value is not None:
            usable[name] = value
    return usable


def _check_sample(split: Any, name: str, seed: int) -> None:
    """Opens some images of a split, and raises ValueError that names the images that cannot be read."""
    rows = sorted(np.random.default_rng(seed).permutation(len(split))[:_SAMPLE].tolist())
    faults = list(_find_faults(split, rows, name))
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"the {name} split must have images that can be read, got {len(faults)} of {len(rows)} that cannot: "
            f"{'; '.join(faults[:3])}{more}. Repair or remove them, or set on_bad_image to skip"
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
