"""Checks a student's input size, normalisation, crop and interpolation, and changes an opened student's."""

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from transformers import (
    BaseImageProcessor,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
)
from transformers.image_utils import PILImageResampling

from .image_sizes import (
    describe_fault,
    image_size_advice,
    is_of_the_meta_device,
    own_image_size,
    run_fault,
    takes_img_size,
    try_image_size,
)
from .preprocessing import IMAGE_PROCESSOR, load_image_processor, read_crop_pct, read_processor

# The models of transformers whose position embeddings are resampled for another size.
_WITH_POSITIONS = (ViTForImageClassification, DeiTForImageClassification, DeiTForImageClassificationWithTeacher)


def change_preprocessing(
    student: PreTrainedModel,
    *,
    image_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    processor: BaseImageProcessor | None = None,
) -> None:
    """Changes a student's preprocessing, in [`load_image_processor`] and in a saved folder; None keeps a setting.

    timm's students and this package's own students have their preprocessing in `config.pretrained_cfg`. Other students
    get a changed image processor as an attribute.

    Args:
        student: a model that was opened.
        image_size, image_mean, image_std, crop_pct, interpolation: see [`create_student`].
        processor: the image processor of a student without a `pretrained_cfg`. None loads it from the student's folder or
            repo.

    Raises:
        ValueError: the student or its image processor does not take one of the settings.
    """
    wanted = {"image_size": image_size, "image_mean": image_mean, "image_std": image_std}
    wanted |= {"crop_pct": crop_pct, "interpolation": interpolation}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if pretrained_cfg := getattr(student.config, "pretrained_cfg", None):
        names = {"image_mean": "mean", "image_std": "std"}
        changed = {names.get(name, name): value for name, value in wanted.items() if name != "image_size"}
        if image_size is not None:
            changed["input_size"] = [3, image_size, image_size]
        student.config.pretrained_cfg = dict(pretrained_cfg) | changed
    else:
        if processor is None:
            processor = _own_processor(student, [*wanted])
        setattr(student, IMAGE_PROCESSOR, _changed_processor(processor, wanted))
    _check(load_image_processor(student), wanted)
    if image_size is not None:
        _resize(student, image_size)


def check_preprocessing(
    image_size: int | None,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
    crop_pct: float | None,
    interpolation: str | None,
) -> None:
    """Raises ValueError unless these arguments of [`create_student`] are in their range, or None."""
    if image_size is not None and type(image_size) is not int:
        raise ValueError(f"image_size must be one integer, the height and the width, got {image_size!r}")
    if image_size is not None and not 1 <= image_size <= 2**14:
        raise ValueError(
            f"image_size must be from 1 to {2**14} pixels, got {image_size}: omit it for the architecture's own"
        )
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if values is not None and not (
            isinstance(values, Sequence) and len(values) == 3 and all(map(math.isfinite, values))
        ):
            raise ValueError(f"{name} must be three finite numbers, one per channel, got {values}")
    if image_mean is not None and max(image_mean) > 1:
        raise ValueError(
            f"image_mean must be in units of [0, 1], got {list(image_mean)}. Divide image_mean and image_std by 255"
        )
    if image_std is not None and min(image_std) <= 0:
        raise ValueError(f"image_std must be above 0, since pixels are divided by it, got {list(image_std)}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"expected 0 < crop_pct <= 1, got {crop_pct}")
    if interpolation not in (None, "bilinear", "bicubic"):
        raise ValueError(f"interpolation must be bilinear or bicubic, got {interpolation!r}")


def check_opened_size(student: PreTrainedModel) -> None:
    """Raises ValueError if an opened model doesn't take images of the size that its own image processor makes."""
    try:
        processor = load_image_processor(student)
    except (OSError, ValueError):  # no image processor, so no size to check
        return
    size = read_processor(processor).size
    if size[0] == size[1]:
        _check_size(student, size[0], resamples=False)


def _own_processor(student: PreTrainedModel, names: list[str]) -> BaseImageProcessor:
    try:
        return load_image_processor(student)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{', '.join(names)} must be None, since {student.name_or_path!r} has no image processor to change. Save one "
            "there first"
        ) from error


def _changed_processor(processor: BaseImageProcessor, wanted: dict[str, Any]) -> BaseImageProcessor:
    settings = processor.to_dict()
    changed = {name: list(wanted[name]) for name in ("image_mean", "image_std") if name in wanted}
    if "interpolation" in wanted:
        changed["resample"] = PILImageResampling[wanted["interpolation"].upper()]
    if "image_size" in wanted or "crop_pct" in wanted:
        height, width = read_processor(processor).size
        if "image_size" in wanted:
            height = width = wanted["image_size"]
        if "crop_pct" in settings:
            changed |= {"crop_pct": wanted.get("crop_pct", settings["crop_pct"])}
        if settings.get("do_center_crop"):
            crop_pct = 1.0 if "crop_pct" in settings else wanted.get("crop_pct") or read_crop_pct(processor)
            changed["crop_size"] = {"height": height, "width": width}
            height, width = round(height / crop_pct), round(width / crop_pct)
        has_side = "shortest_edge" in dict(settings["size"])
        changed["size"] = {"shortest_edge": min(height, width)} if has_side else {"height": height, "width": width}
    return type(processor).from_dict(settings | changed)


def _check(processor: BaseImageProcessor, wanted: dict[str, Any]) -> None:
    """Raises ValueError unless the processor has the wanted settings."""
    got, name = read_processor(processor), type(processor).__name__
    seen = {"image_size": got.size, "image_mean": got.mean, "image_std": got.std}
    for argument, value in wanted.items():
        if argument == "interpolation":
            fits, found = got.interpolation == value, got.interpolation
        elif argument == "crop_pct":
            found = round(read_crop_pct(processor), 2)
            fits = abs(found - value) < 0.5 / min(got.size) + 0.01
        else:
            found = list(seen[argument])
            fits = np.allclose(found, value, rtol=1e-5, atol=1e-6)
        if not fits:
            raise ValueError(
                f"{argument} must be None, since {name} of this student can't have {value} (it stays {found}). Give the "
                "student's folder another image processor, or keep its own preprocessing"
            )


def _resize(student: PreTrainedModel, image_size: int) -> None:
    """Makes a student take another size, if its weights depend on the size."""
    config = student.config
    if isinstance(student, TimmWrapperForImageClassification) and takes_img_size(config.architecture):
        before = config.model_args
        config.model_args = (before or {}) | {"img_size": image_size}
        _check_size(student, image_size)  # builds a model for the size
        _resize_timm(student, image_size)
    elif _has_positions(student) and image_size % student.config.patch_size == 0:
        _resize_positions(student, image_size)
    fault = run_fault(student, image_size)
    if fault is not None and not is_of_the_meta_device(fault):
        _check_size(student, image_size)  # raises with advice on other sizes
        raise _size_error(student, image_size, fault)


def _resize_timm(student: TimmWrapperForImageClassification, image_size: int) -> None:
    with torch.device("meta"):
        fresh = type(student)(student.config)
    wanted = {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    resize = getattr(student.timm_model, "set_input_size", None)
    if resize is not None:
        arguments: dict[str, Any] = {"img_size": (image_size, image_size)}
        if "window_size" in inspect.signature(resize).parameters and hasattr(fresh.timm_model, "layers"):
            # set_input_size scales Swin's windows with the image if none are given; the constructor of a Swin doesn't.
            arguments["window_size"] = [layer.blocks[0].window_size for layer in fresh.timm_model.layers]
        resize(**arguments)
    if {name: tensor.shape for name, tensor in student.state_dict().items()} != wanted:
        raise ValueError(
            f"image_size must be None, since the weights of {student.config.architecture} are for its own size, and timm does "
            f"not resample them to {image_size}. Keep the student's own size"
        )


def _has_positions(student: PreTrainedModel) -> bool:
    """Whether a student is a ViT or DeiT of transformers with square patches."""
    return isinstance(student, _WITH_POSITIONS) and isinstance(student.config.patch_size, int)


def _resize_positions(student: PreTrainedModel, image_size: int) -> None:
    """Resamples the position embeddings of a ViT or DeiT, as timm does for its own."""
    config, own = student.config, student.base_model.embeddings
    config.image_size = image_size
    with torch.device("meta"):
        fresh = type(own)(config)
    state, side = own.state_dict(), image_size // config.patch_size
    positions = state["position_embeddings"]  # [1, other tokens and patches, D]
    before = [length // config.patch_size for length in own.patch_embeddings.image_size]
    num_others = positions.shape[1] - own.patch_embeddings.num_patches
    state["position_embeddings"] = resample_abs_pos_embed(positions, [side, side], before, num_others)
    fresh.load_state_dict(state, assign=True)
    student.base_model.embeddings = fresh.train(own.training)


def _check_size(student: PreTrainedModel, image_size: int, resamples: bool = True) -> None:
    """Raises ValueError if a student doesn't take a size, or would not if its position embeddings were resampled."""

    def build(size: int) -> PreTrainedModel:
        if isinstance(student, TimmWrapperForImageClassification) and takes_img_size(student.config.architecture):
            config = type(student.config).from_dict(student.config.to_dict())
            config.model_args = (config.model_args or {}) | {"img_size": size}
            return type(student)(config)
        if resamples and _has_positions(student):
            config = copy.deepcopy(student.config)
            config.image_size = size
            if size % config.patch_size:
                raise ValueError(f"its patches have {config.patch_size} pixels")
            return type(student)(config)
        return type(student)(student.config)

    _, fault = try_image_size(build, image_size)
    if fault is not None and (is_of_the_meta_device(fault) or not _is_known(student)):
        fault = run_fault(student, image_size)
    if fault is not None:
        architecture, own = getattr(student.config, "architecture", None), getattr(student.config, "image_size", None)
        own = own_image_size(architecture) if architecture else own
        advice = image_size_advice(build, image_size, own if isinstance(own, int) else 224)
        raise _size_error(student, image_size, fault, advice)


def _is_known(student: PreTrainedModel) -> bool:
    """Whether a student's class comes from transformers or this package, so that its configuration alone builds it."""
    return type(student).__module__.split(".")[0] in ("transformers", "nkd_hf")


def _size_error(student: PreTrainedModel, image_size: int, fault: Exception, advice: str = "") -> ValueError:
    name = getattr(student.config, "architecture", None) or type(student).__name__
    return ValueError(
        f"image_size must be a size that {name} takes, got {image_size} ({describe_fault(fault)}). "
        + (advice or "Keep the student's own size")
    )
