"""Opens ONNX files with onnxruntime, and checks that its packages are installed."""

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INPUT, OUTPUT = "pixel_values", "logits"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INSTALL = "Run `pip install 'nkd_hf[onnx]'`."


def check_extra() -> None:
    """Checks that the packages of the extra `onnx` are installed.

    Raises:
        MissingExtraError: a package is missing.
    """
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingExtraError(
                f"the package {name} must be installed to export to ONNX, got {type(error).__name__}. {_INSTALL}"
            ) from error


def describe_missing_extra() -> str | None:
    """Names the packages of the extra `onnx` that are not installed, without importing them; None if all are."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} must be installed for it. {_INSTALL}" if missing else None


def open_session(source: str | Path | bytes, threads: int | None = None) -> "InferenceSession":
    """Opens an ONNX model on the CPU.

    Args:
        source: the file, or its content.
        threads: number of threads of a run; None uses one for each core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # only errors
    # Threads that spin between two runs would slow the other models of a comparison.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    source = str(source) if isinstance(source, Path) else source
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_session(session: "InferenceSession", pixel_values: Any) -> np.ndarray:
    """Returns the logits [N, C] float32 of pixels [N, 3, H, W], which may be a tensor or an array."""
    return session.run([OUTPUT], {INPUT: np.asarray(pixel_values, dtype=np.float32)})[0]


def measure_accuracy(session: "InferenceSession", batches: Iterable[dict[str, Any]]) -> tuple[float, int]:
    """Measures top-1 on labelled batches; images whose logits have NaN count as wrong.

    Returns:
        The fraction of hits, and the number of images.

    Raises:
        ValueError: there are no images, or a label is no class of the model.
    """
    hits = images = 0
    for batch in batches:
        labels = np.asarray(batch["labels"])
        logits = run_session(session, batch["pixel_values"])
        if labels.ndim != 1 or not ((labels >= 0) & (labels < logits.shape[1])).all():
            raise ValueError(
                f"labels must be [N] class numbers from 0 to {logits.shape[1] - 1}, got {labels.shape} up to "
                f"{labels.max()}. Number the classes as the model does."
            )
        hits += int(((logits.argmax(axis=1) == labels) & ~np.isnan(logits).any(axis=1)).sum())
        images += len(labels)
    if images == 0:
        raise ValueError("labelled must hold one image at least, got none. Pass the batches of a validation split.")
    return hits / images, images
