"""Replaces credentials in text that others may read: cards, records of settings and messages."""

import re

__all__ = ["redact"]

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
# A name alone is a credential only to a web server: ssh://git@host is not.
_USER = re.compile(r"((?:https?|ftps?)://(?=[^/\s@]*@)|\w://(?=[^/\s:@]*:[^/\s@]*@))[^/\s@<>]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|auth|authorization|policy|awsaccesskeyid"
    r"|key-pair-id|googleaccessid|[\w.-]*(?:token|secret|password|passwd|pwd|key|credential))=)[^\s&;#\"'`<>\\)\]]+",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Replaces tokens of the Hub, and in addresses the user and the parameters that sign or authorise.

    Example:

    ```python
    >>> from nkd_hf.redaction import redact
    >>> redact("https://me:word@host/a.parquet?part=1&X-Amz-Signature=12ab")
    'https://<SECRET>@host/a.parquet?part=1&X-Amz-Signature=<SECRET>'

    ```
    """
    text = _TOKEN.sub("<TOKEN>", text)
    text = _USER.sub(r"\1<SECRET>@", text)
    return _PARAMETER.sub(r"\1<SECRET>", text)
