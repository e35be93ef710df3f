"""Explains failures of requests to the Hub, with advice."""

import contextlib
import logging
import os
from collections.abc import Iterator

from huggingface_hub import constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

from ..errors import PushError

logger = logging.getLogger(__name__)
# Seconds to wait for a byte from the Hub; the client itself waits for ever.
_TIMEOUT = 120.0


@contextlib.contextmanager
def explain_failures(
    folder: str | os.PathLike | None, repo_id: str, revision: str | None, token: str | None, again: str | None = None
) -> Iterator[None]:
    """Turns errors of the client into a PushError with the cause, the place of the files, and advice."""

    def message(reason: str) -> str:
        if folder is None:
            return f"the repo {repo_id} could not be made or reached on the Hub: {reason}"
        text = f"the push of {folder} to {repo_id} failed: {reason}.\nNothing is lost: it is in {folder}."
        return text if again is None else f"{text} To push it again:\n    {again}"

    session = get_session()
    before = session.timeout
    if before.read is None:  # The user has set no limit.
        session.timeout = _TIMEOUT
    try:
        yield
    except KeyboardInterrupt:
        logger.error(message("it was interrupted"))
        raise
    except PushError as error:
        raise PushError(message(str(error))) from None
    except Exception as error:  # The errors of the client, of httpx and of hf_xet have no common base class.
        raise PushError(message(_reason(error, repo_id, revision, token))) from error
    finally:
        session.timeout = before


def _reason(error: BaseException, repo_id: str, revision: str | None, token: str | None) -> str:
    errors = [error]
    while errors[-1].__cause__ is not None:
        errors.append(errors[-1].__cause__)
    for cause in errors:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, which forbids the network: unset it"
        if isinstance(cause, RevisionNotFoundError):
            return f"there is no branch {revision!r}: make it on the repo's page, or omit the revision"
        if isinstance(cause, HfHubHTTPError):
            return _status(cause, repo_id, token)
        # The kinds are compared by name, since the client uses httpx or httpx2.
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if "TimeoutException" in kinds:
            return f"time-out: {constants.ENDPOINT} was silent for too long"
        if "TransportError" in kinds:
            return f"no connection to {constants.ENDPOINT} ({type(cause).__name__}: {cause}): is there a network?"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _status(error: HfHubHTTPError, repo_id: str, token: str | None) -> str:
    status = error.response.status_code
    said = f"{status}: {error.server_message}" if error.server_message else f"{status}"
    if status == 401:
        cause = "the Hub does not know the token" if token or get_token() else "there is no token"
        return f"{cause} ({said}): run `hf auth login`, or set HF_TOKEN to a token with the scope `write`"
    if status == 403:
        return (
            f"the token may not write there ({said}): it needs the scope `write`, and its owner the right to write to "
            f"{repo_id}"
        )
    if status == 404:
        return f"the Hub has no such repo, or hides it from this token ({said})"
    if status == 412:
        return f"somebody else changed the repo at the same time ({said})"
    if status == 429:
        return f"too many requests ({said}): wait some minutes"
    if status >= 500:
        return f"server error of the Hub ({said}): try again later"
    return f"the Hub refused it ({' '.join(str(error).split())})"
