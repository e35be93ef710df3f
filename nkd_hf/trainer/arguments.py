"""Defines the training arguments of a distillation run."""

import json
import math
from dataclasses import dataclass, field

from transformers import SchedulerType, TrainingArguments

from ..models.repo_ids import read_repo_id
from .optimization import NO_DECAY_KINDS, SCHEDULES, EpochSchedule, check_arguments

NON_FINITE = ("error", "skip")
TEACHER_DTYPES = ("float32", "bf16", "fp16")
# TrainingArguments accepts other values of these arguments, but no run works with them.
_POSITIVE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("base_batch_size", "precise_bn_images", "eval_accumulation_steps", "ddp_timeout"),
)
_NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon", "logging_steps", "eval_delay"),
    # save_total_limit=0 keeps all checkpoints, as None does.
    *("eval_steps", "save_steps", "save_total_limit", "dataloader_num_workers", "seed", "data_seed"),
)
_FRACTIONS = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the arguments of [`DistillationTrainer`], and three other defaults.

    Args:
        feature_layer (`str`, *optional*): the student's submodule whose output USKD's auxiliary head reads. None uses
            the paper's layer, for the paper's architectures.
        teacher_dtype (`str`, *optional*): `float32`, `bf16` or `fp16`: the precision of the teacher's weights and
            computation, whatever the student's precision. None keeps the weights as they are opened (float32 for a Hub id
            or folder), and computes in the student's mixed precision, or in float32 for a store of its logits.
        teacher_channels_last (`bool`, defaults to `False`): whether the teacher, a CNN, computes in this memory format.
        teacher_compile (`bool`, defaults to `False`): whether the teacher is compiled with `torch.compile`; `torch_compile`
            compiles student and teacher. `teacher_channels_last` and `teacher_compile` change the teacher's logits by
            rounding alone.
        lr_scheduler_type (`str`, defaults to `"linear"`): one of `TrainingArguments`, or one that counts in epochs, with
            these `lr_scheduler_kwargs`: `multistep` (milestones, gamma), `exponential_by_epoch` (gamma),
            `constant_then_linear` (constant_steps, constant_factor), `cosine_by_epoch` (warmup_epochs, warmup_factor,
            warmup_by, min_lr); see `nkd_hf.trainer.optimization`.
        base_batch_size (`int`, *optional*): the global batch that `learning_rate` is meant for: per-device batch x
            processes x accumulation. Processes that split a batch (`split_batches` of `accelerator_config`) count
            once. A run with another global batch scales the rate linearly, with a warning. None never scales it.
        no_weight_decay (`list[str]`, *optional*): the parameters of student and losses without weight decay, some of `norm`
            (weights and biases of normalisation layers), `bias` (all biases) and `embedding` (class and distillation
            tokens, position embeddings, relative position biases). An empty list decays everything. None keeps the
            `Trainer`'s own rule: no biases and no LayerNorm, but BatchNorm's weights and the embeddings decay.
        ema_decay (`float`, *optional*): keeps an exponential moving average of the student's weights, updated after each
            optimiser step: decay x average + (1 - decay) x weights. The average is evaluated and saved.
        precise_bn_images (`int`, *optional*): before each evaluation, the statistics of BatchNorm are estimated again on
            this many training images, all processes together.
        on_non_finite_loss (`str`, defaults to `"error"`): the reaction to a step whose loss or gradient norm is NaN or
            infinite. `error` stops the run and names the step. `skip` skips the step, names it, and stops after 10
            skipped steps in a row. With `skip`, the host waits for the device in each step.
        remove_unused_columns (`bool`, defaults to `False`): image transforms read columns that the model does not take.
        ddp_find_unused_parameters (`bool`, defaults to `False`): every parameter has a gradient in each step.
        logging_nan_inf_filter (`bool`, defaults to `False`): the filter hides a loss that is not finite, and waits for
            the GPU in each step.

    Raises:
        ValueError: a value is out of its range, or does not work with several processes (`save_on_each_node`,
            `even_batches` of `accelerator_config`).
    """

    feature_layer: str | None = field(
        default=None,
        metadata={"help": "Submodule of the student that USKD's auxiliary head reads; found for known architectures."},
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the teacher on its own. Default: float32 weights, in the student's mixed precision.",
            "choices": list(TEACHER_DTYPES),
        },
    )
    teacher_channels_last: bool = field(
        default=False, metadata={"help": "Run the teacher, a CNN, in channels_last memory format."}
    )
    teacher_compile: bool = field(default=False, metadata={"help": "Compile the teacher with torch.compile."})
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": f"The learning rate's schedule; {', '.join(SCHEDULES)} count in epochs.",
            "choices": [item.value for item in SchedulerType] + list(SCHEDULES),
        },
    )
    base_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Global batch size that learning_rate is meant for; another size scales learning_rate linearly."
        },
    )
    no_weight_decay: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parameters without weight decay: norm, bias, embedding. Default: the Trainer's rule.",
            "choices": list(NO_DECAY_KINDS),
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of the moving average of the student's weights, which is evaluated and saved."},
    )
    precise_bn_images: int | None = field(
        default=None,
        metadata={"help": "Training images on which BatchNorm's statistics are estimated again before an evaluation."},
    )
    on_non_finite_loss: str = field(
        default="error",
        metadata={
            "help": "A step whose loss is not finite: stop with an error, or skip the step.",
            "choices": list(NON_FINITE),
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop the columns that the model's forward does not take."}
    )
    ddp_find_unused_parameters: bool = field(
        default=False, metadata={"help": "The flag of that name of DistributedDataParallel."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to replace losses that are not finite in the log."}
    )

    def __post_init__(self):
        self._check_ranges()
        self.hub_model_id = read_repo_id(self.hub_model_id, "hub_model_id")
        # TrainingArguments knows only transformers' schedules.
        name = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if name in SCHEDULES:
            self.lr_scheduler_type = "constant"
        super().__post_init__()
        self._check_processes()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch would warn at each loader
        kwargs = self.lr_scheduler_kwargs or {}
        if isinstance(kwargs, str):
            try:
                kwargs = json.loads(kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"lr_scheduler_kwargs must be a mapping in JSON, got {kwargs!r}: {error}") from error
        if not isinstance(kwargs, dict):
            raise ValueError(f"lr_scheduler_kwargs must be a mapping such as {{'gamma': 0.1}}, got {kwargs!r}")
        check_arguments(name, kwargs, self.learning_rate)
        if name in SCHEDULES:
            self.lr_scheduler_type, self.lr_scheduler_kwargs = EpochSchedule(name), kwargs
            if self.warmup_steps:
                raise ValueError(
                    f"lr_scheduler_type={name} does not read warmup_steps={self.warmup_steps}: set the warm-up of "
                    "cosine_by_epoch in lr_scheduler_kwargs"
                )
        if "momentum" in (self.optim_args or "") and self.optim.value.startswith("adam"):
            raise ValueError(
                f"optim={self.optim.value} does not read optim_args={self.optim_args!r}. Set optim to one that reads "
                "them, such as sgd, and its learning_rate"
            )
        if isinstance(self.no_weight_decay, str):
            raise ValueError(f"no_weight_decay must be a list, got {self.no_weight_decay!r}: write it in brackets")
        for kind in self.no_weight_decay or []:
            if kind not in NO_DECAY_KINDS:
                raise ValueError(f"no_weight_decay must be some of {', '.join(NO_DECAY_KINDS)}, got {kind!r}")
        if self.on_non_finite_loss not in NON_FINITE:
            raise ValueError(f"on_non_finite_loss must be {' or '.join(NON_FINITE)}, got {self.on_non_finite_loss!r}")
        if self.teacher_dtype not in (None, *TEACHER_DTYPES):
            raise ValueError(f"teacher_dtype must be {', '.join(TEACHER_DTYPES)}, got {self.teacher_dtype!r}")
        if self.ema_decay is not None and not (0 < self.ema_decay < 1 and math.isfinite(self.ema_decay)):
            raise ValueError(f"ema_decay must lie between 0 and 1, got {self.ema_decay}: omit it to switch it off")

    def _check_processes(self) -> None:
        if self.save_on_each_node:
            raise ValueError(
                "save_on_each_node must be false, got True. Put output_dir on a file system that all nodes share: a "
                "checkpoint is one folder, with files of all processes."
            )
        if not self.accelerator_config.even_batches:
            raise ValueError(
                "even_batches of accelerator_config must be true, got False. Omit it: with unequal numbers of batches, "
                "processes would wait for each other forever."
            )

    def _check_ranges(self) -> None:
        for names, fits, expected in (
            (_POSITIVE, lambda value: 0 < value < math.inf, "positive"),
            (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "a finite number >= 0"),
            (_FRACTIONS, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        ):
            for argument in names:
                value = getattr(self, argument)
                if value is not None and not fits(value):
                    raise ValueError(f"{argument} must be {expected}, got {value}: omit it for its default")

    def process_batch_size(self, batch_size: int | None = None, num_processes: int | None = None) -> int:
        """Returns the number of images in one batch of a process.

        Args:
            batch_size: the data loader's batch size. None uses `train_batch_size`, which `auto_find_batch_size`
                lowers.
            num_processes: None uses the number of processes of this run.
        """
        batch_size = self.train_batch_size if batch_size is None else batch_size
        num_processes = self.world_size if num_processes is None else num_processes
        return batch_size // num_processes if self.accelerator_config.split_batches else batch_size

    def global_batch_size(self, batch_size: int | None = None, num_processes: int | None = None) -> int:
        """Returns the number of images in one optimiser step of all processes; arguments as in `process_batch_size`."""
        num_processes = self.world_size if num_processes is None else num_processes
        return self.process_batch_size(batch_size, num_processes) * num_processes * self.gradient_accumulation_steps

    def scaled_learning_rate(self, global_batch_size: int) -> float:
        """Returns `learning_rate`, multiplied by the global batch / `base_batch_size` if `base_batch_size` is set."""
        if self.base_batch_size is None:
            return self.learning_rate
        return self.learning_rate * global_batch_size / self.base_batch_size

    @property
    def teacher_settings(self) -> list[str]:
        """The names of the arguments about the teacher's computation that are set."""
        return [name for name in ("teacher_dtype", "teacher_channels_last", "teacher_compile") if getattr(self, name)]
