import gc
import os
import time
import types
from pathlib import Path

import pytest

gc.disable()  # until pytest_collection_finish: almost all that imports and collection make stays
# What the tests need is on this machine: a look at the Hub would only cost retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What takes seconds to import is imported where it is needed: the process that starts those of pytest-xdist needs none of it.


def pytest_collection_finish():
    """Takes one thread for PyTorch, and starts the garbage collector, which sees nothing of what was made so far."""
    import torch

    # Tiny models: a second thread costs more than it brings, and pytest-xdist gives each core a process of its own.
    torch.set_num_threads(1)
    # The first backward pass starts autograd. After an export to ONNX it would start threads, and no fork could train.
    torch.ones(1, requires_grad=True).sum().backward()
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Hides what is left of each test from the garbage collector, which Accelerator.free_memory calls in each training.

    A collection then takes milliseconds in place of the 0.4 seconds of a million objects of modules that tests import.
    """
    result = yield
    gc.collect()
    gc.freeze()
    return result


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub with the user `me`, and the client of this process talking to it."""
    import huggingface_hub
    from hub_server import OTHERS_TOKEN, TOKEN, HubServer
    from huggingface_hub import constants

    server = HubServer()
    server.users = {TOKEN: "me", OTHERS_TOKEN: "other"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it would keep the endpoint
    # The client waits for 23 s between its retries.
    clock = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    yield server
    server.close()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def no_curves():
    """Model cards without their picture, which takes half a CPU second for each model that a module's tests train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nkd_hf.hub.model_card.card.plot_curves", lambda *args, **kwargs: False)
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory, worker_id) -> Path:
    """The folder of what distributed_runs.py has run, once for all workers of pytest."""
    from distributed_runs import STUDENTS, TEACHERS, read, run
    from filelock import FileLock
    from processes import in_processes

    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "distributed-runs"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            folder.mkdir()
            for make in (*STUDENTS.values(), *TEACHERS.values()):
                make()  # which keeps a copy; without it, each of the processes would make its own
            failed = [size for size in (1, 2, 3) if any(in_processes(size, lambda: run(folder), folder / "log"))]
            (folder / "failed").write_text(f"{failed}: {(folder / 'log').read_text()[-3000:]}" if failed else "")
    assert not (folder / "failed").read_text()
    for world_size in (1, 2, 3):
        assert read(folder, world_size, "world_size") == world_size
    return folder
