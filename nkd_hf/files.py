"""Writes files and folders completely or not at all, and describes faults of paths."""

import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# Files of a saved student. The folder of a checkpoint or of a run has others, too.
_STUDENT_FILES = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|preprocessor_config\.json|modeling_\w+\.py"
    r"|README\.md|training_curves\.png|training_args\.yaml|onnx(/[\w.-]+\.onnx)?"
)


def path_fault(name: str | os.PathLike) -> str | None:
    """Returns the reason why a path of this machine is not the expected folder.

    Args:
        name: a path, or the name of a repository of the Hub (`owner/name`).

    Returns:
        A part of a sentence; None for a folder, and for a name that may be on the Hub.

    Example:

    ```python
    >>> from nkd_hf.files import path_fault
    >>> path_fault("timm/resnet34.tv_in1k"), path_fault("./nowhere")
    (None, "there is no folder './nowhere'")

    ```
    """
    name = os.fspath(name)
    path = os.path.abspath(os.path.expanduser(name))
    if os.path.isdir(path):
        return None
    if os.path.exists(path):
        return f"{name!r} is a file, and a folder is expected"
    is_path = re.match(r"[./~\\]|[A-Za-z]:", name) or name.count("/") > 1 or "\\" in name
    return f"there is no folder {name!r}{_nearest_folder(path)}" if is_path else None


def _nearest_folder(path: str) -> str:
    parent, missing = os.path.split(path)
    if not os.path.isdir(parent) or not os.access(parent, os.R_OK):
        return ""
    near = difflib.get_close_matches(missing, [entry.name for entry in os.scandir(parent) if entry.is_dir()], n=1)
    return f", did you mean {os.path.join(parent, near[0])!r}?" if near else ""


class TemporaryFolder(tempfile.TemporaryDirectory):
    """A temporary folder. If its process is killed, the next one of the same prefix removes it.

    The process holds a lock on the folder. If the platform or the file system has no locks, the folder stays.

    Args:
        prefix: the beginning of the folder's name, used for such folders alone.
        parent: the folder in which it is made.
    """

    def __init__(self, prefix: str, parent: str | os.PathLike):
        remove_leftovers(prefix, parent)
        super().__init__(prefix=prefix, dir=parent)
        self._lock = _lock(self.name)

    def cleanup(self) -> None:
        super().cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_leftovers(prefix: str, parent: str | os.PathLike) -> None:
    """Removes each [`TemporaryFolder`] of this prefix whose process was killed."""
    name = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}")  # as tempfile names them
    for folder in Path(parent).iterdir() if os.path.isdir(parent) else ():
        if name.fullmatch(folder.name) and folder.is_dir() and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: str | os.PathLike) -> int | None:
    """Locks a folder and returns the lock's file descriptor; None if the folder is locked, or there are no locks."""
    if fcntl is None:
        return None
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


@contextmanager
def new_folder(output: str, overwrite: bool = False) -> Iterator[str]:
    """Yields a folder to write into, which becomes `output` at the end, or is removed after an exception.

    Args:
        output: the folder's path; it may exist if it is empty.
        overwrite: whether a saved student in the folder is replaced. A folder with other files, such as the
            checkpoints of a run, is never replaced.

    Raises:
        ValueError: `output` exists and may not be replaced.

    Example:

    ```python
    >>> with new_folder("student") as folder:
    ...     _ = open(f"{folder}/config.json", "w").write("{}")
    >>> os.listdir("student")
    ['config.json']

    ```
    """
    if not output:
        raise ValueError("the output has no name: name a folder")
    target = Path(output).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{output} is a file: name a folder")
    held = list(target.iterdir()) if target.exists() else []
    if held and not overwrite:
        raise ValueError(f"{output} is not empty: name another folder, or replace it with --overwrite")
    names = [path.relative_to(target).as_posix() for path in (*held, *target.glob("*/*"))]
    if held and not ((target / "config.json").is_file() and all(map(_STUDENT_FILES.fullmatch, names))):
        raise ValueError(f"{output} holds more than a saved student and is not replaced: name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder is beside the target, since a rename is one step only within a file system.
    with TemporaryFolder(f".{target.name}.nkd_hf-", target.parent) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        yield str(folder)
        if target.exists():
            os.rename(target, Path(temporary, "old"))
        os.rename(folder, target)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file completely or not at all; text as UTF-8."""
    temporary = path.with_name(f".{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # Without fsync, a crash of the machine may leave the file's name without its content.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
