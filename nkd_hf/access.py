"""What to do when the Hub does not let somebody in."""

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError


def gate(error: BaseException, repo_id: str, repo_type: str = "model") -> str | None:
    """Says how to get into a gated repo, if that is what an error is about.

    Args:
        error: what was raised; the errors that led to it are looked at, too.
        repo_id: `owner/name`.
        repo_type: `model` or `dataset`.

    Returns:
        What to accept and where, or None.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # `datasets` cuts the chain off, and leaves its words.
        if isinstance(error, GatedRepoError) or "is a gated dataset on the Hub" in str(error):
            page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
            return (
                f"it is gated: accept its terms on {page}, then run `hf auth login` with an account that has done so, or "
                "set HF_TOKEN to its token"
            )
        error = error.__cause__ or error.__context__
    return None
