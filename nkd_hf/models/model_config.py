"""Reads a model's config.json, and refuses values that no image classifier needs before a model is built from them."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME, cached_file

from ..errors import RefusedError
from .labels import normalize_id2label

# Arguments of timm.create_model that open files or download. A configuration does not need them.
_OPENING_ARGS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
# ImageNet-21k's 21843 names take 0.5 MB.
_MAX_BYTES = 2**25
_MAX_DEPTH = 32
# Limit of one number, and of the sum of a list: the sum of `depths` is the length of a list of drop path rates.
_MAX_NUMBER = 2**20
_MAX_PIXELS = 2**14
_IMAGE_SIZES = ("image_size", "img_size", "input_size", "patch_size")
_CHANNELS = ("num_channels", "in_chans")


def find_file(name: str, file: str, **where) -> str | None:
    """Returns the path of a model's file, downloaded if necessary, or None if there is no such file.

    Args:
        name: a folder or a Hub id.
        file: the file's name in the folder.
        where: `revision`, `cache_dir`, `local_files_only`.
    """
    with contextlib.suppress(OSError, ValueError):
        return cached_file(name, file, **where)
    return None


def read_config(name: str, trust_remote_code: bool = False, **where) -> dict[str, Any] | None:
    """Reads and checks `config.json`.

    Args:
        name: a folder or a Hub id.
        trust_remote_code: whether downloaded code may run.
        where: see [`find_file`].

    Returns:
        `dict` or None: the configuration (timm's in the form that transformers opens), or None if there is none.

    Raises:
        RefusedError: the configuration cannot be read, names other files, or has values that no image classifier has.
    """
    path = find_file(name, CONFIG_NAME, **where)
    if path is None:
        return None
    config = read_json(path, CONFIG_NAME)
    if config.get("configuration_files"):
        raise RefusedError(f"its {CONFIG_NAME} names other configurations: open a folder that holds one of them")
    if is_timm_config(config):
        config = _of_timm(config)
    check_settings(config, trust_remote_code)
    return config


def read_json(path: str, file: str) -> dict[str, Any]:
    """Reads a mapping from a JSON file whose values are bounded in size, depth and range.

    Args:
        path: the path of the file.
        file: the name of the file in messages.

    Raises:
        RefusedError: the file cannot be read, or its content is no such mapping.
    """
    if os.path.getsize(path) > _MAX_BYTES:
        raise RefusedError(
            f"its {file} has {os.path.getsize(path) / 2**20:.0f} MiB, expected at most {_MAX_BYTES >> 20}"
        )
    try:
        with open(path, encoding="utf-8") as opened:
            settings = json.load(opened)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"its {file} is not a valid JSON file ({type(error).__name__}: {error})") from error
    if not isinstance(settings, dict):
        raise RefusedError(f"its {file} is no mapping, got {type(settings).__name__}")
    for key, value in _numbers(settings, file):
        if not math.isfinite(value):
            raise RefusedError(f"its {file} must hold finite numbers, got {value} as {key}")
    return settings


def check_settings(config: dict[str, Any], trust_remote_code: bool = False) -> None:
    """Checks a configuration before a model is built from it.

    Args:
        config: the content of `config.json`.
        trust_remote_code: whether downloaded code may run.

    Raises:
        RefusedError: the configuration makes timm or transformers open further files (weights by a path, a repo, a
            kernel), or has values that no image classifier has.
    """
    check_model_args(config.get("model_args"))
    if ":" in str(config.get("architecture")):
        raise RefusedError(
            f"its architecture {config['architecture']!r} names another folder or repo: pass that folder or repo instead"
        )
    for key in ("_attn_implementation", "attn_implementation"):
        if "/" in str(config.get(key)) and not trust_remote_code:
            raise RefusedError(
                f"its {key} {config[key]!r} is code of a repo: remove it from config.json, or set trust_remote_code"
            )
    weights = config.get("transformers_weights")
    if weights is not None and not (os.path.basename(str(weights)) == weights and weights.endswith(".safetensors")):
        raise RefusedError(
            f"its transformers_weights must be the name of a .safetensors file beside it, got {weights!r}"
        )
    _check_values(config)


def check_model_args(model_args: dict[str, Any] | None) -> None:
    """Raises RefusedError if arguments of timm's architecture make `timm.create_model` open a file."""
    if isinstance(model_args, dict) and (opening := [key for key in _OPENING_ARGS if key in model_args]):
        raise RefusedError(
            f"its model_args hold {', '.join(opening)}, by which timm would open other weights: omit them, and give "
            "the id or folder of the model instead"
        )


def is_timm_config(config: dict[str, Any]) -> bool:
    """Whether timm wrote a configuration; transformers writes `model_type` into its own."""
    return "architecture" in config and "model_type" not in config


def check_image_processor(settings: dict[str, Any], file: str = "preprocessor_config.json") -> None:
    """Checks the sizes and scales of an image processor.

    Args:
        settings: the settings of an image processor, or timm's `pretrained_cfg`.
        file: the name of the settings in messages.

    Raises:
        RefusedError: a size is no number of pixels, or pixels would be divided by 0.
    """
    for key in ("size", "crop_size", "input_size", "test_input_size"):
        sides = settings.get(key)
        sides = list(sides.values()) if isinstance(sides, dict) else sides
        for side in sides if isinstance(sides, (list, tuple)) else [sides]:
            # None means that the side is not given.
            if side is not None and not (_is_integer(side) and 1 <= side <= _MAX_PIXELS**2):
                raise RefusedError(f"its {file} must have pixels as {key}, got {settings[key]!r}")
    for key in ("mean", "std", "image_mean", "image_std"):
        values = settings.get(key)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is None and not isinstance(values, (list, tuple)):
                continue
            if not _is_number(value) or ("std" in key and value <= 0):
                above = " above 0, since pixels are divided by them" if "std" in key else ""
                raise RefusedError(f"its {file} must have numbers{above} as {key}, got {values!r}")
    ratio = settings.get("crop_pct")
    if ratio is not None and not (_is_number(ratio) and 0 < ratio <= 2):
        raise RefusedError(f"its {file} must have a number above 0 as crop_pct, got {ratio!r}")


def _check_values(config: dict[str, Any]) -> None:
    """Raises RefusedError for a value with which building a model would raise another error, or never end."""
    for key in ("num_classes", "num_labels"):
        if config.get(key) is not None and not (_is_integer(config[key]) and config[key] >= 0):
            raise RefusedError(f"its {key} must be a number of classes, got {config[key]!r}")
    for key, kinds in {
        "architecture": str,
        "model_type": str,
        "id2label": (dict, list),
        "label2id": dict,
        "label_names": (dict, list),
        "model_args": dict,
        "pretrained_cfg": dict,
    }.items():
        if not isinstance(config.get(key), (kinds, type(None))):
            raise RefusedError(f"its {key} must be {_named(kinds)}, got {type(config[key]).__name__}")
    for key in ("id2label", "label2id", "label_names"):
        if len(config.get(key) or ()) > _MAX_NUMBER:
            raise RefusedError(f"its {key} must hold at most {_MAX_NUMBER} names, got {len(config[key])}")
    if config.get("pretrained_cfg"):
        check_image_processor(config["pretrained_cfg"], "pretrained_cfg")
    sizes = {**config, **(config.get("model_args") or {})}
    for key in _IMAGE_SIZES:
        sides = sizes.get(key)
        sides = list(sides.values()) if isinstance(sides, dict) else sides
        for side in sides if isinstance(sides, (list, tuple)) else [sides]:
            if side is not None and not (_is_integer(side) and 1 <= side <= _MAX_PIXELS):
                raise RefusedError(f"its {key} must be from 1 to {_MAX_PIXELS} pixels, got {sizes[key]!r}")
    for key in _CHANNELS:
        if sizes.get(key) not in (None, 3):
            raise RefusedError(f"its {key} must be 3, since images come as RGB, got {sizes[key]!r}")
    for key, value in _numbers({key: value for key, value in config.items() if key in _keys_of(config)}, CONFIG_NAME):
        if abs(value) > _MAX_NUMBER:
            raise RefusedError(f"its {key} must be at most {_MAX_NUMBER}, got {value}")


def _keys_of(config: dict[str, Any]) -> set[str]:
    """Returns the keys from which a model is built; all other keys (a count of FLOPs, a seed) may have any number."""
    keys = {"model_args", "pretrained_cfg", "num_classes", "num_labels"}
    if config.get("model_type") in CONFIG_MAPPING:
        default = CONFIG_MAPPING[config["model_type"]]()
        keys |= {key for key in config if hasattr(default, key)}
    return keys


def _numbers(value: Any, key: str, depth: int = 0) -> Iterator[tuple[str, int | float]]:
    """Yields all numbers in a JSON value with their keys, and the sums of lists."""
    if depth > _MAX_DEPTH:
        raise RefusedError(f"its {key} is nested more than {_MAX_DEPTH} times")
    if _is_number(value):
        yield key, value
    elif isinstance(value, dict):
        for inner, item in value.items():
            yield from _numbers(item, inner, depth + 1)
    elif isinstance(value, list):
        numbers = [abs(item) for item in value if _is_number(item)]
        if numbers:
            yield key, sum(numbers)
        for item in value:
            if not _is_number(item):
                yield from _numbers(item, key, depth + 1)


def _of_timm(config: dict[str, Any]) -> dict[str, Any]:
    """Brings a configuration that timm wrote into the form that `TimmWrapperConfig` reads.

    timm's `_parse_model_cfg` (timm/models/_hub.py) reads the same forms.
    """
    config = dict(config)
    if "pretrained_cfg" not in config:
        # Before timm 0.9, all settings were in one mapping.
        pretrained_cfg = dict(config)
        config = {"architecture": pretrained_cfg.pop("architecture")}
        pretrained_cfg.pop("num_features", None)
        config["label_names"] = pretrained_cfg.pop("labels", None)
        config["pretrained_cfg"] = pretrained_cfg
    pretrained_cfg = config["pretrained_cfg"]
    if not isinstance(pretrained_cfg, dict):
        return config
    for key in ("num_classes", "label_names"):
        if config.get(key) is None and pretrained_cfg.get(key) is not None:
            config[key] = pretrained_cfg[key]
    if isinstance(config.get("label_names"), dict):
        try:
            config["label_names"] = list(normalize_id2label(config["label_names"], of="label_names").values())
        except ValueError as error:
            raise RefusedError(f"its {error}") from error
    if isinstance(config.get("model_args"), dict):
        # timm.create_model would get num_classes twice.
        config["model_args"] = {key: value for key, value in config["model_args"].items() if key != "num_classes"}
    return config


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _named(kinds: type | tuple[type, ...]) -> str:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join({str: "text", dict: "a mapping", list: "a list"}[kind] for kind in kinds)
