"""Latency of PyTorch classifiers and of ONNX files."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tiny import timm_cnn
from torch import nn

from nkd_hf.export import measure_latency
from nkd_hf.export.runtime import INPUT, OUTPUT


class Recorder(nn.Module):
    """Notes the batches that it gets, and the number of threads."""

    def __init__(self, name, calls, work=1):
        super().__init__()
        self.name, self.calls, self.work = name, calls, work
        self.weight = nn.Parameter(torch.zeros(64, 64))

    def __deepcopy__(self, memo):
        return self

    def forward(self, pixel_values):
        self.calls.append((self.name, len(pixel_values), torch.get_num_threads(), torch.is_grad_enabled()))
        for _ in range(self.work):
            self.weight @ self.weight
        return pixel_values


def small_onnx(path):
    """A file whose logits are the pixels."""
    pixels = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", 192])
    graph = helper.make_graph([helper.make_node("Flatten", [INPUT], [OUTPUT])], "flatten", [pixels], [logits])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_models_take_turns_after_a_warm_up():
    calls, images = [], torch.zeros(4, 3, 8, 8)
    threads = torch.get_num_threads()
    models = {name: (Recorder(name, calls), images) for name in ("a", "b")}
    measure_latency(models, threads=threads + 1, rounds=2, images_per_round=3)
    turn = [1] * (2 + 3) + [4] * (2 + 1)
    expected = [(name, size, threads + 1, False) for name in ("a", "b", "a", "b") for size in turn]
    assert calls == expected
    assert torch.get_num_threads() == threads


def test_slow_models_are_slow(tmp_path):
    images = torch.zeros(4, 3, 8, 8)
    fast, slow = Recorder("fast", []), Recorder("slow", [], work=300)
    path = small_onnx(tmp_path / "model.onnx")
    speed = measure_latency({"fast": (fast, images), "slow": (slow, images), "onnx": (str(path), images)}, rounds=3)
    assert speed["slow"]["latency_ms"]["p50"] > 3 * speed["fast"]["latency_ms"]["p50"]
    assert speed["slow"]["images_per_second"] < speed["fast"]["images_per_second"] / 3
    for figures in speed.values():
        assert 0 < figures["latency_ms"]["p50"] <= figures["latency_ms"]["p95"]
    assert speed["fast"]["size_bytes"] == 64 * 64 * 4
    assert speed["onnx"]["size_bytes"] == path.stat().st_size


def test_a_classifier_stays_in_training():
    model = timm_cnn().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    speed = measure_latency({"student": (model, torch.randn(2, 3, 32, 32))}, rounds=1, images_per_round=1)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert speed["student"]["size_bytes"] == sum(value.nbytes for value in before.values())


def test_numbers_below_one():
    with pytest.raises(ValueError, match=r"^rounds must be 1 or more, got 0\."):
        measure_latency({}, rounds=0)
