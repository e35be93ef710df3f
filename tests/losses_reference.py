"""The losses as the paper writes them, in plain autograd: slow, with boolean masks, one-hot labels and a double argsort.

Tests compare values and gradients with these; benchmarks/losses.py compares the cost. They are no part of the package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nkd_reference(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Target and (weighted) non-target term of NKD."""
    batch_size, num_classes = student_logits.shape
    teacher_logits = teacher_logits.detach()
    target = labels.argmax(1) if labels.ndim == 2 else labels
    is_target = F.one_hot(target, num_classes).bool()

    teacher_target_prob = F.softmax(teacher_logits, dim=1)[is_target]
    student_target_log_prob = F.log_softmax(student_logits, dim=1)[is_target]
    target_term = -(teacher_target_prob * student_target_log_prob).mean()

    teacher_rest = teacher_logits[~is_target].reshape(batch_size, num_classes - 1)
    student_rest = student_logits[~is_target].reshape(batch_size, num_classes - 1)
    teacher_rest_prob = F.softmax(teacher_rest / temperature, dim=1)
    student_rest_log_prob = F.log_softmax(student_rest / temperature, dim=1)
    non_target_term = -(teacher_rest_prob * student_rest_log_prob).sum(1).mean()
    return target_term, gamma * temperature**2 * non_target_term


def uskd_reference(
    mid_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted target, non-target and weak term of USKD.

    Class indices, or mixup labels whose rows all have two non-zero entries.
    """
    batch_size, num_classes = student_logits.shape
    one_hot = labels if labels.ndim == 2 else F.one_hot(labels, num_classes).to(student_logits.dtype)
    num_targets = 2 if labels.ndim == 2 else 1
    value, target = (column[:, :num_targets] for column in one_hot.sort(dim=1, descending=True))

    prob = F.softmax(student_logits, dim=1)
    log_prob = F.log_softmax(student_logits, dim=1)
    squared_prob = prob.gather(1, target) ** 2
    soft_target = (squared_prob + value - squared_prob.mean(0, keepdim=True)).detach()
    target_term = -(soft_target * log_prob.gather(1, target)).sum(1).mean()

    smooth_label = 0.9 * one_hot + 0.1 / num_classes
    weak_term = -(smooth_label * F.log_softmax(mid_logits, dim=1)).sum(1).mean()

    mid_prob = F.softmax(mid_logits, dim=1)
    rank = mid_prob / (1 - mid_prob.gather(1, target).sum(1, keepdim=True) + 1e-6)
    rank = rank + log_prob / (1 - log_prob.gather(1, target).sum(1, keepdim=True) + 1e-6)
    place = rank.detach().argsort(dim=1, descending=True).argsort(dim=1)
    zipf = 1 / (place + 1).to(student_logits.dtype)

    is_other = torch.ones_like(student_logits).scatter(1, target, 0).bool()
    soft_rest = zipf[is_other].reshape(batch_size, num_classes - num_targets)
    soft_rest = soft_rest / soft_rest.sum(1, keepdim=True)
    rest_log_prob = F.log_softmax(student_logits[is_other].reshape(batch_size, num_classes - num_targets), dim=1)
    non_target_term = -(soft_rest * rest_log_prob).sum(1).mean()
    return alpha * target_term, beta * non_target_term, mu * weak_term


def vitkd_reference(
    module: nn.Module,
    student_low: Tensor,
    student_high: Tensor,
    teacher_low: Tensor,
    teacher_high: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted mimicking and generation term of ViTKD, image by image and token by token."""
    mimicking, generation = 0.0, 0.0
    batch_size, num_tokens = noise.shape
    side = round(num_tokens**0.5)
    for image in range(batch_size):
        for layer in range(2):
            aligned = module.align_low[layer](student_low[image, layer])
            mimicking = mimicking + ((aligned - teacher_low[image, layer]) ** 2).sum()
        num_kept = int(num_tokens * (1 - module.mask_ratio))
        kept = sorted(range(num_tokens), key=noise[image].tolist().__getitem__)[:num_kept]
        tokens = module.align_high(student_high[image])
        tokens = torch.stack([tokens[i] if i in kept else module.mask_token for i in range(num_tokens)])
        grid = tokens.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        generated = module.generator(grid)[0].permute(1, 2, 0).reshape(num_tokens, -1)
        for i in range(num_tokens):
            if i not in kept:
                generation = generation + ((generated[i] - teacher_high[image, i]) ** 2).sum()
    return module.alpha * mimicking / batch_size, module.beta * generation / batch_size / module.mask_ratio
