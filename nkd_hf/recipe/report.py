"""Reports a run: prints its table, draws its curves, collects the facts for its card, pushes and opens the student."""

import contextlib
from pathlib import Path

import datasets
from datasets import DatasetDict, IterableDatasetDict
from torch import nn
from transformers import pipeline

from ..data.arguments import DataArguments
from ..data.decoding import read_sample
from ..errors import BadSampleError, PushError, redact
from ..hub.model_card.facts import CardInfo
from ..hub.push import create_repo, push_student
from ..losses.registry import find_losses
from ..models.loading import open_classifier
from ..models.preprocessing import load_image_processor
from ..models.saving import hidden_progress_bars
from ..teacher_logits.store import TeacherLogits
from ..trainer.arguments import DistillationTrainingArguments
from ..trainer.trainer import DistillationTrainer
from .arguments import RecipeArguments
from .build import images_per_epoch
from .launch_line import launch_line
from .run_folder import RESULTS, exit_if_not_written

# The key in `results.json` of the teacher's accuracy on the student's pixels, on which it is distilled.
ON_STUDENT_PIXELS = "teacher_on_student_pixels"
PICTURE = "accuracy.png"


def say(training: DistillationTrainingArguments, message: str) -> None:
    """Prints a message, in the process that saves."""
    if training.should_save:
        print(f"\n{message}", flush=True)


def say_held_out(data: DataArguments, splits: DatasetDict, training: DistillationTrainingArguments) -> None:
    """Prints the number of held-out images, if they were cut out of the training split."""
    if data.streaming or not _is_held_out(splits):
        return
    held_out, kept = len(splits["validation"]), len(splits["train"])
    say(
        training,
        f"{redact(data.dataset_name)} has no split to evaluate on: {held_out} of its {held_out + kept} training images are "
        f"held out (train_val_split={data.train_val_split})",
    )


def print_table(recipe: RecipeArguments, results: dict[str, float | None], folder: Path) -> None:
    """Prints the accuracies of a run."""
    teacher = ", ".join(recipe.teachers) or (recipe.teacher_logits and f"of {recipe.teacher_logits}")
    # As in the card: the name of a built-in loss is not that of its subclass.
    losses = [vars(loss).get("name") or loss.__name__ for loss in find_losses(recipe.distillation_loss).values()]
    names = {
        "teacher": f"teacher ({teacher})",
        ON_STUDENT_PIXELS: "teacher, on the student's pixels",
        "baseline": f"baseline ({recipe.student})",
        "distilled": f"distilled ({'+'.join(losses)})",
    }
    print(f"\n{'':<44}top-1 accuracy")
    for name, value in results.items():
        if value is not None and not (name == ON_STUDENT_PIXELS and value == results["teacher"]):
            print(f"{names[name]:<44}{value:14.2%}")
    print(f"\nFigures: {folder / RESULTS}, curves: {folder / PICTURE}")


def plot_curves(
    path: Path,
    title: str,
    results: dict[str, float | None],
    curves: dict[str, list[tuple[float, float]]],
    data: DataArguments,
) -> None:
    """Draws the accuracies of baseline and student during training, and the teacher's beside them.

    Args:
        path: the file of the picture.
        title: the text above the picture.
        results: the final accuracies, by the keys of `results.json`.
        curves: points (epochs or steps, accuracy) by these keys.
        data: tells whether the points are at epochs or steps.
    """
    import matplotlib.figure  # only the process that writes the report needs it

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    own, given = results["teacher"], results[ON_STUDENT_PIXELS]
    if own is not None:
        axes.axhline(100 * own, color="0.4", linestyle="--", label="teacher")
    if given not in (None, own):
        axes.axhline(100 * given, color="0.6", linestyle=":", label="teacher, on the student's pixels")
    for name in ("baseline", "distilled"):
        if name in curves:
            epochs, values = zip(*curves[name], strict=True)
            axes.plot(epochs, [100 * value for value in values], marker=".", label=name)
    is_counted = not data.streaming or images_per_epoch(data) is not None
    axes.set(xlabel="epoch" if is_counted else "step", ylabel="top-1 accuracy on held-out images (%)", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def make_card_info(
    recipe: RecipeArguments,
    data: DataArguments,
    splits: DatasetDict | IterableDatasetDict,
    accuracies: dict[str, dict[str, float]],
    store: TeacherLogits | None = None,
) -> CardInfo:
    """Collects the facts of a run for the student's model card.

    Args:
        recipe: the arguments of the run.
        data: the dataset of the run.
        splits: the result of [`load_image_dataset`].
        accuracies: accuracies of teacher and baseline, if they are measured.
        store: the store of the teacher's logits, if there is one.
    """
    crop = "random_crop_padding" if data.random_crop_padding else "random_resized_crop"
    others = (
        "horizontal_flip", "auto_augment", "random_erasing", "pca_lighting", "mixup_alpha", "cutmix_alpha", "balanced_sampling",
    )  # fmt: skip
    augmentation = [f"{name}={value}" for name in (crop, *others) if (value := getattr(data, name))]
    if data.crops_per_image > 1:
        augmentation.append(f"crops_per_image={data.crops_per_image}")
    if store is not None and store.info.cycle is not None:
        augmentation.append(f"cycle={store.info.cycle}")
    unlabeled = splits["train"] if data.trains_without_labels else splits.get("unlabeled")
    return CardInfo(
        dataset=data.dataset_name,
        dataset_config=data.dataset_config_name,
        # A split that was cut out of the training split has no name of its own.
        dataset_split=None if _is_held_out(splits) else str(splits["validation"].split),
        num_train_images=None if data.streaming or data.trains_without_labels else len(splits["train"]),
        num_eval_images=None if data.streaming else len(splits["validation"]),
        teacher=accuracies.get("teacher"),
        teacher_on_student_pixels=accuracies.get(ON_STUDENT_PIXELS),
        baseline=accuracies.get("baseline"),
        augmentation=", ".join(augmentation),
        class_weights=recipe.class_weights,
        unlabeled_dataset=data.unlabeled_dataset,
        num_unlabeled_images=None if unlabeled is None else len(unlabeled),
        trained_without_labels=data.trains_without_labels,
        launch=launch_line(),
        license=recipe.license,
    )


def _is_held_out(splits: DatasetDict | IterableDatasetDict) -> bool:
    train, validation = splits["train"], splits["validation"]
    return "label" in train.features and validation.split == train.split


def create_repo_for(training: DistillationTrainingArguments) -> None:
    """Creates the repo for the student of a run, in the first process, if `push_to_hub` is set.

    Raises:
        SystemExit: with a message, when the Hub refuses the repo.
    """
    if not training.push_to_hub or training.process_index > 0:
        return
    try:
        create_repo(
            training.hub_model_id or Path(training.output_dir).name,
            private=training.hub_private_repo,
            token=training.hub_token,
            revision=training.hub_revision,
        )
    except PushError as error:
        raise SystemExit(
            f"error: {error}\nNothing was trained yet. Without --push_to_hub, the student stays here."
        ) from None


def push_result(
    training: DistillationTrainingArguments, folder: Path, trainer: DistillationTrainer | None, is_trained: bool
) -> str | None:
    """Pushes the student of a run, if `push_to_hub` is set.

    Args:
        training: says whether to push, and to which repo.
        folder: the folder of the student.
        trainer: the trainer of the student; None if an earlier start has trained it, or it is not pushed.
        is_trained: whether an earlier start has trained the student, so that the first process pushes its folder.

    Returns:
        The error as a line; None where nothing failed.
    """
    commit = None
    try:
        if trainer is not None:
            commit = trainer.push_to_hub()
        elif is_trained and training.push_to_hub and training.process_index == 0:
            commit = push_student(
                folder,
                training.hub_model_id or folder.parent.name,
                private=training.hub_private_repo,
                revision=training.hub_revision,
                token=training.hub_token,
            )
    except (PushError, ValueError) as error:
        return f"error: {error}"
    if commit is not None:
        say(training, f"The student is on the Hub: {commit.commit_url}")
    return None


def show_example(
    folder: Path, split: datasets.Dataset | datasets.IterableDataset, class_names: list[str], trust_remote_code: bool
) -> None:
    """Saves a held-out image, classifies it with the saved student, and prints the code that does so.

    Args:
        folder: the folder of the student; the image is written beside it.
        split: the images of the evaluation.
        class_names: by label.
        trust_remote_code: see [`RecipeArguments`].
    """
    for row in split:
        with contextlib.suppress(BadSampleError):
            image, label = read_sample(row, "the example")
            break
    example = folder.parent / "example.png"
    with exit_if_not_written("the example", folder.parent):
        image.save(example)
    with hidden_progress_bars():
        student = open_classifier(str(folder), trust_remote_code=trust_remote_code)
    # pipeline() would look for the processor itself, and warn that timm's processor has no torchvision backend.
    processor = load_image_processor(student)
    classifier = pipeline("image-classification", model=student, image_processor=processor, device="cpu")
    answer = classifier(str(example), top_k=3)
    print(f"\nThe student opens anywhere; {example} is a held-out image of class {class_names[label]!r}:\n")
    print(">>> from transformers import pipeline")
    code = ", trust_remote_code=True" if list(folder.glob("*.py")) else ""
    print(f'>>> classifier = pipeline("image-classification", model="{folder}"{code})')
    print(f'>>> classifier("{example}", top_k=3)')
    print([{"label": entry["label"], "score": round(entry["score"], 4)} for entry in answer])


def describe_size(model: nn.Module) -> str:
    """Writes the number of a model's parameters in words."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{parameters / 1e6:.1f} million" if parameters > 1e6 else f"{parameters / 1e3:.0f} thousand"
