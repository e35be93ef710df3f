"""Each test here runs on the CPU, with tiny sizes, and on a GPU, where `make test-gpu` runs it."""

import contextlib
import os

# Read when a process first multiplies matrices on a GPU: with it cuBLAS gives the same bits each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("PyTorch finds no GPU on this machine, and the tests marked gpu need one", pytrace=False)
    return request.param


@pytest.fixture
def meta(monkeypatch) -> str:
    """A device whose tensors have no values: what would make a GPU wait is an error there. Autocast does not know it."""
    autocast = torch.autocast

    def autocast_or_nothing(device_type, *args, **kwargs):
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", autocast_or_nothing)
    return "meta"
