"""`transformers.Trainer` with a teacher, or with self-distillation."""

import copy
import functools
import json
import logging
import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate.utils import broadcast, set_seed
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, HubStrategy, TrainOutput
from transformers.utils import ModelOutput

from ..data.collator import ImageCollator
from ..data.dataset_classes import check_dataset_classes
from ..data.sampler import EpochDataset, EpochIndices, EpochSampler
from ..data.seeding import derived_seeds
from ..hub.model_card.card import write_card
from ..hub.model_card.curves import OTHER_DATASET
from ..hub.model_card.facts import CardInfo
from ..hub.student_files import SETTINGS, publishable
from ..losses.checks import check_labels
from ..models.labels import check_classifier
from ..models.saving import read_class_names
from ..models.teacher import Teacher
from . import checks, loaders, pushing, teacher_source
from .agreement import decide_in_first, first_fault
from .arguments import DistillationTrainingArguments
from .batch_norm import estimate_batch_norm, wants_more_values
from .callbacks import CheckOwnMethods, KeepPace, PrepareTraining, SetEpoch, UpdateAverage
from .checkpoint_writer import CheckpointWriter, read_sums
from .checkpoints import UNFINISHED, fault_of, find_checkpoint, last_checkpoint, remove_old
from .distillation_model import IGNORE_INDEX, DistillationModel, DistillationOutput
from .image_losses import ImageLosses
from .loss_log import LossLog
from .non_finite import StepGuard
from .optimization import SCHEDULES, decayed_parameters, lr_factor
from .optimizer_groups import check_no_group_is_empty
from .sigterm import EXIT_CODE, Sigterm

logger = logging.getLogger(__name__)

# Of a sample or a batch, beside pixels and labels.
OWN_COLUMNS = ("epoch", "index", "position", "teacher_logits")


class DistillationTrainer(Trainer):
    """Trains a student with the task loss (cross-entropy) plus distillation losses.

    Everything that `transformers.Trainer` does works as it does there. `trainer.model` is one module that holds the
    student and whatever the losses train; `trainer.student` is the plain student, and the only thing that is saved
    outside of `checkpoint-*`.

    A checkpoint takes its name `checkpoint-*` when all of it is written; one that was damaged later is recognised by its
    files' sizes. SIGTERM ends training after the step, with a checkpoint. A loss that is not finite ends the run or has the
    step skipped, by `on_non_finite_loss`: a skipped step leaves weights, BatchNorm's statistics, optimiser and log as they
    were. Pushes hold the student alone, and lose nothing when they fail. `hub_strategy` means what it means to `Trainer`:
    `end` pushes when `save_model` or `push_to_hub` is called, `every_save` pushes the student of each checkpoint in the
    background, `checkpoint` puts the checkpoint itself into `last-checkpoint`, too, and `all_checkpoints` each checkpoint
    into a folder of its own, pickles of optimiser and generators included. A save that finds the push of the one before
    under way is not pushed; with `hub_always_push` it waits for that and is.

    Args:
        model (`PreTrainedModel`): the student, any `*ForImageClassification` of transformers; for timm's architectures
            see [`create_student`].
        args (`DistillationTrainingArguments`)
        data_collator, train_dataset, eval_dataset, processing_class: as in `Trainer`. Batches hold `pixel_values`
            [B, 3, H, W] float and `labels`: [B] int64, or [B, C] float after mixup / cutmix. `processing_class` is the
            student's image processor; it is saved with the student. An [`ImageCollator`] with `teacher_logits` takes the
            place of a teacher.
        teacher (`str`, `nn.Module` or [`Teacher`], *optional*): a Hub id, a folder or a model; see [`load_teacher`].
        distillation_loss (`nn.Module` or `dict[str, nn.Module]`, *optional*): [`NKDLoss`], [`USKDLoss`], [`ViTKDLoss`],
            [`KDLoss`], [`DKDLoss`], [`WSLDLoss`], [`DISTLoss`], [`WTTMLoss`], [`MGDLoss`], [`SRRLLoss`], or several by name,
            which add up; [`KDLoss`] scales the task loss by `1 - alpha`. None trains with the task loss alone: the baseline.
        card_info ([`CardInfo`], *optional*): what the model card should say beyond what the trainer knows: the dataset, a
            baseline's accuracy, the licence.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: loss and teacher do not fit each other, the teacher's classes are not the student's, those of an
            `ImageDataset` are not (see [`~nkd_hf.data.dataset_classes.check_dataset_classes`]), no layer is
            found for a loss that reads a mid feature, `compute_loss_func` would replace a distillation loss,
            `label_names` has no `labels`, a group of `optimizers` is empty, or student or teacher is for regression, for several labels an image (`problem_type`) or for one class.

    Example:

    ```python
    >>> from nkd_hf import DistillationTrainer, DistillationTrainingArguments, NKDLoss, create_student
    >>> trainer = DistillationTrainer(
    ...     model=create_student("resnet18", num_labels=10, image_size=32),
    ...     teacher=create_student("resnet34", num_labels=10, image_size=32),
    ...     distillation_loss=NKDLoss(),
    ...     args=DistillationTrainingArguments("resnet18-nkd", report_to="none", use_cpu=True),
    ... )
    >>> batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([3, 7])}
    >>> trainer.compute_loss(trainer.model, batch).isfinite().item()
    True

    ```
    """

    # compute_loss returns a mean over its micro-batch, and Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    # ---- construction

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: BaseImageProcessor | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        teacher: str | nn.Module | Teacher | None = None,
        distillation_loss: nn.Module | dict[str, nn.Module] | None = None,
        card_info: CardInfo | None = None,
    ):
        args = DistillationTrainingArguments("tmp_trainer") if args is None else args
        checks.check_arguments(args)
        self.distillation_losses = checks.read_losses(distillation_loss, compute_loss_func)
        self.card_info = CardInfo() if card_info is None else card_info
        self.loss_log, self.image_losses = LossLog(), ImageLosses()
        self.step_guard, self.checkpoint_writer = StepGuard(skips=False), CheckpointWriter()
        self._resumed_from: str | None = None
        # The step whose precise statistics BatchNorm has.
        self._batch_norm_step: int | None = None
        self._loaders: list[torch.utils.data.DataLoader] = []
        if model is not None:
            model = self._with_losses(model, self.distillation_losses, args)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
        )  # fmt: skip
        config = self.accelerator.dataloader_config
        if args.world_size > 1 and config.data_seed is None:
            # accelerate would seed a RandomSampler by torch's initial seed, which the processes have in common until one of
            # their trainers has trained.
            config.data_seed = args.seed
        if compute_loss_func is not None and not self.has_own("loss_is_scaled_for_ga"):
            self.loss_is_scaled_for_ga = None  # As Trainer: the function gets num_items_in_batch.
        # The smoothing is in the model's task loss, for both kinds of labels.
        self.label_smoother = None
        # Trainer sets it in each step. compute_loss and training_step may be called by hand.
        self.current_gradient_accumulation_steps = 1
        student = self.accelerator.unwrap_model(self.model).student
        checks.check_label_names(self)
        checks.check_pixels(self.datasets, student, self.processing_class)
        check_dataset_classes(self.student.config.id2label, self.datasets)
        if self.optimizer is not None:
            check_no_group_is_empty(self.optimizer)
        self.teacher_source = self._open_teacher_source(teacher)
        if self.optimizer is not None:
            checks.check_optimizer(self, self.optimizer)
        self._pace = KeepPace(self)
        for callback in (self._pace, CheckOwnMethods(self), PrepareTraining(self)):
            self.add_callback(callback)
        if args.ema_decay is not None:
            self.add_callback(UpdateAverage(self))

    def _with_losses(
        self, model: nn.Module, losses: dict[str, nn.Module], args: DistillationTrainingArguments
    ) -> DistillationModel:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"model must be a *ForImageClassification of transformers, got {type(model).__name__}: "
                'for a timm architecture give create_student("<its name>"), and load weights into its timm_model'
            )
        check_classifier(model.config, "the student")
        read_class_names(model)
        return DistillationModel(model, losses, args.feature_layer, args.label_smoothing_factor, args.ema_decay)

    def _open_teacher_source(self, teacher: str | nn.Module | Teacher | None) -> teacher_source.TeacherSource | None:
        model, collator = self.accelerator.unwrap_model(self.model), self.data_collator
        store = collator.teacher_logits if isinstance(collator, ImageCollator) else None
        stored = None if store is None else teacher_source.open_stored_logits(store, model)
        teacher_source.check_teacher_is_asked_for(model, teacher, store, self.args)
        if teacher is None:
            return stored
        return teacher_source.open_live_teacher(teacher, model, self.processing_class, self.args, self.accelerator)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        # model_init returns a student, and Trainer needs the module that is trained, with losses as they were at first.
        losses = copy.deepcopy(self.distillation_losses)
        return self._with_losses(super().call_model_init(trial), losses, self.args)

    def has_own(self, name: str) -> bool:
        """Whether a subclass, or the trainer itself, has an attribute of its own in place of DistillationTrainer's."""
        classes = type(self).__mro__[: type(self).__mro__.index(DistillationTrainer)]
        return name in vars(self) or any(name in vars(kind) for kind in classes)

    @property
    def has_own_evaluation(self) -> bool:
        """Whether a subclass, or a method that is set on the trainer, says what the loss of an evaluation is."""
        return self.has_own("compute_loss") or self.has_own("prediction_step")

    @property
    def student(self) -> PreTrainedModel:
        """The plain student that is evaluated and saved: with `ema_decay`, the one with the averaged weights."""
        return self.accelerator.unwrap_model(self.model).evaluated_student

    @property
    def teacher(self) -> nn.Module | None:
        """The [`Teacher`] that computes in each step, possibly wrapped."""
        source = self.teacher_source
        return source.model if isinstance(source, teacher_source.LiveTeacher) else None

    @property
    def datasets(self) -> dict[str, Any]:
        """The datasets of training and evaluation, by what errors call them."""
        if not isinstance(self.eval_dataset, dict):
            return {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        evaluation = {f"eval_dataset[{name!r}]": dataset for name, dataset in self.eval_dataset.items()}
        return {"train_dataset": self.train_dataset, **evaluation}

    # ---- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Task loss plus distillation losses; under `torch.no_grad()`, as evaluation runs, the cross-entropy alone.

        Args:
            model: `trainer.model`, possibly wrapped.
            inputs: `pixel_values` [B, 3, H, W] float and `labels` [B] int64 or [B, C] float; with a store of teacher
                logits, `teacher_logits`, too. Columns that the student's forward names reach it, others are ignored.
            return_outputs: whether to return a `ModelOutput` with `logits` [B, C] and, in training, `losses` by name, too.
            num_items_in_batch: ignored but by `compute_loss_func`; the loss is a mean over the micro-batch.

        Returns:
            `Tensor`: a float32 scalar.
        """
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        checks.check_batch(inputs)
        if not torch.is_grad_enabled():
            return self._compute_evaluation_loss(model, inputs, return_outputs)
        teacher = {} if self.teacher_source is None else self.teacher_source.outputs(inputs)
        columns = self.accelerator.unwrap_model(self.model).select_columns(inputs)
        outputs = model(inputs["pixel_values"], inputs["labels"], teacher, **columns)
        # DataParallel gives a vector, one entry per GPU.
        components = {name: value.mean() for name, value in outputs["losses"].items()}
        self.loss_log.add(components, share=1 / self.current_gradient_accumulation_steps)
        self.step_guard.note(components, outputs["logits"], teacher.get("teacher_logits"))
        loss = sum(components.values())
        return (loss, outputs) if return_outputs else loss

    def _compute_evaluation_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        labels, columns = inputs["labels"], self.accelerator.unwrap_model(self.model).select_columns(inputs)
        outputs = DistillationOutput(logits=model(inputs["pixel_values"], **columns)["logits"])
        check_labels(labels, outputs.logits.shape, IGNORE_INDEX)
        loss = F.cross_entropy(outputs.logits.float(), labels if labels.is_floating_point() else labels.long())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_in_train:  # Called by hand: there is no step to stop at or to undo.
            return super().training_step(model, inputs, *args, **kwargs)
        self.step_guard.begin(self._read_step_state)
        step, rate = self.state.global_step + 1, self.optimizer.param_groups[0]["lr"]
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except ValueError as error:  # check_batches does not see the batches of a stream.
            if not wants_more_values(error):
                raise
            raise ValueError(
                f"the batch of step {step} must have at least 2 images, got 1. BatchNorm has no statistics of one "
                "value: set another per_device_train_batch_size. dataloader_drop_last has no effect on streams"
            ) from error
        self.step_guard.add(step, rate, loss * self.current_gradient_accumulation_steps, inputs.get("index"))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # Trainer calls _get_grad_norm last before the optimiser's step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        step, has_scaler = self.state.global_step + 1, self.accelerator.scaler is not None
        before = self.step_guard.close_step(step, grad_norm, has_scaler, self._sum_over_processes)
        if before is None:
            return grad_norm
        # Without gradients an optimiser changes neither a parameter nor its state. A gradient scaler needs to see them,
        # and then skips the step by itself.
        if not has_scaler:
            model.zero_grad(set_to_none=True)
        self._undo_step(before)
        return None

    @property
    def step_was_skipped(self) -> bool:
        """Whether the step that is under way is skipped."""
        return self.step_guard.step_was_skipped

    def _sum_over_processes(self, number: float) -> float:
        return self.accelerator.reduce(torch.tensor(number, device=self.args.device), reduction="sum").item()

    def _read_step_state(self) -> tuple[Tensor, LossLog, list[Tensor]]:
        return self._tr_loss.clone(), self.loss_log.copy(), [buffer.clone() for buffer in self.model.buffers()]

    def _undo_step(self, before: tuple[Tensor, LossLog, list[Tensor]]) -> None:
        loss, log, buffers = before
        self._tr_loss.copy_(loss)
        log.skipped_steps += 1
        self.loss_log = log
        # The mean of the log is over the steps since then.
        self._globalstep_last_logged += 1
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The components stand beside `loss` and are averaged as it is: over steps, accumulation and processes.
        if "loss" in logs:
            gather = functools.partial(nested_gather, parallel_mode=self.args.parallel_mode)
            logs = {"loss": logs["loss"], **self.loss_log.means(gather), **logs}
        # Trainer divides what was summed up since the resume by the steps since then. Here both are the run's.
        if "train_loss" in logs:
            num_steps = self.state.global_step - self.loss_log.skipped_steps
            logs["train_loss"] = self._total_loss_scalar / max(num_steps, 1)
        super().log(logs, start_time)

    # ---- optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Trainer decays BatchNorm's weights and position embeddings, and no bias.
        if self.args.no_weight_decay is None:
            return super().get_decay_parameter_names(model)
        return decayed_parameters(model, self.args.no_weight_decay)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        # Trainer knows transformers' schedules alone, and a rate that may be meant for another global batch.
        if self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self._scale_learning_rate(optimizer)
        args, name = self.args, self.args.lr_scheduler_type.value
        if name not in SCHEDULES:
            return super().create_scheduler(num_training_steps, optimizer)
        epochs, rate, kwargs = args.num_train_epochs, args.learning_rate, args.lr_scheduler_kwargs
        factor = lr_factor(name, num_training_steps, epochs, rate, kwargs, max_steps=args.max_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _scale_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Scales the rate to the global batch of this attempt, from that of the first one."""
        args = self.args
        global_batch_size = args.global_batch_size(self._train_batch_size)
        scale = 1.0 if args.base_batch_size is None else global_batch_size / args.base_batch_size
        for group in optimizer.param_groups:
            unscaled = group.setdefault("unscaled_lr", group["lr"])
            group["lr"] = group["initial_lr"] = unscaled * scale
        if scale != 1 and self.is_world_process_zero():
            logger.warning(
                "learning_rate %g is meant for a global batch of %d (base_batch_size), and this run's is %d: it is "
                "scaled to %g.",
                optimizer.param_groups[0]["unscaled_lr"],
                args.base_batch_size,
                global_batch_size,
                optimizer.param_groups[0]["lr"],
            )

    # ---- data

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        # (epoch, index) pairs make the augmentation a function of both in every worker; set_epoch would not reach them.
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(train_dataset, EpochDataset):
            return loaders.make_epoch_sampler(train_dataset, self.args, self.data_collator)
        loaders.check_holds_no_epoch_dataset(train_dataset)
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        # With remove_unused_columns, Trainer keeps what the forward of trainer.model names, which is not the student's.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += [*self.accelerator.unwrap_model(self.model).columns, *OWN_COLUMNS]

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        *args: Any,
        sampler_fn: Callable[[Any], torch.utils.data.Sampler | None] | None = None,
        is_training: bool = False,
        **kwargs: Any,
    ) -> torch.utils.data.DataLoader:
        # Trainer makes all of its loaders here, and calls an overridden _get_train_sampler here too.
        if is_training and sampler_fn is not None:
            sampler_fn = functools.partial(self._make_training_sampler, sampler_fn)
        if not is_training:
            name = "test_dataset" if description == "test" else "eval_dataset"
            check_dataset_classes(self.student.config.id2label, {name: dataset})
        divided = is_training and loaders.is_divided(self, dataset)
        if divided:
            dataset = dataset.for_process(self.args.process_index, self.args.world_size)
        with loaders.loader_settings(self, is_training, divided):
            loader = super()._get_dataloader(
                dataset, description, *args, sampler_fn=sampler_fn, is_training=is_training, **kwargs
            )
        self._loaders.append(loaders.prepare_loader(loader, self.args, divided))
        return loader

    def _make_training_sampler(self, sampler_fn: Callable, dataset: Any) -> torch.utils.data.Sampler | None:
        sampler = loaders.make_training_sampler(sampler_fn, dataset, self.args, self.data_collator)
        self.pop_callback(SetEpoch)
        if isinstance(sampler, EpochSampler | EpochIndices):
            self.add_callback(SetEpoch(sampler))
        return sampler

    def check_batches(self, loader: torch.utils.data.DataLoader, max_steps: int) -> None:
        """Checks the sizes of training batches; see [`~nkd_hf.trainer.checks.check_batches`]."""
        checks.check_batches(self, loader, max_steps)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ):
        # Once for all evaluations of a step.
        images = self.args.precise_bn_images
        if images is not None and self.train_dataset is not None and self._batch_norm_step != self.state.global_step:
            self._estimate_batch_norm(images)
            self._batch_norm_step = self.state.global_step
        start = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # Names, and None, are of the trainer's own; a dict is evaluated dataset by dataset, each with its own call.
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if not isinstance(eval_dataset, str | dict | type(None)) and all(eval_dataset is not data for data in own):
            for entry in self.state.log_history[start : start + 1]:
                # In the log, where it outlives a resume: the model card speaks of held-out images alone.
                entry[OTHER_DATASET] = True
        return metrics

    def _estimate_batch_norm(self, num_images: int) -> None:
        estimate_batch_norm(
            self.student,
            self.train_dataset,
            num_images,
            self.accelerator,
            key=(self.args.seed, self.state.global_step),
            batch_size=self.args.process_batch_size(self._train_batch_size),
            collate_fn=loaders.without_mixing(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.has_own_evaluation or self.compute_loss_func is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        only_logits = ignore_keys is None
        if only_logits:
            ignore_keys = [*getattr(self.student.config, "keys_to_ignore_at_inference", ["cache"]), "loss"]
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if only_logits and isinstance(logits, tuple):  # of a student with more outputs, from images without labels
            logits = logits[0]
        label = labels[self.label_names.index("labels")] if isinstance(labels, tuple) else labels
        if isinstance(logits, Tensor) and isinstance(label, Tensor):
            self.image_losses.add(logits, label, self.gather_function)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # BatchNorm's statistics are each process's own; the first one's are saved.
        for buffer in self.student.buffers():
            broadcast(buffer)
        self.image_losses = ImageLosses()
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            if not self.is_in_train:
                loaders.end_workers(self._loaders)
        loss = self.image_losses.mean()
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    # ---- running, saving and resuming

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains; see `Trainer.train`.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last one in `output_dir` that is whole. Nothing is
                resumed unasked.
            trial, ignore_keys_for_eval: as in `Trainer`.

        Raises:
            ValueError: the checkpoint is not whole, holds the model only (`save_only_model`), or there is none.
            CheckpointError: a checkpoint could not be written; the ones before it are as they were.
            NonFiniteLossError: a loss or gradient was not finite; see `on_non_finite_loss`.
            SystemExit: with code 143, when SIGTERM came; the last checkpoint is of the last step.
        """
        # Trainer.train takes a checkpoint that is half there.
        checkpoint = self._resumed_from = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        with Sigterm(self.args.world_size, self.args.ddp_timeout) as self.sigterm:
            try:
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            except pickle.UnpicklingError as error:  # whose advice is to run what the file says
                raise ValueError(
                    f"{checkpoint} is not resumed, since a file of it holds more than tensors and could run code: "
                    f"{str(error).splitlines()[0]}"
                ) from error
            finally:
                loaders.end_workers(self._loaders)
            # Twice, since several processes are answered one call late.
            if any([self.sigterm.came(), self.sigterm.came()]):
                logger.warning("SIGTERM came: training had just ended, and the process ends. Start it again to go on.")
                raise SystemExit(EXIT_CODE)
            self.step_guard.check(wait=True)  # of the last steps, if nothing was saved after them
        return output._replace(training_loss=output.metrics["train_loss"])

    def begin_attempt(self) -> None:
        """Prepares a run whose model and optimizer are made, again for each batch size that `auto_find_batch_size` tries."""
        loaders.end_workers(self._loaders)
        # An interrupted run, or an attempt before this one, may have left some.
        self.loss_log, self._batch_norm_step = LossLog(), None
        skips = self.args.on_non_finite_loss == "skip"
        self.step_guard = StepGuard(skips, self.args.world_size, self._resumed_from)
        sums = read_sums(self._resumed_from, self.args.world_size, self.args.process_index)
        if sums is not None:
            self._tr_loss += sums["loss"]
            self._total_loss_scalar, self._globalstep_last_logged = sums["logged_loss"], sums["logged_step"]
            self.loss_log.load(sums, self._tr_loss.device)

    def seed_process(self) -> None:
        """Gives every process but the first a stream of random numbers of its own.

        All processes are seeded alike, so that they build the same weights; then all would draw the same masks, dropout
        and drop path. What they draw in common does not come from this stream: see `training_sampler`. A run that is
        resumed gets its streams from its checkpoint.
        """
        if self.args.process_index > 0:
            common = int(torch.empty((), dtype=torch.int64).random_())
            set_seed(derived_seeds(common, self.args.process_index)[0] >> 32)

    def last_checkpoint(self) -> str | None:
        """The last checkpoint in `output_dir` that is whole; damaged ones after it are put aside, and said.

        One that holds the model only (`save_only_model`) is passed over. To be called in all processes.
        """
        return decide_in_first(functools.partial(last_checkpoint, self.args.output_dir))

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        # Resumed at its end in the middle of an epoch, Trainer trains for a step more.
        trained = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # With save_strategy=best the answer takes the place of what SIGTERM has asked for.
        is_best = super()._determine_best_metric(*args, **kwargs)
        return is_best or (self._pace.leaving and not self._pace.save_after_epoch)

    def _get_output_dir(self, trial: Any) -> str:
        # Where Trainer._save_checkpoint writes; CheckpointWriter moves the checkpoint from there to its place.
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.checkpoint_writer.is_writing else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A checkpoint of weights that are not finite would take the place of a good one.
        self.step_guard.check(wait=True)
        run_folder = self._get_output_dir(trial)
        with self.checkpoint_writer.write(run_folder, self.state, self._read_sums) as checkpoint:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            remove_old(run_folder, self.state.global_step, limit, best)
        self.step_guard.last_good_checkpoint = checkpoint

    def _read_sums(self) -> dict[str, Any]:
        return {
            "loss": self._tr_loss.item(),
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            **self.loss_log.state(),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Trainer._save writes the keys of the module that is trained, and a pickle of the arguments beside them.
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        is_checkpoint = self.checkpoint_writer.is_writing
        model.save(output_dir, model.state_dict() if state_dict is None else state_dict, with_losses=is_checkpoint)
        # A timm student's preprocessing is in its config.json, where transformers and timm look for it.
        if not isinstance(model.student, TimmWrapperForImageClassification):
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            elif not is_checkpoint:
                logger.warning(
                    "%s holds no preprocessing, so that pipeline() cannot open it: hand the student's image processor to "
                    "DistillationTrainer(processing_class=...).",
                    output_dir,
                )
        with open(os.path.join(output_dir, SETTINGS), "w", encoding="utf-8") as file:
            # Through JSON, which turns what YAML has no name for (paths, numpy's numbers) into text.
            settings = json.loads(json.dumps(self.args.to_dict(), default=str))
            yaml.safe_dump(publishable(settings), file, sort_keys=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer looks for the trained module's keys, and a checkpoint holds the student's.
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(self.model).load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif fault := first_fault(fault_of(self.state.best_model_checkpoint)):
            logger.warning(
                "The best model could not be loaded from %s: %s. The model keeps the weights of the last step.",
                self.state.best_model_checkpoint,
                fault,
            )
            return
        else:
            self.accelerator.unwrap_model(self.model).load(self.state.best_model_checkpoint)
        # It was saved with the statistics that it was evaluated with.
        self._batch_norm_step = self.state.global_step

    # ---- Hub

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs,
    ) -> None:
        # Trainer's card knows neither loss nor teacher, and takes the place of one that a person has edited.
        if self.is_world_process_zero():
            repo_id = self.hub_model_id or self.args.hub_model_id
            write_card(
                self.args.output_dir,
                self.student,
                name=model_name or os.path.basename(os.path.abspath(self.args.output_dir)),
                args=self.args,
                state=self.state,
                repo_id=repo_id if repo_id and "/" in repo_id else None,
                teacher=None if self.teacher_source is None else self.teacher_source.description,
                losses=self.distillation_losses,
                info=self.card_info.updated(language, license, tags, **kwargs),
            )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # At construction: a missing permission is told before anything is trained, and in words of this package.
        if self.is_world_process_zero():
            pushing.make_repo(self, token, private)

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
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        pushing.wait_for_push(self)
        # Before all that can fail, and on all processes: the weights may be sharded.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        settings = {
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
            "overwrite_card": overwrite_card,
        }
        return pushing.push_saved_student(
            self, blocking=blocking, token=token, private=private, settings=settings, card=kwargs
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer pushes all of output_dir, with a pickle of the arguments, and before a checkpoint is all written.
        if self.checkpoint_writer.is_writing or self.args.hub_strategy == HubStrategy.END:
            return
        self.accelerator.wait_for_everyone()  # Each process writes files of its own into the checkpoint.
        if self.is_world_process_zero():
            pushing.push_saved_checkpoint(self, checkpoint_folder)
