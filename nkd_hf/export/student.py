"""Exports a saved student into its folder: `onnx/model.onnx`, `onnx/model_int8.onnx` and the preprocessing."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ..models.saving import INT8_FILE, ONNX_FILE
from .int8 import Int8Report, quantize
from .metadata import save_preprocessing
from .onnx import OnnxReport, export_onnx


class StudentExport(NamedTuple):
    """The reports of [`export_student`]; `int8` is None without `calibration`."""

    onnx: OnnxReport
    int8: Int8Report | None


def export_student(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    pixel_values: Tensor,
    *,
    calibration: Iterable[dict[str, Any]] | None = None,
    labelled: Iterable[dict[str, Any]] | None = None,
    max_drop: float = 1.0,
) -> StudentExport:
    """Writes the ONNX files of a saved student beside its weights, where `push_student` finds them.

    An int8 file of an earlier export is removed.

    Args:
        model: the student.
        folder: the folder of the saved student.
        pixel_values: see [`~nkd_hf.export.onnx.export_onnx`].
        calibration, labelled: see [`~nkd_hf.export.int8.quantize`]. With them, int8 is tried.
        max_drop: percentage points of top-1 that int8 may lose.

    Returns:
        [`StudentExport`]

    Raises:
        ValueError, MissingExtraError: as in [`~nkd_hf.export.onnx.export_onnx`] and [`~nkd_hf.export.int8.quantize`].

    Example:

    ```python
    export = export_student(student, "outputs/distill_cnn/student", images, calibration=train, labelled=validation)
    print(export.onnx.max_difference, export.int8.kept, export.int8.drop)
    ```
    """
    if (calibration is None) != (labelled is None):
        raise ValueError("calibration and labelled must come together, got one of them. Pass both for int8, or none.")
    folder = Path(folder)
    report = export_onnx(model, folder / ONNX_FILE, pixel_values)
    (folder / INT8_FILE).unlink(missing_ok=True)
    save_preprocessing(model, folder)
    if calibration is None:
        return StudentExport(report, None)
    return StudentExport(report, quantize(report.path, calibration, labelled, max_drop, folder / INT8_FILE))
