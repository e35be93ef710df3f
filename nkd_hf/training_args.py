"""The arguments of a distillation run."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what [`DistillationTrainer`] adds, and three defaults that differ.

    Args:
        feature_layer (`str`, *optional*): the student's submodule whose output USKD's auxiliary head reads. None takes
            the paper's layer for the architectures that it names.
        remove_unused_columns (`bool`, defaults to `False`): image transforms run on columns that the model does not take.
        ddp_find_unused_parameters (`bool`, defaults to `False`): every parameter has a gradient in each step.
        logging_nan_inf_filter (`bool`, defaults to `False`): the filter hides a loss that is not finite, and waits for
            the GPU in each step.
    """

    feature_layer: str | None = field(
        default=None,
        metadata={"help": "Submodule of the student that USKD's auxiliary head reads; found for known architectures."},
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
