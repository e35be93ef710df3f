"""Makes the elements, numbers and names of an HTML page. ElementTree escapes all texts and attributes."""

import re
import unicodedata
import xml.etree.ElementTree as ET

Child = ET.Element | str | None
_NO_VALUE = "\u2013"  # a dash
_MINUS = "\u2212"


def element(tag: str, *children: Child, **attributes: object) -> ET.Element:
    """Makes an element of HTML or SVG.

    Args:
        tag: such as `td`.
        children: elements and texts in their order; None is ignored.
        attributes: `class_` becomes `class`, and `stroke_width` becomes `stroke-width`. Floats are written with two digits, and
            an attribute that is None is ignored.

    Returns:
        An element; `xml.etree.ElementTree.tostring(..., method="html")` writes it.

    Example:

    ```python
    >>> import xml.etree.ElementTree as ET
    >>> from nkd_hf.recipe.html_elements import element
    >>> ET.tostring(element("p", "cats & ", element("b", "<dogs>"), class_="names"), encoding="unicode", method="html")
    '<p class="names">cats &amp; <b>&lt;dogs&gt;</b></p>'

    ```
    """
    written = {
        key.rstrip("_").replace("_", "-"): _value(value) for key, value in attributes.items() if value is not None
    }
    made = ET.Element(tag, written)
    for child in children:
        if isinstance(child, ET.Element):
            made.append(child)
        elif child is not None and len(made):
            made[-1].tail = (made[-1].tail or "") + child
        elif child is not None:
            made.text = (made.text or "") + child
    return made


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def clean(text: object) -> str:
    """Returns one line of text without control characters and surrogates, which a page cannot contain."""
    text = str(text).encode("utf-8", "replace").decode()
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\ufffe\uffff]+", " ", text).strip() or "(no name)"


def text_width(text: str) -> int:
    """Measures the width of a text in Latin letters; wide letters, such as Chinese ones, count twice."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def shorten(text: str, width: int) -> str:
    """Cuts a text to a width in Latin letters; see [`text_width`].

    Example:

    ```python
    >>> from nkd_hf.recipe.html_elements import shorten
    >>> shorten("golden retriever", 8)
    'golden …'

    ```
    """
    if text_width(text) <= width:
        return text
    kept = 0
    while text_width(text[: kept + 1]) < width:
        kept += 1
    return text[:kept] + "…"


def percent(fraction: float | None, digits: int = 2) -> str:
    """Writes a fraction in percent, `0.9417` as `94.17%`; a dash for None."""
    return _NO_VALUE if fraction is None else f"{fraction:.{digits}%}"


def points(fraction: float, digits: int = 1) -> str:
    """Writes a difference of two fractions in points of percent, with its sign: `0.014` as `+1.4`."""
    text = f"{100 * fraction:+.{digits}f}"
    return f"{0:.{digits}f}" if not float(text) else text.replace("-", _MINUS)


def short_number(number: float | None) -> str:
    """Writes a number with three digits and a unit of thousands: `11689512` as `11.7 M`."""
    return _scaled(number, (("", 1), (" k", 1e3), (" M", 1e6), (" G", 1e9)))


def file_size(size: float | None) -> str:
    """Writes a number of bytes: `44700000` as `44.7 MB`."""
    return _scaled(size, ((" B", 1), (" kB", 1e3), (" MB", 1e6), (" GB", 1e9)))


def milliseconds(time: float | None) -> str:
    """Writes a number of milliseconds: `0.4127` as `0.413 ms`."""
    return _scaled(time, ((" ms", 1), (" s", 1e3)))


def _scaled(number: float | None, units: tuple[tuple[str, float], ...]) -> str:
    if number is None:
        return _NO_VALUE
    # 999.6 would round to four digits in its own unit, so it is 1.00 of the next one.
    unit, factor = [entry for entry in units if number >= 0.9995 * entry[1]][-1:][0] if number >= 1 else units[0]
    value = number / factor
    if value == int(value) or value >= 99.95:
        return f"{value:.0f}{unit}"
    return f"{value:.{1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f}{unit}"


def compare(own: float, other: float, more: str, less: str) -> str | None:
    """Compares two positive numbers in words, such as `4.1 times smaller`; None if they hardly differ."""
    factor, word = (other / own, less) if other > own else (own / other, more)
    return None if factor < 1.05 else f"{factor:.1f} times {word}"
