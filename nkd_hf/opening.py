"""Opens a classifier of the Hub or of a folder; what could run foreign code is refused unless it is asked for."""

import contextlib
import os
import pickle
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, has_file

from . import architectures  # noqa: F401  (so that their folders open without trust_remote_code)
from .access import gate


class RefusedError(ValueError):
    """A model that is not opened for a reason of its own; the message says what to do."""


def open_pretrained(
    name: str, *, allow_pickle: bool = False, trust_remote_code: bool = False, **kwargs
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """`AutoModelForImageClassification.from_pretrained`, which by itself would open pickles.

    Args:
        name: a folder or a Hub id.
        allow_pickle: whether weights in a pickle (`pytorch_model.bin`) are opened where there are no safetensors; of a
            pickle, tensors alone are read (`weights_only`).
        trust_remote_code: whether code beside the weights may run.
        kwargs: handed to `from_pretrained`.

    Raises:
        RefusedError: the weights are a pickle, or the repo is gated.
        ValueError: the code is not trusted.
        OSError: there is no such model, or it is not in the cache and cannot be reached.
    """
    try:
        with _without_conversion():
            return AutoModelForImageClassification.from_pretrained(
                name,
                use_safetensors=None if allow_pickle else True,
                weights_only=True,
                trust_remote_code=trust_remote_code,
                **kwargs,
            )
    except SafetensorError as error:
        raise RefusedError(f"its safetensors cannot be read, they are damaged or cut short: {error}") from error
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"its pickle holds more than tensors, and is not opened: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, ValueError) as error:
        if how := gate(error, name):
            raise RefusedError(how) from error
        if isinstance(error, OSError) and not allow_pickle and (file := _pickle_of(name)):
            raise RefusedError(
                f"its weights are a pickle ({file}), which can run code when it is opened, and there are none as "
                "safetensors: take another model, or set allow_pickle, which reads the pickle's tensors alone"
            ) from error
        raise


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
