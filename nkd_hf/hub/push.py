"""Puts students and checkpoints on the Hub."""

import json
import logging
import os
import re
import shlex
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoCard,
    constants,
    get_session,
)
from huggingface_hub.utils import build_hf_headers

from ..errors import PushError
from ..models.repo_ids import read_repo_id
from ..models.saving import INT8_FILE, ONNX_FILE
from .failures import explain_failures
from .model_card.card import CURVES_FILE, create_plain_card, is_generated, read_card, with_repo_id
from .student_files import CARD, SETTINGS, TEXT, check_publishable, publishable, read_json, read_text, student_files

logger = logging.getLogger(__name__)

# Files that an earlier push of another student may have left. Users would open them in place of the pushed files.
_STALE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|(pre)?processor_config\.json"
    rf"|{re.escape(ONNX_FILE)}|{re.escape(INT8_FILE)}"
)
COMMIT_MESSAGE = "Upload student"


class PushApi(HfApi):
    """The client of a push, which also pushes to an endpoint that does not check model cards, such as a mirror of the
    Hub.

    `HfApi` and `RepoCard.validate` fail there, and `RepoCard.validate` sends no token.
    """

    def __init__(self, token: str | None = None):
        super().__init__(token=token)
        self._judged: set[str] = set()

    def check_card(self, text: str, repo_type: str = "model") -> None:
        """Asks the Hub whether a card is valid. The Hub would refuse the commit only after all weights were sent.

        Args:
            text: the text of the card.
            repo_type: `model` or `dataset`.

        Raises:
            PushError: the card is not valid.
        """
        if text in self._judged or not text.startswith("---"):
            return
        try:
            RepoCard(text)
        except (ValueError, yaml.YAMLError) as error:
            raise PushError(f"its model card is not valid: {' '.join(str(error).split())}") from error
        url = f"{self.endpoint}/api/validate-yaml"
        said = "no answer"
        try:
            response = get_session().post(
                url, json={"content": text, "repoType": repo_type}, headers=build_hf_headers(token=self.token)
            )
            said = f"status {response.status_code}"
            answer = response.json() if response.status_code in (200, 400) else {}
            errors, warnings = ([item["message"] for item in answer[key]] for key in ("errors", "warnings"))
        except Exception as error:  # errors of httpx, of json, and of an unknown form of answer
            logger.warning(
                "The model card is pushed unchecked, since %s gave no verdict (%s, %s).",
                url,
                said,
                type(error).__name__,
            )
        else:
            if errors:
                raise PushError(f"its model card is not valid: {' '.join('; '.join(errors).split())}")
            if warnings:
                logger.warning("The Hub warns of the model card: %s", "; ".join(warnings))
        self._judged.add(text)

    def _validate_yaml(self, content: str, *, repo_type: str | None = None, token: bool | str | None = None) -> None:
        # create_commit and upload_folder call this method of HfApi, and no public option switches it off.
        self.check_card(content, repo_type or "model")


def push_student(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = COMMIT_MESSAGE,
    overwrite_card: bool = False,
    create_pr: bool = False,
) -> CommitInfo:
    """Puts a saved student on the Hub, in one commit: all of it or nothing.

    It pushes the configuration, the weights as safetensors, the preprocessing, the modelling files that the configuration
    names, the model card, `training_curves.png`, `training_args.yaml` and `onnx/*.onnx`, and no other file of the folder. For
    a folder without a model card, such as a folder of `nkd-hf export`, it writes a card that shows how to open the
    student. It
    deletes files that an earlier push of another student left: weights, preprocessing and ONNX files that would be
    opened in place of the new ones, training curves and arguments. Other files of the repo stay. A model card that a
    person has edited also stays, with a warning.

    Args:
        folder: the folder of a saved student: `trainer.save_model()`, `nkd-hf export`.
        repo_id: `owner/name`, or the address of its page, or `name` for the token's owner; the repo is made if it does
            not exist.
        private: whether a new repo is private; None uses the owner's default.
        revision: a branch that exists; None means `main`.
        token: a token with the right to write; None uses `HF_TOKEN`, or the token of `hf auth login`.
        commit_message: the commit's title.
        overwrite_card: whether a model card that a person has edited on the Hub is replaced.
        create_pr: whether the commit becomes a pull request to `main`, which a token without the right to write there may
            open, too.

    Returns:
        `CommitInfo`: the new commit, or the last commit if nothing has changed. Its `pr_url` is the pull request.

    Raises:
        ValueError: the folder has no student; one of its files has a token or a path of this machine; `repo_id` is the
            address of another kind of page; `create_pr` comes with another branch than `main`.
        PushError: the Hub was not reached, or refused the push.
    """
    folder = Path(folder).expanduser()
    repo_id = read_repo_id(repo_id, "repo_id")
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError(f"revision must be main with create_pr, got {revision!r}. Omit one of the two.")
    files: dict[str, Path | bytes] = {name: folder / name for name in student_files(folder)}
    if CARD not in files:
        files[CARD] = create_plain_card(folder, repo_id).encode()
    check_publishable(files, token)
    again = _command(folder, repo_id, private, revision, commit_message, overwrite_card, create_pr)
    with explain_failures(folder, repo_id, revision, token, again):
        api = PushApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.model_info(repo_id, revision=revision)
        if private:
            _check_private(info)
        held = {file.rfilename for file in info.siblings}
        card = files[CARD].decode() if isinstance(files[CARD], bytes) else read_text(files[CARD])
        files[CARD] = with_repo_id(card, repo_id, revision).encode()
        if CARD in held and not overwrite_card:
            card = read_card(api, repo_id, info.sha)
            if not is_generated(card) and card.encode() != files[CARD]:
                logger.warning(
                    "The model card of %s was edited by hand and is kept (--overwrite_card, or overwrite_card=True, "
                    "would replace it): see whether it describes the student that is pushed now.",
                    repo_id,
                )
                del files[CARD]
        if CARD in files:  # before the weights are sent; create_commit checks the card after them
            api.check_card(files[CARD].decode())
        stale = {name for name in held if _STALE.fullmatch(name) or name in (CURVES_FILE, SETTINGS)}
        return _commit(api, info, files, stale, revision, commit_message, create_pr)


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    path_in_repo: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload checkpoint",
) -> CommitInfo:
    """Puts a whole checkpoint into a folder of an existing repo, so that training can resume from it.

    The optimiser's, scheduler's and generators' states are PyTorch's pickles. `training_args.bin` is not pushed, and paths
    in `trainer_state.json` are shortened to their last names.

    Args:
        folder: the `checkpoint-*` folder.
        repo_id: `owner/name`.
        path_in_repo: the folder in the repo; files of an earlier checkpoint in it are deleted.
        name: the folder's name in messages.
        revision, token, commit_message: as in [`push_student`].

    Raises:
        ValueError: a file has a token or a path of this machine.
        PushError: the Hub was not reached, or refused the push.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {
        f"{path_in_repo}/{path.relative_to(folder).as_posix()}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "training_args.bin"
    }
    state = f"{path_in_repo}/trainer_state.json"
    if state in files:
        files[state] = json.dumps(publishable(read_json(files[state])), indent=2).encode()
    check_publishable(files, token)
    with explain_failures(name or folder, repo_id, revision, token):
        api = PushApi(token=token)
        info = api.model_info(repo_id, revision=revision)
        stale = {file.rfilename for file in info.siblings if file.rfilename.startswith(f"{path_in_repo}/")}
        return _commit(api, info, files, stale, revision, commit_message)


def create_repo(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    folder: str | os.PathLike | None = None,
    commit_message: str = COMMIT_MESSAGE,
    overwrite_card: bool = False,
) -> str:
    """Creates a repo if it does not exist, and checks that the branch exists. Call this before training.

    Args:
        repo_id, private, revision, token: as in [`push_student`].
        folder: the folder to push, if it exists already.
        commit_message, overwrite_card: options of the push command in the error message.

    Returns:
        The repo's id with its owner.

    Raises:
        PushError: the Hub was not reached, or refused the repo; there is no such branch.
    """
    repo_id = read_repo_id(repo_id, "repo_id")
    again = None
    if folder is not None:
        again = _command(folder, repo_id, private, revision, commit_message, overwrite_card)
    with explain_failures(folder, repo_id, revision, token, again):
        api = PushApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private or revision:
            info = api.model_info(repo_id, revision=revision)
            if private:
                _check_private(info)
        return repo_id


def _command(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    overwrite_card: bool,
    create_pr: bool = False,
) -> str:
    options = ["--private"] if private else []
    options += ["--revision", revision] if revision else []
    options += ["--commit_message", commit_message] if commit_message not in (None, COMMIT_MESSAGE) else []
    options += ["--overwrite_card"] if overwrite_card else []
    options += ["--create_pr"] if create_pr else []
    return shlex.join(["nkd-hf", "push", str(folder), repo_id, *options])


def _check_private(info: ModelInfo) -> None:
    if not info.private:
        raise PushError(f"{info.id} exists and is public: make it private in its settings first")


def _commit(
    api: PushApi,
    info: ModelInfo,
    files: dict[str, Path | bytes],
    stale: set[str],
    revision: str | None,
    message: str,
    create_pr: bool = False,
) -> CommitInfo:
    where = {"revision": revision, "create_pr": create_pr}
    operations = [CommitOperationDelete(name) for name in sorted(stale - set(files))]
    additions = [CommitOperationAdd(name, source) for name, source in files.items()]
    for addition in additions:
        if not addition.path_in_repo.endswith(TEXT):
            # The client sends a single file in this thread, so that an interrupt need not wait for other threads.
            api.preupload_lfs_files(info.id, [addition], free_memory=False, **where)
    operations += additions
    # With parent_commit, the Hub refuses to overwrite a commit that was made after model_info was read.
    return api.create_commit(info.id, operations, commit_message=message, parent_commit=info.sha, **where)
