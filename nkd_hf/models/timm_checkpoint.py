"""Builds a student from a checkpoint that timm's training script or `torch.save` wrote."""

import os

import timm
from timm.data import resolve_data_config
from torch import Tensor
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification

from .labels import normalize_id2label

# The keys of timm.data.resolve_data_config that a folder keeps.
_PREPROCESSING = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def read_timm_checkpoint(path: str) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint with `timm.models.load_state_dict`.

    It reads a training checkpoint's moving average (`state_dict_ema`, `model_ema`) if there is one, as
    `timm.create_model(checkpoint_path=...)` does, and removes the prefixes of DDP and torch.compile.

    Args:
        path: a `.safetensors` file, or a file of `torch.save` (`.pth`, `.pth.tar`, `.bin`); only its tensors are read.

    Returns:
        `dict[str, Tensor]`: the weights by timm's names, on the CPU.

    Raises:
        OSError: there is no such file.
        ValueError: the file is no checkpoint, or has more than tensors and plain values.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    try:
        weights = timm.models.load_state_dict(path, use_ema=True, weights_only=True)
    except Exception as error:  # torch's readers raise nearly anything on a broken file
        if "weights_only" in str(error):
            # The message omits timm's advice to load the file without the restriction.
            globals_ = str(error).partition("Unsupported globals: ")[2].partition(". ")[0]
            raise ValueError(
                f"{path} is not opened: it must hold tensors and plain values alone, got {globals_ or 'other objects'}. Save "
                "the model's state_dict() alone"
            ) from error
        raise ValueError(f"{path} is no checkpoint that timm can read ({type(error).__name__}: {error})") from error
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, Tensor) for value in weights.values())
    ):
        first = next((f"{key} as {type(value).__name__}" for key, value in weights.items()), "nothing")
        raise ValueError(f"{path} must hold tensors by their names, got {first}. Save the model's state_dict()")
    return weights


def create_timm_student(
    weights: dict[str, Tensor], architecture: str, id2label: list[str] | dict[int, str] | None = None
) -> PreTrainedModel:
    """Builds a student of one of timm's architectures and loads weights into it.

    Args:
        weights: the weights by timm's names; see [`read_timm_checkpoint`].
        architecture: timm's name of the model, with or without a tag (`resnet18.a1_in1k`). The student gets timm's
            preprocessing for it.
        id2label: class names. None means ImageNet's if the checkpoint has as many classes as ImageNet, as in transformers
            for a timm model without names, and else `LABEL_0`, `LABEL_1`, ...

    Returns:
        `PreTrainedModel`: a student with as many classes as the checkpoint's classifier.

    Raises:
        ValueError: timm has no such architecture, or the weights belong to another one.
    """
    if not timm.is_model(architecture):
        raise ValueError(
            f"architecture must be one of timm.list_models(), got {architecture!r}. Look its name up there"
        )
    try:
        pretrained_cfg = timm.get_pretrained_cfg(architecture).to_dict()
    except RuntimeError as error:
        raise ValueError(
            f"architecture must have a tag that timm knows or none, got {architecture!r}. Remove the tag"
        ) from error
    num_classes = _num_classes(weights, pretrained_cfg.get("classifier"), architecture)
    data_config = resolve_data_config(pretrained_cfg=pretrained_cfg, verbose=False)
    settings = {
        "architecture": architecture.partition(".")[0],
        "num_classes": num_classes,
        "model_args": {},
        "pretrained_cfg": {key: data_config[key] for key in _PREPROCESSING},
    }
    if id2label is not None:
        settings["label_names"] = list(normalize_id2label(id2label, num_classes, of="the labels").values())
    student = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(settings))
    expected = {key: list(value.shape) for key, value in student.timm_model.state_dict().items()}
    got = {key: list(value.shape) for key, value in weights.items()}
    faults = {
        "missing": [key for key in expected if key not in got],
        "unknown": [key for key in got if key not in expected],
        "of another shape": [
            f"{key} {got[key]} instead of {shape}" for key, shape in expected.items() if got.get(key, shape) != shape
        ],
        "not finite": [
            key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {fault}: {', '.join(keys[:5])}" for fault, keys in faults.items() if keys)
        raise ValueError(
            f"these must be the weights of timm's {architecture} with {num_classes} classes, got {found}. Name the "
            "architecture that was trained"
        )
    student.load_state_dict(weights)
    return student


def _num_classes(weights: dict[str, Tensor], classifier: str | tuple[str, ...] | None, architecture: str) -> int:
    """Returns the number of classes of a checkpoint, which is the number of rows of its classifier's weight."""
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    for key in (f"{name}.{weight}" for name in names for weight in ("weight", "linear.weight")):
        if key in weights:
            return len(weights[key])
    raise ValueError(
        f"these must be the weights of timm's {architecture}, whose classifier is {' and '.join(names) or 'none'}, got "
        f"{', '.join(list(weights)[:5])}. Name the architecture that was trained; a backbone without a classifier is not "
        "converted"
    )
