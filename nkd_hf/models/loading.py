"""Opens a classifier from the Hub or a folder, and refuses pickles and code beside the weights by default."""

import contextlib
import logging
import os
import pickle
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    has_file,
)

from ..errors import RefusedError, explain_gated_repo, reason
from ..files import path_fault
from .build_limit import build_limit, measure_weights
from .model_config import check_image_processor, find_file, is_timm_config, read_config, read_json
from .outputs import check_inputs
from .repo_ids import read_repo_id
from .weight_checks import check_weights, has_random_weights

# Endings of the names of files of weights.
_TIMM_FILES = (".pth.tar", ".pth", ".pt", ".safetensors")


def open_classifier(name: str, **kwargs) -> PreTrainedModel:
    """Opens a finished image classifier by its folder or Hub id.

    Args:
        name: a folder or a Hub id.
        kwargs: `allow_pickle`, `trust_remote_code` and arguments of `from_pretrained`; see [`open_pretrained`].

    Raises:
        ValueError: there is no such model, or it is no whole image classifier.
    """
    try:
        return open_pretrained(name, **kwargs)
    except RefusedError as error:
        raise ValueError(f"{name} is not opened: {error}") from error
    except (OSError, ValueError) as error:
        missing = "" if os.path.isdir(os.path.expanduser(name)) else f"there is no folder {name!r} here, and "
        raise ValueError(f"{name} could not be opened as a folder or a Hub id: {missing}{error}") from error


def open_pretrained(
    name: str,
    *,
    model_class: type = AutoModelForImageClassification,
    new_head: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """Calls `from_pretrained` of an auto class, and refuses pickles and missing weights, which `from_pretrained`
    accepts.

    The model gets the attribute `starts_with_new_head`: whether its classifier starts from random weights.

    Args:
        name: a folder or a Hub id.
        model_class: the auto class. A model of another auto class than the default may need more than pixels.
        new_head: whether the classifier may start from random weights, as a student's may. All other weights must be in the
            file.
        allow_pickle: whether weights in a pickle (`pytorch_model.bin`) are opened if there are no safetensors; only
            the pickle's tensors are read (`weights_only`).
        trust_remote_code: whether code beside the weights may run.
        kwargs: passed to `from_pretrained`.

    Raises:
        RefusedError: the folder does not exist, or the repo is gated; the weights are a pickle; the files name other files, or
            cannot be read; weights are missing.
        ValueError: the code is not trusted.
        OSError: there is no such model, or it is not in the cache and the Hub cannot be reached.
    """
    name = os.path.expanduser(read_repo_id(name, "the model"))
    where = {key: kwargs[key] for key in ("revision", "cache_dir") if key in kwargs}
    _check_files(name, where)
    config = read_config(name, trust_remote_code, **where) or {}
    num_new_classes = kwargs.get("num_labels", 0)
    if _has_classes(config, kwargs.get("num_labels")):
        # TimmWrapperConfig.from_dict ignores the model's class names if it gets num_labels.
        kwargs.pop("num_labels", None)
    with _explain_failures(name, allow_pickle):
        size = measure_weights(_find_weights(name, config, allow_pickle, where))
        if is_timm_config(config):
            _add_timm_config(kwargs, config, new_head)
        with _without_conversion(), _without_report(), build_limit(size, num_new_classes):
            model, loaded = model_class.from_pretrained(
                name,
                use_safetensors=None if allow_pickle else True,
                weights_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # check_weights names them.
                output_loading_info=True,
                **kwargs,
            )
    check_weights(model, loaded, new_head)
    model.starts_with_new_head = has_random_weights(loaded)
    model.config.return_dict = True  # A file with False makes forward return tuples.
    try:
        if model_class is AutoModelForImageClassification:
            check_inputs(model, "the model")
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return model


def _has_classes(config: dict[str, Any], num_labels: int | None) -> bool:
    """Whether a model of timm has `num_labels` classes, and a name for each class or no names."""
    num_names = len(config.get("label_names") or ())
    return "architecture" in config and config.get("num_classes") == num_labels and num_names in (0, num_labels)


def _add_timm_config(kwargs: dict[str, Any], config: dict[str, Any], new_head: bool) -> None:
    """Replaces `num_labels` in arguments of `from_pretrained` with the configuration of a model of timm."""
    if config.get("num_classes") == 0 and not new_head:
        kwargs.setdefault("num_labels", 2)  # check_weights names the missing classifier
    labels = {"num_labels": kwargs.pop("num_labels")} if "num_labels" in kwargs else {}
    kwargs["config"] = TimmWrapperConfig.from_dict(config, **labels)


def _check_files(name: str, where: dict[str, Any]) -> None:
    """Raises RefusedError for a checkpoint, a path that cannot be opened, or an adapter."""
    _check_no_checkpoint(name)
    if fault := path_fault(name):
        raise RefusedError(fault)
    if find_file(name, ADAPTER_CONFIG_NAME, **where):
        raise RefusedError(
            f"it has an {ADAPTER_CONFIG_NAME}, so its weights are an adapter of another model that the file names. Merge "
            "the adapter into its model (merge_and_unload of peft), save that, and open the folder"
        )


def _check_no_checkpoint(name: str) -> None:
    """Raises RefusedError for a file of weights, or a folder without a configuration, which timm's training writes."""
    files = [Path(name)] if os.path.isfile(name) else []
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, CONFIG_NAME)):
        files = [path for path in sorted(Path(name).iterdir()) if path.name.endswith(_TIMM_FILES)]
        # The message should name model_best, which timm writes beside the checkpoints of the last epochs.
        files.sort(key=lambda path: not path.name.startswith("model_best"))
        if models := sorted(str(path.parent) for path in Path(name).glob(f"*/{CONFIG_NAME}")):
            raise RefusedError(
                f"it holds no {CONFIG_NAME}, but folders of models. Name one of them: {', '.join(models)}"
            )
    if files and not os.path.exists(os.path.join(name, ADAPTER_CONFIG_NAME)):
        raise RefusedError(
            f"it must be a folder with a {CONFIG_NAME} or a Hub id, got weights alone. Convert a checkpoint of timm with "
            f"`nkd-hf convert --timm {shlex.quote(str(files[0]))} --architecture NAME --output DIR`, and open DIR"
        )


def open_image_processor(name: str, *, trust_remote_code: bool = False, **kwargs) -> BaseImageProcessor:
    """Calls `AutoImageProcessor.from_pretrained`, and checks the processor's sizes, scales and names of outputs.

    Args:
        name: a folder or a Hub id.
        trust_remote_code: whether code beside the model may run.
        kwargs: passed to `from_pretrained`.

    Raises:
        RefusedError: a size or scale does not fit images, or the processor's model needs more than pixels.
        OSError: there is no image processor.
    """
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    check_image_processor(processor.to_dict())
    if more := [key for key in processor.model_input_names if key != "pixel_values"]:
        raise RefusedError(
            f"its image processor must make pixel_values alone, got {type(processor).__name__}, which also makes "
            f"{', '.join(more)}. Take another model"
        )
    return processor


def _read_index(file: str, path: str) -> list[str]:
    """Returns the shards that an index names, which must be beside it."""
    try:
        weight_map = read_json(path, file).get("weight_map")
    except RefusedError as error:
        raise RefusedError(f"its {file} is no index of weights: {error}") from error
    if not isinstance(weight_map, dict):
        raise RefusedError(f"its {file} is no index of weights: weight_map must be a mapping, got {weight_map!r}")
    ending = ".safetensors" if file == SAFE_WEIGHTS_INDEX_NAME else ".bin"
    shards = {str(shard): shard for shard in weight_map.values()}
    for shard in shards.values():
        is_text = isinstance(shard, str)
        if not is_text or os.path.basename(shard) != shard or "\\" in shard or not shard.endswith(ending):
            raise RefusedError(
                f"its {file} names {shard!r}, expected the names of {ending} files beside it: take the model from its "
                "author again"
            )
    return sorted(shards)


def _find_weights(name: str, config: dict[str, Any], allow_pickle: bool, where: dict[str, Any]) -> list[str]:
    """Returns the paths of the files that `from_pretrained` will read, without missing files, for which it raises."""
    kinds = [(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)]
    shards = {}
    for _, index in kinds:
        if path := find_file(name, index, **where):
            shards[index] = _read_index(index, path)
    if config.get("transformers_weights"):
        kinds = [(config["transformers_weights"], ""), *kinds]
    for whole, index in kinds if allow_pickle else kinds[:-1]:
        if path := find_file(name, whole, **where):
            return [path]
        if paths := [find_file(name, shard, **where) for shard in shards.get(index, ())]:
            return [path for path in paths if path is not None]
    return []


def comes_with_code(model: PreTrainedModel) -> bool:
    """Whether a model's class comes from code beside its weights, with `trust_remote_code`."""
    return type(model).__module__.startswith("transformers_modules.")


@contextlib.contextmanager
def _explain_failures(name: str, allow_pickle: bool) -> Iterator[None]:
    """Raises RefusedError in place of an error of the files or the configuration, and says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise RefusedError(f"its safetensors cannot be read, they are damaged or cut short: {error}") from error
    except pickle.UnpicklingError as error:
        raise RefusedError(f"its pickle holds more than tensors, and is not opened: {reason(error)}") from error
    except (OSError, ValueError) as error:
        if how := explain_gated_repo(error, name):
            raise RefusedError(how) from error
        if isinstance(error, OSError) and not allow_pickle and (file := _pickle_of(name)):
            raise RefusedError(
                f"its weights are a pickle ({file}), which can run code when it is opened, and there are none as "
                "safetensors: take another model, or set allow_pickle, which reads the pickle's tensors alone"
            ) from error
        raise
    except Exception as error:  # transformers raises nearly anything on an odd configuration
        raise RefusedError(
            f"its configuration and weights are not of a model that can be built ({type(error).__name__}: {reason(error)})"
        ) from error


def _pickle_of(name: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return next((file for file in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if has_file(name, file)), None)
    return None


@contextlib.contextmanager
def _without_conversion() -> Iterator[None]:
    """Prevents transformers from asking the Hub to convert a pickle, which opens a pull request in the user's name."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Hides transformers' report of weights and names that do not fit: check_weights raises, or the head is new."""
    texts = {
        "transformers.modeling_utils": "LOAD REPORT",
        "transformers.configuration_utils": "incompatible to the `id2label` map",
    }
    loggers = [logging.getLogger(name) for name in texts]

    def keep(record: logging.LogRecord) -> bool:
        return texts[record.name] not in str(record.msg)

    # Another log level would make transformers log its tensor-parallel plan.
    for each in loggers:
        each.addFilter(keep)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(keep)
