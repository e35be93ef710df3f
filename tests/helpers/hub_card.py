"""What the Hub refuses in the metadata of a model card, as far as that is public.

Sources: the specification in huggingface/hub-docs, modelcard.md; the licences of huggingface.co/docs/hub/repositories-licenses;
the tasks of huggingface.js, packages/tasks; and messages that users of the Hub have reported. The Hub itself may be milder:
of a task that it does not know, it may only warn.
"""

from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from nkd_hf.hub.model_card.licences import LICENSES

# Of the tasks, those on images: no other card is pushed here.
_TASKS = """
    image-classification object-detection image-segmentation text-to-image image-to-text image-to-image image-to-video
    unconditional-image-generation depth-estimation zero-shot-image-classification zero-shot-object-detection
    mask-generation image-feature-extraction keypoint-detection image-to-3d
"""
_RELATIONS = ["adapter", "finetune", "merge", "quantized"]


def card_errors(text: str) -> list[str]:
    """What is wrong with a card's metadata, in the Hub's words; nothing for a card without metadata."""
    front_matter = REGEX_YAML_BLOCK.search(text)
    if front_matter is None:
        return []
    try:
        data = yaml.safe_load(front_matter[2])
    except yaml.YAMLError as error:
        return [f"Invalid YAML in README.md: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be an object"]
    errors: list[str] = []
    for key in ("language", "license", "tags", "metrics", "datasets", "base_model"):
        if key in data and (key in ("tags", "metrics") or not isinstance(data[key], str)):
            _strings(data[key], f'"{key}"', errors)
    for key in ("library_name", "pipeline_tag", "base_model_relation"):
        _check(data, key, "", errors)
    for key, known in (("license", LICENSES), ("pipeline_tag", _TASKS.split()), ("base_model_relation", _RELATIONS)):
        for value in _listed(data.get(key)):
            if value not in known:
                errors.append(f'"{key}" must be one of [{", ".join(sorted(known))}]')
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        for i, value in enumerate(_listed(data.get(key))):
            name = key if isinstance(data[key], str) else f"{key}[{i}]"
            if not _is_repo_id(value):
                errors.append(
                    f'"{name}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                )
    if "model-index" in data:
        _check_model_index(data["model-index"], errors)
    return errors


def _check_model_index(models: Any, errors: list[str]) -> None:
    for model, where in _objects(models, "model-index", errors):
        _check(model, "name", where, errors, required=True)
        for result, place in _objects(model.get("results"), f"{where}.results", errors):
            for part, required, optional in (
                ("task", ("type",), ("name",)),
                ("dataset", ("type", "name"), ("config", "split", "revision")),
            ):
                value = result.get(part)
                if not isinstance(value, dict):
                    errors.append(
                        f'"{place}.{part}" is required' if value is None else f'"{place}.{part}" must be an object'
                    )
                    continue
                for key in (*required, *optional):
                    _check(value, key, f"{place}.{part}", errors, required=key in required)
            for metric, spot in _objects(result.get("metrics"), f"{place}.metrics", errors):
                _check(metric, "type", spot, errors, required=True)
                for key in ("name", "config"):
                    _check(metric, key, spot, errors)
                if metric.get("value") is None:
                    errors.append(f'"{spot}.value" is required')


def _objects(value: Any, where: str, errors: list[str]) -> list[tuple[dict, str]]:
    if not isinstance(value, list):
        errors.append(f'"{where}" is required' if value is None else f'"{where}" must be an array')
        return []
    found = [(item, f"{where}[{i}]") for i, item in enumerate(value)]
    errors += [f'"{place}" must be an object' for item, place in found if not isinstance(item, dict)]
    return [(item, place) for item, place in found if isinstance(item, dict)]


def _check(value: dict, key: str, where: str, errors: list[str], required: bool = False) -> None:
    name = f"{where}.{key}" if where else key
    if key not in value:
        errors += [f'"{name}" is required'] * required
    elif not isinstance(value[key], str):
        errors.append(f'"{name}" must be a string')
    elif not value[key]:
        errors.append(f'"{name}" is not allowed to be empty')


def _strings(value: Any, name: str, errors: list[str]) -> None:
    if not isinstance(value, list):
        errors.append(f"{name} must be an array")
    else:
        errors += [
            f'"{name[1:-1]}[{i}]" must be a string' for i, item in enumerate(value) if not isinstance(item, str)
        ]


def _is_repo_id(value: Any) -> bool:
    try:
        validate_repo_id(str(value))
    except HFValidationError:
        return False
    return True


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]
