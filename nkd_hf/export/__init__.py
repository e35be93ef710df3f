"""Exports a trained student for deployment: ONNX, int8 and latency. It needs the extra `nkd_hf[onnx]`."""

from .int8 import Int8Report, quantize
from .latency import measure_latency
from .onnx import OnnxReport, export_onnx
from .student import StudentExport, export_student

__all__ = [
    "Int8Report",
    "OnnxReport",
    "StudentExport",
    "export_onnx",
    "export_student",
    "measure_latency",
    "quantize",
]
