"""What the tests of losses share."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = json.loads((FIXTURES / "golden" / "index.json").read_text())
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HARD, MIXUP = "class indices", "mixup"


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm()


def assert_same_with_gradients(actual, expected, inputs, tolerance=1e-10, weights=(0.7, -1.3, 0.4)):
    """Components and the gradients of their weighted sum, so that each has another incoming gradient."""
    for a, b in zip(actual, expected, strict=True):
        # where the target's probability is close to one, the reference's log-probability is good to 2e-16
        assert abs(a.item() - b.item()) <= tolerance * abs(b.item()) + 1e-15
    weights = weights[: len(expected)]
    actual_gradients = torch.autograd.grad(sum(w * a for w, a in zip(weights, actual, strict=True)), inputs)
    expected_gradients = torch.autograd.grad(sum(w * b for w, b in zip(weights, expected, strict=True)), inputs)
    for a, b in zip(actual_gradients, expected_gradients, strict=True):
        assert a.dtype == b.dtype
        # a gradient that vanishes is a difference of probabilities that cancels, hence the floor
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1e-3)


def make_batch(batch_size, num_classes, *, labels=HARD, seed=0, scale=3.0, dtype=torch.float64):
    """Student, teacher (or auxiliary head) logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    student_logits, other_logits = (
        (scale * torch.randn(batch_size, num_classes, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    first, second = torch.rand(batch_size, num_classes, generator=generator).topk(2).indices.unbind(1)
    if labels == HARD:
        return student_logits.requires_grad_(), other_logits, first
    share = 0.55 + 0.4 * torch.rand(batch_size, 1, generator=generator, dtype=dtype)
    mixed = share * F.one_hot(first, num_classes) + (1 - share) * F.one_hot(second, num_classes)
    return student_logits.requires_grad_(), other_logits, mixed
