"""Ends training after its step, with a checkpoint, at the SIGTERM that a cluster sends before it stops a machine."""

import datetime
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

# A shell reports this exit code for a process that SIGTERM has ended: the run is not done.
EXIT_CODE = 128 + signal.SIGTERM


class Sigterm:
    """Notes a SIGTERM within its `with` block. A second SIGTERM ends the process as usual.

    A handler that other code has set stays in place, and then no SIGTERM is noted.

    Args:
        world_size: number of processes. All of them must enter the block and call `was_received` equally often.
        timeout: seconds that a process waits for another one, as `ddp_timeout` of the arguments. None uses torch's
            own.

    Example:

    ```python
    >>> with Sigterm(world_size=1) as sigterm:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     sigterm.was_received()
    True

    ```
    """

    def __init__(self, world_size: int, timeout: float | None = None):
        self._world_size = world_size
        self._timeout = None if timeout is None else datetime.timedelta(seconds=timeout)
        self._noted = self._installed = False
        self._group = self._asked = None

    def __enter__(self) -> "Sigterm":
        self._pid = os.getpid()
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        if self._world_size > 1:
            # The group is on the CPU, also where training runs on a GPU: was_received must not wait for the GPU.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(self, error: type | None, *_) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._group is not None and error is None:
            if self._asked is not None:
                self._asked[0].wait()
            dist.destroy_process_group(self._group)

    def was_received(self) -> bool:
        """Whether a process has noted a SIGTERM. The answer is the same in all processes, and may come one call late."""
        if self._group is None:
            return self._noted
        asked, flag = self._asked, torch.tensor(int(self._noted))
        # The answer arrives while the next step runs.
        self._asked = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        if asked is None:
            return False
        asked[0].wait()
        return bool(asked[1])

    def exit_if_received(self) -> None:
        """Exits at the end of training if a process has noted a SIGTERM."""
        # was_received is called twice, since with several processes the answer comes one call late.
        if any([self.was_received(), self.was_received()]):
            logger.warning("SIGTERM was received at the end of training: the process exits. Restart it to continue.")
            raise SystemExit(EXIT_CODE)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # A forked process inherits the handler.
        if self._noted or os.getpid() != self._pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._noted = True


def shield_worker(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Keeps a worker alive until its parent ends it, as a DataLoader's `worker_init_fn`.

    A cluster and `torchrun` send SIGTERM to all processes of a group. The step before the last checkpoint would fail if a
    worker were gone.
    """
    if init is not None:
        init(worker_id)
    if sys.platform == "linux":  # elsewhere a signal does not name its sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_for, args=(os.getppid(),), daemon=True).start()


def _exit_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
