"""`nkd-hf push`: puts a saved student on the Hub."""

import argparse
import sys

from ..errors import PushError
from ..hub.push import COMMIT_MESSAGE, push_student


def main(args: list[str] | None = None) -> None:
    """Runs `nkd-hf push`."""
    parser = argparse.ArgumentParser(
        prog="nkd-hf push",
        description="Puts a saved student on the Hub. The token comes from HF_TOKEN or `hf auth login`.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a saved student")
    parser.add_argument(
        "repo_id", metavar="REPO", help="owner/name on the Hub, or the address of its page; made if it does not exist"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make the repo private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--commit_message", default=COMMIT_MESSAGE, help="(default: %(default)s)")
    parser.add_argument("--overwrite_card", action="store_true", help="replace a model card that was edited by hand")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of writing to main")
    args = parser.parse_args(args)
    try:
        commit = push_student(**vars(args))
    except PushError as error:
        sys.exit(f"nkd-hf push: error: {error}")
    except KeyboardInterrupt:  # push_student has printed how to go on
        sys.exit(130)
    if commit.pr_url is not None:
        print(f"{args.folder} is proposed on the Hub: {commit.pr_url}")
    else:  # With create_pr and nothing to propose, this is the last commit.
        print(f"{args.folder} is on the Hub: {commit.commit_url}")
