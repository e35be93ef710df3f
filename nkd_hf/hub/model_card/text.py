"""Formats names, paths and the command line for a card: on one line, without paths of the machine and tokens."""

import os
import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ...errors import redact

# The pattern does not match the slashes of a relative path or of a URL.
_POSIX_PATH = re.compile(r"(?:(?<![\w.~/:-])/+|(?<=:)/(?!/))[^\s\"'`,;|<>()\[\]{}/][^\s\"'`,;|<>()\[\]{}]*")
_WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:\\[^\s\"'`,;|<>()\[\]{}]+")

# The text before the value of an option or before a path in timm's syntax; a single letter before a colon is a drive.
_PREFIX = re.compile(r"((?:[\w.+-]+=|[\w.+-]{2,}:(?!//))*)(.*)", re.DOTALL)
_WINDOWS_START = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def plain(text: object) -> str:
    """Returns one line of text. Absolute paths are cut to the part below the working directory, or to their last part, and
    credentials are masked (see [`redact`]).

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.text import plain
    >>> plain("teacher\\n of /home/me/models/resnet34")
    'teacher of resnet34'

    ```
    """
    # Surrogates, from undecodable file names, could not be written.
    text = str(text).encode("utf-8", "replace").decode()
    text = redact(re.sub(r"[\s\x00-\x1f\x7f]+", " ", text).strip().replace("file://", ""))
    text = _WINDOWS_PATH.sub(lambda match: match[0].rstrip("\\").rpartition("\\")[2], text)
    return _POSIX_PATH.sub(lambda match: relative_path(match[0]), text)


def plain_name(value: object) -> str:
    """Does the same as `plain` for one name or argument, which may be a path with spaces.

    The text before an equals sign or a colon (`--output_dir=`, `local-dir:`) is kept.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.text import plain_name
    >>> plain_name("/home/john doe/flowers"), plain_name("--data=~/my data/flowers"), plain_name("owner/flowers")
    ('flowers', '--data=flowers', 'owner/flowers')

    ```
    """
    text = re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(value)).strip().replace("file://", "")
    prefix, path = _PREFIX.fullmatch(text).groups()
    if _WINDOWS_START.match(path):
        path = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    elif os.path.isabs(expanded := os.path.expanduser(path)):
        path = relative_path(expanded)
    return plain(prefix + path)


def plain_folder(folder: str) -> str:
    """Does the same as `plain_name` for a folder that code opens. The part outside the working directory is `path/to`.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.text import plain_folder
    >>> plain_folder("out/student"), plain_folder("/home/john/out/student")
    ('out/student', 'path/to/student')

    ```
    """
    path = os.path.expanduser(folder)
    is_here = not os.path.isabs(path) or f"{path}/".startswith(f"{os.getcwd()}/")  # nothing is below "/"
    return plain_name(folder) if is_here else f"path/to/{plain_name(folder)}"


def code(text: object) -> str:
    """Returns the text as a code span, in which Markdown and HTML are not interpreted.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.text import code
    >>> code("a <b> `c`")
    '`` a <b> `c` ``'

    ```
    """
    text = plain(text) or "(no name)"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    # A space separates a backtick from the fence, and is not shown.
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def code_block(text: str, language: str) -> str:
    """Returns a text of several lines as a fenced block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def hub_id(name: str | None) -> str | None:
    """Returns the name if it is an id of the Hub, `owner/name`, and not a folder of this machine; otherwise None.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.text import hub_id
    >>> hub_id("timm/resnet34.tv_in1k"), hub_id("digits"), hub_id("/data/flowers")
    ('timm/resnet34.tv_in1k', None, None)

    ```
    """
    if name is None or name.count("/") != 1 or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def link(name: str, kind: str = "") -> str:
    """Returns an id of the Hub as a link to its page, any other name as a code span.

    Args:
        name: the name of a model or dataset.
        kind: `datasets/` for a dataset.
    """
    return code(plain_name(name)) if hub_id(name) is None else f"[{code(name)}](https://huggingface.co/{kind}{name})"


def relative_path(path: str) -> str:
    here = os.getcwd()
    if path.rstrip("/") == here:
        return "."
    if here != "/" and path.startswith(here + "/"):
        return path[len(here) + 1 :].rstrip("/") or "."
    return path.rstrip("/").rpartition("/")[2] or "/"
