"""Defines the exceptions of the package, prints errors in one line, and redacts secrets in messages."""

import contextlib
import difflib
import errno
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError

# ValueErrors of these libraries are for the user of a command; a ValueError of another (torch, numpy, timm) is a bug.
_FOR_USERS = {"nkd_hf", "transformers", "accelerate", "datasets", "huggingface_hub"}
# EFBIG: a limit of the process on the size of a file.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
# Messages of gloo and NCCL in a process whose peer has ended.
_LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Socket Timeout", re.IGNORECASE)
# 128 + SIGPIPE, the exit status of a Unix tool whose reader has ended.
_NO_READER = 141
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
# A name alone is a credential only to a web server: ssh://git@host is not.
_USER = re.compile(r"((?:https?|ftps?)://(?=[^/\s@]*@)|\w://(?=[^/\s:@]*:[^/\s@]*@))[^/\s@<>]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|auth|authorization|policy|awsaccesskeyid"
    r"|key-pair-id|googleaccessid|[\w.-]*(?:token|secret|password|passwd|pwd|key|credential))=)[^\s&;#\"'`<>\\)\]]+",
    re.IGNORECASE,
)


class ConfigError(ValueError):
    """A fault in a YAML file; its message names the file."""


class RefusedError(ValueError):
    """A model that the package refuses to open; the message says what to do."""


class NoClassifierError(RefusedError):
    """Weights that lack a model's classifier, and nothing else."""


class OutsideError(ValueError):
    """A dataset names a file that is not its own."""


class BadSampleError(ValueError):
    """A row whose image cannot be decoded or whose label is missing."""


class NonFiniteLossError(FloatingPointError):
    """A step's loss or gradient norm is NaN or infinite; the message names the step."""


class CheckpointError(OSError):
    """A checkpoint could not be written; the checkpoints before it are unchanged."""


class MissingExtraError(ImportError):
    """A package of an extra of setup.cfg is not installed; the message says how to install it."""


class PushError(RuntimeError):
    """A failed push; the message gives the cause, the student's folder, and the command to push it again."""


def redact(text: str) -> str:
    """Replaces tokens of the Hub and, in addresses, the user and the parameters that sign or authorise with
    placeholders.

    Example:

    ```python
    >>> from nkd_hf.errors import redact
    >>> redact("https://me:word@host/a.parquet?part=1&X-Amz-Signature=12ab")
    'https://<SECRET>@host/a.parquet?part=1&X-Amz-Signature=<SECRET>'

    ```
    """
    text = _TOKEN.sub("<TOKEN>", text)
    text = _USER.sub(r"\1<SECRET>@", text)
    return _PARAMETER.sub(r"\1<SECRET>", text)


def reason(error: BaseException) -> str:
    """Returns an error's text as a part of a sentence: one line of at most 400 characters, without a full stop, never empty.

    Example:

    ```python
    >>> from nkd_hf.errors import reason
    >>> reason(ValueError("It is no folder.\\n")), reason(KeyError())
    ('It is no folder', 'KeyError')

    ```
    """
    text = textwrap.shorten(redact(_own_text(error)), 400, placeholder=" ...")
    return re.sub(r"(?<!\.)\.$", "", text).rstrip(" :") or type(error).__name__


def failed_write(error: Exception, folder: str | Path) -> tuple[str, str]:
    """Returns the reason why files could not be written, and advice.

    Args:
        error: an OSError, or the exception that safetensors or torch raises in its place.
        folder: the folder of the files.

    Returns:
        The cause, for parentheses, and an imperative without a full stop.

    Example:

    ```python
    >>> failed_write(PermissionError(13, "Permission denied"), "run")
    ('PermissionError: [Errno 13] Permission denied', 'allow this user to write there')

    ```
    """
    cause = f"{type(error).__name__}: {reason(error)}"
    number = re.search(r"os error (\d+)", str(error))  # safetensors' message
    code = error.errno if isinstance(error, OSError) else number and int(number[1])
    if not code and _LOST_PEER.search(str(error)):
        return cause, "read the last message of the process that has ended"
    existing = next((path for path in (Path(folder), *Path(folder).absolute().parents) if path.is_dir()), Path("/"))
    if code in _NO_RIGHT or not (code or os.access(existing, os.W_OK)):
        return cause, "allow this user to write there"
    if code and code not in _NO_ROOM:
        return cause, "check the path and the disk"
    return f"{cause}; {shutil.disk_usage(existing).free / 2**30:.1f} GiB are free there", "make room"


@contextlib.contextmanager
def one_line_errors(prefix: str = "", code: int = 1) -> Iterator[None]:
    """Ends the process with `error: ...` on stderr if the input is wrong, and without a message if stdout was closed.

    Wrong input is an exception of this package's own classes, an OSError, or a ValueError that this package or a library of
    Hugging Face has raised. Any other exception is a bug and keeps its traceback.

    Args:
        prefix: text before `error:`, such as `nkd-hf plan: `.
        code: exit status.

    Raises:
        SystemExit: with `code`; with 141 where stdout was closed, as in `nkd-hf plan ... | head -1`.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout at exit, which needs an open file; see "Note on SIGPIPE" in Python's signal module.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_NO_READER)
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"{prefix}error: {redact(' '.join(_own_text(error).split()))}", file=sys.stderr)
        sys.exit(code)


def _is_expected(error: Exception) -> bool:
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] == "nkd_hf":
        return True
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_by = traceback.tb_frame.f_globals.get("__name__", "").split(".")[0]
    return isinstance(error, ValueError) and raised_by in _FOR_USERS


def _own_text(error: BaseException) -> str:
    """Returns the error's text without the traceback of a DataLoader's worker, which torch puts before it."""
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process", text):
        return text
    return re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)[-1]


def explain_gated_repo(error: BaseException, repo_id: str, repo_type: str = "model") -> str | None:
    """Explains how to get access to a gated repo, if that is the cause of an error.

    Args:
        error: an exception; its causes are searched, too.
        repo_id: `owner/name`.
        repo_type: `model` or `dataset`.

    Returns:
        A part of a sentence, or None for another cause.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # `datasets` raises an error without the GatedRepoError as its cause, so its text is searched.
        if isinstance(error, GatedRepoError) or "is a gated dataset on the Hub" in str(error):
            page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
            return (
                f"it is gated: accept its terms on {page}, then run `hf auth login` with an account that has done so, or "
                "set HF_TOKEN to its token"
            )
        error = error.__cause__ or error.__context__
    return None


def suggest(name: str, names: Iterable[str]) -> str:
    """Returns a suggestion of the most similar name for a message; an empty text if no name is similar.

    Example:

    ```python
    >>> suggest("gama", ["alpha", "gamma"])
    ": did you mean 'gamma'?"

    ```
    """
    names = list(names)
    # For `dataset_name`, `dataset` is a better suggestion than `dataset_config_name`.
    shorter = sorted((known for known in names if name.startswith(f"{known}_")), key=len, reverse=True)
    near = difflib.get_close_matches
    matches = near(name, names, n=1, cutoff=0.8) or shorter or near(name, names, n=1)
    return f": did you mean {matches[0]!r}?" if matches else ""
