"""Prints once, after the first steps of a training, how long its steps will take."""

import statistics
import sys
import time

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .duration import describe_duration

# The callback prints after STEPS + 1 steps, which have STEPS intervals. In the first WARM_UP intervals, caches, workers and
# compilers warm up.
STEPS, WARM_UP = 10, 3


class TimeLeft(TrainerCallback):
    """Prints how long a training will take, from the median of its first steps; evaluations come on top.

    Args:
        name: the name of the training: `teacher`, `baseline` or `student`.
        following: the names of the trainings that come after it.
    """

    def __init__(self, name: str, following: list[str]):
        self.name, self.following = name, following
        self.times: list[float] = []
        self.is_resumed = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.times, self.is_resumed = [], state.global_step > 0

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.times) > STEPS:
            return
        self.times.append(time.perf_counter())
        if len(self.times) <= STEPS or not args.should_save:
            return
        pairs = zip(self.times[WARM_UP:], self.times[WARM_UP + 1 :], strict=False)
        step = statistics.median(after - before for before, after in pairs)
        steps_left = state.max_steps - state.global_step
        left = describe_duration(step * steps_left)
        steps = f"last {steps_left} of {state.max_steps} steps" if self.is_resumed else f"{state.max_steps} steps"
        then = f"; then the {' and the '.join(self.following)}" if self.following else ""
        # tqdm.write prints above the live line of the training.
        tqdm.write(
            f"About {left} left for the {steps} of the {self.name}, and its evaluations{then}",
            file=sys.stdout,
        )
        sys.stdout.flush()
