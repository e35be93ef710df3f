"""Writes int8 versions of an ONNX model with onnxruntime's static quantisation."""

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .runtime import INPUT, open_session, run_session

if TYPE_CHECKING:
    pass

# The calibrations of each activation's range, in the order in which they are tried.
METHODS = ("minmax", "percentile")
# Part of an activation's values, in percent, that the percentile method represents.
_PERCENTILE = 99.99
# These operators use the numbers of their inputs as they are. onnxruntime does not quantise one of them alone.
_FREE = {"Clip", "Flatten", "Gather", "MaxPool", "Pad", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
         "Unsqueeze"}  # fmt: skip
# Number of images that rank the nodes.
_RANKING_IMAGES = 32


class QdqWriter:
    """Calibrates an ONNX model once for each method, and writes it with any choice of nodes in int8.

    Weights are signed, symmetric and per output channel; activations are unsigned with a zero point. Weights use 7 of their
    8 bits (`reduce_range`): on x86 without VNNI, sums of two products of 8 bits saturate, and the accuracy would depend on
    the CPU. quant_pre_process infers shapes, and folds constants and the BatchNorms that torch's exporter did not
    fold.

    Args:
        path: the float model.
        calibration: batches of `pixel_values` [N, 3, H, W], which are read once for each method.
        folder: folder for temporary files.

    Attributes:
        path (`Path`): path of the int8 file.
    """

    def __init__(self, path: Path, calibration: Iterable[dict[str, Any]], folder: Path):
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._calibration = calibration
        self._folder = folder
        self.path = folder / "int8.onnx"
        self._metadata = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
        self._prepared = folder / "prepared.onnx"
        quant_pre_process(path, self._prepared)
        self._nodes = [node for node in onnx.load(self._prepared).graph.node if node.op_type not in _FREE]

    def write(self, method: str, float_nodes: Sequence[str] = (), only: str | None = None) -> Path:
        """Writes the model in int8.

        Args:
            method: one of `METHODS`.
            float_nodes: names of nodes that stay in float.
            only: the name of the only node in int8; None for all nodes but `float_nodes`.

        Returns:
            `Path`: `path`, which the next call replaces.
        """
        from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

        with _quiet_quantizer():
            quantize_static(
                self._prepared,
                self.path,
                _Batches(self._calibration),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=None if only is None else [only],
                nodes_to_exclude=list(float_nodes),
                calibrate_method=CalibrationMethod.MinMax if method == "minmax" else CalibrationMethod.Percentile,
                extra_options={
                    "CalibPercentile": _PERCENTILE,
                    "CalibTensorRangeSymmetric": False,
                    # Read one batch at a time: otherwise the histograms need the activations of all batches at once.
                    "CalibStridedMinMax": 1,
                },
                calibration_cache_path=self._folder / f"{method}.json",
            )
        self._set_metadata()
        return self.path

    def rank_nodes(self, method: str) -> list[str]:
        """Returns the names of the nodes that int8 changes, the one with the largest error of the logits first.

        The error is the mean square of the change of the logits of some calibration images when that node alone is in int8.
        """
        images = _first_images(self._calibration, _RANKING_IMAGES)
        expected = run_session(open_session(self._prepared), images)
        errors = {}
        for node in self._nodes:
            logits = run_session(open_session(self.write(method, only=node.name)), images)
            error = float(np.square(logits - expected).mean())
            if error > 0:
                errors[node.name] = error
        return sorted(errors, key=errors.get, reverse=True)

    def _set_metadata(self) -> None:
        """Restores the metadata of the float file, since quantize_static adds entries of its own."""
        import onnx

        proto = onnx.load(self.path)
        onnx.helper.set_model_props(proto, self._metadata)
        onnx.save(proto, self.path)


class _Batches:
    """Reads batches for onnxruntime as a CalibrationDataReader, one range at a time."""

    def __init__(self, batches: Iterable[dict[str, Any]]):
        self._batches = batches
        self._iterator = iter(())
        self._left = 0

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        if start_index == 0:
            self._iterator = iter(self._batches)
        self._left = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._left == 0:
            return None
        self._left -= 1
        return {INPUT: np.asarray(next(self._iterator)["pixel_values"], dtype=np.float32)}


def _first_images(batches: Iterable[dict[str, Any]], number: int) -> np.ndarray:
    arrays, images = [], 0
    for batch in batches:
        arrays.append(np.asarray(batch["pixel_values"], dtype=np.float32))
        images += len(arrays[-1])
        if images >= number:
            break
    return np.concatenate(arrays)[:number]


@contextlib.contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Hides the lines that onnxruntime's quantizer prints and logs for each call."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
