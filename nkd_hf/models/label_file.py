"""Reads the names of classes from a text file."""

import codecs
import io
from pathlib import Path

# The longer mark first: UTF-32's begins with UTF-16's.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_label_file(path: str | Path) -> list[str]:
    """Reads class names from a text file, one a line, in order.

    The text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. Blanks around a name and blank lines at the end are
    ignored. Names may repeat.

    Raises:
        ValueError: the file cannot be read or is in another encoding, a line within it is blank, or there is no name.
    """
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"the label file {path} could not be read ({error}). Name a text file") from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"the label file {path} must be {encoding.removesuffix('-sig').upper()} text, got other bytes in line {line} "
            f"({error.reason}). Save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"the label file {path} must be UTF-8 text, got zero bytes. Save it as UTF-8")
    # StringIO splits at all three ends of a line; str.splitlines would split at a form feed, too.
    names = [line.strip() for line in io.StringIO(text.rstrip(), newline=None)]
    if not names:
        raise ValueError(
            f"the label file {path} must hold a class name in each line, got none. Write the names into it"
        )
    if "" in names:
        raise ValueError(
            f"the label file {path} must hold a class name in each line, got a blank line {names.index('') + 1}. "
            "Remove the line, or name its class"
        )
    return names
