"""Stores a teacher's logits on the training images on disk."""

from .compression import dense_logits, softmax_logits, sparse_logits
from .info import FORMAT, STORE, StoreInfo, TeacherDescription
from .store import TeacherLogits, read_record, shard_path, unfinished, write_shard

__all__ = [
    "FORMAT",
    "STORE",
    "StoreInfo",
    "TeacherDescription",
    "TeacherLogits",
    "dense_logits",
    "read_record",
    "shard_path",
    "softmax_logits",
    "sparse_logits",
    "unfinished",
    "write_shard",
]
