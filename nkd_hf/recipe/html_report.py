"""Writes `report.html`: the figures, charts and pictures of a distillation run as one file that loads nothing."""

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import write_whole
from ..hub.model_card.text import plain, plain_name
from .figures import accuracy_difference
from .html_charts import lines, scatter
from .html_elements import clean, element, file_size, milliseconds, percent, short_number
from .html_evidence import (
    ReportImages,
    calibration_card,
    classes_card,
    confusion_card,
    disagreements_card,
    labels_card,
)
from .html_verdict import facts, verdict

# In the order of the table.
MODEL_NAMES = {
    "teacher": "Teacher",
    "baseline": "Baseline",
    "student": "Student",
    "student_onnx": "Student, ONNX",
    "student_int8": "Student, int8",
}
# Label, key in `results["models"]`, and the function that writes the value.
_ROWS = [
    ("Top-1 accuracy", "top1", percent),
    ("Top-5 accuracy", "top5", percent),
    ("Balanced accuracy", "balanced_accuracy", percent),
    ("Calibration error", "ece", percent),
    ("Parameters", "parameters", short_number),
    ("Size", "size_bytes", file_size),
    ("Latency, median", "p50", milliseconds),
    ("Latency, 95th percentile", "p95", milliseconds),
    ("Images per second", "images_per_second", short_number),
]
_MAX_SETTING = 300  # letters


def write_html_report(
    path: Path,
    *,
    results: Mapping[str, Any],
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    class_names: Sequence[str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    read_image: Callable[[int], Image.Image],
    title: str,
    x_axis: str = "epoch",
) -> None:
    """Writes the report of a run as one HTML file. The same arguments give the same bytes.

    The page has no script, and its content security policy forbids loading anything. Its size is bounded: of many classes and
    images, it shows the most telling ones.

    Args:
        path: of the file, which is written completely or not at all.
        results: the content of `results.json`. `models` has an entry `student`, and may have `teacher`, `baseline`,
            `student_onnx` and `student_int8`. A model has `top1`; its other figures may be missing. The page ends with
            `dataset`, `settings` and `versions`, if they are present.
        logits: [N, C] float logits by the keys of `models`, with `student`; a model without logits is only in the table.
        labels: [N] integer classes; an image with the label -100 is ignored.
        class_names: C names.
        curves: points (epoch or step, top-1 accuracy as a fraction) of `baseline` and `distilled`.
        read_image: returns the image with a number from 0 to N - 1; it is called at most 24 times.
        title: of the page.
        x_axis: `epoch`, or `step` where the points of the curves are at steps.

    Raises:
        ValueError: the student is missing, or the shapes do not fit.
        OSError: the file cannot be written.

    Example:

    ```python
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from nkd_hf.recipe.figures import model_figures
    >>> from nkd_hf.recipe.html_report import write_html_report
    >>> student, labels = np.array([[2.0, 0.0], [1.0, 3.0]]), np.array([0, 1])
    >>> write_html_report(
    ...     Path("report.html"),
    ...     results={"models": {"student": model_figures(student, labels)}},
    ...     logits={"student": student},
    ...     labels=labels,
    ...     class_names=["cat", "dog"],
    ...     curves={},
    ...     read_image=lambda number: Image.new("RGB", (8, 8)),
    ...     title="Cats and dogs",
    ... )
    >>> "<h1>Cats and dogs</h1>" in Path("report.html").read_text()
    True

    ```
    """
    _check(results, logits, labels, class_names)
    models = read_models(results["models"])
    images = ReportImages(logits, labels, [clean(name) for name in class_names], read_image)
    cards = [
        _summary(models, logits, labels, results, class_names),
        _table(models),
        _cost_card("latency", models, "p50", milliseconds, "latency of an image (log scale)"),
        _cost_card("size", models, "size_bytes", file_size, "size on disk (log scale)"),
        _curves_card(curves, models, x_axis),
        calibration_card(images),
        classes_card(images),
        confusion_card(images),
        disagreements_card(images),
        labels_card(images),
        _settings_card(results),
    ]
    main = element("main", element("h1", clean(title)), *(card for card in cards if card is not None))
    written = ET.tostring(_page(clean(title), main), encoding="unicode", method="html")
    write_whole(Path(path), f"<!DOCTYPE html>\n{written}\n")


def read_models(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the figures that are present, by model in the table's order, with `p50` and `p95` in place of `latency_ms`."""
    flat = {key: models[key] | (models[key].get("latency_ms") or {}) for key in MODEL_NAMES if key in models}
    return {
        key: {name: value for name, value in model.items() if value is not None and name != "latency_ms"}
        for key, model in flat.items()
    }


def _check(
    results: Mapping[str, Any], logits: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str]
) -> None:
    for argument, entries in (('results["models"]', results["models"]), ("logits", logits)):
        if "student" not in entries:
            raise ValueError(
                f"{argument} must have an entry 'student', got {sorted(entries)}. Pass the student's, too."
            )
    shape = (len(labels), len(class_names))
    for key, values in logits.items():
        if values.shape != shape:
            raise ValueError(
                f"logits[{key!r}] must be an array {list(shape)}, a row for each label and a column for each name of a class, "
                f"got {list(values.shape)}. Pass all models' logits of the same images and classes."
            )


def _page(title: str, main: ET.Element) -> ET.Element:
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy"}, content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    return element("html", head, element("body", main), lang="en")


def _summary(
    models: Mapping[str, Any],
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    results: Mapping[str, Any],
    class_names: Sequence[str],
) -> ET.Element:
    gain = None
    if "baseline" in models and "baseline" in logits:
        gain = accuracy_difference(logits["student"], logits["baseline"], labels)
    faults = [results.get(name, {}).get("reason") for name in ("int8", "onnx")]
    answers = np.unique(logits["student"][labels != -100].argmax(-1))
    is_constant = len(answers) == 1 < len(np.unique(labels[labels != -100]))
    only_answer = clean(class_names[answers[0]]) if is_constant else None
    headline, text = verdict(models, gain, int((labels != -100).sum()), *faults, only_answer)
    tiles = [
        element("div", element("b", value), element("span", note), class_="tile")
        for value, note in facts(models, gain, results.get("agreement_with_teacher"))
    ]
    heading = element("p", headline, class_="headline")
    return element("section", heading, element("p", text), element("div", *tiles, class_="tiles"), id="verdict")


def _table(models: Mapping[str, Any]) -> ET.Element:
    head = element("tr", element("td"))
    for key in models:
        of_student, _, name = MODEL_NAMES[key].rpartition(", ")
        prefix = element("span", f"{of_student}, ") if of_student else None  # a phone has no room for the prefix
        head.append(element("th", prefix, name, scope="col", class_=key))
    rows = []
    for label, name, write in _ROWS:
        values = {key: model.get(name) for key, model in models.items()}
        if any(value is not None for value in values.values()):
            cells = [element("td", write(value), class_=key) for key, value in values.items()]
            rows.append(element("tr", element("th", label, scope="row"), *cells, id=f"row-{name}"))
    table = element("table", element("thead", head), element("tbody", *rows), class_="models")
    note = (
        "Balanced accuracy is the mean of the classes' accuracies. The calibration error is the mean distance between how sure a "
        "model is and how often it is right."
    )
    if any("p50" in model for model in models.values()):
        note += " Latency is the time for a single image."
    return element(
        "section",
        element("h2", "Models"),
        element("div", table, class_="wide"),
        element("p", note, class_="note"),
        id="models",
    )


def _cost_card(
    name: str, models: Mapping[str, Any], figure: str, write: Callable[[float], str], label: str
) -> ET.Element | None:
    places = {key: (model[figure], model["top1"]) for key, model in models.items() if figure in model}
    if len(places) < 2:
        return None
    chart = scatter(places, MODEL_NAMES, write, label)
    return element("section", element("h2", f"Accuracy and {name}"), chart, class_="half", id=name)


def _curves_card(
    curves: Mapping[str, Sequence[tuple[float, float]]], models: Mapping[str, Any], x_axis: str
) -> ET.Element | None:
    by_model = {
        key: list(curves[name])
        for name, key in (("baseline", "baseline"), ("distilled", "student"))
        if curves.get(name)
    }
    if not by_model:
        return None
    levels = {"teacher": models["teacher"]["top1"]} if "teacher" in models else {}
    legend = element("p", class_="legend")
    for key in (*by_model, *levels):
        legend.append(element("span", MODEL_NAMES[key], class_=f"key {key}"))
    chart = lines(by_model, levels, x_axis)
    return element("section", element("h2", "Accuracy during training"), legend, chart, class_="half", id="curves")


def _settings_card(results: Mapping[str, Any]) -> ET.Element | None:
    tables = []
    for name in ("dataset", "settings", "versions"):
        if results.get(name):
            rows = [
                element("tr", element("th", plain(key), scope="row"), element("td", plain_name(value)[:_MAX_SETTING]))
                for key, value in _flat(results[name], name)
            ]
            tables += [element("h3", name.capitalize()), element("table", *rows, class_="settings")]
    if not tables:
        return None
    details = element("details", element("summary", "Dataset, settings and versions"), *tables)
    return element("section", element("h2", "How it was made"), details, id="settings")


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    """Flattens nested dicts and joins their keys by dots; the entries of the first dict keep their own keys."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    entries = []
    for key, inner in value.items():
        nested = _flat(inner, str(key))
        entries += [(f"{key}.{path}", leaf) if isinstance(inner, Mapping) else (path, leaf) for path, leaf in nested]
    return entries
