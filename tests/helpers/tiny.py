"""Small real models and small real data, for tests of everything that trains."""

import copy
import functools

import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from nkd_hf import DistillationLoss, DistillationTrainer, DistillationTrainingArguments, create_student

NUM_CLASSES = 10
DIGITS = {i: str(i) for i in range(NUM_CLASSES)}
# Arguments of the trainer, not of its training arguments.
OWN_ARGUMENTS = ("compute_metrics", "callbacks", "data_collator", "card_info", "class_weights")


class Mimic(DistillationLoss):
    """A loss that reads all logits as they are."""

    def forward(self, student_logits, teacher_logits):
        return {"mimic": (student_logits - teacher_logits).square().mean()}


def digits(start: int, stop: int) -> list[dict]:
    """Samples of scikit-learn's digits as 32 x 32 pixel values."""
    images, labels = _all_digits()
    pixels = torch.tensor(images[start:stop].reshape(-1, 1, 8, 8) / 8 - 1, dtype=torch.float32)
    pixels = torch.nn.functional.interpolate(pixels, size=32).expand(-1, 3, -1, -1).contiguous()
    return [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels, labels[start:stop], strict=True)]


@functools.cache
def _all_digits():
    return load_digits(return_X_y=True)


def timm_cnn(seed: int = 0, **kwargs):
    return _copy_of_student(seed, "resnet18", image_size=32, model_args={"channels": [8, 16, 32, 64]}, **kwargs)


def timm_deit(seed: int = 0, drop_path: float = 0.0, width: int = 32):
    args = {"patch_size": 8, "embed_dim": width, "depth": 4, "num_heads": 2, "drop_path_rate": drop_path}
    return _copy_of_student(seed, "deit_tiny_patch16_224", image_size=32, model_args=args)


_students = {}


def _copy_of_student(seed: int, name: str, **kwargs):
    """What `create_student` makes after `set_seed`, which it does once: it takes ten times as long as a copy."""
    set_seed(seed)
    key = repr((seed, name, kwargs, torch.get_default_device()))
    if key not in _students:
        student = create_student(name, id2label=DIGITS, **kwargs)
        _students[key] = student, torch.get_rng_state()
    student, state = _students[key]
    torch.set_rng_state(state)
    return copy.deepcopy(student)


def native_vit(seed: int = 0, dropout: float = 0.0):
    set_seed(seed)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=dropout,
        id2label=DIGITS,
        label2id={name: i for i, name in DIGITS.items()},
    )
    return ViTForImageClassification(config)


def native_resnet(seed: int = 0):
    set_seed(seed)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], layer_type="basic", id2label=DIGITS
    )
    return ResNetForImageClassification(config)


def make_trainer(folder, model, train=None, evaluation=None, *, teacher=None, distillation_loss=None, **kwargs):
    """A trainer on the CPU that is silent and saves nothing unless told to."""
    trainer_kwargs = {key: kwargs.pop(key) for key in OWN_ARGUMENTS if key in kwargs}
    defaults = {
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    args = DistillationTrainingArguments(str(folder), **(defaults | kwargs))
    return DistillationTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        teacher=teacher,
        distillation_loss=distillation_loss,
        **trainer_kwargs,
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def top1(model, images) -> float:
    """Top-1 of a saved student, or of a teacher, on a dataset of `pixel_values` and `labels`, image by image."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForImageClassification.from_pretrained(model, trust_remote_code=True)
    hits = []
    with torch.no_grad():
        for sample in images:
            logits = model.eval()(sample["pixel_values"][None])
            hits.append(getattr(logits, "logits", logits).argmax().item() == sample["labels"])
    return sum(hits) / len(hits)


def digit_folder(folder, names: list[str], train: int, validation: int) -> str:
    """Writes digits as a folder of images, `train/NAME/*.png` and `validation/NAME/*.png`.

    Args:
        folder: which gets the images.
        names: of the digits 0, 1, ...
        train, validation: images of each class; lists have a number for each class.
    """
    images, labels = _all_digits()
    for digit, name in enumerate(names):
        rows = iter(images[labels == digit])
        for split, count in (("train", train), ("validation", validation)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count[digit] if isinstance(count, list) else count):
                pixels = np.rint(next(rows).reshape(8, 8) * (255 / 16)).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return str(folder)
