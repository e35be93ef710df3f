"""Trainings on a GPU: precision, a step that does not wait, teacher, store, average, resuming, NaN, and the recipes."""

import contextlib
import json
import warnings
from pathlib import Path

import pytest
import recipe_runs
import torch
from digit_rows import Collator, rows_of_digits
from tiny import digits, make_trainer, timm_cnn, timm_deit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from trainer_checks import losses as logged
from trainer_checks import snapshot
from transformers import TrainerCallback

from nkd_hf import (
    DistillationTrainer,
    ImageCollator,
    MGDLoss,
    NKDLoss,
    NonFiniteLossError,
    SRRLLoss,
    USKDLoss,
    load_teacher,
)
from nkd_hf.data.sampler import EpochSampler
from nkd_hf.losses import ViTKDLoss
from nkd_hf.teacher_logits.compression import sparse_logits
from nkd_hf.teacher_logits.info import StoreInfo, TeacherDescription
from nkd_hf.teacher_logits.store import TeacherLogits, shard_path, write_shard

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cnn_teacher() -> nn.Module:
    """A CNN whose logits are as large as those of a trained one."""
    model = timm_cnn(seed=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return model


def three_losses() -> dict:
    """Arguments of a trainer: a DeiT with a teacher."""
    torch.manual_seed(0)
    losses = {"nkd": NKDLoss(), "uskd": USKDLoss(32, 10), "vitkd": ViTKDLoss(32, 48)}
    teacher = timm_deit(seed=1, width=48)
    return {"model": timm_deit(), "train": digits(0, 128), "teacher": teacher, "distillation_loss": losses}


def prepare(folder: Path, device: str, precision: str = "float32", **kwargs) -> DistillationTrainer:
    """A trainer of a DeiT with three losses, unless told otherwise."""
    if precision == "fp16" and device == "cpu":
        pytest.skip("fp16 has a gradient scaler on a GPU alone: on the CPU, accelerate trains in float32")
    precisions = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    return make_trainer(folder, **three_losses() | kwargs, use_cpu=device == "cpu", **precisions)


def train(folder: Path, device: str, precision: str = "float32", resume: Path | None = None, **kwargs):
    trainer = prepare(folder, device, precision, **kwargs)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert next(trainer.model.parameters()).device.type == device
    return trainer


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_follows_float32(tmp_path, device, precision):
    # Of SGD, whose steps are as long as the gradients, and few, since the trainings part later.
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    before = snapshot(timm_deit())
    trainer = prepare(tmp_path / precision, device, precision, **settings)
    scaler = trainer.accelerator.scaler
    assert (scaler is not None) == (precision == "fp16")
    if scaler is not None:  # at the first scale, 2 ** 16, the first step would overflow, and be skipped
        scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**10})
    trainer.train()
    exact = train(tmp_path / "float32", device, **settings)
    assert logged(trainer) == pytest.approx(logged(exact), rel=0.03)
    ways = [
        torch.cat([(value.cpu() - before[name]).flatten() for name, value in each.student.state_dict().items()])
        for each in (trainer, exact)
    ]
    assert (ways[0] - ways[1]).norm() <= 0.1 * ways[1].norm()


class Steep(nn.Module):
    """0, with an infinite slope."""

    def forward(self, student_logits):
        return {"steep": (student_logits - student_logits.detach()).abs().sum().sqrt()}


def test_the_gradient_scaler_skips_infinite_gradients(tmp_path, device):
    trainer = train(tmp_path, device, "fp16", teacher=None, distillation_loss=Steep(), max_steps=3)
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (16 - 3)
    before = snapshot(timm_deit())
    assert all(torch.equal(value.cpu(), before[name]) for name, value in trainer.student.state_dict().items())


class Waits(TrainerCallback):
    """Lets PyTorch warn of each call that waits for the GPU, in the second and the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.device.type == "cuda" and state.global_step == 1:
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda" and state.global_step == 3:
            torch.ones(1, device="cuda").item()  # The one warning that must come.
            torch.cuda.set_sync_debug_mode("default")


def write_store(folder: Path, teacher: nn.Module, dataset, top_k: int | None, device: str) -> TeacherLogits:
    """Writes the logits of one epoch, in the order of the trainer's sampler, computed on a device as the live teacher's are."""
    samples = [dataset[key] for key in EpochSampler(len(dataset), 0, positions=True)]
    info = StoreInfo(10, len(samples), 1, top_k, [1.0], len(samples), {}, TeacherDescription(None, "tiny", 1))
    logits = teacher.to(device)(torch.stack([sample["pixel_values"] for sample in samples]).to(device)).cpu()
    labels = torch.tensor([sample["labels"] for sample in samples])
    write_shard(shard_path(folder, 0, 0), sparse_logits(logits, labels, top_k, [1.0]))
    info.write(folder)
    return TeacherLogits(folder)


def stored(folder: Path, top_k: int | None, device: str = "cpu") -> dict:
    """Arguments of `train` for a CNN that learns from a store."""
    store = write_store(folder / "store", load_teacher(cnn_teacher()), rows_of_digits(64), top_k, device)
    return {"teacher": None, "data_collator": ImageCollator(10, teacher_logits=store)}


def settings_of(kind: str, folder: Path) -> dict:
    """Arguments of `train`; a step of each kind runs other code."""
    rows = {"train": rows_of_digits(64), "distillation_loss": NKDLoss()}
    if kind == "maps":
        losses = {"mgd": MGDLoss(64, 64), "srrl": SRRLLoss(64, 64)}
        return {"model": timm_cnn(), "teacher": cnn_teacher(), "distillation_loss": losses}
    if kind == "compiled":
        losses = {"nkd": NKDLoss(), "srrl": SRRLLoss(64, 64)}
        teacher = {"teacher_dtype": "fp16", "teacher_channels_last": True, "teacher_compile": True}
        return {"model": timm_cnn(), "teacher": cnn_teacher(), "distillation_loss": losses, **teacher}
    if kind in ("all", "top 5"):
        return rows | {"model": timm_cnn(), **stored(folder, 5 if kind == "top 5" else None)}
    if kind == "mixed":
        collator = ImageCollator(10, mixup_alpha=0.8, cutmix_alpha=1.0)
        losses = {"nkd": NKDLoss(), "uskd": USKDLoss(32, 10)}
        # With a process that loads, and a thread that pins what it has loaded, as in a recipe.
        loader = {"dataloader_num_workers": 1, "dataloader_pin_memory": True}
        return rows | {"distillation_loss": losses, "data_collator": collator, "label_smoothing_factor": 0.1, **loader}
    return {
        "ema_decay": 0.9,
        "gradient_accumulation_steps": 2,
        "teacher_dtype": "bf16",
        "class_weights": torch.ones(10),
    }


KINDS = [
    ("tokens", "bf16"),
    ("tokens", "fp16"),
    ("maps", "bf16"),
    ("compiled", "bf16"),
    ("all", "float32"),
    ("top 5", "bf16"),
    ("mixed", "bf16"),
]


@pytest.mark.parametrize(("kind", "precision"), KINDS)
def test_a_step_does_not_wait_for_the_gpu(tmp_path, device, kind, precision):
    settings = settings_of(kind, tmp_path) | {"max_steps": 4, "logging_steps": 100, "callbacks": [Waits()]}
    # Compiled on a GPU alone: the CPU's compiler takes long.
    stance = torch.compiler.set_stance("force_eager" if device == "cpu" else "default")
    with stance, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(tmp_path, device, precision, **settings)
    assert trainer.state.global_step == 4
    if device == "cpu":
        pytest.skip("the run went through, and torch.cuda.set_sync_debug_mode is of CUDA alone")
    found = [each for each in caught if "synchronizing CUDA" in str(each.message)]
    assert [f"{each.filename}:{each.lineno}" for each in found if each.filename != __file__] == []
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["tokens", "maps", "all", "top 5", "mixed"])
def test_the_trainers_part_of_a_step_looks_at_no_value(tmp_path, meta, kind):
    trainer = make_trainer(tmp_path, **three_losses() | settings_of(kind, tmp_path), use_cpu=True)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch = tree_map(lambda value: value.to(meta) if isinstance(value, torch.Tensor) else value, batch)
    trainer.model.to(meta).train()
    if trainer.teacher is not None:
        trainer.teacher.to(meta)
    for step in (1, 2):
        loss = trainer.compute_loss(trainer.model, batch)
        trainer.step_guard.add(step, 0.1, loss, batch.get("index"))
        loss.backward()
        if trainer.args.ema_decay is not None:
            trainer.model.update_average(step)
    assert loss.is_meta


@pytest.mark.parametrize("top_k", [None, 5])
def test_stored_logits_train_as_the_live_teacher(tmp_path, device, top_k):
    same = {"model": timm_cnn(), "train": rows_of_digits(64), "distillation_loss": NKDLoss(), "optim": "sgd"}
    live = train(tmp_path / "live", device, **same, teacher=cnn_teacher(), data_collator=ImageCollator(10))
    same["model"] = timm_cnn()
    from_store = train(tmp_path / "stored", device, **same, **stored(tmp_path, top_k, device))
    assert logged(from_store) == pytest.approx(logged(live), rel=1e-3 if top_k is None else 0.05)


@pytest.mark.parametrize(("precision", "compiled"), [(name, False) for name in DTYPES] + [("bf16", True)])
def test_a_teacher_in_any_setting_gives_its_logits(device, precision, compiled):
    pixels = torch.stack([sample["pixel_values"] for sample in digits(0, 16)]).to(device)
    model = cnn_teacher().to(device)
    exact = load_teacher(model)(pixels)
    # Compiled on a GPU alone: the CPU's compiler takes long.
    stance = torch.compiler.set_stance("force_eager" if device == "cpu" else "default")
    with stance, torch.autocast(device, torch.bfloat16):
        teacher = load_teacher(model).copy().for_inference(precision, channels_last=True, compile=compiled)
        teacher.tap(["teacher_map"])
        logits = teacher(pixels)
        feature_map = teacher.take_features()["teacher_map"]
    assert logits.dtype == feature_map.dtype == DTYPES[precision]
    assert logits.device.type == device
    bound = {"float32": 5e-3, "bf16": 5e-2, "fp16": 2e-2}[precision]
    assert (logits.float() - exact).norm() <= bound * exact.norm()


class Keep(TrainerCallback):
    """Keeps the student's weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = {name: value.detach().cpu().double() for name, value in model.student.named_parameters()}
        self.weights.append(weights)


def test_the_average_is_that_of_the_weights_step_by_step(tmp_path, device):
    keep = Keep()
    trainer = train(tmp_path, device, ema_decay=0.9, callbacks=[keep], learning_rate=0.01)
    average = keep.weights[0]
    for weights in keep.weights[1:]:
        average = {name: 0.9 * average[name] + 0.1 * value for name, value in weights.items()}
    for name, value in trainer.student.named_parameters():
        torch.testing.assert_close(value.detach().cpu().double(), average[name], rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def deterministic():
    """Takes PyTorch's deterministic kernels, where it has them; attention has one without a fused kernel."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, device, precision):
    settings = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    with deterministic():
        whole = train(tmp_path, device, precision, **settings)
        resumed = train(tmp_path, device, precision, tmp_path / "checkpoint-2", **settings)
    expected = snapshot(whole.model)
    for name, value in snapshot(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert logged(resumed) == logged(whole)


class Slow(NKDLoss):
    """Keeps a GPU busy for some hundredths of a second, so that the host is steps ahead."""

    def forward(self, student_logits, teacher_logits, labels):
        if student_logits.is_cuda:
            torch.cuda._sleep(10**8)
        return super().forward(student_logits, teacher_logits, labels)


def test_a_loss_that_is_not_finite_is_found_late_and_named_right(tmp_path, device):
    order = [index for _, index in EpochSampler(128, 0)]
    with pytest.raises(NonFiniteLossError) as error:
        train(
            tmp_path, device, train=rows_of_digits(128), distillation_loss=Slow(), data_collator=Collator(order[20]),
            per_device_train_batch_size=8, save_strategy="steps", save_steps=8, logging_steps=100, max_steps=16,
        )  # fmt: skip
    assert str(error.value).startswith("the loss of step 3 is not finite (task=nan, nkd_target=nan, ")
    assert f"for 1 of 8 samples ({order[20]})" in str(error.value)
    assert not list(tmp_path.glob("checkpoint-*"))


FEW = [
    "--num_train_epochs",
    "1",
    "--max_train_samples",
    "32",
    "--max_eval_samples",
    "16",
    "--use_cpu",
    "true",
    "--save_strategy",
    "no",
]
ALL = ["--max_train_samples", "1437", "--max_eval_samples", "360", "--bf16", "true", "--dataloader_pin_memory", "true"]
# A recipe, the training beside the student's, and its epochs, for which recipe_runs has a default of its own.
RECIPES = [("distill_cnn", "teacher", "8"), ("distill_deit", "teacher", "20"), ("self_distill", "baseline", "8")]


@pytest.mark.runs
@pytest.mark.parametrize(("recipe", "other", "epochs"), RECIPES)
def test_two_trainings_of_each_recipe(tmp_path, device, recipe, other, epochs):
    arguments = FEW if device == "cpu" else [*ALL, "--num_train_epochs", epochs]
    with_baseline = str(other == "baseline")
    recipe_runs.run(recipe, *arguments, "--output_dir", str(tmp_path), "--compare_with_baseline", with_baseline)
    for stage in (other, "student"):
        history = json.loads((tmp_path / stage / "trainer_state.json").read_text())["log_history"]
        accuracy = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry][-1]
        if device == "cuda":  # docs/quickstart.md has 86 to 99 % of the CPU.
            assert accuracy > 0.75
