"""Quantises an ONNX classifier to int8, and keeps the result if its accuracy is good enough."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import TemporaryFolder, write_whole
from .qdq import METHODS, QdqWriter
from .runtime import check_extra, measure_accuracy, open_session

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Int8Report:
    """The report of an int8 version of an ONNX file: of the written version, or of the best version if none was
    written.

    Attributes:
        kept (`bool`): whether the file was written.
        path (`Path`): the path of the file, which does not exist if it was not kept.
        accuracy_float (`float`): top-1 of the float file, a fraction.
        accuracy_int8 (`float`): top-1 of the int8 file, a fraction.
        images (`int`): labelled images, on which both were measured.
        method (`str`): the calibration of the activations' ranges, `minmax` or `percentile`.
        float_nodes (`tuple[str, ...]`): names of the ONNX nodes that stay in float, the most sensitive one first.
        size_bytes (`int`): size of the file.
        reason (`str` or None): the reason why the file was not kept.
    """

    kept: bool
    path: Path
    accuracy_float: float
    accuracy_int8: float
    images: int
    method: str
    float_nodes: tuple[str, ...]
    size_bytes: int
    reason: str | None = None

    @property
    def drop(self) -> float:
        """The top-1 that int8 loses, in percentage points; negative if it gains."""
        return 100 * (self.accuracy_float - self.accuracy_int8)


def quantize(
    path: str | os.PathLike,
    calibration: Iterable[dict[str, Any]],
    labelled: Iterable[dict[str, Any]],
    max_drop: float = 1.0,
    output: str | os.PathLike | None = None,
) -> Int8Report:
    """Writes an int8 version of an ONNX file if it loses little accuracy.

    It tries versions until one loses at most `max_drop`. The first has the ranges of the activations by minimum and
    maximum, the second by percentiles. The others take the better of these two, and keep the 1, 2, 4, ... most
    sensitive nodes in float, up to half of the nodes. The sensitivity of a node is measured (see
    [`~nkd_hf.export.qdq.QdqWriter.rank_nodes`]).

    Args:
        path: the float file that [`~nkd_hf.export.onnx.export_onnx`] writes.
        calibration: batches with `pixel_values` [N, 3, H, W] float32 of some 200 to 500 training images: a list or a DataLoader,
            which can be read several times.
        labelled: batches with `pixel_values` and `labels` [N] of the whole validation split, numbered as the model's classes;
            it is read once for each version.
        max_drop: percentage points of top-1 that int8 may lose.
        output: the int8 file; None means `model_int8.onnx` beside a `model.onnx`. If no version is good enough, an
            existing file of that name is removed, since it belongs to another float file.

    Returns:
        [`Int8Report`]

    Raises:
        ValueError: `max_drop` is negative; the batches can be read only once; a label is no class of the model.
        MissingExtraError: onnx, onnxscript or onnxruntime is missing.

    Example:

    ```python
    report = quantize("student/onnx/model.onnx", calibration_loader, validation_loader)
    print(report.kept, report.accuracy_float, report.accuracy_int8, report.float_nodes)
    ```
    """
    check_extra()
    for name, batches in (("calibration", calibration), ("labelled", labelled)):
        if isinstance(batches, Iterator):
            raise ValueError(
                f"{name} must be a list or a DataLoader, which can be read again, got a {type(batches).__name__}. Pass "
                f"list({name})."
            )
    if not max_drop >= 0:
        raise ValueError(f"max_drop must be 0 points or more, got {max_drop:g}.")
    path = Path(path)
    output = path.with_stem(f"{path.stem}_int8") if output is None else Path(output)
    accuracy_float, images = measure_accuracy(open_session(path), labelled)
    with TemporaryFolder(".nkd_hf-int8-", path.parent) as folder:
        writer = QdqWriter(path, calibration, Path(folder))

        def measure(method: str, float_nodes: Sequence[str]) -> Int8Report:
            file = writer.write(method, float_nodes)
            accuracy, _ = measure_accuracy(open_session(file), labelled)
            size = file.stat().st_size
            report = Int8Report(True, output, accuracy_float, accuracy, images, method, tuple(float_nodes), size)
            logger.info("int8 by %s, %d nodes in float: loses %.2f points", method, len(float_nodes), report.drop)
            return report

        tried = _try_versions(writer, measure, max_drop)
        if _is_good(tried[-1], max_drop):
            write_whole(output, writer.path.read_bytes())
            return tried[-1]
    output.unlink(missing_ok=True)
    best = max(tried, key=lambda report: report.accuracy_int8)
    reason = (
        f"int8 must lose at most {max_drop:g} points of top-1, and the best of {len(tried)} versions ({best.method}, "
        f"{len(best.float_nodes)} nodes in float) loses {best.drop:.2f}"
    )
    return dataclasses.replace(best, kept=False, reason=reason)


def _try_versions(writer: QdqWriter, measure: Callable[..., Int8Report], max_drop: float) -> list[Int8Report]:
    """Tries versions, and returns their reports; if one is good enough, it is the last one."""
    tried = []
    for method in METHODS:
        tried.append(measure(method, ()))
        if _is_good(tried[-1], max_drop):
            return tried
    method = max(tried, key=lambda report: report.accuracy_int8).method
    nodes = writer.rank_nodes(method)
    count = 1
    while 2 * count <= len(nodes):
        tried.append(measure(method, nodes[:count]))
        if _is_good(tried[-1], max_drop):
            break
        count *= 2
    return tried


def _is_good(report: Int8Report, max_drop: float) -> bool:
    # Rounding removes the floating-point error of a difference of fractions.
    return round(report.drop, 9) <= max_drop
