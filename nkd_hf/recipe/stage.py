"""Trains one model of a run, teacher, baseline or student, into its own folder."""

import copy
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from transformers import EarlyStoppingCallback, EvalPrediction, PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..data.bad_images import BadImageReport
from ..data.collator import ImageCollator
from ..data.student_datasets import ImageDatasets
from ..errors import CheckpointError
from ..metrics import compute_metrics, top5_indices
from ..models.labels import check_class_order
from ..models.loading import open_classifier
from ..models.preprocessing import load_image_processor
from ..models.teacher import Teacher
from ..trainer.agreement import first_fault
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.checkpoints import checkpoints, remove_old
from ..trainer.trainer import DistillationTrainer
from .progress import show_progress
from .report import say
from .run_folder import decide_in_folder, exit_if_not_written, read_history


def make_trainer(
    training: DistillationTrainingArguments,
    folder: Path,
    student: PreTrainedModel,
    datasets: ImageDatasets,
    collator: ImageCollator,
    loss: nn.Module | dict[str, nn.Module] | None = None,
    teacher: PreTrainedModel | Teacher | None = None,
    steps_per_epoch: int | None = None,
    class_weights: Tensor | None = None,
    metrics: Callable[[EvalPrediction], dict[str, float]] = compute_metrics,
    early_stopping_patience: int | None = None,
    **changes,
) -> DistillationTrainer:
    """Makes the trainer of one model.

    Args:
        training: the arguments of the run; the trainer gets a copy.
        folder: the folder of the model.
        student: the model that is trained.
        datasets: the images of training and of evaluation.
        collator: makes the batches.
        loss: the distillation loss; None trains with the task loss alone, and ignores the settings of a teacher.
        teacher: the teacher of the loss.
        steps_per_epoch: optimiser steps of an epoch of a stream.
        class_weights: [C] float, the weights of the task loss.
        metrics: `compute_metrics` of the trainer.
        early_stopping_patience: the training ends after so many evaluations without an improvement; None trains all
            steps.
        **changes: arguments that differ from the run's.
    """
    args = copy.copy(training)
    for argument, value in {"output_dir": str(folder), "push_to_hub": False, **changes}.items():
        setattr(args, argument, value)
    args.hub_model_id = args.hub_model_id or Path(training.output_dir).name
    if loss is None:
        args.feature_layer = args.teacher_dtype = None
        args.teacher_channels_last = args.teacher_compile = False
    train, validation = datasets
    callbacks: list[TrainerCallback] = [BadImageReport(steps_per_epoch)]
    if early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience))
        args.restore_callback_states_from_checkpoint = True  # a resumed run keeps the count of evaluations
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        distillation_loss=loss,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=load_image_processor(student),
        class_weights=class_weights,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=top5_indices,
        callbacks=callbacks,
    )
    show_progress(trainer, folder.name)
    return trainer


def train_model(trainer: DistillationTrainer, name: str, checkpoint: str | None, with_card: bool) -> None:
    """Trains, saves and evaluates one model.

    Args:
        trainer: the trainer of the model.
        name: `teacher`, `baseline` or `student`.
        checkpoint: the folder from which the training resumes; None starts it from the beginning.
        with_card: whether a model card is written beside the weights.

    Raises:
        SystemExit: with a message, when a checkpoint or the model cannot be written.
    """
    args, folder, limit = trainer.args, Path(trainer.args.output_dir), trainer.args.save_total_limit
    if limit == 1 and args.load_best_model_at_end:
        # Trainer deletes the last checkpoint, beside the best one, before the model is saved and evaluated. A run that is
        # killed then would repeat the epochs after the best one.
        args.save_total_limit = 2
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except CheckpointError as error:
        raise SystemExit(f"error: {error}") from error
    # An internal call of save_model does not push: Recipe.report pushes after it has written the figures.
    with exit_if_not_written(f"the {name}", folder):
        trainer.save_model(_internal_call=True)
    trainer.evaluate()
    with exit_if_not_written(f"the {name}", folder):
        if args.precise_bn_images is not None:
            trainer.save_model(_internal_call=True)  # with the BatchNorm statistics of the evaluation
        trainer.save_state()
        if with_card:
            _write_card(trainer)
    if args.save_total_limit != limit and args.should_save:
        remove_old(str(folder), -1, limit, trainer.state.best_model_checkpoint)
    args.save_total_limit = limit


def restore_trained(trainer: DistillationTrainer) -> None:
    """Restores a trainer's state at the end of a training of an earlier start, and writes the model card.

    Args:
        trainer: a trainer whose student has the trained weights; see [`open_trained`].

    Raises:
        SystemExit: with a message, when the card cannot be written.
    """
    folder = Path(trainer.args.output_dir)
    trainer.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    with exit_if_not_written(f"the {folder.name}", folder):
        _write_card(trainer)


def _write_card(trainer: DistillationTrainer) -> None:
    trainer.create_model_card(model_name=trainer.args.hub_model_id.split("/")[-1])


def find_trained(folder: Path) -> list[dict[str, float]] | None:
    """Reads the log of a model that an earlier start has trained to its end; None where there is no such model.

    Raises:
        SystemExit: with a message, when one of the processes does not see the model that the first process sees.
    """
    history = decide_in_folder(folder.parent, lambda: read_history(folder))
    if history is None:
        return None
    fault = first_fault(None if read_history(folder) == history else f"{folder} lacks the trained {folder.name}")
    if fault:
        raise SystemExit(f"error: output_dir must be one folder for all processes: {fault}")
    return history


def open_trained(folder: Path, student: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """Loads the weights of a model that an earlier start has trained into `student`, and returns `student`."""
    check_class_order(str(folder), student.config.id2label)
    trained = open_classifier(str(folder), trust_remote_code=trust_remote_code)
    student.load_state_dict(trained.state_dict())
    return student


def find_last_checkpoint(trainer: DistillationTrainer, has_begun: bool) -> str | None:
    """Finds the checkpoint from which a training resumes, and prints it.

    Args:
        trainer: the trainer of the model.
        has_begun: whether an earlier start has begun this training, so that a missing checkpoint gets a message.

    Returns:
        The folder; None where the training starts from the beginning.
    """
    args = trainer.args
    checkpoint = trainer.last_checkpoint()
    if checkpoint is not None:
        say(args, f"Continues from {checkpoint}")
        return checkpoint
    if not has_begun:
        return None
    missing = f"There is no checkpoint in {args.output_dir}"
    if checkpoints(args.output_dir):
        missing = f"The checkpoints in {args.output_dir} hold the model only (save_only_model)"
    say(args, f"{missing}: this training starts from the beginning")
    return None
