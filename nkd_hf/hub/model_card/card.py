"""Writes the model card of a student, and recognises an unedited card."""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ...models.teacher import Teacher
from ...teacher_logits.info import TeacherDescription
from ..student_files import CARD, read_json
from .curves import percentages, plot_curves
from .facts import CardInfo, Run, listed
from .sections import body, own_text
from .text import code, hub_id, plain, plain_name


def create_plain_card(folder: Path, repo_id: str) -> str:
    """Returns the card of a student of which only the configuration is known."""
    config = read_json(folder / "config.json")
    is_timm, has_own_code = config.get("model_type") == "timm_wrapper", bool(config.get("auto_map"))
    tags = ["image-classification", *(["timm", "transformers"] if is_timm else [])]
    data = ModelCardData(
        license="unknown",
        library_name="timm" if is_timm else "transformers",
        pipeline_tag="image-classification",
        tags=[*tags, *(["custom_code"] if has_own_code else []), "nkd_hf"],
    )
    names = list((config.get("id2label") or {}).values()) or config.get("label_names") or []
    # transformers does not save its default, two classes without names.
    num_classes = len(names) or config.get("num_classes") or 2
    classes = f"{num_classes} class{'es' * (num_classes != 1)}"
    classes += " without names" if names and all(str(name).startswith("LABEL_") for name in names) else ""
    architecture = config.get("architecture") or config["architectures"][0].removesuffix("ForImageClassification")
    trust = ", trust_remote_code=True" if has_own_code else ""
    return signed(f"""\
---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

An image classifier, {code(plain_name(architecture))}, {classes}.

## Results

**Not evaluated**: how these weights were trained, and their accuracy, is not known here.

## How to use

```python
from transformers import pipeline

classifier = pipeline("image-classification", model={json.dumps(repo_id)}{trust})
print(classifier("image.png"))
```""")


def read_card(api: HfApi, repo_id: str, revision: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=folder)
        return Path(path).read_text(encoding="utf-8")


logger = logging.getLogger(__name__)

CURVES_FILE = "training_curves.png"
# The examples in a card, and the model that they open.
_CODE = re.compile(r"^```python\n.*?\n```$", re.DOTALL | re.MULTILINE)
_SOURCE = re.compile(r'(from_pretrained\(|create_model\(|, model=)"(?:[^"\\]|\\.)*"(?:, revision="(?:[^"\\]|\\.)*")?')
_MARK = "<!-- Written by nkd_hf, which writes it anew as long as nobody edits it: {} -->"


def write_card(
    folder: str | Path,
    student: PreTrainedModel,
    *,
    name: str,
    args: TrainingArguments,
    state: TrainerState,
    repo_id: str | None = None,
    teacher: Teacher | TeacherDescription | list[TeacherDescription] | None = None,
    losses: Mapping[str, nn.Module] | None = None,
    info: CardInfo | None = None,
) -> bool:
    """Writes `README.md` and the training curves that it shows into a student's folder.

    Args:
        folder: the folder of the student.
        student, name, args, state, repo_id, teacher, losses, info: as in [`create_card`].

    Returns:
        Whether the card was written: a card that a person wrote or edited is kept, with a warning.
    """
    path, info = Path(folder, "README.md"), info or CardInfo()
    levels = {
        "teacher": info.teacher,
        "teacher on the student's pixels": info.teacher_on_student_pixels,
        "baseline": info.baseline,
    }
    curves = plot_curves(
        state.log_history,
        path.with_name(CURVES_FILE),
        levels={other: values["accuracy"] for other, values in levels.items() if values},
        x_axis="step" if args.max_steps > 0 else "epoch",
    )
    if path.exists() and not is_generated(path.read_text(encoding="utf-8", errors="replace")):
        logger.warning("%s is kept, since a person wrote or edited it: remove it to get a new one.", path)
        return False
    picture, own = CURVES_FILE if curves else None, None if repo_id else str(folder)
    _render(Run(student, name, args, state, repo_id, teacher, losses or {}, info, picture, own)).save(path)
    return True


def create_card(
    student: PreTrainedModel,
    *,
    name: str,
    args: TrainingArguments,
    state: TrainerState,
    repo_id: str | None = None,
    teacher: Teacher | TeacherDescription | list[TeacherDescription] | None = None,
    losses: Mapping[str, nn.Module] | None = None,
    info: CardInfo | None = None,
    curves: str | None = None,
) -> ModelCard:
    """Makes the card of a student from the arguments alone. The card claims only results that the arguments show.

    Args:
        student: the plain student.
        name: the model's name, for the title and the `model-index`.
        args: the arguments of the run; none of their paths and tokens is read.
        state: `trainer.state`: the log, the step of the weights, and the step of the best weights.
        repo_id: the student's repo, `owner/name`. With None, the examples open a folder, `name`.
        teacher: the model that the student was distilled from.
        losses: the distillation losses by name; none means the task loss alone.
        info: facts that the trainer does not know.
        curves: the file name of a picture beside the card, which the card shows.

    Returns:
        `huggingface_hub.ModelCard`: `str(card)` is the text, for which [`is_generated`] is True.

    Example:

    ```python
    >>> from transformers import TrainerState
    >>> from nkd_hf import DistillationTrainingArguments, USKDLoss, create_student
    >>> from nkd_hf.hub.model_card.facts import CardInfo
    >>> from nkd_hf.hub.model_card.card import create_card, is_generated
    >>> card = create_card(
    ...     create_student("resnet18", num_labels=10),
    ...     name="resnet18-uskd",
    ...     args=DistillationTrainingArguments("resnet18-uskd", report_to="none", use_cpu=True),
    ...     state=TrainerState(global_step=10, log_history=[{"eval_accuracy": 0.25, "step": 10, "epoch": 1.0}]),
    ...     losses={"uskd": USKDLoss(256, 10)},
    ...     info=CardInfo(dataset="uoft-cs/cifar10", license="apache-2.0"),
    ... )
    >>> card.data.library_name, card.data.datasets, card.data.eval_results[0].metric_value
    ('timm', ['uoft-cs/cifar10'], 0.25)
    >>> is_generated(str(card))
    True

    ```
    """
    return _render(Run(student, name, args, state, repo_id, teacher, losses or {}, info or CardInfo(), curves))


def is_generated(text: str) -> bool:
    """Whether a card's text was made by [`create_card`] and is unchanged except for line endings and trailing space.

    Example:

    ```python
    >>> from nkd_hf.hub.model_card.card import is_generated
    >>> is_generated("# My model, described by myself")
    False

    ```
    """
    before, _, mark = _unix(text).rstrip().rpartition("\n")
    return mark == _MARK.format(_digest(before))


def with_repo_id(text: str, repo_id: str, revision: str | None = None) -> str:
    """Returns a card whose examples open `repo_id`, for a student that was saved before it is pushed.

    Args:
        text: the text of a card; a card that [`create_card`] has not made, or that was edited, is returned unchanged.
        repo_id: `owner/name`.
        revision: the branch that is pushed to; None means `main`.
    """
    if not is_generated(text):
        return text
    revision = None if revision == "main" else revision

    def with_source(source: re.Match) -> str:
        if "create_model" in source[1]:
            return source[1] + json.dumps(f"hf-hub:{repo_id}" + (f"@{revision}" if revision else ""))
        return source[1] + json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision else "")

    text = _CODE.sub(lambda block: _SOURCE.sub(with_source, block[0]), _unix(text))
    return signed(text.rstrip().rpartition("\n")[0])


def _render(run: Run) -> ModelCard:
    for metric, value in percentages(run.state.log_history).items():
        logger.warning(
            "The model card omits %s, which was logged as %g: compute_metrics must return fractions from 0 to 1.",
            metric,
            value,
        )
    # No template engine is used: it would interpret braces in a name.
    return ModelCard(signed(f"---\n{_metadata(run).to_yaml()}\n---\n\n{body(run)}"))


def signed(text: str) -> str:
    return f"{text.rstrip()}\n\n{_MARK.format(_digest(text))}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(_unix(text).rstrip().encode()).hexdigest()


def _unix(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _metadata(run: Run) -> ModelCardData:
    # The tags are those of timm's own repositories: the Hub then shows how to open the model in timm and in
    # transformers.
    tags = ["image-classification", *(["timm", "transformers"] if run.is_timm else [])]
    if run.losses:
        tags.append("self-distillation" if run.teacher is None else "knowledge-distillation")
    tags += dict.fromkeys(plain(name.lower()) for loss in run.losses.values() if (name := own_text(loss, "name")))
    tags += ["custom_code"] if run.has_own_code else []
    # The Hub knows the relations adapter, finetune, merge and quantized (huggingface.co/docs/hub/model-cards), and
    # none for a teacher (huggingface_hub's issue 3985 asks for `distill`), so none is claimed. If the student was
    # fine-tuned, `finetune` is claimed: for two models without a relation the Hub would infer a merge.
    start = hub_id(run.start)
    teachers = dict.fromkeys(hub_id(teacher.name) for teacher in run.teachers)
    base_models = [model for model in (start, *teachers) if model]
    used = [*run.datasets, *listed(run.info.unlabeled_dataset)]
    relation = {"base_model_relation": "finetune"} if start else {}
    return ModelCardData(
        language=[plain(language) for language in listed(run.info.language)] or None,
        license=plain(run.info.license or "unknown"),
        library_name="timm" if run.is_timm else "transformers",
        pipeline_tag="image-classification",
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        **relation,
        datasets=[dataset for dataset in dict.fromkeys(used) if hub_id(dataset)] or None,
        metrics=["accuracy"] if run.results else None,
        tags=[*tags, "nkd_hf", "generated_from_trainer", *map(plain, run.info.tags)],
        model_name=plain_name(run.name) if run.results else None,
        eval_results=_eval_results(run) or None,
    )


def _eval_results(run: Run) -> list[EvalResult]:
    dataset = next(iter(run.datasets), None)
    # The metadata require an identifier and a readable name.
    known = {"digits": ("sklearn-digits", "scikit-learn's digits"), None: ("unknown", "held-out images")}
    kind, readable = known.get(dataset) or (dataset if hub_id(dataset) else "local", plain_name(dataset))
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=kind,
            dataset_name=plain(f"{readable}, {part}" if part else readable),
            # The Hub treats results with the same type, configuration and split as results of one dataset.
            dataset_config=plain(part or run.info.dataset_config or "") or None,
            dataset_split=plain(run.info.dataset_split or "") or None,
            dataset_args=None if run.info.num_eval_images is None else {"num_images": run.info.num_eval_images},
            # Top-5 has a type of its own, so that a search for `accuracy` does not find it.
            metric_type=metric,
            metric_name={"accuracy": "Top-1 accuracy", "top5_accuracy": "Top-5 accuracy"}[metric],
            # The value is a fraction, as in Trainer's own cards.
            metric_value=round(value, 5),
        )
        for part, values in run.results.items()
        for metric, value in values.items()
    ]
