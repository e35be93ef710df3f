"""Reads accuracies and losses from the Trainer's log, and draws their curves for the model card."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Keys of a training entry that are neither the loss nor its components.
_NO_LOSS = {"epoch", "step", "grad_norm", "learning_rate", "num_input_tokens_seen", "total_flos"}
# With several evaluation datasets, the dataset's name is between prefix and metric.
_ACCURACY = re.compile(r"eval_(?:(?P<name>.+?)_)??(?P<metric>accuracy|top5_accuracy)", re.DOTALL)
# The mark of an evaluation on a dataset that is not the trainer's own, such as the training images.
OTHER_DATASET = "other_dataset"
# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def read_accuracies(entry: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the accuracies in an entry of the Trainer's `log_history`.

    Returns:
        `accuracy` and `top5_accuracy` (fractions, if they are present and finite) by the name of the evaluation
        dataset. The name is empty for a single dataset, and the dict is empty for an entry without an accuracy.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.curves import read_accuracies
    >>> read_accuracies({"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_top5_accuracy": 1.0, "step": 10})
    {'': {'accuracy': 0.75, 'top5_accuracy': 1.0}}
    >>> read_accuracies({"eval_sketches_accuracy": 0.5, "step": 10})
    {'sketches': {'accuracy': 0.5}}

    ```
    """
    accuracies: dict[str, dict[str, float]] = {}
    for key in sorted(entry):
        match = _ACCURACY.fullmatch(key)
        # Beside eval_accuracy, eval_balanced_accuracy is another metric and not the accuracy on a dataset `balanced`.
        is_mean = key.endswith("balanced_accuracy") and key.replace("balanced_accuracy", "accuracy") in entry
        if match and not is_mean and math.isfinite(entry[key]):
            accuracies.setdefault(match["name"] or "", {})[match["metric"]] = float(entry[key])
    return {name: values for name, values in accuracies.items() if "accuracy" in values}


def publishable_log(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the log with accuracies on the trainer's own evaluation datasets alone.

    It omits evaluations of another dataset, which `DistillationTrainer.evaluate` has marked, and accuracies that
    [`percentages`] returns.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.curves import publishable_log
    >>> publishable_log([{"eval_accuracy": 0.5, "step": 1}, {"eval_accuracy": 0.9, "step": 1, "other_dataset": True}])
    [{'eval_accuracy': 0.5, 'step': 1}]

    ```
    """
    wrong = percentages(log_history)
    return [
        {key: value for key, value in entry.items() if key not in wrong}
        for entry in log_history
        if not entry.get(OTHER_DATASET)
    ]


def percentages(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the names of accuracies in a log that are not fractions, with the first value outside of 0..1."""
    found: dict[str, float] = {}
    for entry in log_history:
        for key in entry:
            if _ACCURACY.fullmatch(key) and math.isfinite(entry[key]) and not 0 <= entry[key] <= 1:
                found.setdefault(key, float(entry[key]))
    return found


def plot_curves(
    log_history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    levels: Mapping[str, float] | None = None,
    x_axis: str = "epoch",
) -> bool:
    """Draws held-out accuracy and training loss with its components as one picture.

    Args:
        log_history: `trainer.state.log_history`.
        path: the file of the PNG. A run without an evaluation gets no picture, and a picture of an earlier run is
            removed. The same log gives the same bytes.
        levels: top-1 accuracies (fractions) of other models by name, such as `baseline`: dashed lines.
        x_axis: `epoch`, or `step` for a run without meaningful epochs (a stream).

    Returns:
        Whether there is a picture.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.curves import plot_curves
    >>> log = [{"epoch": 1.0, "step": 5, "loss": 2.0, "task": 2.0}, {"epoch": 1.0, "step": 5, "eval_accuracy": 0.4}]
    >>> plot_curves(log, "training_curves.png"), plot_curves(log[:1], "training_curves.png")
    (True, False)

    ```
    """
    log_history = publishable_log(log_history)
    accuracies, losses = _accuracy_curves(log_history, x_axis), _loss_curves(log_history, x_axis)
    if not accuracies:
        if os.path.exists(path):
            os.remove(path)
        return False
    import matplotlib.figure  # only the process that writes the card needs it
    from matplotlib.ticker import MaxNLocator

    width = 4.6 if losses else 6.0
    figure = matplotlib.figure.Figure(figsize=(width * (1 + bool(losses)), 4.0), layout="constrained")
    axes = figure.subplots(1, 1 + bool(losses), squeeze=False)[0]
    _plot_lines(axes[0], accuracies)
    for (name, value), colour in zip((levels or {}).items(), ("0.25", "0.55", "0.75"), strict=False):
        axes[0].axhline(
            100 * value, color=colour, linestyle="--", linewidth=1.2, label=f"{name}, top-1 {100 * value:.2f}"
        )
    axes[0].set(title="Accuracy on held-out images", xlabel=x_axis, ylabel="accuracy (%)")
    if losses:
        _plot_lines(axes[1], losses)
        axes[1].set(title="Training loss and its components", xlabel=x_axis, ylabel="loss")
    for panel, curves in zip(axes, (accuracies, losses), strict=False):
        xs = {x for values, _ in curves.values() for x in values}
        if len(xs) == 1:  # The axis of a single point would be a fraction of a step wide.
            panel.set_xlim(min(xs) - 1, max(xs) + 1)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        # The legend is below the axes, where it hides no curve, however many there are.
        columns = 3 if max(len(line.get_label()) for line in panel.get_lines()) < 26 else 1
        panel.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False)
    # Software=None, since matplotlib would write its version into the file.
    figure.savefig(path, format="png", dpi=180, metadata={"Software": None})
    return True


Curve = tuple[list[float], list[float]]


def _accuracy_curves(log_history: Sequence[Mapping[str, Any]], x_axis: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for entry in log_history:
        for name, values in read_accuracies(entry).items():
            for metric, label in (("accuracy", "top-1"), ("top5_accuracy", "top-5")):
                if metric in values:
                    _append(curves, f"{label}, {name}" if name else label, entry[x_axis], 100 * values[metric])
    return curves


def _loss_curves(log_history: Sequence[Mapping[str, Any]], x_axis: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {"loss": ([], []), "task": ([], [])}
    for entry in log_history:
        if "loss" in entry:
            for name in sorted(set(entry) - _NO_LOSS):
                if isinstance(entry[name], int | float):
                    # A loss that is not finite leaves a gap; an infinite value would break the axis.
                    value = entry[name] if math.isfinite(entry[name]) else math.nan
                    _append(curves, name, entry[x_axis], value)
    # Without a distillation loss, the task loss is the loss.
    if set(curves) == {"loss", "task"}:
        del curves["task"]
    return {name: curve for name, curve in curves.items() if curve[0]}


def _append(curves: dict[str, Curve], name: str, x: float, y: float) -> None:
    xs, ys = curves.setdefault(name, ([], []))
    # The evaluation after training repeats the one of the last step, or evaluates an earlier checkpoint.
    if not xs or xs[-1] != x:
        xs.append(x)
        ys.append(y)


def _plot_lines(axes: "Axes", curves: dict[str, Curve]) -> None:
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        axes.plot(
            xs,
            ys,
            # matplotlib omits names that begin with an underscore from the legend, and reads a dollar sign as TeX.
            label=plain(name).lstrip("_").replace("$", r"\$"),
            color=_COLOURS[i % len(_COLOURS)],
            linewidth=1.6 if i == 0 else 1.2,
            marker="." if len(xs) <= 40 else None,
        )
