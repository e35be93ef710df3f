"""How the trainer pushes: at the end, and during training by `--hub_strategy`."""

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..errors import PushError
from ..files import TemporaryFolder
from ..hub.push import create_repo, push_checkpoint, push_student
from ..hub.student_files import student_files

logger = logging.getLogger(__name__)

# How the names begin of the folders in output_dir from which checkpoints are pushed.
PUSH_COPY = "_push-"


class HubTrainer(Trainer):
    """A `Trainer` whose pushes hold the student alone, and lose nothing when they fail; see [`push_student`].

    `hub_strategy` means what it means to `Trainer`: `end` pushes when `save_model` or `push_to_hub` is called,
    `every_save` pushes the student of each checkpoint in the background, `checkpoint` puts the checkpoint itself into
    `last-checkpoint`, too, and `all_checkpoints` each checkpoint into a folder of its own. What is in a checkpoint is
    then in the repo: the optimiser's and generators' states, which are pickles, and what the losses train. A save that
    finds the push of the one before under way is not pushed; with `hub_always_push` it waits for that and is.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # At construction, before anything is trained in vain; the default's error is the client's.
        if self.is_world_process_zero():
            self._init_repo(token, private)

    def _init_repo(self, token: str | None, private: bool | None, **kwargs: Any) -> None:
        self.hub_model_id = create_repo(
            self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            **({"revision": self.args.hub_revision} | kwargs),
        )
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        overwrite_card: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the student with its card, and pushes it.

        Args:
            commit_message: the commit's title.
            blocking: whether to wait; else the files in `output_dir` must stay as they are until it is done.
            token, revision, private: None takes `hub_token`, `hub_revision` and `hub_private_repo`.
            overwrite_card: whether a model card that a person has edited on the Hub is replaced.
            **kwargs: those of `create_model_card`.

        Returns:
            The commit, or a `Future` of it; None on other processes than the first.

        Raises:
            ValueError: a file to push holds a token or a path of this machine.
            PushError: the push failed; the student is in `output_dir`, and the message says how to push it again.
        """
        args, folder = self.args, self.args.output_dir
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._wait_for_push()
        # Ahead of all that can fail, and on all processes: the weights may be sharded.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        token = token or args.hub_token
        private = args.hub_private_repo if private is None else private
        settings = {
            "revision": revision or args.hub_revision,
            "commit_message": commit_message,
            "overwrite_card": overwrite_card,
        }
        if self.hub_model_id is None:
            self._init_repo(token, private, folder=folder, **settings)
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in self.accelerator.unwrap_model(self.model).model_tags or [] if tag not in tags]
        name = kwargs.pop("model_name", None) or self.hub_model_id.split("/")[-1]
        self.create_model_card(model_name=name, tags=tags, **kwargs)

        def push() -> CommitInfo:
            return push_student(folder, self.hub_model_id, private=private, token=token, **settings)

        if blocking:
            return push()
        job = _background(push)
        job.add_done_callback(_say_failure)  # Few look into a future.
        self.push_in_progress = PushInProgress([job])
        return job

    def _wait_for_push(self) -> None:
        # Trainer sets push_in_progress when it pushes, and not before.
        if getattr(self, "push_in_progress", None) is not None:
            self.push_in_progress.wait_until_done()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The default pushes all of output_dir, and a pickle of the arguments with it.
        args = self.args
        if args.hub_strategy == HubStrategy.END:
            return
        self.accelerator.wait_for_everyone()  # Each process writes files of its own into the checkpoint.
        if not self.is_world_process_zero():
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not args.hub_always_push:
                return
            self._wait_for_push()  # It reads the files that are written now.
        self.callback_handler.on_push_begin(args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        for file in student_files(checkpoint, in_checkpoint=True):
            shutil.copy(checkpoint / file, args.output_dir)
        self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
        step = f"step {self.state.global_step}"
        if args.save_strategy != SaveStrategy.STEPS:
            step = f"epoch {int(self.state.epoch)}"
        settings = {"revision": args.hub_revision, "token": args.hub_token}
        message = f"Training in progress, {step}"
        jobs = [
            _background(_warned(push_student), args.output_dir, self.hub_model_id, commit_message=message, **settings)
        ]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            where = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            copy = _linked_copy(checkpoint, args.output_dir)
            settings |= {"name": checkpoint_folder, "commit_message": f"{message}, checkpoint"}
            jobs.append(_background(_warned(_push_copy), copy, self.hub_model_id, where, **settings))
        self.push_in_progress = PushInProgress(jobs)


# One queue: the pushes of a run follow each other.
_background = HfApi().run_as_future


def _say_failure(job: Future) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.error("%s", error)


def _warned(push: Callable) -> Callable:
    """A push that fails during training is a warning: training goes on, and the next save pushes again."""

    def warned(*args: Any, **kwargs: Any) -> None:
        try:
            push(*args, **kwargs)
        except (PushError, ValueError, OSError) as error:
            logger.warning("%s\nTraining goes on, and the next save is pushed again.", error)

    return warned


def _push_copy(copy: TemporaryFolder, *args: Any, **kwargs: Any) -> None:
    with copy as folder:
        push_checkpoint(folder, *args, **kwargs)


def _linked_copy(checkpoint: Path, parent: str) -> TemporaryFolder:
    """The checkpoint's files, for as long as the push takes: `save_total_limit` may delete the checkpoint before."""
    copy = TemporaryFolder(PUSH_COPY, parent)
    for path in checkpoint.rglob("*"):
        target = Path(copy.name, path.relative_to(checkpoint))
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # a file system without hard links
            shutil.copy2(path, target)
    return copy
