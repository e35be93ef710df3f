"""Chooses the epochs of a run's trainings so that they end within a given time."""

import copy
import dataclasses
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import release_memory
from transformers import EarlyStoppingCallback, TrainerCallback

from ..files import write_whole
from ..trainer.agreement import decide_in_first
from ..trainer.trainer import DistillationTrainer
from .build import count_epochs
from .crops import note_crops
from .duration import describe_duration, parse_duration
from .progress import TrainingProgress
from .report import say

if TYPE_CHECKING:
    from .recipe import Recipe

logger = logging.getLogger(__name__)

# Number of measured steps, and of steps before them that warm up caches, workers and compilers.
_STEPS, _WARM_UP = 10, 3
# This file in the folder of a run contains the chosen epochs.
CHOSEN_EPOCHS = ".time_budget.json"
# The part of the budget that the trainings get; the rest is for start-up, saving, export and report.
_SHARE = 0.85


@dataclasses.dataclass
class Speed:
    """The measured speed of one training.

    Args:
        name: `teacher`, `baseline` or `student`.
        epochs: number of epochs without a budget.
        step: seconds of an optimiser step.
        steps_per_epoch: optimiser steps of an epoch.
        evaluation: seconds of an evaluation; each epoch has one.
    """

    name: str
    epochs: float
    step: float
    steps_per_epoch: int
    evaluation: float

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return self.steps_per_epoch * self.step + self.evaluation


class _Clock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)  # without it, the clock measures the time to queue a step
        self.times.append(time.perf_counter())


def measure_speed(trainer: DistillationTrainer, name: str) -> Speed:
    """Trains a throw-away model for some steps, and evaluates it.

    Args:
        trainer: the trainer of a model that is not needed afterwards.
        name: the name of the training.
    """
    clock, args = _Clock(), trainer.args
    epochs, steps = (
        args.num_train_epochs,
        math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps),
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer.args = copy.copy(args)
        for argument, value in {
            "output_dir": folder, "max_steps": _WARM_UP + _STEPS, "save_strategy": "no", "eval_strategy": "no",
            "logging_strategy": "no", "report_to": [], "load_best_model_at_end": False,
        }.items():  # fmt: skip
            setattr(trainer.args, argument, value)
        for callback in (EarlyStoppingCallback, TrainingProgress):
            trainer.remove_callback(callback)
        trainer.add_callback(clock)
        trainer.train()
        start = time.perf_counter()
        trainer.evaluate()
        evaluation = time.perf_counter() - start
    pairs = list(zip(clock.times[_WARM_UP - 1 :], clock.times[_WARM_UP:], strict=False))
    release_memory()
    return Speed(name, epochs, statistics.median(after - before for before, after in pairs), steps, evaluation)


def fit_epochs(seconds: float, speeds: Iterable[Speed], multiple: int = 1) -> dict[str, int]:
    """Chooses the epochs of all trainings to fill a time, in proportion to their epochs without a budget.

    Args:
        seconds: the time for all trainings, with saving and report.
        speeds: the speeds of the trainings.
        multiple: all epochs are multiples of it: `crops_per_image`, since so many epochs take each image equally
            often.

    Returns:
        `dict[str, int]`: epochs by the names of the trainings.

    Raises:
        ValueError: the time does not suffice for `multiple` epochs of each training.

    Example:
        >>> fit_epochs(1000, [Speed("teacher", 10, 1.0, 9, 1.0), Speed("student", 20, 0.5, 9, 0.5)])
        {'teacher': 42, 'student': 84}
    """
    speeds = list(speeds)
    available = _SHARE * seconds
    # Each training ends with one more evaluation, and the teacher is measured before the student is trained.
    available -= sum(2 * speed.evaluation for speed in speeds)
    least = multiple * sum(speed.epoch for speed in speeds)
    if least > available:
        epochs = "one epoch" if multiple == 1 else f"{multiple} epochs (crops_per_image)"
        raise ValueError(
            f"time_budget must suffice for {epochs} of each training, which take "
            f"{describe_duration((seconds - available) + least)} here, got {describe_duration(seconds)}. Set a longer one, fewer "
            "images (max_train_samples), or a smaller image_size"
        )
    rest, short = speeds, speeds
    while rest and short:
        factor = available / sum(speed.epochs * speed.epoch for speed in rest)
        short = [speed for speed in rest if factor * speed.epochs < multiple]
        # The trainings in `short` get the fewest epochs, and the others share the rest of the time.
        available -= multiple * sum(speed.epoch for speed in short)
        rest = [speed for speed in rest if speed not in short]
    chosen = {speed.name: multiple * int(factor * speed.epochs / multiple) for speed in rest}
    return {speed.name: chosen.get(speed.name, multiple) for speed in speeds}


def settle_epochs(run: "Recipe") -> None:
    """Chooses a run's epochs by its `time_budget`, if it is set, and warns of epochs that use images unequally often.

    Args:
        run: a run whose models, data and folder are checked.

    Raises:
        ValueError: see [`fit_time_budget`].
    """
    if run.args.time_budget is not None:
        fit_time_budget(run)
    training, num_images = run.training_args, None if run.data_args.streaming else len(run.data["train"])
    for fault in note_crops(run.args, run.data_args, training, run.stages, num_images, training.global_batch_size()):
        if training.should_save:
            logger.warning("%s.", fault)


def fit_time_budget(run: "Recipe") -> None:
    """Sets the epochs of a run's trainings so that all of them end within `time_budget`.

    Each training is measured on throw-away models. The chosen epochs are saved in the run's folder, for a start that
    resumes it. With a store of the teacher's logits that is no cycle, they are limited to the epochs without a budget.
    They are a multiple of `crops_per_image`, unless such a store has fewer epochs.

    Args:
        run: a run whose models, data and folder are checked.

    Raises:
        ValueError: the time does not suffice for one epoch, or `crops_per_image`, of each training.
    """
    file, seconds = run.folder / CHOSEN_EPOCHS, parse_duration(run.args.time_budget)
    multiple = run.data_args.crops_per_image
    store, most = run.teacher_logits, math.inf
    if store is not None and store.info.cycle is None:
        most = count_epochs(run.training_args, len(run.data["train"]))  # Recipe has checked the store
        most = max(most - most % multiple, min(most, multiple))
    epochs = decide_in_first(lambda: json.loads(file.read_text()) if run.goes_on and file.is_file() else None)
    if epochs is None:
        say(
            run.training_args,
            f"Measuring the speed of {len(run.stages)} trainings, to end within {run.args.time_budget}",
        )
        speeds = [measure_speed(run.make_stage(name), name) for name in run.stages]
        epochs = decide_in_first(lambda: _choose(file, seconds, speeds, multiple, most))
    run.args.teacher_epochs = epochs.get("teacher", run.args.teacher_epochs)
    run.training_args.num_train_epochs = epochs.get("student") or epochs["baseline"]


def _choose(file: Path, seconds: float, speeds: list[Speed], multiple: int, most: float) -> dict[str, int]:
    epochs = {name: min(chosen, most) for name, chosen in fit_epochs(seconds, speeds, multiple).items()}
    write_whole(file, json.dumps(epochs) + "\n")
    return epochs
