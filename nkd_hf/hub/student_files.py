"""Selects the files of a student that may be published, and keeps tokens and paths of the machine out of them."""

import json
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.dynamic_module_utils import get_relative_imports

from ..errors import redact

logger = logging.getLogger(__name__)

CARD, SETTINGS = "README.md", "training_args.yaml"
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PREPROCESSING = "preprocessor_config.json"
TEXT = (".json", ".yaml", ".md", ".py")
# A path does not begin behind a letter, as in a URL or a relative path, nor behind the `<` of a closing tag.
_PATH = re.compile(r"(?:(?<=file://)|(?<![\w.:/~<-]))/[\w.@+-]+(?:/[\w.@+-]+)+")
# These folders are on every machine, so that their paths reveal nothing.
_SYSTEM = ("/bin/", "/dev/", "/etc/", "/lib/", "/proc/", "/sbin/", "/sys/", "/usr/")


def student_files(folder: Path, in_checkpoint: bool = False) -> list[str]:
    """Returns the names of a student's files in a folder.

    Args:
        folder: the folder of a saved student.
        in_checkpoint: whether the folder may be a training checkpoint, which has more than the student, and no ONNX
            files.

    Raises:
        ValueError: the folder has no student.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if is_checkpoint(folder) and not in_checkpoint:
        raise ValueError(
            f"{folder} is a training checkpoint: write its student into a folder of its own with "
            f"`nkd-hf export --checkpoint {shlex.quote(str(folder))} --output DIR`, and push that"
        )
    if not (folder / _CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
        hint = f": name one of the folders in it, {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} holds no student, since it has no {_CONFIG}{hint}")
    config = read_json(folder / _CONFIG)
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForImageClassification") for name in architectures):
        raise ValueError(f"{folder} holds no image classifier: its {_CONFIG} says architectures={architectures}")
    names = [_CONFIG]
    if (folder / _WEIGHTS).is_file():
        names.append(_WEIGHTS)
    elif (folder / _INDEX).is_file():
        names += [_INDEX, *sorted(set(read_json(folder / _INDEX)["weight_map"].values()))]
    else:
        raise ValueError(f"{folder} holds no student, since it has no {_WEIGHTS}: weights in pickles are not pushed")
    modules = set()
    for reference in (config.get("auto_map") or {}).values():
        # A reference is one name or several, some of them None; code of another repo (`owner/name--module`) is not
        # pushed.
        references = reference if isinstance(reference, list) else [reference]
        modules |= {f"{name.rpartition('.')[0]}.py" for name in references if name and "--" not in name}
    names += sorted(_with_imports(folder, modules))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{folder} is no plain student: {', '.join(outside)} lies outside of it")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is no whole student: {', '.join(missing)} is missing")
    optional = [_PREPROCESSING, CARD, "training_curves.png", SETTINGS]
    names += [name for name in optional if (folder / name).is_file()]
    if not in_checkpoint:
        names += sorted(f"onnx/{path.name}" for path in (folder / "onnx").glob("*.onnx"))
    if _PREPROCESSING not in names and "TimmWrapperForImageClassification" not in architectures:
        logger.warning(
            "%s holds no preprocessing, so that pipeline() cannot open it: save the student's image processor there.",
            folder,
        )
    return names


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a training checkpoint, which has more than the student."""
    return bool(re.fullmatch(r"checkpoint-\d+", folder.resolve().name)) or (folder / "optimizer.pt").exists()


def publishable(settings: Any) -> Any:
    """Returns settings for the public: paths are cut to their last names, and credentials are masked (see [`redact`]).

    Args:
        settings: a value of JSON's types.

    Example:

    ```python
    >>> from nkd_hf.hub.student_files import publishable
    >>> publishable({"output_dir": "/home/me/runs/student", "hub_token": "<HUB_TOKEN>", "seed": 0})
    {'output_dir': 'student', 'hub_token': '<HUB_TOKEN>', 'seed': 0}
    >>> publishable("data=/home/john doe/runs/x")
    'data=x'

    ```
    """
    if isinstance(settings, dict):
        return {key: publishable(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [publishable(value) for value in settings]
    if not isinstance(settings, str):
        return settings
    text = redact(settings)
    # A value that is one path may contain spaces.
    option, equals, path = text.rpartition("=")
    if os.path.isabs(os.path.expanduser(path)):
        return option + equals + Path(path).name
    return _PATH.sub(lambda match: Path(match[0]).name, text)


def check_publishable(files: Mapping[str, Path | bytes], token: str | None = None) -> None:
    """Searches text files for tokens and for paths of this machine.

    This package writes no tokens or paths, so they come from a person, or from a model that was opened.

    Args:
        files: the files by their names in the repo.
        token: the push's token; tokens of the environment and of `hf auth login` are searched, too.

    Raises:
        ValueError: a file has a token or such a path; the message names file and line.
    """
    tokens = {token, get_token(), os.environ.get("HF_TOKEN")} - {None, ""}
    folders = {source.parent for source in files.values() if isinstance(source, Path)}
    own_path = _own_paths({Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *folders})
    for name, source in files.items():
        if not name.endswith(TEXT):
            continue
        text = source.decode() if isinstance(source, bytes) else read_text(source)
        for number, line in enumerate(text.splitlines(), start=1):
            where = f"line {number} of {name if isinstance(source, bytes) else source}"
            if redact(line) != line or any(token in line for token in tokens):
                raise ValueError(
                    f"{where} holds an access token or another credential, which everybody could use: remove it, then push"
                )
            found = own_path.search(line) or next(filter(_exists, _PATH.finditer(line)), None)
            if found:
                raise ValueError(f"{where} holds a path of this machine, {found[0]}: remove it, then push")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file."""
    return json.loads(read_text(path))


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _with_imports(folder: Path, modules: set[str]) -> set[str]:
    """Returns the modules and all modules that they import relatively."""
    found, new = set(modules), set(modules)
    while new:
        paths = [folder / name for name in new if (folder / name).is_file()]
        for path in paths:
            read_text(path)  # the error of read_text names the file
        new = {f"{module}.py" for path in paths for module in get_relative_imports(path)} - found
        found |= new
    return found


def _own_paths(folders: set[Path]) -> re.Pattern:
    """Returns a pattern for the folders and all paths in them, whether they exist or not."""
    patterns = []
    for path in {path for folder in folders for path in (folder.absolute(), folder.resolve())}:
        if len(path.parts) > 1:
            # `/tmp` alone reveals nothing.
            patterns.append(re.escape(str(path)) + (r"(?![\w-])\S*" if len(path.parts) > 2 else r"[/\\]\w\S*"))
    return re.compile(r"(?<![\w.])(?:" + "|".join(sorted(patterns, reverse=True)) + ")")


def _exists(match: re.Match) -> bool:
    first_two = "/".join(match[0].split("/")[:3])
    return not match[0].startswith(_SYSTEM) and os.path.exists(first_two)
