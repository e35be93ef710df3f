"""int8 of a trained classifier: kept where it is accurate, with sensitive nodes in float where it must, else not at all."""

import copy

import numpy as np
import onnx
import pytest
import torch
from tiny import timm_cnn
from trained import digit_batches, train

from nkd_hf.export import export_onnx, quantize
from nkd_hf.export.runtime import open_session, run_session

CALIBRATION, VALIDATION = digit_batches(0, 256), digit_batches(1200, 1797)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    model = train(timm_cnn(), digit_batches(0, 1152), epochs=6)
    return model, export_onnx(model, folder / "model.onnx", VALIDATION[0]["pixel_values"]).path


def inner_pairs(graph) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """The convolutions of residual blocks: one ReLU reads the first one alone, and the second one reads it alone."""
    pairs = []
    for first in graph.node:
        relus = [node for node in graph.node if first.output[0] in node.input]
        if first.op_type == "Conv" and [node.op_type for node in relus] == ["Relu"]:
            seconds = [node for node in graph.node if relus[0].output[0] in node.input]
            if [node.op_type for node in seconds] == ["Conv"]:
                pairs.append((first, seconds[0]))
    return pairs


def with_outliers(path, output, number: int) -> list[str]:
    """Writes a file with the same logits, in which one channel between two convolutions is a thousand times larger.

    The weights after the channel are smaller by as much. 8 bits that hold the channel have no room for the others.

    Returns:
        The names of the convolutions of `number` such pairs.
    """
    proto = onnx.load(path)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    pairs = inner_pairs(proto.graph)[:number]
    for first, second in pairs:
        for name, axis, factor in ((first.input[1], 0, 1000), (first.input[2], 0, 1000), (second.input[1], 1, 0.001)):
            values = onnx.numpy_helper.to_array(weights[name]).copy()
            np.moveaxis(values, axis, 0)[0] *= factor
            weights[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(proto, output)
    images = VALIDATION[0]["pixel_values"]
    logits = run_session(open_session(path), images)
    np.testing.assert_allclose(run_session(open_session(output), images), logits, atol=1e-2)
    return [node.name for pair in pairs for node in pair]


@pytest.mark.runs
def test_an_accurate_file_is_kept(trained):
    model, path = trained
    report = quantize(path, CALIBRATION, VALIDATION)
    assert report.kept
    assert report.reason is None
    assert (report.method, report.float_nodes, report.images) == ("minmax", (), 597)
    assert report.path == path.with_name("model_int8.onnx")
    assert sorted(file.name for file in path.parent.glob("*.onnx")) == ["model.onnx", "model_int8.onnx"]
    assert not list(path.parent.glob(".nkd*"))
    assert report.size_bytes == report.path.stat().st_size < path.stat().st_size / 2.5
    hits = {"float": 0, "int8": 0, "torch": 0}
    for batch in VALIDATION:
        pixels = batch["pixel_values"]
        with torch.no_grad():
            logits = {"torch": model(pixels).logits.numpy()}
        logits |= {
            "float": run_session(open_session(path), pixels),
            "int8": run_session(open_session(report.path), pixels),
        }
        for name in hits:
            hits[name] += (logits[name].argmax(1) == batch["labels"].numpy()).sum()
    assert hits["torch"] == hits["float"]
    assert (report.accuracy_float, report.accuracy_int8) == (hits["float"] / 597, hits["int8"] / 597)
    assert report.accuracy_float > 0.75
    assert report.drop <= 1
    proto = onnx.load(report.path)
    assert {entry.key for entry in proto.metadata_props} == {"id2label", "preprocessing", "nkd_hf_version"}
    weights = [tensor for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert len(weights) > 20
    for tensor in weights:
        # Weights of 7 bits: products of 8 bits saturate on x86 without VNNI.
        assert np.abs(onnx.numpy_helper.to_array(tensor)).max() <= 64


def test_sensitive_nodes_stay_in_float(trained, tmp_path):
    path = tmp_path / "model.onnx"
    convolutions = with_outliers(trained[1], path, 1)
    report = quantize(path, CALIBRATION, VALIDATION)
    assert report.kept
    assert report.drop <= 1
    # The convolution that writes the outlier and the one that reads it.
    assert set(report.float_nodes) == set(convolutions)
    kinds = {node.output[0]: node.op_type for node in onnx.load(report.path).graph.node}
    for node in onnx.load(report.path).graph.node:
        if node.op_type == "Conv":
            in_float = kinds.get(node.input[1]) != "DequantizeLinear"
            assert in_float == (node.name in report.float_nodes)


def test_a_file_that_loses_too_much_is_not_kept(trained, tmp_path):
    path = tmp_path / "model.onnx"
    assert len(with_outliers(trained[1], path, 100)) == 16
    (tmp_path / "model_int8.onnx").write_text("of an earlier export")
    report = quantize(path, CALIBRATION, VALIDATION, max_drop=0.1)
    assert not report.kept
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert report.reason.startswith("int8 must lose at most 0.1 points of top-1, and the best of ")
    assert f"loses {report.drop:.2f}" in report.reason
    assert report.drop > 0.1


def test_wrong_input(trained, tmp_path):
    _, path = trained
    with pytest.raises(ValueError, match=r"^labelled must be a list or a DataLoader, .* got a generator\. Pass list"):
        quantize(path, CALIBRATION, (batch for batch in VALIDATION))
    wrong = copy.deepcopy(VALIDATION[:1])
    wrong[0]["labels"][0] = 10
    with pytest.raises(ValueError, match=r"^labels must be \[N\] class numbers from 0 to 9, got \(64,\) up to 10"):
        quantize(path, CALIBRATION, wrong)
    with pytest.raises(ValueError, match=r"^labelled must hold one image at least"):
        quantize(path, CALIBRATION, [])
    with pytest.raises(ValueError, match=r"^max_drop must be 0 points or more, got -1"):
        quantize(path, CALIBRATION, VALIDATION, max_drop=-1)
