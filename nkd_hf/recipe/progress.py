"""Shows the progress of a run: one live line for each training in a terminal, else a line for each epoch or evaluation."""

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils.import_utils import is_in_notebook

from ..trainer.arguments import DistillationTrainingArguments
from .duration import describe_duration

# Seconds after which an entry of the log is printed in the middle of an epoch, so that a long epoch is not silent.
_SILENCE = 600


def shows_bars(training: DistillationTrainingArguments) -> bool:
    """Whether progress bars are wanted, and stderr is a terminal or the output of a notebook."""
    return not training.disable_tqdm and (is_in_notebook() or sys.stderr.isatty())


def show_progress(trainer: Trainer, name: str) -> None:
    """Replaces the progress bars and printed logs of `Trainer` with [`TrainingProgress`]; a notebook keeps its own table.

    Args:
        trainer: the trainer of one model.
        name: the name of the training, such as `student`.
    """
    if is_in_notebook():
        return
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    shows_bar = shows_bars(trainer.args)
    trainer.add_callback(TrainingProgress(name, shows_bar, prints_lines=not (shows_bar and sys.stdout.isatty())))


class TrainingProgress(TrainerCallback):
    """Shows steps, loss, accuracy and the time left of one training, in the first process.

    The log of all values is in `trainer_state.json`, and in TensorBoard where `report_to` says so.

    Args:
        name: the name of the training, such as `student`.
        shows_bar: whether stderr gets a live line.
        prints_lines: whether stdout gets a line for each evaluation, and for each epoch without one.
    """

    def __init__(self, name: str, shows_bar: bool, prints_lines: bool):
        self.name, self.shows_bar, self.prints_lines = name, shows_bar, prints_lines
        self.bar: tqdm | None = None
        self.is_training = self.was_trained = self.is_epoch_over = False
        self.first_step = self.printed_step = self.num_predicted = 0
        self.began = self.printed_at = self.seconds = 0.0
        self.loss = self.accuracies = ""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._close()  # An attempt of auto_find_batch_size may have failed.
        self.is_training, self.loss, self.accuracies = True, "", ""
        self.began = self.printed_at = time.monotonic()
        self.first_step = self.printed_step = state.global_step
        if self.shows_bar and state.is_world_process_zero:
            self.bar = _make_bar(state.max_steps, self.name, initial=state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        if not (self.shows_bar and state.is_world_process_zero):
            return
        total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
        self.num_predicted += 1
        if self.is_training:
            self.bar.set_postfix_str(f"evaluating {self.num_predicted}/{total or '?'}", refresh=False)
            self.bar.update(0)
            return
        self.bar = self.bar or _make_bar(total, f"{self.name}, evaluation")
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in (logs or {}):
            return
        self.loss = f"loss {logs['loss']:.4g}"
        self._show_figures()
        is_quiet = time.monotonic() - self.printed_at > _SILENCE
        if self.is_epoch_over or (is_quiet and not control.should_evaluate):
            self._print(args, state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        self.num_predicted = 0
        self.accuracies = _describe_accuracies(metrics or {})
        if self.is_training:
            self._show_figures()
            self._print(args, state)
        elif self.was_trained and state.is_world_process_zero:
            self._close()
            self.was_trained = False
            took = f"trained in {describe_duration(self.seconds)}"
            print("  ".join(filter(None, [f"{self.name:<8}", took, self.accuracies])), flush=True)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        # Trainer logs and evaluates the end of an epoch after this event.
        self.is_epoch_over = control.should_log and not control.should_evaluate
        if not (control.should_log or control.should_evaluate):
            self._print(args, state)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._close()
        self.is_training, self.was_trained = False, True
        self.seconds = time.monotonic() - self.began

    def _print(self, args, state) -> None:
        self.is_epoch_over = False
        if not (self.prints_lines and state.is_world_process_zero) or state.global_step == self.printed_step:
            return
        self.printed_step, self.printed_at = state.global_step, time.monotonic()
        position = f"epoch {state.epoch:.4g}/{args.num_train_epochs:g}"
        if args.max_steps > 0:
            position = f"step {state.global_step}/{state.max_steps}"
        steps = state.global_step - self.first_step
        left = (self.printed_at - self.began) / steps * (state.max_steps - state.global_step)
        time_left = f"{describe_duration(left)} left" if left > 0 else ""
        print(
            "  ".join(filter(None, [f"{self.name:<8}", position, self.loss, self.accuracies, time_left])), flush=True
        )

    def _show_figures(self) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(", ".join(filter(None, [self.loss, self.accuracies])))

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def _make_bar(total: int | None, name: str, initial: int = 0) -> tqdm:
    # With miniters=0, update(0) draws the line where mininterval has passed.
    return tqdm(total=total, initial=initial, desc=name, leave=False, dynamic_ncols=True, miniters=0, file=sys.stderr)


def _describe_accuracies(metrics: dict[str, Any]) -> str:
    names = {"top-1": "eval_accuracy", "balanced": "eval_balanced_accuracy"}
    return "  ".join(f"{name} {100 * metrics[key]:.2f} %" for name, key in names.items() if key in metrics)
