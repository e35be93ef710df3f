"""Pushes a trainer's student at the end of training, and during training by `hub_strategy`."""

import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..errors import PushError
from ..files import TemporaryFolder
from ..hub.model_card.card import write_card
from ..hub.model_card.facts import CardInfo
from ..hub.push import create_repo, push_checkpoint, push_student
from ..hub.student_files import student_files
from ..models.saving import removed_onnx_of_other_weights
from .checkpoints import PUSH_COPY

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.getLogger(__name__)
# The pushes of a run follow each other in one queue.
_background = HfApi().run_as_future


def write_trainers_card(trainer: "DistillationTrainer", name: str | None, info: CardInfo) -> None:
    """Writes the model card of a trainer's student into `output_dir`."""
    args, source = trainer.args, trainer.teacher_source
    repo_id = trainer.hub_model_id or args.hub_model_id
    write_card(
        args.output_dir,
        trainer.student,
        name=name or os.path.basename(os.path.abspath(args.output_dir)),
        args=args,
        state=trainer.state,
        repo_id=repo_id if repo_id and "/" in repo_id else None,
        teacher=None if source is None else source.description,
        losses=trainer.distillation_losses,
        info=info,
    )


def make_repo(trainer: "DistillationTrainer", token: str | None, private: bool | None, **settings: Any) -> None:
    """Creates the repository of a trainer, as its first process; `settings` are arguments of [`create_repo`]."""
    args = trainer.args
    trainer.hub_model_id = create_repo(
        args.hub_model_id or Path(args.output_dir).absolute().name,
        private=args.hub_private_repo if private is None else private,
        token=token or args.hub_token,
        **({"revision": args.hub_revision} | settings),
    )
    trainer.push_in_progress = None


def push_saved_student(
    trainer: "DistillationTrainer",
    blocking: bool,
    token: str | None,
    private: bool | None,
    settings: dict[str, Any],
    card: dict[str, Any],
) -> CommitInfo | Future[CommitInfo]:
    """Pushes the student in `output_dir` with a new card, as the first process.

    Args:
        trainer: a trainer that has saved its student.
        blocking: whether to wait for the commit.
        token, private, settings: arguments of [`push_student`].
        card: arguments of `create_model_card`.
    """
    args, folder = trainer.args, trainer.args.output_dir
    token = token or args.hub_token
    private = args.hub_private_repo if private is None else private
    if trainer.hub_model_id is None:
        make_repo(trainer, token, private, folder=folder, **settings)
    tags = card.pop("tags", None) or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    tags += [tag for tag in trainer.accelerator.unwrap_model(trainer.model).model_tags or [] if tag not in tags]
    name = card.pop("model_name", None) or trainer.hub_model_id.split("/")[-1]
    trainer.create_model_card(model_name=name, tags=tags, **card)

    def push() -> CommitInfo:
        return push_student(folder, trainer.hub_model_id, private=private, token=token, **settings)

    if blocking:
        return push()
    job = _background(push)
    job.add_done_callback(_say_failure)  # Few callers read the exception of a future.
    trainer.push_in_progress = PushInProgress([job])
    return job


def push_saved_checkpoint(trainer: "DistillationTrainer", checkpoint_folder: str) -> None:
    """Pushes the student of a checkpoint in the background, and the checkpoint itself where `hub_strategy` says so."""
    args = trainer.args
    if trainer.push_in_progress is not None and not trainer.push_in_progress.is_done():
        if not args.hub_always_push:
            return
        wait_for_push(trainer)  # The running push reads the files that are overwritten below.
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    checkpoint = Path(checkpoint_folder)
    with removed_onnx_of_other_weights(args.output_dir):
        for file in student_files(checkpoint, in_checkpoint=True):
            shutil.copy(checkpoint / file, args.output_dir)
    trainer.create_model_card(model_name=trainer.hub_model_id.split("/")[-1])
    step = f"step {trainer.state.global_step}"
    if args.save_strategy != SaveStrategy.STEPS:
        step = f"epoch {int(trainer.state.epoch)}"
    settings = {"revision": args.hub_revision, "token": args.hub_token}
    message = f"Training in progress, {step}"
    jobs = [
        _background(_warned(push_student), args.output_dir, trainer.hub_model_id, commit_message=message, **settings)
    ]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        where = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        copy = _linked_copy(checkpoint, args.output_dir)
        settings |= {"name": checkpoint_folder, "commit_message": f"{message}, checkpoint"}
        jobs.append(_background(_warned(_push_copy), copy, trainer.hub_model_id, where, **settings))
    trainer.push_in_progress = PushInProgress(jobs)


def wait_for_push(trainer: "DistillationTrainer") -> None:
    """Waits until a running push has ended, if there is one."""
    # Trainer sets push_in_progress only when it pushes.
    if getattr(trainer, "push_in_progress", None) is not None:
        trainer.push_in_progress.wait_until_done()


def _say_failure(job: Future) -> None:
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.error("%s", error)


def _warned(push: Callable) -> Callable:
    """Turns the failure of a push into a warning: training continues, and the next save pushes again."""

    def warned(*args: Any, **kwargs: Any) -> None:
        try:
            push(*args, **kwargs)
        except (PushError, ValueError, OSError) as error:
            logger.warning("%s\nTraining continues, and the next save pushes again.", error)

    return warned


def _push_copy(copy: TemporaryFolder, *args: Any, **kwargs: Any) -> None:
    with copy as folder:
        push_checkpoint(folder, *args, **kwargs)


def _linked_copy(checkpoint: Path, parent: str) -> TemporaryFolder:
    """Links the checkpoint's files into a temporary folder: `save_total_limit` may delete them before the push ends."""
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
