"""Programs that take turns, step by step, in one process: what disturbs the machine disturbs all of them alike."""

import statistics
import threading
import time
from collections.abc import Callable

import torch


class Turns:
    """Runs training loops side by side, one step of each at a time, and measures the steps.

    A loop is a function of a callback that it calls at the end of each step; it may be a `Trainer`, whose loop is its
    own. Each runs in a thread of which only one is awake.

    Args:
        rounds: steps that are measured.
        warmup: steps before them that are not.
        device: whose work a step waits for.
    """

    def __init__(self, rounds: int, warmup: int = 2, device: str = "cpu"):
        self.rounds, self.warmup, self.device = rounds, warmup, torch.device(device)
        # Other programs on the machine do not count in a process's CPU time; PyTorch's threads wait for each other there.
        self.on_cpu_clock = self.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.process_time if self.on_cpu_clock else time.perf_counter

    @property
    def steps(self) -> int:
        """How many steps a loop must make."""
        return self.rounds + self.warmup

    def run(self, loops: dict[str, Callable[[Callable[[], None]], None]]) -> dict[str, list[float]]:
        """Seconds of each step, by loop."""
        names = list(loops)
        turns = {name: threading.Semaphore(0) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        errors: list[BaseException] = []
        started = {}

        def go(name: str) -> None:
            following = turns[names[(names.index(name) + 1) % len(names)]]

            def step_is_over() -> None:
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times[name].append(self.clock() - started[name])
                following.release()
                turns[name].acquire()
                if errors:
                    raise errors[0]
                started[name] = self.clock()

            turns[name].acquire()
            started[name] = self.clock()
            try:
                if not errors:
                    loops[name](step_is_over)
            except BaseException as error:
                errors.append(error)
            # The others still wait in their last step.
            for turn in turns.values():
                turn.release(self.steps)

        threads = [threading.Thread(target=go, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        turns[names[0]].release()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return {name: values[self.warmup : self.warmup + self.rounds] for name, values in times.items()}


def ratio(times: dict[str, list[float]], side: str, against: str) -> tuple[float, float, float]:
    """Median of the ratios within each round, and their quartiles."""
    ratios = sorted(a / b for a, b in zip(times[side], times[against], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return statistics.median(ratios), low, high
