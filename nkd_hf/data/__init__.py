"""Opens datasets, and turns their rows into batches."""

from .arguments import DataArguments, streaming_max_steps
from .labels import describe_synsets, label_names
from .loading import load_evaluation_split, load_image_dataset
from .student_datasets import make_datasets

__all__ = [
    "DataArguments",
    "describe_synsets",
    "label_names",
    "load_evaluation_split",
    "load_image_dataset",
    "make_datasets",
    "streaming_max_steps",
]
