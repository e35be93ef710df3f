"""Checks a licence against the ids that the Hub knows."""

import difflib

# huggingface.co/docs/hub/repositories-licenses
_IDS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
LICENSES = frozenset(_IDS.split())


def check_license(license: str | None) -> None:
    """Refuses, before a run, a licence that the Hub would refuse when the card is pushed.

    Args:
        license: the licence as the Hub spells it; None and an empty text mean no licence.

    Raises:
        ValueError: there is no such id; the message names the closest one.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.licences import check_license
    >>> check_license("Apache 2.0")
    Traceback (most recent call last):
    ValueError: license must be an id of the Hub, got 'Apache 2.0': write apache-2.0

    ```
    """
    if not license or license in LICENSES:
        return
    spelled = "-".join(license.lower().split())
    if spelled in LICENSES:
        raise ValueError(f"license must be an id of the Hub, got {license!r}: write {spelled}")
    closest = difflib.get_close_matches(spelled, sorted(LICENSES), n=1)
    meant = f"is {closest[0]} meant? " if closest else ""
    raise ValueError(
        f"license must be an id of the Hub (huggingface.co/docs/hub/repositories-licenses), got {license!r}: {meant}"
        "For a licence that is not in that list, write other"
    )
