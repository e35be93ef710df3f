"""Half precision and torch.compile, on the CPU.

accelerate has no fp16 there: the Trainer's `fp16=True` trains in float32 without a word. So PyTorch's own autocast stands
around the loss, and loss scaling is not run.
"""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import digits, make_trainer, native_vit, timm_cnn, timm_deit

from nkd_hf import (
    DataArguments,
    DistillationTrainer,
    DistillationTrainingArguments,
    NKDLoss,
    Recipe,
    RecipeArguments,
    USKDLoss,
    parse_args,
)
from nkd_hf.losses import ViTKDLoss
from nkd_hf.trainer.distillation_model import DistillationModel

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
COMPONENTS = {
    "task", "nkd_target", "nkd_non_target", "uskd_target", "uskd_non_target", "uskd_weak", "vitkd_mimicking",
    "vitkd_generation",
}  # fmt: skip


def three_losses() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {"nkd": NKDLoss(), "uskd": USKDLoss(32, 10), "vitkd": ViTKDLoss(32, 48)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("student", [timm_deit, native_vit])
def test_losses_run_in_float32_under_autocast(student, dtype):
    # Logits and tokens near the end of fp16's range, whose squares and sums lie beyond it.
    student = student()
    classifier = student.timm_model.head if student.config.model_type == "timm_wrapper" else student.classifier
    with torch.no_grad():
        classifier.weight.mul_(1e5)
    model = DistillationModel(student, three_losses())
    samples = digits(0, 8)
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    labels = torch.tensor([sample["labels"] for sample in samples])
    teacher = {
        "teacher_logits": 3e4 * torch.randn(8, 10).clamp(-2, 2),
        "teacher_low": 3e4 * torch.randn(8, 2, 16, 48).clamp(-2, 2),
        "teacher_high": 3e4 * torch.randn(8, 16, 48).clamp(-2, 2),
    }
    with torch.autocast("cpu", dtype):
        outputs = model(pixels, labels, {name: value.to(dtype) for name, value in teacher.items()})
    outputs["logits"].retain_grad()
    assert outputs["logits"].dtype == dtype
    assert outputs["logits"].abs().max() > 300
    assert outputs["losses"].keys() == COMPONENTS
    for name, value in outputs["losses"].items():
        assert value.dtype == torch.float32, name
        assert value.isfinite(), name
    sum(outputs["losses"].values()).backward()
    # Not of the student's weights: what such a classifier hands back is beyond fp16 without the loss's doing.
    assert outputs["logits"].grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.losses.parameters())


def run_recipe(name: str, precision: str, folder: Path, monkeypatch, *arguments: str) -> dict[str, list[dict]]:
    """The recipe on digits in one precision: what each of its trainings logged."""
    compute_loss = DistillationTrainer.compute_loss

    def compute_loss_in_half(self, model, *args, **kwargs):
        with torch.autocast("cpu", torch.float16, enabled=precision == "fp16"):
            result = compute_loss(self, model, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        assert {loss.dtype, *(value.dtype for value in self.loss_log.sums.values())} == {torch.float32}
        return result

    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss_in_half)
    arguments = [
        "--config", str(CONFIGS / f"digits_{name}.yaml"), "--output_dir", str(folder), "--use_cpu", "true", "--bf16",
        str(precision == "bf16"), "--eval_strategy", "no", "--save_strategy", "no", "--logging_strategy", "steps", "--logging_steps", "1",
        "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false", "--disable_tqdm", "true", *arguments,
    ]  # fmt: skip
    recipe = Recipe(*parse_args((RecipeArguments, DataArguments, DistillationTrainingArguments), args=arguments))
    recipe.train_teacher()
    recipe.train_baseline()
    recipe.train_student()
    return {
        path.parent.name: [entry for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
        for path in folder.glob("*/trainer_state.json")
    }


RECIPES = {
    "distill_deit": {"teacher", "student"},
    "distill_cnn": {"teacher", "student"},
    "self_distill": {"student"},
}


@pytest.mark.runs
@pytest.mark.parametrize(
    ("recipe", "precision"), [("distill_deit", "bf16"), ("distill_cnn", "fp16"), ("self_distill", "bf16")]
)
def test_first_steps_of_a_recipe_in_half_precision(tmp_path, monkeypatch, recipe, precision):
    few = ["--max_steps", "3", "--max_train_samples", "48", "--max_eval_samples", "16"]
    few += ["--per_device_train_batch_size", "16", "--compare_with_baseline", "false"]
    logs = run_recipe(recipe, precision, tmp_path, monkeypatch, *few)
    assert logs.keys() == RECIPES[recipe]
    exact = run_recipe(recipe, "float32", tmp_path / "float32", monkeypatch, *few)
    for name, log in logs.items():
        assert len(log) == 3
        # Some hundredths at the first step; the trainings part later.
        for entry, other in zip(log, exact[name], strict=True):
            assert entry["loss"] == pytest.approx(other["loss"], rel=0.03), (name, entry, other)
        assert log[0]["grad_norm"] == pytest.approx(exact[name][0]["grad_norm"], rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_hundred_steps_of_a_recipe_in_half_precision(tmp_path, monkeypatch, recipe, precision):
    arguments = ("--max_steps", "100", "--compare_with_baseline", "false", "--per_device_train_batch_size", "16")
    logs = run_recipe(recipe, precision, tmp_path, monkeypatch, *arguments)
    assert logs.keys() == RECIPES[recipe]
    for name, log in logs.items():
        assert len(log) == 100
        assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in log)
        start, end = (sum(entry["loss"] for entry in part) / 10 for part in (log[:10], log[-10:]))
        print(f"{recipe} {precision} {name}: loss {start:.3f} -> {end:.3f}")
        assert end < start


def train(folder: Path, student, losses, teacher, **kwargs) -> DistillationTrainer:
    trainer = make_trainer(
        folder, student(), digits(0, 128), digits(128, 144), teacher=teacher(), distillation_loss=losses(), optim="sgd",
        learning_rate=0.05, save_strategy="steps", save_steps=2, **kwargs,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=kwargs.pop("resume_from_checkpoint", None))
    trainer.evaluate()
    return trainer


def curves(trainer: DistillationTrainer) -> dict[str, list[float]]:
    """What was logged of each training step, and the evaluation's loss."""
    log = trainer.state.log_history
    names = ["loss", "grad_norm", *(COMPONENTS & log[0].keys())]
    curves = {name: [entry[name] for entry in log if name in entry] for name in names}
    return curves | {"eval_loss": [entry["eval_loss"] for entry in log if "eval_loss" in entry]}


def assert_compiled_like_eager(folder: Path, student, losses, teacher, backend: str, tolerance: float, **kwargs):
    torch._dynamo.reset()
    eager = train(folder / "eager", student, losses, teacher, **kwargs)
    compiled = train(
        folder / "compiled", student, losses, teacher, torch_compile=True, torch_compile_backend=backend, **kwargs
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    measured = curves(compiled)
    for name, values in curves(eager).items():
        assert measured[name] == pytest.approx(values, rel=tolerance), name
    # A checkpoint holds the names that eager training gives, and a run goes on from it.
    for file in ("model.safetensors", "distillation_losses.safetensors"):
        keys = [
            list(safetensors.torch.load_file(folder / kind / "checkpoint-2" / file)) for kind in ("eager", "compiled")
        ]
        assert keys[0] == keys[1]
    return compiled


def deit_teacher():
    return timm_deit(seed=1, width=48)


@pytest.mark.runs
def test_compiled_training_gives_the_eager_curve(tmp_path):
    compiled = assert_compiled_like_eager(tmp_path, timm_deit, three_losses, deit_teacher, "eager", 1e-6)
    assert curves(compiled).keys() >= COMPONENTS
    whole = {name: value.clone() for name, value in compiled.model.state_dict().items()}
    resumed = train(
        tmp_path / "compiled", timm_deit, three_losses, deit_teacher, torch_compile=True, torch_compile_backend="eager",
        resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-2"),
    )  # fmt: skip
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "losses", "teacher", "steps"),
    [
        (timm_deit, three_losses, deit_teacher, 10),
        (native_vit, three_losses, deit_teacher, 10),
        # BatchNorm's rounding grows a thousandfold in a few steps, in a network as small as this.
        (timm_cnn, lambda: {"nkd": NKDLoss(), "uskd": USKDLoss(32, 10)}, lambda: timm_cnn(seed=1), 3),
    ],
)
def test_training_compiled_by_inductor_gives_the_eager_curve(tmp_path, student, losses, teacher, steps):
    # Else ViTKD's masks are other ones than in eager training.
    with torch._inductor.config.patch(fallback_random=True):
        assert_compiled_like_eager(tmp_path, student, losses, teacher, "inductor", 1e-4, max_steps=steps)
