"""Draws the charts of a report as SVG elements. Colours, fonts and the dark mode are in report.css."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .html_elements import element, percent, points, shorten, text_width

# Sizes are in units of the SVG's view box, which is as wide as a phone's screen or a half of a desktop's page.
_WIDTH = 440
_LETTER = 7.2  # mean width of a letter, at the larger size of a phone


@dataclass
class Axis:
    """Maps values to positions from `start` to `end`."""

    start: float
    end: float
    ticks: list[float]
    low: float
    high: float
    is_log: bool = False

    def at(self, value: float) -> float:
        low, high, value = map(math.log, (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def linear_axis(
    values: Sequence[float], start: float, end: float, low: float = -math.inf, high: float = math.inf
) -> Axis:
    """Makes an axis that has some room around the values, within `low` and `high`."""
    room = 0.08 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    first, last = max(low, min(values) - room), min(high, max(values) + room)
    longest = 0.3 * (last - first)
    power = 10.0 ** math.floor(math.log10(longest))
    step = power * max(factor for factor in (1, 2, 5) if factor * power <= longest)
    numbers = range(math.ceil(first / step - 1e-6), math.floor(last / step + 1e-6) + 1)
    return Axis(start, end, [round(number * step, 10) for number in numbers], first, last)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Makes a logarithmic axis with room around the values for their labels."""
    first, last = min(values) / 1.5, max(values) * 1.5
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)))
    ticks: list[float] = []
    # The loop takes the coarsest steps that give three ticks. The last steps give at least two, since the range is
    # above a factor of two.
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        if len(ticks) < 3:
            ticks = [factor * 10.0**power for power in powers for factor in factors]
            ticks = [tick for tick in ticks if first <= tick <= last]
    return Axis(start, end, ticks, first, last, is_log=True)


def scatter(
    models: dict[str, tuple[float, float]], labels: dict[str, str], write_x: Callable[[float], str], x_label: str
) -> ET.Element:
    """Draws the accuracy of models against a cost.

    Args:
        models: (cost, accuracy as a fraction) by key; the key is the CSS class of the point.
        labels: of the models.
        write_x: formats a cost.
        x_label: of the axis of costs.
    """
    costs, accuracies = zip(*models.values(), strict=True)
    x, y = log_axis(costs, 52, _WIDTH - 14), _accuracy_axis(accuracies, 240, 14)
    drawing = _frame(x, y, write_x, x_label, "top-1 accuracy")
    places = [(x.at(cost), y.at(accuracy)) for cost, accuracy in models.values()]
    boxes = [(left - 7, top - 7, left + 7, top + 7) for left, top in places]
    for (key, (cost, accuracy)), (left, top) in zip(models.items(), places, strict=True):
        title = element("title", f"{labels[key]}: {percent(accuracy)}, {write_x(cost)}")
        drawing.append(element("circle", title, cx=left, cy=top, r=6, class_=f"dot {key}"))
        drawing.append(_place_label(labels[key], left, top, boxes))
    return drawing


def _place_label(label: str, left: float, top: float, boxes: list[tuple[float, ...]]) -> ET.Element:
    """Puts a label beside its point, where it covers as little as possible, and adds its box to `boxes`."""
    width = _LETTER * text_width(label) + 4
    candidates = []
    for down in (0, -15, 15, -29, 29):
        for across in (10, -10 - width, -width / 2):
            box = (left + across, top + down - 7, left + across + width, top + down + 7)
            covered = sum(
                max(0, min(box[2], other[2]) - max(box[0], other[0]))
                * max(0, min(box[3], other[3]) - max(box[1], other[1]))
                for other in boxes
            )
            outside = max(0, 52 - box[0]) + max(0, box[2] - _WIDTH) + max(0, box[3] - 240) + max(0, 2 - box[1])
            candidates.append((covered + 100 * outside + abs(down) / 10, len(candidates), box))
    box = min(candidates)[2]
    boxes.append(box)
    return element("text", label, x=box[0], y=box[3] - 3, class_="name")


def lines(curves: dict[str, list[tuple[float, float]]], levels: dict[str, float], x_label: str) -> ET.Element:
    """Draws accuracies (fractions) during training by key, and `levels` of other models as dashed lines."""
    xs, accuracies = zip(*(point for curve in curves.values() for point in curve), strict=True)
    x = linear_axis([0.0, *xs], 52, _WIDTH - 14, low=0.0, high=max(xs))
    # There is no half an epoch or step, except as the end of a short run.
    x.ticks = [tick for tick in x.ticks if tick == int(tick)] if max(xs) >= 1 else [max(xs)]
    y = _accuracy_axis([*accuracies, *levels.values()], 240, 14)
    drawing = _frame(x, y, lambda value: f"{value:g}", x_label, "top-1 accuracy")
    for key, level in levels.items():
        drawing.append(element("path", d=f"M52 {y.at(level):.1f}H{_WIDTH - 14}", class_=f"level {key}"))
    for key, curve in curves.items():
        path = "L".join(f"{x.at(at):.1f} {y.at(accuracy):.1f}" for at, accuracy in curve)
        drawing.append(element("path", d=f"M{path}", class_=f"curve {key}"))
        for at, accuracy in curve if len(curve) <= 60 else ():
            title = element("title", f"{x_label} {at:g}: {percent(accuracy)}")
            drawing.append(element("circle", title, cx=x.at(at), cy=y.at(accuracy), r=2.6, class_=f"dot {key}"))
    return drawing


def _accuracy_axis(fractions: Sequence[float], start: float, end: float) -> Axis:
    middle, span = (max(fractions) + min(fractions)) / 2, max(max(fractions) - min(fractions), 0.02)
    # Above 100% is room for the points of perfect models.
    return linear_axis([middle - 0.6 * span, middle + 0.6 * span], start, end, -0.05 * span, 1 + 0.05 * span)


def _frame(x: Axis, y: Axis, write_x: Callable[[float], str], x_label: str, y_label: str) -> ET.Element:
    drawing = element("svg", viewBox=f"0 0 {_WIDTH} 286", role="img", aria_label=f"{y_label} against {x_label}")
    digits = 0 if all(abs(100 * tick - round(100 * tick)) < 1e-6 for tick in y.ticks) else 1
    for tick in y.ticks:
        if 0 <= tick <= 1:
            drawing.append(element("path", d=f"M{x.start} {y.at(tick):.1f}H{x.end}", class_="grid"))
            drawing.append(element("text", percent(tick, digits), x=46, y=y.at(tick) + 4, class_="tick end"))
    for tick in x.ticks:
        drawing.append(element("path", d=f"M{x.at(tick):.1f} {y.start}v4", class_="axis"))
        drawing.append(element("text", write_x(tick), x=x.at(tick), y=y.start + 18, class_="tick middle"))
    drawing.append(element("path", d=f"M{x.start} {y.start}H{x.end}", class_="axis"))
    drawing.append(element("text", x_label, x=(x.start + x.end) / 2, y=y.start + 40, class_="tick middle"))
    return drawing


def class_changes(rows: list[tuple[str, float, float, str, int]]) -> ET.Element:
    """Draws the accuracies of classes before and after.

    Args:
        rows: (name, accuracy before, accuracy after, CSS class of the point before, number of images) of each class.
    """
    height = 21
    labels = [shorten(name, 20) for name, *_ in rows]
    left = _LETTER * max(map(text_width, labels)) + 16
    x = linear_axis([value for row in rows for value in row[1:3]], left, _WIDTH - 54, 0.0, 1.0)
    bottom = height * len(rows) + 4
    drawing = element("svg", viewBox=f"0 0 {_WIDTH} {bottom + 24}", role="img", aria_label="accuracy of classes")
    for tick in x.ticks:
        drawing.append(element("path", d=f"M{x.at(tick):.1f} 0V{bottom}", class_="grid"))
        drawing.append(element("text", percent(tick, 0), x=x.at(tick), y=bottom + 17, class_="tick middle"))
    for number, (name, before, after, key, support) in enumerate(rows):
        top = height * number + 13
        change = "gain" if after > before else "loss" if after < before else "same"
        title = element("title", f"{name}: {percent(before, 1)} before, {percent(after, 1)} now, {support} images")
        group = element("g", title, element("text", labels[number], x=left - 12, y=top + 4, class_="name end"))
        group.append(element("path", d=f"M{x.at(before):.1f} {top}H{x.at(after):.1f}", class_=f"change {change}"))
        group.append(element("circle", cx=x.at(before), cy=top, r=3.6, class_=f"hollow {key}"))
        group.append(element("circle", cx=x.at(after), cy=top, r=4.6, class_="dot student"))
        group.append(element("text", points(after - before), x=_WIDTH - 4, y=top + 4, class_=f"name end {change}"))
        drawing.append(group)
    return drawing


def heatmap(names: list[str], cells: np.ndarray, support: np.ndarray) -> ET.Element:
    """Draws a confusion matrix.

    Args:
        names: of K classes.
        cells: [K, K] numbers of images; rows are labels, columns are predictions.
        support: [K] images with each label, also with predictions outside of the K classes.
    """
    labels = [shorten(name, 14) for name in names]
    longest = _LETTER * max(map(text_width, labels))
    left, top = longest + 12, 0.82 * longest + 14  # the labels of columns are turned by 55 degrees
    side = min(56.0, (_WIDTH - left - 4) / len(names))
    size = min(12.0, 0.44 * side)
    drawing = element(
        "svg", viewBox=f"0 0 {_WIDTH} {top + side * len(names):.0f}", role="img", aria_label="confusion matrix"
    )
    for row, label in enumerate(labels):
        middle = side * (row + 0.5)
        style = {"class_": "name", "font_size": max(size, 8.0)}
        drawing.append(element("text", label, x=left - 6, y=top + middle + 4, text_anchor="end", **style))
        turn = f"rotate(-55 {left + middle:.1f} {top - 6:.1f})"
        drawing.append(element("text", label, x=left + middle + 2, y=top - 6, transform=turn, **style))
        for column in range(len(names)):
            count, x, y = int(cells[row, column]), left + side * column, top + side * row
            place = {"x": x, "y": y, "width": side - 1, "height": side - 1}
            drawing.append(element("rect", class_="cell", **place))
            if count:
                kind, share = "right" if row == column else "wrong", count / float(support[row])
                title = element("title", f"{names[row]} → {names[column]}: {count} of {support[row]} images")
                drawing.append(element("rect", title, class_=kind, fill_opacity=0.12 + 0.88 * share**0.6, **place))
                shade = "count dark" if share > 0.45 else "count"
                place = {"x": x + side / 2, "y": y + side / 2 + 0.35 * size, "font_size": size}
                drawing.append(element("text", str(count), class_=shade, **place))
    return drawing


def reliability_chart(bins: tuple[np.ndarray, np.ndarray, np.ndarray], title: str) -> ET.Element:
    """Draws how often predictions are right, against how sure the model is; see [`nkd_hf.recipe.figures.reliability`]."""
    counts, confidence, accuracy = bins
    left, bottom, side = 40, 226, 200
    drawing = element("svg", viewBox="0 0 250 286", role="img", aria_label=title)
    drawing.append(element("text", title, x=left, y=14, class_="name"))
    for tick in (0, 0.5, 1):
        drawing.append(element("path", d=f"M{left} {bottom - side * tick}h{side}", class_="grid"))
        drawing.append(element("text", percent(tick, 0), x=left - 5, y=bottom - side * tick + 4, class_="tick end"))
        drawing.append(element("text", percent(tick, 0), x=left + side * tick, y=bottom + 18, class_="tick middle"))
    width = side / len(counts)
    for number, count in enumerate(counts):
        if count:
            sure, right = float(confidence[number]), float(accuracy[number])
            note = element("title", f"{count} images: {percent(sure, 1)} sure, {percent(right, 1)} right")
            place = {"x": left + width * number + 1, "width": width - 2}
            drawing.append(element("rect", note, y=bottom - side * right, height=side * right, class_="bar", **place))
            line = f"M{place['x']:.1f} {bottom - side * sure:.1f}h{place['width']:.1f}"
            drawing.append(element("path", d=line, class_="sure"))
    drawing.append(element("path", d=f"M{left} {bottom}l{side} {-side}", class_="ideal"))
    drawing.append(element("text", "confidence", x=left + side / 2, y=bottom + 40, class_="tick middle"))
    return drawing
