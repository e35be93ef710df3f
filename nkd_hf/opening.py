"""Opens a classifier of the Hub or of a folder; what could run foreign code is refused unless it is asked for."""

import contextlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperForImageClassification,
)
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    has_file,
)

from . import architectures  # noqa: F401  (so that their folders open without trust_remote_code)
from .access import gate
from .errors import reason
from .folders import path_fault

# Weights that classify nothing: counters, tables that models compute for themselves, heads of training.
_WITHOUT_EFFECT = re.compile(
    r"(.*\.)?(num_batches_tracked|relative_position_index|attn_mask|position_ids|mask_token)"
    r"|(timm_model\.)?(AuxLogits|aux_classifier|aux_head|aux[12])\..*"
)
# Arguments of timm.create_model that open files or download: a configuration has no use for them.
_OPENING_ARGS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class RefusedError(ValueError):
    """A model that is not opened for a reason of its own; the message says what to do."""


def open_classifier(name: str, **kwargs) -> PreTrainedModel:
    """Opens a finished image classifier by its folder or Hub id.

    Args:
        name: a folder or a Hub id.
        kwargs: `allow_pickle`, `trust_remote_code` and arguments of `from_pretrained`; see [`open_pretrained`].

    Raises:
        ValueError: there is no such model, or its weights are not those of a whole image classifier.
    """
    try:
        return open_pretrained(name, **kwargs)
    except RefusedError as error:
        raise ValueError(f"{name} is not opened: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} could not be opened as a folder or a Hub id: {error}") from error


def open_pretrained(
    name: str,
    *,
    new_head: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """`AutoModelForImageClassification.from_pretrained`, which opens pickles and fills missing weights with random ones.

    The model gets the attribute `starts_with_new_head`: whether its classifier is not that of the file.

    Args:
        name: a folder or a Hub id.
        new_head: whether the classifier may start from random weights, as that of a student that trains it. All other
            weights must be in the file.
        allow_pickle: whether weights in a pickle (`pytorch_model.bin`) are opened where there are no safetensors; of a
            pickle, tensors alone are read (`weights_only`).
        trust_remote_code: whether code beside the weights may run.
        kwargs: passed to `from_pretrained`.

    Raises:
        RefusedError: the folder does not exist; the weights are a pickle, or the repo is gated; its files lead to others, or cannot be read; weights
            are missing.
        ValueError: the code is not trusted.
        OSError: there is no such model, or it is not in the cache and cannot be reached.
    """
    if fault := path_fault(name):
        raise RefusedError(fault)
    name = os.path.expanduser(name)
    _check_files(name, trust_remote_code, {key: kwargs[key] for key in ("revision", "cache_dir") if key in kwargs})
    try:
        with _without_conversion():
            model, loaded = AutoModelForImageClassification.from_pretrained(
                name,
                use_safetensors=None if allow_pickle else True,
                weights_only=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # check_weights names them.
                output_loading_info=True,
                **kwargs,
            )
    except SafetensorError as error:
        raise RefusedError(f"its safetensors cannot be read, they are damaged or cut short: {error}") from error
    except pickle.UnpicklingError as error:
        raise RefusedError(f"its pickle holds more than tensors, and is not opened: {reason(error)}") from error
    except (OSError, ValueError) as error:
        if how := gate(error, name):
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
    check_weights(model, loaded, new_head)
    random = [key for keys in ("missing_keys", "mismatched_keys") for key in map(str, loaded[keys])]
    model.starts_with_new_head = any(not _WITHOUT_EFFECT.fullmatch(key) for key in random)
    return model


def check_weights(model: PreTrainedModel, loaded: dict[str, Any], new_head: bool = False) -> None:
    """Checks that a file's weights are those of the model that was built from its configuration.

    Args:
        model: the model.
        loaded: `from_pretrained`'s loading info.
        new_head: whether the classifier's weights may differ, and the file may hold more than the model.

    Raises:
        RefusedError: weights are missing, have another shape, or have no place in the model.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]]
    faults = {
        "missing keys": loaded["missing_keys"],
        "mismatched keys": mismatched,
        "unexpected keys": loaded["unexpected_keys"],
    }
    if new_head:
        is_head = _head_of(model)
        faults = {fault: [key for key in faults[fault] if not is_head(key)] for fault in list(faults)[:2]}
    for fault, keys in faults.items():
        if keys := sorted(key for key in keys if not _WITHOUT_EFFECT.fullmatch(key)):
            expected = "the weights of all layers but the classifier" if new_head else "a whole image classifier"
            raise RefusedError(
                f"its weights must be {expected}, got {len(keys)} {fault} of {len(model.state_dict())}, {keys[0]} first. "
                f"{_advice(loaded['unexpected_keys'], new_head)}"
            )


def _advice(unexpected: Iterable[str], new_head: bool) -> str:
    wrapped = sorted(
        {key.removeprefix("timm_model.").split(".")[0] for key in unexpected}
        & {"module", "backbone", "model", "_orig_mod"}
    )
    if wrapped:
        return f"Remove the prefix {wrapped[0] + '.'!r} from the keys of its weights."
    if new_head:
        return "Open another folder, or name an architecture to start from random weights."
    return "Open another folder; a student (create_student) may lack its classifier."


def _head_of(model: PreTrainedModel) -> Callable[[str], bool]:
    """Tells whether a weight, by its name, belongs to a classifier that is replaced with the number of classes."""
    if isinstance(model, TimmWrapperForImageClassification):
        names = model.timm_model.pretrained_cfg.get("classifier") or ()
        names = (names,) if isinstance(names, str) else names
        tops = {f"timm_model.{name.split('.')[0]}" for name in (*names, "fc_norm")}
        return lambda key: ".".join(key.split(".")[:2]) in tops
    prefix, shapes = model.base_model_prefix, {key: value.shape for key, value in model.state_dict().items()}
    has_base = bool(prefix) and hasattr(model, prefix)

    def is_head(key: str) -> bool:
        # A pooler is trained with the classifier: self-supervised weights (BEiT's, MAE's) come without it.
        if has_base and (not key.startswith(f"{prefix}.") or "pooler" in key.split(".")):
            return True
        return shapes.get(key, ())[:1] == (model.config.num_labels,)

    return is_head


def check_settings(config: dict[str, Any], trust_remote_code: bool = False) -> None:
    """Looks at a configuration before a model is built from it.

    Args:
        config: what stands in `config.json`.
        trust_remote_code: whether code may run that is downloaded.

    Raises:
        RefusedError: it makes timm or transformers open further files: weights by a path, a repo, a kernel.
    """
    check_model_args(config.get("model_args"))
    if ":" in str(config.get("architecture")):
        raise RefusedError(
            f"its architecture {config['architecture']!r} leads to another folder or repo: name that one itself"
        )
    for key in ("_attn_implementation", "attn_implementation"):
        if "/" in str(config.get(key)) and not trust_remote_code:
            raise RefusedError(
                f"its {key} {config[key]!r} is code of a repo: remove it from config.json, or set trust_remote_code"
            )


def check_model_args(model_args: dict[str, Any] | None) -> None:
    """ValueError where arguments of timm's architecture are those that make `timm.create_model` open a file."""
    if isinstance(model_args, dict) and (opening := [key for key in _OPENING_ARGS if key in model_args]):
        raise RefusedError(
            f"its model_args hold {', '.join(opening)}, by which timm would open other weights: leave that out, and give "
            "the id or folder of the model instead"
        )


def _check_files(name: str, trust_remote_code: bool, where: dict[str, Any]) -> None:
    """What `config.json` and the index of the weights lead to; whether they are there is `from_pretrained`'s to say."""
    if _cached(name, ADAPTER_CONFIG_NAME, where):
        raise RefusedError(
            f"it has an {ADAPTER_CONFIG_NAME}, so its weights are an adapter of another model that the file names. Merge "
            "the adapter into its model (merge_and_unload of peft), save that, and open the folder"
        )
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **where)
        check_settings(config, trust_remote_code)
    except OSError:
        pass
    except (TypeError, KeyError, AttributeError) as error:
        raise RefusedError(f"its config.json is no mapping ({type(error).__name__}: {reason(error)})") from error
    for file in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        path = _cached(name, file, where)
        if path is None:
            continue
        try:
            with open(path, encoding="utf-8") as index:
                shards = set(json.load(index)["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RefusedError(f"its {file} is no index of weights: {type(error).__name__}: {error}") from error
        ending = ".safetensors" if file == SAFE_WEIGHTS_INDEX_NAME else ".bin"
        for shard in shards:
            if os.path.basename(str(shard)) != shard or "\\" in shard or not shard.endswith(ending):
                raise RefusedError(
                    f"its {file} names {shard!r}, expected the names of {ending} files beside it: take the model from its "
                    "author again"
                )


def _cached(name: str, file: str, where: dict[str, Any]) -> str | None:
    """The path of a file of a model, which is downloaded if it must be; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where)
    return None


def comes_with_code(model: PreTrainedModel) -> bool:
    """Whether a model's class came from beside its weights, with `trust_remote_code`."""
    return type(model).__module__.startswith("transformers_modules.")


def _pickle_of(name: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return next((file for file in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if has_file(name, file)), None)
    return None


@contextlib.contextmanager
def _without_conversion() -> Iterator[None]:
    """Keeps transformers from asking the Hub to convert a pickle: it would open a pull request in the user's name."""
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
