"""The losses on a GPU, eager and compiled, in each precision: the values and gradients of float64 on the CPU."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nkd_hf.losses.base import loss_inputs
from nkd_hf.losses.registry import LOSSES, build_losses

SHAPES = {"in_features": 16, "student_dim": 16, "teacher_dim": 24, "student_channels": 8, "teacher_channels": 12}
# Shapes of the losses' inputs beside [B, C] logits, without B.
FEATURES = {
    "mid_feature": (16,), "student_low": (2, 9, 16), "teacher_low": (2, 9, 24), "student_high": (9, 16),
    "teacher_high": (9, 24), "student_map": (8, 4, 4), "teacher_map": (12, 4, 4),
}  # fmt: skip
# Arguments with which the masks of these losses do not depend on what is drawn.
LOSS_ARGS = {"mgd": {"mask_ratio": 0.0}, "vitkd": {"mask_ratio": 1.0}}
# Each loss, and those that standardise logits with that, too: the loss's name and its arguments.
VARIANTS = {name: (name, {}) for name in LOSSES}
VARIANTS |= {f"{name}, standardize": (name, {"standardize": True}) for name in ("kd", "dkd", "rld")}
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_inputs(dtype: torch.dtype, batch: int, classes: int) -> dict:
    """The inputs of all losses by name, rounded to a dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"student_logits": (classes,), "teacher_logits": (classes,), **FEATURES}
    tensors = {name: 2 * torch.randn(batch, *shape, generator=generator) for name, shape in shapes.items()}
    for side, channels in (("student", 8), ("teacher", 12)):
        tensors[f"{side}_head_weight"] = torch.randn(classes, channels, generator=generator)
        tensors[f"{side}_head_bias"] = torch.zeros(classes)
    labels = torch.randint(classes, (batch,), generator=generator)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {"labels": labels}


def build(name: str, loss_args: dict, shapes: dict) -> nn.Module:
    return build_losses({name: LOSSES[name]}, loss_args, shapes)[name]


def evaluate(
    losses: nn.ModuleDict, inputs: dict[str, Tensor], scale: float, backend: str | None
) -> dict[str, list[Tensor]]:
    """Components of each loss, and its gradients with respect to what is the student's."""
    fixed = {"token_grid": (3, 3), "label_smoothing": 0.1, "logit_moments": None}
    given, leaves = {}, {}
    for name, loss in losses.items():
        # Tensors of each loss's own, so that one backward pass gives the gradients of all.
        own = {key: inputs[key].detach().clone() for key in loss_inputs(loss) if key in inputs}
        leaves[name] = [tensor for key, tensor in own.items() if key != "labels" and not key.startswith("teacher")]
        for tensor in leaves[name]:
            tensor.requires_grad_()
        given[name] = own | {key: fixed[key] for key in loss_inputs(loss) if key in fixed}

    def compute() -> dict[str, dict[str, Tensor]]:
        return {name: loss(**given[name]) for name, loss in losses.items()}

    results = (compute if backend is None else torch.compile(compute, fullgraph=True, backend=backend))()
    total = sum(value for components in results.values() for value in components.values())
    gradients = iter(torch.autograd.grad(scale * total, [leaf for of_loss in leaves.values() for leaf in of_loss]))
    return {
        name: [*components.values(), *(next(gradients).double() / scale for _ in leaves[name])]
        for name, components in results.items()
    }


# The losses compute in float32 whatever the logits' precision is, so that one graph says enough of compiled ones.
@pytest.mark.parametrize(("precision", "compiled"), [(name, False) for name in PRECISIONS] + [("float32", True)])
def test_losses_are_those_of_float64(device, precision, compiled):
    batch, classes, names = (8, 10, ["nkd", "uskd"]) if device == "cpu" else (256, 1000, VARIANTS)
    torch.manual_seed(0)
    shapes = SHAPES | {"num_classes": classes}
    # On the CPU, tests/losses compiles each of them.
    variants = VARIANTS | {name: (name, loss_args) for name, loss_args in LOSS_ARGS.items()}
    built = {name: build(*variants[name], shapes) for name in (names if compiled else VARIANTS)}
    losses, inputs = nn.ModuleDict(built), make_inputs(PRECISIONS[precision], batch, classes)
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    expected = evaluate(copy.deepcopy(losses).double(), exact, 1.0, None)
    # As the gradient scaler's, without which small gradients are 0.
    scale = 2.0**10 if precision == "fp16" else 1.0
    backend = {"cpu": "eager", "cuda": "inductor"}[device] if compiled else None
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    measured = evaluate(losses.to(device), inputs, scale, backend)
    for name, values in measured.items():
        # A GPU multiplies and convolves in TF32.
        value_bound = 5e-3 if any(True for _ in losses[name].parameters()) else 1e-4
        gradient_bound = value_bound if precision == "float32" else 2e-2
        for value, other in zip(values, expected[name], strict=True):
            assert value.device.type == device
            bound = value_bound if value.ndim == 0 else gradient_bound
            assert (value.detach().cpu().double() - other).norm() <= bound * other.detach().norm() + 1e-6, (
                name,
                value,
                other,
            )


@pytest.mark.parametrize("labels", ["class indices", "mixup"])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_loss_looks_at_a_value(meta, name, labels):
    loss = build(*VARIANTS[name], SHAPES | {"num_classes": 10}).to(meta)
    inputs = {key: tensor.to(meta) for key, tensor in make_inputs(torch.float16, 8, 10).items()}
    if labels == "mixup":
        inputs["labels"] = torch.empty(8, 10, device=meta)
    assert all(value.is_meta for value in evaluate(nn.ModuleDict({name: loss}), inputs, 1.0, None)[name])
