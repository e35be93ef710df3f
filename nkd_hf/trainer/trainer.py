"""`transformers.Trainer` with a teacher, or with self-distillation."""

import contextlib
import copy
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset
from transformers import (
    BaseImageProcessor,
    EarlyStoppingCallback,
    PreTrainedModel,
    SchedulerType,
    TimmWrapperForImageClassification,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, SaveStrategy, has_length
from transformers.utils import ModelOutput

from ..data.collator import ImageCollator
from ..data.dataset_classes import check_dataset_classes
from ..data.image_datasets import ImageDataset, StreamingImageDataset
from ..data.label_check import LabelCheck
from ..data.sampler import EpochDataset, EpochIndices, EpochSampler, training_sampler
from ..data.seeding import derived_seeds, seeded
from ..data.transforms import read_transform
from ..hub.model_card.card import write_card
from ..hub.model_card.curves import OTHER_DATASET
from ..hub.model_card.facts import CardInfo
from ..hub.student_files import SETTINGS, publishable
from ..losses.checks import check_labels
from ..metrics import compute_metrics
from ..models.features import check_token_grids
from ..models.labels import check_classifier
from ..models.preprocessing import read_preprocessing
from ..models.saving import read_class_names
from ..models.teacher import Teacher, load_teacher, unwrap_module
from ..teacher_logits.store import StoredTeacher, TeacherLogits
from .agreement import first_fault
from .arguments import DistillationTrainingArguments
from .batch_norm import estimate_batch_norm, has_batch_norm, smallest_batch, wants_more_values
from .checkpoints import fault_of
from .distillation_model import IGNORE_INDEX, DistillationModel, DistillationOutput
from .finite_trainer import FiniteTrainer
from .image_losses import ImageLosses
from .optimization import SCHEDULES, check_optimizer, decayed_parameters, lr_factor
from .optimizer_groups import check_no_group_is_empty

logger = logging.getLogger(__name__)

# Of a sample or a batch, beside pixels and labels.
OWN_COLUMNS = ("epoch", "index", "position", "teacher_logits")


class DistillationTrainer(FiniteTrainer):
    """Trains a student with the task loss (cross-entropy) plus distillation losses.

    Everything that `transformers.Trainer` does works as it does there. `trainer.model` is one module that holds the
    student and whatever the losses train; `trainer.student` is the plain student, and the only thing that is saved
    outside of `checkpoint-*`.

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
            `label_names` has no `labels`, a group of `optimizers` is empty, or student or
            teacher is for regression, for several labels an image (`problem_type`) or for one class.

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

    # compute_loss returns a mean over its micro-batch, and the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

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
        if not isinstance(args, DistillationTrainingArguments):
            raise ValueError(
                f"args must be DistillationTrainingArguments, got {type(args).__name__}: it takes the same ones"
            )
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != args.world_size:
            raise ValueError(
                f"{started} processes were started, and each would train by itself, as one of {args.world_size}: on the "
                "CPU, set use_cpu (--use_cpu true)"
            )
        losses = {} if distillation_loss is None else distillation_loss
        losses = dict(losses) if isinstance(losses, dict) else {"distillation": losses}
        for name, loss in losses.items():
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"the names of distillation_loss must be text without a dot, got {name!r}")
            if not isinstance(loss, nn.Module):
                raise ValueError(
                    f"distillation_loss must be a module such as NKDLoss(), or a dict of them by name, got {loss!r}"
                )
        if losses and compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func must be None with a distillation_loss, which it would replace, got "
                f"{compute_loss_func!r}. Pass a module as one more distillation_loss, or override compute_loss and add to "
                "what super().compute_loss returns."
            )
        self._distillation_losses = losses
        self.card_info = CardInfo() if card_info is None else card_info
        if model is not None:
            model = self._with_losses(model, losses, args)
        self._batch_norm_step: int | None = None
        self._image_losses = ImageLosses()
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
        )  # fmt: skip
        config = self.accelerator.dataloader_config
        if args.world_size > 1 and config.data_seed is None:
            # accelerate would seed a RandomSampler by torch's initial seed, which the processes have in common until one of
            # their trainers has trained.
            config.data_seed = args.seed
        if compute_loss_func is not None and not _overrides(self, "loss_is_scaled_for_ga"):
            self.loss_is_scaled_for_ga = None  # As Trainer: the function gets num_items_in_batch.
        self._check_label_names()
        self._check_pixels()
        check_dataset_classes(self.student.config.id2label, self._datasets)
        if args.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha must be None, got {args.neftune_noise_alpha}. It adds noise to the embeddings of words"
            )
        self.add_callback(_CheckOwnMethods(self))
        if self.optimizer is not None:
            check_no_group_is_empty(self.optimizer)
        # The smoothing is in the model's task loss, for both kinds of labels.
        self.label_smoother = None
        # Trainer sets it in each step. compute_loss and training_step may be called by hand.
        self.current_gradient_accumulation_steps = 1
        self.teacher_logits = self._check_stored_logits()
        self.teacher = self._prepare_teacher(teacher)
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)
        self.add_callback(_PrepareTraining(self))
        if args.ema_decay is not None:
            self.add_callback(_UpdateAverage(self))

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

    def _check_label_names(self) -> None:
        if "labels" not in self.label_names and self.compute_loss_func is None and not self._has_own_evaluation:
            raise ValueError(
                f"label_names must contain 'labels', the column that compute_loss reads, got {self.label_names}. Rename the "
                "column, or override compute_loss."
            )

    @property
    def _datasets(self) -> dict[str, Any]:
        """The datasets of training and evaluation, by what errors call them."""
        if not isinstance(self.eval_dataset, dict):
            return {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        evaluation = {f"eval_dataset[{name!r}]": dataset for name, dataset in self.eval_dataset.items()}
        return {"train_dataset": self.train_dataset, **evaluation}

    def _check_pixels(self) -> None:
        """Raises ValueError where training or evaluation don't preprocess as processing_class does.

        Without processing_class, the student's own configuration says what `pipeline` will do with the saved student.
        """
        known = {
            name: colours
            for name, dataset in self._datasets.items()
            if (colours := read_transform(getattr(dataset, "transform", None))) is not None
        }
        if self.processing_class is None and not known:
            return
        pixels = read_preprocessing(self.accelerator.unwrap_model(self.model).student, self.processing_class)
        if pixels is None:
            return
        is_given = self.processing_class is not None
        for name, given in known.items():
            differs = next(
                (field for field in ("channel_order", "mean", "std") if not given.is_near(pixels, field)), None
            )
            if differs is not None:
                message = (
                    f"the {differs} of the {name}'s transform must be that of "
                    f"{'processing_class' if is_given else 'the student'}, {list(getattr(pixels, differs))}, got "
                    f"{list(getattr(given, differs))}. Make it from nkd_hf.models.preprocessing.read_preprocessing(student, "
                    "processing_class)"
                )
                if is_given or differs == "channel_order":
                    raise ValueError(message)
                logger.warning("pipeline() will give the saved student other pixels than training does: %s.", message)
            elif given.size != pixels.size:
                logger.warning(
                    "The images of the %s are %d x %d, and the student's image processor makes %d x %d, which evaluation and "
                    "pipeline() will use.",
                    name,
                    *given.size,
                    *pixels.size,
                )

    @property
    def _has_own_evaluation(self) -> bool:
        """Whether a subclass, or a method that is set on the trainer, says what the loss of an evaluation is."""
        return _overrides(self, "compute_loss") or _overrides(self, "prediction_step")

    def _check_stored_logits(self) -> TeacherLogits | None:
        """The store that the batches' teacher logits come from, if it serves the losses."""
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        store = self.data_collator.teacher_logits if isinstance(self.data_collator, ImageCollator) else None
        if store is None:
            return None
        if set(model.teacher_inputs) - {"teacher_logits"}:
            raise ValueError(
                f"the distillation losses ask a teacher for {', '.join(model.teacher_inputs)}, and {store.folder} has its "
                "logits alone: set a teacher and no teacher_logits"
            )
        takers = [loss for name, loss in model.losses.items() if model.needs("teacher_logits", of=name)]
        self._stored_temperature = 1.0
        if store.info.top_k is None or not takers:
            return store
        if others := [type(loss).__name__ for loss in takers if not getattr(loss, "works_from_top_k", False)]:
            raise ValueError(
                f"{', '.join(others)} needs top_k = all, and {store.folder} has the {store.info.top_k} largest logits, from "
                "which NKD alone can be computed: write a store without --top_k"
            )
        temperatures = {float(loss.temperature) for loss in takers}
        if len(temperatures) > 1 or not temperatures <= set(store.info.temperatures):
            raise ValueError(
                f"NKD's temperature must be one of {', '.join(map(str, store.info.temperatures))}, those of "
                f"{store.folder}, got {', '.join(map(str, temperatures))}: write a store with --temperatures"
            )
        self._stored_temperature = temperatures.pop()
        return store

    def _prepare_teacher(self, teacher: str | nn.Module | Teacher | None) -> nn.Module | None:
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        if self.teacher_logits is not None and teacher is not None:
            raise ValueError(
                f"the teacher's logits are those of {self.teacher_logits.folder}: leave teacher out, or the collator's "
                "teacher_logits"
            )
        has_teacher = teacher is not None or self.teacher_logits is not None
        if bool(model.teacher_inputs) != has_teacher:
            names = ", ".join(type(loss).__name__ for loss in self._distillation_losses.values()) or "none"
            raise ValueError(
                f"distillation_loss is {names}, which asks for no teacher: leave teacher (and teacher_logits) out"
                if has_teacher
                else f"distillation_loss is {names}, which asks for a teacher: set teacher to a Hub id, folder or model"
            )
        if model.taps and self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel) cannot read a feature: start the script with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        if teacher is None:
            if self.teacher_logits is None and (unused := self.args.teacher_settings):
                raise ValueError(f"{', '.join(unused)} set how a teacher computes, and there is none: leave them out")
            return None
        if isinstance(teacher, nn.Module):
            # Another trainer may have compiled its teacher.
            teacher = unwrap_module(teacher)
            if teacher is model.student or _have_same_weights(teacher, model.student):
                raise ValueError(
                    "teacher and student must be two models, got one and the same model, which changes while it teaches. "
                    "Pass copy.deepcopy(student) as teacher."
                )
        # A copy, since another trainer, or its owner, may use the teacher too.
        teacher = load_teacher(teacher).copy()
        teacher.align(read_preprocessing(model.student, self.processing_class), model.config.id2label)
        args = self.args
        teacher.for_inference(
            args.teacher_dtype, channels_last=args.teacher_channels_last, compile=args.teacher_compile
        )
        teacher.tap(model.teacher_inputs)
        if model.needs("student_high") and model.needs("teacher_high"):
            pixels = read_preprocessing(model.student, self.processing_class)
            sizes = [wanted and wanted.size for wanted in (pixels, teacher.preprocessing or pixels)]
            check_token_grids(model.student, teacher.model, *sizes)
        # Its device is said, since accelerate leaves it to FSDP, which does not see the teacher.
        return self.accelerator.prepare_model(teacher, device_placement=True, evaluation_mode=True)

    @property
    def student(self) -> PreTrainedModel:
        """The plain student that is evaluated and saved: with `ema_decay`, the one with the averaged weights."""
        return self.accelerator.unwrap_model(self.model).evaluated_student

    def call_model_init(self, trial: Any = None) -> nn.Module:
        # model_init gives a student, and the Trainer needs the module that is trained; its losses start anew as well.
        losses = copy.deepcopy(self._distillation_losses)
        return self._with_losses(super().call_model_init(trial), losses, self.args)

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
        if "labels" not in inputs:
            raise ValueError(
                f"the batch must hold pixel_values and labels, got {', '.join(inputs)}: see data_collator"
            )
        pixel_values, labels = self._read_pixels(inputs), inputs["labels"]
        columns = self.accelerator.unwrap_model(self.model).select_columns(inputs)
        if not torch.is_grad_enabled():
            outputs = DistillationOutput(logits=model(pixel_values, **columns)["logits"])
            check_labels(labels, outputs.logits.shape, IGNORE_INDEX)
            loss = F.cross_entropy(outputs.logits.float(), labels if labels.is_floating_point() else labels.long())
            return (loss, outputs) if return_outputs else loss
        teacher_outputs = {}
        if self.teacher is not None:
            teacher_outputs["teacher_logits"] = self.teacher(pixel_values)
            teacher_outputs |= self.accelerator.unwrap_model(self.teacher).take_features()
        elif self.teacher_logits is not None:
            stored = self.teacher_logits.dense(inputs["teacher_logits"], self._stored_temperature)
            teacher_outputs["teacher_logits"] = stored
        outputs = model(pixel_values, labels, teacher_outputs, **columns)
        # DataParallel gives a vector, one entry per GPU.
        losses = {name: value.mean() for name, value in outputs["losses"].items()}
        share = 1 / self.current_gradient_accumulation_steps
        for name, value in losses.items():
            self._component_sums[name] = self._component_sums.get(name, 0.0) + value.detach() * share
        self._component_steps += share
        self._watched = {
            "losses": losses,
            "student_logits": outputs["logits"],
            "teacher_logits": teacher_outputs.get("teacher_logits"),
        }
        loss = sum(losses.values())
        return (loss, outputs) if return_outputs else loss

    def _read_pixels(self, inputs: dict[str, Any]) -> Tensor:
        """The pixel values of a batch, if they are those of images that were preprocessed."""
        pixel_values = inputs.get("pixel_values")
        if not isinstance(pixel_values, Tensor):
            raise ValueError(
                f"the batch must hold pixel_values, a tensor [B, 3, H, W], got {', '.join(inputs)}. Transform the images in "
                "the dataset (ImageDataset), or in data_collator"
            )
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be [B, 3, H, W] of floats, got {list(pixel_values.shape)} of {pixel_values.dtype}. "
                "Normalise the images, channels first"
            )
        return pixel_values

    def begin_attempt(self) -> None:
        super().begin_attempt()
        self._batch_norm_step = None

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # The default decays BatchNorm's weights and position embeddings, and no bias.
        if self.args.no_weight_decay is None:
            return super().get_decay_parameter_names(model)
        return decayed_parameters(model, self.args.no_weight_decay)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        # The default knows transformers' schedules alone, and a rate that may be meant for another global batch.
        if self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self._scale_learning_rate(optimizer)
        args, name = self.args, self.args.lr_scheduler_type.value
        if name not in SCHEDULES:
            return super().create_scheduler(num_training_steps, optimizer)
        factor = lr_factor(
            name,
            num_training_steps,
            args.num_train_epochs,
            args.learning_rate,
            args.lr_scheduler_kwargs,
            max_steps=args.max_steps,
        )
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
        if not isinstance(eval_dataset, str | dict | type(None)) and all(
            eval_dataset is not dataset for dataset in own
        ):
            for entry in self.state.log_history[start : start + 1]:
                # In the log, where it outlives a resume: the model card speaks of held-out images alone.
                entry[OTHER_DATASET] = True
        return metrics

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        check_optimizer(optimizer, model.student, model.losses)
        scheduled = _without_accelerate(getattr(self.lr_scheduler, "optimizer", optimizer))
        if scheduled is not optimizer and not self._created_lr_scheduler:
            raise ValueError(
                "the scheduler must be one of the optimizer that trains, got one of another optimizer, whose rates it would "
                "set. Pass both in optimizers, or neither"
            )

    def _check_weights(self) -> None:
        for name, weight in self.student.state_dict().items():
            if weight.is_floating_point() and not weight.isfinite().all():
                raise ValueError(
                    f"the student's weights must be finite, got NaN or infinity in {name}. Open another model, or another "
                    "checkpoint"
                )

    def _check_metric(self) -> None:
        """Raises ValueError where no evaluation will have the metric that best model, schedule or early stopping read."""
        args, metric = self.args, self.args.metric_for_best_model
        is_read = (
            args.load_best_model_at_end
            or args.save_strategy == SaveStrategy.BEST
            or any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)
        )
        is_read = is_read or args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
        own = any(_overrides(self, name) for name in ("evaluate", "evaluation_loop"))
        if metric is None or not is_read or own or self.compute_metrics not in (None, compute_metrics):
            return
        known = ["loss"] if self.compute_metrics is None else ["loss", "accuracy", "top5_accuracy"]
        if isinstance(self.eval_dataset, dict):
            known = [f"{dataset}_{name}" for dataset in self.eval_dataset for name in known]
        if metric.removeprefix("eval_") not in known and not metric.endswith(("_runtime", "_per_second")):
            advice = "Set compute_metrics, or" if self.compute_metrics is None else "Set"
            raise ValueError(
                f"metric_for_best_model must be a metric of an evaluation, got {metric!r}. {advice} metric_for_best_model to "
                f"{' or '.join(known)}"
            )

    def check_batches(self, loader: torch.utils.data.DataLoader, max_steps: int) -> None:
        """Raises ValueError where a batch of one image would end training in BatchNorm, or an odd one can't be paired.

        Args:
            loader: of the training images. One without a length passes.
            max_steps: optimiser steps of the run.
        """
        args, collator = self.args, self.data_collator
        batch_size = args.process_batch_size(self._train_batch_size)
        if isinstance(collator, ImageCollator) and collator.mix_pairs and batch_size % 2:
            raise ValueError(
                f"per_device_train_batch_size must be even with mix_pairs, got {batch_size} for each process. Two images "
                "that follow each other are mixed: set an even one, or mix_pairs to false"
            )
        if not has_length(loader) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        num_devices = max(1, args.n_gpu)
        every_batch = batch_size <= num_devices
        last_is_reached = max_steps * args.gradient_accumulation_steps >= len(loader)
        if not (every_batch or last_is_reached) or smallest_batch(loader, num_devices) != 1:
            return
        if not has_batch_norm(self.model) or not self._one_image_fails(loader):
            return
        if every_batch:
            raise ValueError(
                "per_device_train_batch_size must be at least 2 for this model, got 1. BatchNorm has no statistics of one "
                "value: set a larger one"
            )
        raise ValueError(
            f"the last batch of an epoch must have at least 2 images, got 1: {len(loader.dataset)} images in batches of "
            f"{batch_size}. BatchNorm has no statistics of one value: set dataloader_drop_last "
            "(--dataloader_drop_last true), or another per_device_train_batch_size"
        )

    def _one_image_fails(self, loader: torch.utils.data.DataLoader) -> bool:
        """Whether a step with one image ends in BatchNorm, which takes it where the maps have more than one pixel."""
        model: DistillationModel = self.accelerator.unwrap_model(self.model)
        sampler = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler).sampler
        key = next(iter(sampler)) if isinstance(sampler, EpochSampler) else 0
        key = (0, key) if isinstance(loader.dataset, EpochDataset) and not isinstance(key, tuple) else key
        sums, buffers = (self._component_sums, self._component_steps), [b.clone() for b in model.buffers()]
        modes = {module: module.training for module in model.modules()}
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        self._component_sums = {}
        try:
            with seeded(0), torch.random.fork_rng(devices), self.compute_loss_context_manager():
                self.compute_loss(model.train(), self._prepare_inputs(loader.collate_fn([loader.dataset[key]])))
        except ValueError as error:
            if wants_more_values(error):
                return True
            raise
        finally:
            self._watched = None
            self._component_sums, self._component_steps = sums
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
            for module, mode in modes.items():
                module.training = mode
        return False

    def _give_own_stream(self) -> None:
        """Gives every process but the first a stream of random numbers of its own.

        All processes are seeded alike, so that they build the same weights; then all would draw the same masks, dropout
        and drop path. What they draw in common does not come from this stream: see `_training_sampler`. A run that is
        resumed gets its streams from its checkpoint.
        """
        if self.args.process_index > 0:
            common = int(torch.empty((), dtype=torch.int64).random_())
            set_seed(derived_seeds(common, self.args.process_index)[0] >> 32)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        # (epoch, index) pairs make the augmentation a function of both in every worker; set_epoch would not reach them.
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(train_dataset, EpochDataset):
            if (strategy := self.args.train_sampling_strategy) not in ("random", "sequential"):
                raise ValueError(
                    f"train_sampling_strategy must be random or sequential, got {strategy}. Images have no length: set one "
                    "of the two"
                )
            collator = self.data_collator if isinstance(self.data_collator, ImageCollator) else None
            pairs = collator is not None and collator.mix_pairs
            shuffle = self.args.train_sampling_strategy == "random"
            return EpochSampler(
                len(train_dataset), self._data_seed, shuffle=shuffle, positions=self._needs_positions, pairs=pairs
            )
        if _holds_an_epoch_dataset(train_dataset):
            raise ValueError(
                f"train_dataset must be an ImageDataset itself, got a {type(train_dataset).__name__} of one. It passes row "
                "numbers without the epoch, so that a resumed run would see the augmentation of epoch 0 again: select or "
                "concatenate the rows of the datasets.Dataset, and make an ImageDataset of the result"
            )
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        # With remove_unused_columns, Trainer keeps what the forward of trainer.model names, which is not the student's.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += [*self.accelerator.unwrap_model(self.model).columns, *OWN_COLUMNS]

    def _get_dataloader(
        self,
        dataset: Any,
        *args: Any,
        sampler_fn: Callable[[Any], torch.utils.data.Sampler | None] | None = None,
        is_training: bool = False,
        **kwargs: Any,
    ) -> torch.utils.data.DataLoader:
        # All samplers of training pass here, those of an overridden _get_train_sampler too.
        if is_training and sampler_fn is not None:
            sampler_fn = functools.partial(self._training_sampler, sampler_fn)
        # Trainer makes all of its loaders here. ImageCollator checks its labels, and another loss may take other ones.
        collator = self.data_collator
        is_own = _overrides(self, "compute_loss") if is_training else self._has_own_evaluation
        if not (is_own or self.compute_loss_func is not None or isinstance(collator, ImageCollator)):
            model: DistillationModel = self.accelerator.unwrap_model(self.model)
            ignore_index = None if is_training and model.needs("labels") else IGNORE_INDEX
            self.data_collator = LabelCheck(collator, model.config.num_labels, ignore_index)
        num_processes = self.args.world_size
        is_divided = is_training and num_processes > 1 and isinstance(dataset, StreamingImageDataset)
        is_divided = is_divided and not self.accelerator.dispatch_batches  # True asks for the first process' reading
        if is_divided:
            dataset = dataset.for_process(self.args.process_index, num_processes)
        try:
            with self._dispatching(False if is_divided else self.accelerator.dispatch_batches):
                loader = super()._get_dataloader(
                    dataset, *args, sampler_fn=sampler_fn, is_training=is_training, **kwargs
                )
        finally:
            self.data_collator = collator
        if is_divided:
            # accelerate's wrapper would pick this process' batches of a stream that holds no others.
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        return loader

    @contextlib.contextmanager
    def _dispatching(self, dispatch_batches: bool | None) -> Iterator[None]:
        """Sets whether the first process reads a loader that is made in here for all others."""
        config = self.accelerator.dataloader_config
        before, config.dispatch_batches = config.dispatch_batches, dispatch_batches
        try:
            yield
        finally:
            config.dispatch_batches = before

    def _training_sampler(self, sampler_fn: Callable, dataset: Any) -> torch.utils.data.Sampler | None:
        sampler = training_sampler(sampler_fn(dataset), dataset, self._data_seed, self.args.world_size)
        if isinstance(dataset, EpochDataset) and self._needs_positions and not getattr(sampler, "positions", False):
            given = sampler.sampler if isinstance(sampler, EpochIndices) else sampler
            raise ValueError(
                "mixing in pairs and stored teacher logits need the order of EpochSampler with positions, got "
                f"{type(given).__name__}. Leave _get_train_sampler as it is, or set mix_pairs to false and a teacher"
            )
        self.pop_callback(_SetEpoch)
        if isinstance(sampler, EpochSampler | EpochIndices):
            self.add_callback(_SetEpoch(sampler))
        return sampler

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def _needs_positions(self) -> bool:
        collator = self.data_collator
        return isinstance(collator, ImageCollator) and (collator.mix_pairs or collator.teacher_logits is not None)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        check_dataset_classes(self.student.config.id2label, {"eval_dataset": eval_dataset})
        with self._for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        check_dataset_classes(self.student.config.id2label, {"test_dataset": test_dataset})
        with self._for_evaluation():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _for_evaluation(self) -> Iterator[None]:
        # Mixup, cutmix and drop_last are for training alone.
        args = self.args
        self.args = copy.copy(args)
        self.args.dataloader_drop_last = False
        try:
            # accelerate dispatches the batches of a stream, which alone counts each image once, unless it is told not to.
            with self._without_mixing(), self._dispatching(None):
                yield
        finally:
            self.args = args

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self._has_own_evaluation or self.compute_loss_func is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        only_logits = ignore_keys is None
        if only_logits:
            ignore_keys = [*getattr(self.student.config, "keys_to_ignore_at_inference", ["cache"]), "loss"]
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        if only_logits and isinstance(logits, tuple):  # of a student with more outputs, from images without labels
            logits = logits[0]
        label = labels[self.label_names.index("labels")] if isinstance(labels, tuple) else labels
        if isinstance(logits, Tensor) and isinstance(label, Tensor):
            self._image_losses.add(logits, label, self.gather_function)
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
        self._image_losses = ImageLosses()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss = self._image_losses.mean()
        if loss is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    @contextlib.contextmanager
    def _without_mixing(self) -> Iterator[None]:
        collator = self.data_collator
        if isinstance(collator, ImageCollator):
            self.data_collator = collator.without_mixing()
        try:
            yield
        finally:
            self.data_collator = collator

    def _estimate_batch_norm(self, num_images: int) -> None:
        with self._without_mixing():
            estimate_batch_norm(
                self.student,
                self.train_dataset,
                num_images,
                self.accelerator,
                key=(self.args.seed, self.state.global_step),
                batch_size=self.args.process_batch_size(self._train_batch_size),
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # The default would write the keys of the module that is trained, and a pickle of the arguments beside them.
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(output_dir, exist_ok=True)
        model: DistillationModel = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state_dict = model.state_dict() if state_dict is None else state_dict
        model.save(output_dir, state_dict, with_losses=self._saving_checkpoint)
        timm_student = isinstance(model.student, TimmWrapperForImageClassification)
        if self.processing_class is None and not timm_student and not self._saving_checkpoint:
            logger.warning(
                "%s holds no preprocessing, so that pipeline() cannot open it: hand the student's image processor to "
                "DistillationTrainer(processing_class=...).",
                output_dir,
            )
        # A timm student's preprocessing is in its config.json, where transformers and timm look for it.
        if self.processing_class is not None and not timm_student:
            self.processing_class.save_pretrained(output_dir)
        with open(os.path.join(output_dir, SETTINGS), "w", encoding="utf-8") as file:
            # Through JSON, which turns what YAML has no name for (paths, numpy's numbers) into text.
            settings = json.loads(json.dumps(self.args.to_dict(), default=str))
            yaml.safe_dump(publishable(settings), file, sort_keys=False)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs,
    ) -> None:
        # The default's card knows neither loss nor teacher, and takes the place of one that a person has edited.
        if self.is_world_process_zero():
            repo_id = self.hub_model_id or self.args.hub_model_id
            write_card(
                self.args.output_dir,
                self.student,
                name=model_name or os.path.basename(os.path.abspath(self.args.output_dir)),
                args=self.args,
                state=self.state,
                repo_id=repo_id if repo_id and "/" in repo_id else None,
                teacher=self._described_teacher(),
                losses=self._distillation_losses,
                info=self.card_info.updated(language, license, tags, **kwargs),
            )

    def _described_teacher(self) -> Teacher | StoredTeacher | None:
        if self.teacher_logits is not None:
            return self.teacher_logits.info.teacher
        return None if self.teacher is None else self.accelerator.unwrap_model(self.teacher)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The default looks for the trained module's keys, and a checkpoint holds the student's.
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


def _have_same_weights(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether the student's parameters, in memory, are the teacher's."""
    ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (student, teacher))
    return ours == theirs != set()


def _overrides(trainer: DistillationTrainer, name: str) -> bool:
    """Whether a subclass, or the trainer itself, has an attribute of its own in place of DistillationTrainer's."""
    classes = type(trainer).__mro__[: type(trainer).__mro__.index(DistillationTrainer)]
    return name in vars(trainer) or any(name in vars(kind) for kind in classes)


class _CheckOwnMethods(TrainerCallback):
    """Checks what an overridden create_optimizer builds, and whether an overridden compute_loss distils."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.is_first_step = True

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.is_first_step = True
        # Trainer's own group of what does not decay may be empty.
        if _overrides(self.trainer, "create_optimizer"):
            check_no_group_is_empty(optimizer)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        is_first_step, self.is_first_step = self.is_first_step, False
        own_loss = trainer._distillation_losses and _overrides(trainer, "compute_loss")
        if is_first_step and own_loss and not trainer._component_sums and not trainer.step_was_skipped:
            logger.warning(
                "compute_loss of %s returned a loss without the distillation losses (%s), which super().compute_loss "
                "computes. Add its result, or pass no distillation_loss.",
                type(trainer).__name__,
                ", ".join(trainer._distillation_losses),
            )


class _SetEpoch(TrainerCallback):
    """Tells the sampler its epoch: on resume, the Trainer's own call stops short of it when there are several processes."""

    def __init__(self, sampler: EpochSampler | EpochIndices):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.sampler.set_epoch(int(state.epoch))


class _PrepareTraining(TrainerCallback):
    """Checks what is known when all is made and no step is done, in every attempt of `auto_find_batch_size`."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, train_dataloader=None, **kwargs) -> None:
        trainer = self.trainer
        # Sharding puts parameters of its own in the place of the model's.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer._check_optimizer(_without_accelerate(optimizer))
            trainer._check_weights()
        trainer._check_metric()
        for dataset in trainer._datasets.values():
            if isinstance(dataset, ImageDataset):
                dataset.check_labels()
        trainer.check_batches(train_dataloader, state.max_steps)
        trainer._give_own_stream()


class _UpdateAverage(TrainerCallback):
    """Updates the moving average of the student's weights after each optimiser step."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.trainer.step_was_skipped:
            model.update_average(state.global_step)


def _holds_an_epoch_dataset(dataset: Any) -> bool:
    """Whether it is a `Subset` or `ConcatDataset`, however deep, of an [`EpochDataset`]."""
    if isinstance(dataset, ConcatDataset):
        return any(isinstance(part, EpochDataset) or _holds_an_epoch_dataset(part) for part in dataset.datasets)
    if isinstance(dataset, Subset):
        return isinstance(dataset.dataset, EpochDataset) or _holds_an_epoch_dataset(dataset.dataset)
    return False


def _without_accelerate(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)
