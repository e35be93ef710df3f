"""`transformers.Trainer` with a teacher, or with self-distillation."""

import copy
import functools
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from accelerate.utils import broadcast
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, HubStrategy, TrainOutput

from ..data.sampler import EpochDataset
from ..hub.model_card.curves import OTHER_DATASET
from ..hub.model_card.facts import CardInfo
from ..models.teacher import Teacher
from . import checks, loaders, pushing, unlabeled
from .agreement import decide_in_first
from .arguments import DistillationTrainingArguments
from .batch_norm import explained_single_image, update_batch_norm
from .callbacks import CheckOwnMethods, KeepPace, PrepareTraining, UpdateAverage
from .checkpoint_writer import CheckpointWriter, find_sums
from .checkpoints import UNFINISHED, find_checkpoint, last_checkpoint, refused_pickles, remove_old
from .distillation_model import DistillationModel, DistillationOutput
from .image_losses import ImageLosses, evaluation_loss
from .learning_rate import make_schedule, scale_learning_rate
from .loss_log import LossLog, load_sums, read_sums
from .non_finite import StepGuard, StepState
from .optimization import decayed_parameters
from .sigterm import Sigterm
from .student_folder import load_best_student, write_student
from .teacher_source import LiveTeacher, open_teacher_source


class DistillationTrainer(Trainer):
    """Trains a student with the task loss (cross-entropy) plus distillation losses.

    All features of `transformers.Trainer` work as they do there; docs/trainer.md has the differences in one table.
    `trainer.model` is one module with the student and the losses' own layers. `trainer.student` is the plain student,
    the only part that is saved outside of `checkpoint-*`. A checkpoint is whole or absent. After SIGTERM the trainer
    saves one and exits. A loss that is not finite ends the run or skips the step, see `on_non_finite_loss`. Pushes
    contain only the student, and with the `hub_strategy` `checkpoint` or `all_checkpoints` the checkpoints, too.

    Args:
        model (`PreTrainedModel`): the student, any `*ForImageClassification`; for timm's see [`create_student`].
        args (`DistillationTrainingArguments`)
        data_collator, train_dataset, eval_dataset, processing_class: as in `Trainer`. Batches hold `pixel_values`
            [B, 3, H, W] float and `labels`: [B] int64, or [B, C] float after mixup / cutmix. `processing_class` is the
            student's image processor; it is saved with the student. An [`ImageCollator`] with `teacher_logits`
            replaces a teacher.
        teacher (`str`, `nn.Module`, [`Teacher`] or a list, *optional*): a Hub id, a folder or a model; see [`load_teacher`].
        distillation_loss (`nn.Module` or `dict[str, nn.Module]`, *optional*): such as [`NKDLoss`] or [`USKDLoss`], see
            `nkd_hf.losses`, or several by name, which add up. None trains with the task loss alone: the baseline.
        card_info ([`CardInfo`], *optional*): facts for the model card that the trainer does not know, such as the dataset.
        class_weights (`Tensor`, *optional*): [C] float, weights of the classes in the task loss of training, as in
            `torch.nn.functional.cross_entropy` with the mean over a micro-batch.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        ValueError: arguments don't fit each other: losses and teacher, the classes of student, teacher and datasets, their
            pixels, layers that a loss reads, optimiser and scheduler. Regression and several labels per image are refused.

    Example:

    ```python
    >>> from nkd_hf import DistillationTrainer, DistillationTrainingArguments, NKDLoss, create_student
    >>> models = [create_student(name, num_labels=10, image_size=32) for name in ("resnet18", "resnet34")]
    >>> args = DistillationTrainingArguments("resnet18-nkd", report_to="none", use_cpu=True)
    >>> trainer = DistillationTrainer(models[0], args, teacher=models[1], distillation_loss=NKDLoss())
    >>> batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([3, 7])}
    >>> trainer.compute_loss(trainer.model, batch).isfinite().item()
    True

    ```
    """

    # compute_loss returns a mean over its micro-batch, and Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    # ---- construction

    # fmt: off
    def __init__(
        self,
        model: PreTrainedModel | None = None, args: DistillationTrainingArguments | None = None,
        data_collator: Callable | None = None, train_dataset: Any = None, eval_dataset: Any = None,
        processing_class: BaseImageProcessor | None = None, model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None, compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *, teacher: str | nn.Module | Teacher | list | None = None, class_weights: Tensor | None = None,
        distillation_loss: nn.Module | dict[str, nn.Module] | None = None, card_info: CardInfo | None = None,
    ):
        # fmt: on
        args = DistillationTrainingArguments("tmp_trainer") if args is None else args
        checks.check_arguments(args)
        self.distillation_losses = checks.read_losses(distillation_loss, compute_loss_func)
        self.card_info, self.class_weights = card_info or CardInfo(), class_weights
        self.loss_log, self.image_losses = LossLog(), ImageLosses()
        self.step_guard, self.checkpoint_writer = StepGuard(skips=False), CheckpointWriter()
        self.batch_norm_step = self._resumed_from = None
        self._loaders: list[torch.utils.data.DataLoader] = []
        if model is not None:
            model = self._with_losses(model, self.distillation_losses, args)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
        )  # fmt: skip
        loaders.configure_loaders(self.accelerator, args)
        if compute_loss_func is not None and not self.has_own("loss_is_scaled_for_ga"):
            self.loss_is_scaled_for_ga = None  # As in Trainer, the function gets num_items_in_batch.
        # The smoothing is in the model's task loss, for both kinds of labels.
        self.label_smoother = None
        # Trainer sets this number in each step. compute_loss and training_step may be called outside of training.
        self.current_gradient_accumulation_steps = 1
        checks.check_trainer(self)
        own = self.accelerator.unwrap_model(self.model), self.processing_class, args, self.accelerator
        self.teacher_source = open_teacher_source(teacher, self.data_collator, *own)
        checks.check_optimizer(self, self.optimizer)
        self._pace = KeepPace(self)
        for callback in (self._pace, CheckOwnMethods(self), PrepareTraining(self), UpdateAverage(self)):
            self.add_callback(callback)

    def _with_losses(self, student, losses, args) -> DistillationModel:
        checks.check_student(student)
        settings = args.feature_layer, args.label_smoothing_factor, args.ema_decay, self.class_weights
        return DistillationModel(student, losses, *settings)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        # model_init returns a student, and Trainer needs a DistillationModel. Each trial starts with the losses as passed.
        if trial is not None:  # Trainer sets a trial's values after call_model_init, and the model reads some of them.
            self._hp_search_setup(trial)
        return self._with_losses(super().call_model_init(trial), copy.deepcopy(self.distillation_losses), self.args)

    def has_own(self, *names: str) -> bool:
        """Whether a subclass, or the trainer itself, has one of these attributes in place of DistillationTrainer's."""
        classes = type(self).__mro__[: type(self).__mro__.index(DistillationTrainer)]
        return any(name in vars(place) for name in names for place in (self, *classes))

    @property
    def student(self) -> PreTrainedModel:
        """The plain student that is evaluated and saved: with `ema_decay`, the one with the averaged weights."""
        return self.accelerator.unwrap_model(self.model).evaluated_student

    @property
    def teacher(self) -> nn.Module | None:
        """The [`Teacher`] that runs in each step, possibly wrapped, or None."""
        source = self.teacher_source
        return source.model if isinstance(source, LiveTeacher) else None

    # ---- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the task loss plus the distillation losses, a float32 scalar; Trainer.compute_loss knows no teacher.

        Under `torch.no_grad()`, as in evaluation, the loss is the cross-entropy alone.

        Args:
            model: `trainer.model`, possibly wrapped.
            inputs: `pixel_values` [B, 3, H, W] float, `labels` [B] int64 or [B, C] float, and maybe stored `teacher_logits` or
                `unlabeled_pixel_values` [U, 3, H, W]. The student's forward gets the columns that it names, no others.
            return_outputs: whether to return a `ModelOutput` with `logits` [B, C] and, in training, `losses` by name, too.
            num_items_in_batch: read by `compute_loss_func` alone; the loss is a mean over the micro-batch.
        """
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs, num_unlabeled = unlabeled.join_batch(inputs, torch.is_grad_enabled())
        columns = self.accelerator.unwrap_model(self.model).select_columns(inputs)
        if not torch.is_grad_enabled():
            outputs = DistillationOutput(logits=model(inputs["pixel_values"], **columns)["logits"])
            loss = evaluation_loss(outputs.logits, inputs["labels"])
            return (loss, outputs) if return_outputs else loss
        teacher = {} if self.teacher_source is None else self.teacher_source.outputs(inputs)
        outputs = model(inputs["pixel_values"], inputs["labels"], teacher, num_unlabeled, **columns)
        # DataParallel gives a vector, one entry per GPU.
        components = {name: value.mean() for name, value in outputs["losses"].items()}
        self.loss_log.add(components, share=1 / self.current_gradient_accumulation_steps)
        self.step_guard.note(components, outputs["logits"], teacher.get("teacher_logits"))
        loss = sum(components.values())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # Trainer.training_step passes losses that are not finite to the optimiser. step_guard stops, or undoes the step.
        if not self.is_in_train:
            return super().training_step(model, inputs, *args, **kwargs)
        self.step_guard.begin(functools.partial(StepState.read, self))
        step, rate = self.state.global_step + 1, self.optimizer.param_groups[0]["lr"]
        with explained_single_image(step):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_guard.add(step, rate, loss * self.current_gradient_accumulation_steps, inputs.get("index"))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        # Trainer calls _get_grad_norm last before the optimiser's step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        step, has_scaler = self.state.global_step + 1, self.accelerator.scaler is not None
        before = self.step_guard.close_step(step, grad_norm, has_scaler)
        if before is None:
            return grad_norm
        # Without gradients an optimiser changes neither a parameter nor its state. A gradient scaler must see infinite
        # gradients to skip the step itself.
        if not has_scaler:
            model.zero_grad(set_to_none=True)
        before.restore(self)
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The log has the components beside `loss`, averaged in the same way: over steps, accumulation and processes.
        if "loss" in logs:
            gather = functools.partial(nested_gather, parallel_mode=self.args.parallel_mode)
            logs = {"loss": logs["loss"], **self.loss_log.means(gather), **logs}
        # Trainer divides the loss since the resume by the steps since the resume. Here both are the whole run's.
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.loss_log.skipped_steps, 1)
        super().log(logs, start_time)

    # ---- optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Trainer decays BatchNorm's weights and position embeddings, and no bias.
        if self.args.no_weight_decay is None:
            return super().get_decay_parameter_names(model)
        return decayed_parameters(model, self.args.no_weight_decay)

    def create_scheduler(self, num_training_steps, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        # Trainer.create_scheduler knows only transformers' schedules, and does not scale the rate to the global batch.
        if self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        scale_learning_rate(optimizer, self.args, self._train_batch_size)
        schedule = make_schedule(optimizer, self.args, num_training_steps)
        if schedule is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler, self._created_lr_scheduler = schedule, True
        return schedule

    # ---- data

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        # Trainer's sampler gives only indices. The workers' augmentation needs the epoch, and set_epoch does not reach them.
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(train_dataset, EpochDataset):
            return loaders.make_epoch_sampler(train_dataset, self.args, self.data_collator)
        loaders.check_holds_no_epoch_dataset(train_dataset)
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        # With remove_unused_columns, Trainer keeps the columns of DistillationModel.forward, not of the student's forward.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += [*self.accelerator.unwrap_model(self.model).columns, *loaders.OWN_COLUMNS]

    def _get_dataloader(self, dataset, description, *args, sampler_fn=None, is_training=False, **kwargs):
        # Trainer makes all of its loaders here, and calls an overridden _get_train_sampler here too.
        if is_training and sampler_fn is not None:
            sampler_fn = functools.partial(loaders.make_training_sampler, self, sampler_fn)
        with loaders.loader_settings(self, dataset, description, is_training) as dataset:
            kwargs |= {"sampler_fn": sampler_fn, "is_training": is_training}
            loader = super()._get_dataloader(dataset, description, *args, **kwargs)
        self._loaders.append(loaders.prepare_loader(self, loader))
        return loader

    # ---- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        # Trainer.evaluate knows nothing of precise_bn_images, and does not mark another dataset in the log.
        update_batch_norm(self)
        start = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if not checks.is_own_dataset(self, eval_dataset):
            for entry in self.state.log_history[start : start + 1]:
                # The log keeps the mark when a run is resumed. The model card reports only held-out images.
                entry[OTHER_DATASET] = True
        return metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Trainer.prediction_step returns the loss of a batch. The exact mean over all processes needs the loss of each image.
        if self.has_own("compute_loss", "prediction_step") or self.compute_loss_func is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        default = [*getattr(self.student.config, "keys_to_ignore_at_inference", ["cache"]), "loss"]
        keys = default if ignore_keys is None else ignore_keys
        loss, logits, labels = super().prediction_step(model, inputs, False, keys)
        if ignore_keys is None and isinstance(logits, tuple):  # several outputs, and images without labels
            logits = logits[0]
        label = labels[self.label_names.index("labels")] if isinstance(labels, tuple) else labels
        if isinstance(logits, Tensor) and isinstance(label, Tensor):
            self.image_losses.add(logits, label, self.gather_function)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        # Trainer.evaluation_loop uses each process's own BatchNorm statistics. Those of the first process are saved.
        for buffer in self.student.buffers():
            broadcast(buffer)
        self.image_losses = ImageLosses()
        try:
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        finally:
            if not self.is_in_train:
                loaders.end_workers(self._loaders)
        if (loss := self.image_losses.mean()) is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    # ---- running, saving and resuming

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        """Trains; see `Trainer.train`.

        Args:
            resume_from_checkpoint (`str` or `bool`): a checkpoint, or True for the last one in `output_dir` that is whole.

        Raises:
            ValueError: the checkpoint is not whole, holds the model only (`save_only_model`), or there is none.
            CheckpointError, NonFiniteLossError: training has ended; earlier checkpoints are unchanged.
            SystemExit: with code 143, after SIGTERM; the last checkpoint is of the last step.
        """
        # Trainer.train would resume from a half-written checkpoint.
        checkpoint = self._resumed_from = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        with Sigterm(self.args.world_size, self.args.ddp_timeout) as self.sigterm:
            try:
                with refused_pickles(checkpoint):
                    output = super().train(checkpoint, trial, ignore_keys_for_eval)
            finally:
                loaders.end_workers(self._loaders)
            self.sigterm.exit_if_received()
            self.step_guard.check(wait=True)  # the last steps, if no checkpoint was saved after them
        return output._replace(training_loss=output.metrics["train_loss"])

    def begin_attempt(self) -> None:
        """Prepares a run when its model and optimizer exist: once for each batch size of `auto_find_batch_size`."""
        loaders.end_workers(self._loaders)
        # An interrupted run or an earlier attempt may have left sums.
        self.loss_log, self.batch_norm_step = LossLog(), None
        self.step_guard = StepGuard(self.args.on_non_finite_loss == "skip", self.args.world_size, self._resumed_from)
        if (sums := find_sums(self._resumed_from, self.args.world_size, self.args.process_index)) is not None:
            load_sums(self, sums)

    def last_checkpoint(self) -> str | None:
        """Returns the last whole checkpoint in `output_dir`, in all processes; see [`~nkd_hf.trainer.checkpoints.last_checkpoint`]."""
        return decide_in_first(functools.partial(last_checkpoint, self.args.output_dir))

    def _init_training_state(self, max_steps, steps_per_epoch, num_train_epochs, checkpoint, *args) -> tuple[int, int]:
        # Trainer (5.24) would train one more step from the last one, and one more epoch after EarlyStoppingCallback's end.
        trained = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, checkpoint, *args)
        restores = checkpoint is not None and self.args.restore_callback_states_from_checkpoint
        is_stopped = restores and checks.is_stopped_early(self.callback_handler.callbacks)
        return (num_train_epochs, 0) if is_stopped or self.state.global_step >= max_steps else trained

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # With save_strategy=best, Trainer sets control.should_save to this answer, also after KeepPace has set it to True.
        is_best = super()._determine_best_metric(*args, **kwargs)
        return is_best or (self._pace.leaving and not self._pace.save_after_epoch)

    def _get_output_dir(self, trial: Any) -> str:
        # Trainer._save_checkpoint writes into this folder; CheckpointWriter moves the checkpoint from there to its place.
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self.checkpoint_writer.is_writing else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Trainer._save_checkpoint writes in place, also weights that are not finite: a good checkpoint would be lost.
        self.step_guard.check(wait=True)
        run_folder = self._get_output_dir(trial)
        with self.checkpoint_writer.write(run_folder, self.state, functools.partial(read_sums, self)) as checkpoint:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            remove_old(run_folder, self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.step_guard.last_good_checkpoint = checkpoint

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Trainer._save writes the keys of the module that is trained, and a pickle of the arguments beside them.
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        folder, in_checkpoint = output_dir or self.args.output_dir, self.checkpoint_writer.is_writing
        write_student(model, folder, state_dict, self.processing_class, self.args, in_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer looks for the trained module's keys, and a checkpoint holds the student's.
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(self.model).load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # As in _load_from_checkpoint, Trainer looks for the trained module's keys.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        elif not load_best_student(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint):
            return
        # The checkpoint holds the BatchNorm statistics that it was evaluated with.
        self.batch_norm_step = self.state.global_step

    # ---- Hub

    def create_model_card(self, language=None, license=None, tags=None, model_name=None, **kwargs) -> None:
        # Trainer.create_model_card knows neither loss nor teacher, and overwrites a card that a person has edited.
        if self.is_world_process_zero():
            info = self.card_info.updated(language, license, tags, **kwargs)
            pushing.write_trainers_card(self, model_name, info)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        # Trainer calls init_hf_repo at construction, so that a missing permission fails before training, with our message.
        if self.is_world_process_zero():
            pushing.make_repo(self, token, private)

    # fmt: off
    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None,
        overwrite_card=False, **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        # fmt: on
        """Saves the student with its card, and pushes both; Trainer.push_to_hub would push all of `output_dir`.

        Args:
            commit_message (`str`): the commit's title.
            blocking: whether to wait; else the files in `output_dir` must not change until the push is done.
            token, revision, private: None uses `hub_token`, `hub_revision` and `hub_private_repo`.
            overwrite_card: whether a model card that a person has edited on the Hub is replaced.
            **kwargs: arguments of `create_model_card`.

        Returns the commit, or a `Future` of it, in the first process, and None in others. Raises what [`push_student`] does.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        pushing.wait_for_push(self)
        # All processes save the student, since the weights may be sharded, and before any step that can fail.
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        revision = revision or self.args.hub_revision
        settings = {"revision": revision, "commit_message": commit_message, "overwrite_card": overwrite_card}
        return pushing.push_saved_student(self, blocking, token, private, settings, card=kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer._push_from_checkpoint pushes all of output_dir with training_args.bin, before the checkpoint is complete.
        if self.checkpoint_writer.is_writing or self.args.hub_strategy == HubStrategy.END:
            return
        self.accelerator.wait_for_everyone()  # Each process writes files of its own into the checkpoint.
        if self.is_world_process_zero():
            pushing.push_saved_checkpoint(self, checkpoint_folder)
