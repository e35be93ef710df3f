"""Exports a classifier to ONNX, and checks the file against PyTorch."""

import copy
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import reason
from ..files import write_whole
from .metadata import read_metadata
from .runtime import INPUT, OUTPUT, check_extra, open_session, run_session

if TYPE_CHECKING:
    from onnx import ModelProto

# The largest difference of logits up to 1. For larger logits, it is a fraction of the largest one.
TOLERANCE = 1e-4
# protobuf limits a file to 2 GiB. Larger weights would need a second file.
_MAX_BYTES = 2**31 - 2**24


@dataclass(frozen=True)
class OnnxReport:
    """The report of a written ONNX file.

    Attributes:
        path (`Path`): path of the file.
        size_bytes (`int`): size of the file.
        max_difference (`float`): the largest difference to PyTorch's logits, divided by the largest logit where that is
            above 1.
        images (`int`): images of the largest batch that was compared.
    """

    path: Path
    size_bytes: int
    max_difference: float
    images: int


def export_onnx(model: PreTrainedModel, path: str | os.PathLike, pixel_values: Tensor) -> OnnxReport:
    """Writes a classifier as one ONNX file, if its logits in onnxruntime are PyTorch's.

    The input is `pixel_values` [batch, 3, H, W] float32, the output `logits` [batch, C] float32, for batches of any size.
    The exporter of torch folds each BatchNorm into the convolution before it.
    [`~nkd_hf.export.metadata.read_metadata`] describes the metadata.

    Args:
        model: any `*ForImageClassification` with known preprocessing. It is not changed, and stays on its device.
        path: the file, which is replaced if it exists; its folder is made.
        pixel_values: [N, 3, H, W] float32 preprocessed images, N > 1. Batches of 1, 5 and N of them are compared.

    Returns:
        [`OnnxReport`]

    Raises:
        ValueError: the model cannot be exported, is too large for one file, or has other logits in onnxruntime than in
            PyTorch.
        MissingExtraError: onnx, onnxscript or onnxruntime is missing.

    Example:

    ```python
    model = AutoModelForImageClassification.from_pretrained("outputs/distill_cnn/student")
    images = load_image_processor(model)(list_of_images, return_tensors="pt")["pixel_values"]
    print(export_onnx(model, "outputs/distill_cnn/student/onnx/model.onnx", images).max_difference)
    ```
    """
    check_extra()
    if pixel_values.ndim != 4 or len(pixel_values) < 2:
        raise ValueError(
            f"pixel_values must be [N, 3, H, W] with N > 1, got {list(pixel_values.shape)}. Pass a batch of images."
        )
    size = sum(weight.numel() * 4 for weight in model.state_dict().values())
    if size > _MAX_BYTES:
        raise ValueError(f"the weights must take less than 2 GiB for one ONNX file, got {size / 2**30:.1f} GiB.")
    metadata = read_metadata(model)
    pixel_values = pixel_values.to("cpu", torch.float32)
    # The model is copied, since the caller's may be in training mode or on another device.
    logits = _Logits(copy.deepcopy(model).to("cpu", torch.float32)).eval()
    content = _convert(logits, pixel_values, metadata, describe_architecture(model)).SerializeToString()
    difference = _compare(logits, content, pixel_values)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the logits of {describe_architecture(model)} in onnxruntime must be within {TOLERANCE:g} of PyTorch's, got a "
            f"difference of {difference:.2g}. No ONNX file was written: deploy the PyTorch model."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return OnnxReport(path, len(content), difference, len(pixel_values))


def describe_architecture(model: PreTrainedModel) -> str:
    """Returns the architecture's name of one of timm's models, or the class of any other model."""
    return getattr(model.config, "architecture", None) or type(model).__name__


class _Logits(nn.Module):
    """A model whose output is the tensor of its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def _convert(logits: _Logits, pixel_values: Tensor, metadata: dict[str, str], name: str) -> "ModelProto":
    import onnx

    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                logits,
                (pixel_values,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: "batch"}},
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"{name} cannot be exported to ONNX ({type(cause).__name__}: {reason(cause)}). Take another architecture."
        ) from error
    proto = program.model_proto
    _remove_traces(proto)
    onnx.helper.set_model_props(proto, metadata)
    return proto


def _remove_traces(proto: "ModelProto") -> None:
    """Removes notes of the exporter, which contain paths of this machine and are larger than a small model."""
    graph = proto.graph
    proto.doc_string = graph.doc_string = ""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


class _quiet_exporter(warnings.catch_warnings):
    """Hides the warnings of torch's exporter, which are meant for its authors."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        self._level = logging.getLogger("torch.onnx").level
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    def __exit__(self, *args):
        logging.getLogger("torch.onnx").setLevel(self._level)
        return super().__exit__(*args)


def _compare(logits: _Logits, content: bytes, pixel_values: Tensor) -> float:
    """Returns the largest difference between PyTorch's logits and onnxruntime's."""
    session = open_session(content)
    differences = []
    for batch in (pixel_values[:1], pixel_values[:5], pixel_values):
        with torch.inference_mode():
            expected = logits(batch).numpy()
        scale = max(1.0, float(np.abs(expected).max()))
        differences.append(float(np.abs(run_session(session, batch) - expected).max()) / scale)
    return float(np.max(differences))  # NaN where one of them is NaN
