"""Writes a folder as a whole or not at all."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a saved student consists of: no checkpoint and no run, which hold more.
_STUDENT_FILES = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|preprocessor_config\.json|modeling_\w+\.py"
    r"|README\.md|training_curves\.png|training_args\.yaml"
)


@contextmanager
def new_folder(output: str, overwrite: bool = False) -> Iterator[str]:
    """Gives a folder to write into, which becomes `output` when all went well and is removed when not.

    Args:
        output: may exist if it is empty.
        overwrite: whether a student that is saved there is replaced. What holds other things, such as the checkpoints
            of a run, is not.

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
    if held and not ((target / "config.json").is_file() and all(_STUDENT_FILES.fullmatch(path.name) for path in held)):
        raise ValueError(f"{output} holds more than a saved student and is not replaced: name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is one step within a file system alone.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        folder = Path(temporary, "new")
        folder.mkdir()
        yield str(folder)
        if target.exists():
            os.rename(target, Path(temporary, "old"))
        os.rename(folder, target)
