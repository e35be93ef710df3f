"""Reads the id of a Hub repository from the address of its page."""

import os
import re

from huggingface_hub import constants, parse_hf_uri
from huggingface_hub.errors import HfUriError

from ..errors import redact

_ADDRESS = re.compile(r"(https?|hf)://", re.IGNORECASE)


def read_repo_id(name: str | os.PathLike, argument: str, repo_type: str = "model") -> str | os.PathLike:
    """Returns a repository's id for its address, as pasted from a browser, and any other name unchanged.

    Args:
        name: an address on huggingface.co or on the host of `HF_ENDPOINT`; or a Hub id, a folder, an architecture.
        argument: the argument that the error names.
        repo_type: `model` or `dataset`.

    Raises:
        ValueError: the address belongs to no repository of this type, or names another branch or a file.

    Example:

    ```python
    >>> from nkd_hf.models.repo_ids import read_repo_id
    >>> read_repo_id("https://huggingface.co/timm/resnet34.tv_in1k/tree/main", "teacher")
    'timm/resnet34.tv_in1k'
    >>> read_repo_id("outputs/student", "teacher")
    'outputs/student'

    ```
    """
    if not isinstance(name, str) or not _ADDRESS.match(name):  # A folder may be a Path.
        return name
    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}owner/name"
    expected = f"{argument} must be the id of a {repo_type} or the address of its page, got {redact(name)!r}"
    try:
        found = parse_hf_uri(name, endpoint=constants.ENDPOINT)
    except HfUriError as error:
        raise ValueError(f"{expected}. Write owner/name or {page}.") from error
    if found.type != repo_type:
        raise ValueError(f"{expected}, which is a {found.type}. Write owner/name or {page}.")
    if found.path_in_repo:
        raise ValueError(f"{expected}, which is a file or folder in it. Write {found.id}.")
    if found.revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError(
            f"{expected}, which is its branch {found.revision}. Write {found.id}, which is its main branch."
        )
    return found.id
