"""Work in forked processes: it spares each of them some ten seconds of imports."""

import functools
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from nkd_hf import DataArguments, load_image_dataset


def in_a_process(work: Callable[[], None], log: Path) -> int:
    """Does it in a process of its own; the exit code, negative for a signal."""
    return _exit_code(_fork(work, log))


def in_processes(world_size: int, work: Callable[[], None], log: Path) -> list[int]:
    """Does it in processes that are joined as those of `accelerate launch` are; their exit codes."""
    group = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}

    def of_rank(rank: int) -> None:
        if world_size > 1:
            os.environ.update(
                {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            )
        signal.alarm(300)  # one that waits for another that is gone
        # What the parent knows of itself.
        AcceleratorState._reset_state(reset_partial_state=True)
        work()
        state = PartialState()
        assert state.num_processes == world_size
        if world_size == 1 or torch.distributed.is_initialized():  # a recipe ends its group itself
            state.wait_for_everyone()
            state.destroy_process_group()

    processes = [_fork(lambda rank=rank: of_rank(rank), log) for rank in range(world_size)]
    return [_exit_code(process) for process in processes]


@functools.cache
def _prepare() -> None:
    """Does once what most of the processes would do again, each for itself."""
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(module)
    load_image_dataset(DataArguments())


def _fork(work: Callable[[], None], log: Path) -> int:
    _prepare()
    pid = os.fork()
    if pid == 0:
        code = 1
        gc.freeze()  # or each collection copies the parent's memory
        try:
            sys.stdout = sys.stderr = log.open("a", buffering=1)
            logging.basicConfig(stream=sys.stderr, force=True)
            work()
            code = 0
        except SystemExit as exit:
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
            code = 0 if exit.code is None else exit.code if isinstance(exit.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def _exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
