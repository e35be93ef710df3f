"""Makes the report's cards about classes and images: gains, confusion, disagreements, labels, calibration."""

import base64
import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .calibration import calibration_error, confidences, fit_temperature, predictions, reliability
from .figures import confused_pairs, confusion, disagreements, likely_label_errors, per_class, unique_names
from .html_charts import class_changes, heatmap, reliability_chart
from .html_elements import element, percent, shorten

# Up to this number, all classes are shown; of more classes, the ones that changed most or are confused most.
_ALL_CLASSES = 20
_CHANGES = 10
_CONFUSED_CLASSES = 15
_CONFUSED_PAIRS = 8
_TABLE_CLASSES = 200
_PICTURES = 12
_PICTURE_SIZE = 160  # pixels
_NAME_LENGTH = 40  # letters


@dataclass
class ReportImages:
    """The evaluated images of a run.

    Args:
        logits: [N, C] float logits by model; `student` is one of them.
        labels: [N] integer classes.
        class_names: C names.
        read_image: returns the image with a number.
    """

    logits: Mapping[str, np.ndarray]
    labels: np.ndarray
    class_names: Sequence[str]
    read_image: Callable[[int], Image.Image]

    def __post_init__(self):
        self.class_names = unique_names(self.class_names)
        # Models to compare the student with: pictures use the first one, classes the last one.
        self.others = [key for key in ("teacher", "baseline") if key in self.logits]


def classes_card(images: ReportImages) -> ET.Element:
    """Shows the accuracies of classes: the largest gains and losses against the baseline, or against the teacher."""
    models = {key: images.logits[key] for key in (*images.others, "student")}
    classes = {
        name: row for name, row in per_class(models, images.labels, images.class_names).items() if row["support"]
    }
    parts: list[ET.Element] = []
    if images.others:
        other = images.others[-1]
        changes = [(name, row[other], row["student"], other, row["support"]) for name, row in classes.items()]
        changes.sort(key=lambda row: (row[1] - row[2], -row[4]))
        note = f"From the {other} (ring) to the student (dot), in points."
        if len(changes) > _ALL_CLASSES:
            changes = [row for n, row in enumerate(changes) if n < _CHANGES or n >= len(changes) - _CHANGES]
            note += f" The {_CHANGES} largest gains and losses of {len(classes)} classes."
        parts += [element("p", note, class_="note"), class_changes(changes)]
    parts.append(_classes_table(classes, [*images.others, "student"]))
    return element("section", element("h2", "Gains and losses of classes"), *parts, class_="half", id="classes")


def _classes_table(classes: Mapping[str, Mapping], models: list[str]) -> ET.Element:
    worst = sorted(classes.items(), key=lambda entry: (entry[1]["student"], entry[0]))[:_TABLE_CLASSES]
    head = element(
        "tr", *(element("th", text, scope="col") for text in ("Class", "Images", *map(str.capitalize, models)))
    )
    rows = [
        element(
            "tr",
            element("th", shorten(name, _NAME_LENGTH), scope="row"),
            element("td", str(row["support"])),
            *(element("td", percent(row[key], 1)) for key in models),
        )
        for name, row in worst
    ]
    count = "All classes" if len(worst) == len(classes) else f"The worst {len(worst)} of {len(classes)} classes"
    summary = element("summary", f"{count}, the student's worst first")
    is_open = "" if len(classes) <= _ALL_CLASSES else None
    return element(
        "details",
        summary,
        element("div", element("table", element("thead", head), *rows), class_="wide"),
        open=is_open,
    )


def confusion_card(images: ReportImages) -> ET.Element:
    """Shows the student's confusion matrix and its most frequent confusions; of many classes, the most confused ones."""
    student = images.logits["student"]
    pairs = confused_pairs(student, images.labels, _CONFUSED_CLASSES**2)
    classes = list(range(len(images.class_names)))
    note = "Rows are labels, columns are the student's answers."
    if len(classes) > _ALL_CLASSES:
        classes = sorted(list(dict.fromkeys(number for pair in pairs for number in pair[:2]))[:_CONFUSED_CLASSES])
        note += f" The {len(classes)} classes of the most frequent confusions."
    heading = element("h2", "Confusion")
    if not classes:
        return element(
            "section", heading, element("p", "The student confuses no classes."), class_="half", id="confusion"
        )
    support = np.bincount(images.labels[images.labels >= 0], minlength=len(images.class_names))
    cells = confusion(student, images.labels, classes)
    names = [images.class_names[number] for number in classes]
    items = [
        element(
            "li",
            element("bdi", shorten(images.class_names[label], _NAME_LENGTH)),
            " taken for ",
            element("bdi", shorten(images.class_names[answer], _NAME_LENGTH)),
            f": {count} of {support[label]}",
        )
        for label, answer, count in pairs[:_CONFUSED_PAIRS]
    ]
    listed = element("ol", *items) if items else element("p", "The student makes no mistake.")
    chart = element("div", heatmap(names, cells, support[classes]), class_="wide" if len(names) > 12 else None)
    return element("section", heading, element("p", note, class_="note"), chart, listed, class_="half", id="confusion")


def disagreements_card(images: ReportImages) -> ET.Element | None:
    """Shows images for which the student and the teacher, or the baseline, predict different classes."""
    if not images.others:
        return None
    other = images.others[0]
    own, theirs = images.logits["student"], images.logits[other]
    found = disagreements(theirs, own, images.labels)
    own_hits = int((predictions(own)[found] == images.labels[found]).sum())
    other_hits = int((predictions(theirs)[found] == images.labels[found]).sum())
    text = (
        f"They differ on {len(found)} of {(images.labels >= 0).sum()} images. The {other} is right on {other_hits} of these, the "
        f"student on {own_hits}."
    )
    if len(found) == 0:
        text = f"They agree on all {(images.labels >= 0).sum()} images."
    if len(found) > _PICTURES:
        text += f" Below are the {_PICTURES} images on which both are surest."
    heading = element("h2", f"Where student and {other} disagree")
    return element(
        "section", heading, element("p", text, class_="note"), _gallery(images, found, other), id="disagreements"
    )


def labels_card(images: ReportImages) -> ET.Element | None:
    """Shows images whose label is probably wrong."""
    if not images.others:
        return None
    other = images.others[0]
    found = likely_label_errors(images.logits[other], images.logits["student"], images.labels)
    text = (
        f"Student and {other} agree on another class than the label, and both are at least as sure as they are on average of this "
        "class. Such labels are worth a look."
    )
    if len(found) > _PICTURES:
        text += f" These are the surest {_PICTURES} of {len(found)}."
    elif len(found) == 0:
        text = f"None: wherever student and {other} agree on another class than the label, one of them is unsure."
    heading = element("h2", "Labels that may be wrong")
    return element("section", heading, element("p", text, class_="note"), _gallery(images, found, other), id="labels")


def _gallery(images: ReportImages, numbers: np.ndarray, other: str) -> ET.Element | None:
    if len(numbers) == 0:
        return None
    numbers = numbers[:_PICTURES]
    figures = []
    answers = {
        key: (predictions(images.logits[key][numbers]), confidences(images.logits[key][numbers]))
        for key in (other, "student")
    }
    for place, number in enumerate(numbers.tolist()):
        label = int(images.labels[number])
        name = shorten(images.class_names[label], _NAME_LENGTH)
        lines = [element("div", element("span", "label"), element("i", f"image {number}"), element("bdi", name))]
        for key, (classes, sure) in answers.items():
            answer = int(classes[place])
            mark = "right" if answer == label else "wrong"
            said = element("bdi", shorten(images.class_names[answer], _NAME_LENGTH), class_=mark)
            lines.append(element("div", element("span", key), said, element("i", percent(float(sure[place]), 0))))
        picture = _picture(images.read_image(number), f"image {number}, labelled {name}")
        figures.append(element("figure", picture, element("figcaption", *lines)))
    return element("div", *figures, class_="gallery")


def _picture(image: Image.Image, alt: str) -> ET.Element:
    image = image.convert("RGB")
    image.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
    # JPEG blurs tiny images, and saves nothing there.
    is_tiny = max(image.size) <= 64
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} if is_tiny else {"format": "JPEG", "quality": 80}))
    kind, data = "png" if is_tiny else "jpeg", base64.b64encode(file.getvalue()).decode()
    return element("img", src=f"data:image/{kind};base64,{data}", alt=alt, class_="tiny" if is_tiny else None)


def calibration_card(images: ReportImages) -> ET.Element:
    """Shows how sure the student is against how often it is right, before and after temperature scaling."""
    student, labels = images.logits["student"], images.labels
    temperature = fit_temperature(student, labels)
    bins = [reliability(student, labels, scale) for scale in (1.0, temperature)]
    before, after = map(calibration_error, bins)
    charts = [
        reliability_chart(bins[0], f"as trained: error {percent(before, 1)}"),
        reliability_chart(bins[1], f"scaled: error {percent(after, 1)}"),
    ]
    counts, confidence, accuracy = bins[0]
    sure, right = (float(counts @ values / counts.sum()) for values in (confidence, accuracy))
    text = (
        f"On average the student is {percent(sure)} sure of its answers, and {percent(right)} of them are right. Temperature "
        f"scaling, which divides its logits by {temperature:.3g}, changes its calibration error from {percent(before)} to "
        f"{percent(after)}, and no answer. The temperature is fitted to these images, and is applied only where you ask for it. "
        "Bars are how often the student is right, red lines are how sure it is."
    )
    note = element("p", text, class_="note")
    row = element("div", *charts, class_="pair")
    return element("section", element("h2", "Calibration of the student"), note, row, class_="half", id="calibration")
