"""Checks that a file has the weights of the model that was built from its configuration."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel, TimmWrapperForImageClassification

from ..errors import NoClassifierError, RefusedError

# Weights without effect on the logits: counters, tables that models compute themselves, auxiliary heads for training.
_WITHOUT_EFFECT = re.compile(
    r"(.*\.)?(num_batches_tracked|relative_position_index|attn_mask|position_ids|mask_token)"
    r"|(timm_model\.)?(AuxLogits|aux_classifier|aux_head|aux[12])\..*"
)


def check_weights(model: PreTrainedModel, loaded: dict[str, Any], new_head: bool = False) -> None:
    """Checks that a file has the weights of the model that was built from its configuration.

    Args:
        model: the model.
        loaded: `from_pretrained`'s loading info.
        new_head: whether the classifier's weights may differ, and the file may have more weights than the model.

    Raises:
        NoClassifierError: only the classifier's weights are missing.
        RefusedError: weights are missing, have another shape, or are unknown to the model.
    """
    # Old files have tables that the model computes itself, such as LeViT's attention_bias_idxs.
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    faults = {}
    for fault in ("missing keys", "mismatched keys", "unexpected keys"):
        keys = (key if isinstance(key, str) else key[0] for key in loaded[fault.replace(" ", "_")])
        faults[fault] = sorted(key for key in keys if not _WITHOUT_EFFECT.fullmatch(key) and key not in computed)
    is_head = _head_of(model)
    of_others = {fault: [key for key in faults[fault] if not is_head(key)] for fault in list(faults)[:2]}
    lacks_head = not new_head and not any((*of_others.values(), faults["mismatched keys"]))
    for fault, keys in (of_others if new_head else faults).items():
        if keys:
            expected = "the weights of all layers but the classifier" if new_head else "a whole image classifier"
            first = min(keys, key=is_head)  # a layer of the backbone, if there is one
            kind = NoClassifierError if lacks_head and fault == "missing keys" else RefusedError
            raise kind(
                f"its weights must be {expected}, got {len(keys)} {fault} of {len(model.state_dict())}, {first} first. "
                f"{_advice(loaded['unexpected_keys'], new_head)}"
            )


def has_random_weights(loaded: dict[str, Any]) -> bool:
    """Whether weights that the file lacks, or has in another shape, are random and have an effect on the logits."""
    random = [key for keys in ("missing_keys", "mismatched_keys") for key in map(str, loaded[keys])]
    return any(not _WITHOUT_EFFECT.fullmatch(key) for key in random)


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
    """Returns a function that decides by a weight's name if it is of the classifier, which `new_head` may replace."""
    if isinstance(model, TimmWrapperForImageClassification):
        names = model.timm_model.pretrained_cfg.get("classifier") or ()
        names = (names,) if isinstance(names, str) else names
        tops = {f"timm_model.{name.split('.')[0]}" for name in (*names, "fc_norm")}
        return lambda key: ".".join(key.split(".")[:2]) in tops
    prefix, shapes = model.base_model_prefix, {key: value.shape for key, value in model.state_dict().items()}
    has_base = bool(prefix) and hasattr(model, prefix)

    def is_head(key: str) -> bool:
        # A pooler is trained with the classifier: self-supervised weights (BEiT's, MAE's) have no pooler.
        if has_base and (not key.startswith(f"{prefix}.") or "pooler" in key.split(".")):
            return True
        return shapes.get(key, ())[:1] == (model.config.num_labels,)

    return is_head
