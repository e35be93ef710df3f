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


def _softened(logits: Tensor, temperature: float) -> Tensor:
    powers = torch.exp(logits / temperature)
    return powers / powers.sum(1, keepdim=True)


def standardized_reference(logits: Tensor) -> Tensor:
    """Logits in units of their deviation from their mean, image by image."""
    rows = []
    for row in logits:
        mean = sum(row) / len(row)
        deviation = (sum((value - mean) ** 2 for value in row) / (len(row) - 1)).sqrt()
        rows.append((row - mean) / (1e-7 + deviation))
    return torch.stack(rows)


def kd_reference(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.5, temperature: float = 4.0
) -> tuple[Tensor]:
    """KD: cross-entropy of the softened distributions, image by image."""
    student, teacher = (_softened(logits, temperature) for logits in (student_logits, teacher_logits))
    images = [-(teacher[b] * student[b].log()).sum() for b in range(len(student))]
    return (alpha * temperature**2 * sum(images) / len(images),)


def dkd_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 6.0,
    temperature: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """Weighted target and non-target term of DKD (equation 7), image by image."""
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    student, teacher = (_softened(logits, temperature) for logits in (student_logits, teacher_logits))
    target_terms, non_target_terms = [], []
    for p, q, target in zip(student, teacher, labels.tolist(), strict=True):
        others = [i for i in range(len(p)) if i != target]
        p_rest, q_rest = p[others].sum(), q[others].sum()
        target_terms.append(q[target] * (q[target] / p[target]).log() + q_rest * (q_rest / p_rest).log())
        p_hat, q_hat = p[others] / p_rest, q[others] / q_rest
        non_target_terms.append((q_hat * (q_hat / p_hat).log()).sum())
    scale = temperature**2 / len(student)
    return alpha * scale * sum(target_terms), beta * scale * sum(non_target_terms)


def wsld_reference(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float = 2.25, temperature: float = 4.0
) -> tuple[Tensor]:
    """WSLD, image by image. The official code adds 1e-7 to the teacher's cross-entropy."""
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    total = 0.0
    for s, t, target in zip(student_logits, teacher_logits, labels.tolist(), strict=True):
        student_error, teacher_error = (-_softened(row[None], 1)[0, target].log() for row in (s, t))
        weight = 1 - torch.exp(-student_error / (teacher_error + 1e-7)).detach()
        p, q = (_softened(row[None], temperature)[0] for row in (s, t))
        total = total - weight * (q * p.log()).sum()
    return (alpha * temperature**2 * total / len(student_logits),)


def dist_reference(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Weighted inter-class and intra-class relation of DIST (equations 6 to 10): covariance over standard deviations."""
    student, teacher = _softened(student_logits, 1), _softened(teacher_logits, 1)

    def distance(u: Tensor, v: Tensor) -> Tensor:
        if len(u) < 2 or u.var() == 0 or v.var() == 0:
            return 1 - 0 * u.sum()
        covariance = ((u - u.mean()) * (v - v.mean())).sum() / (len(u) - 1)
        # The official code's floor of 1e-8 is under the sums of squares, which are n - 1 variances.
        return 1 - covariance / (u.std() * v.std() + 1e-8 / (len(u) - 1))

    batch_size, num_classes = student.shape
    inter_class = sum(distance(student[b], teacher[b]) for b in range(batch_size)) / batch_size
    intra_class = sum(distance(student[:, i], teacher[:, i]) for i in range(num_classes)) / num_classes
    return beta * inter_class, gamma * intra_class


def wttm_reference(
    student_logits: Tensor, teacher_logits: Tensor, exponent: float = 0.2, beta: float = 1.0
) -> tuple[Tensor]:
    """WTTM: the power sum U and the divergence from the power-transformed teacher, image by image."""
    student, teacher = _softened(student_logits, 1), _softened(teacher_logits, 1)
    total = 0.0
    for p, q in zip(student, teacher, strict=True):
        power_sum = sum(probability**exponent for probability in q)
        for p_i, q_i in zip(p, q, strict=True):
            transformed = q_i**exponent / power_sum
            total = total + power_sum * transformed * (transformed / p_i).log()
    return (beta * total / len(student),)


def rld_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    target_temperature: float = 1.0,
    standardize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted confidence and correlation term of RLD, image by image."""
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    if standardize:
        student_logits, teacher_logits = standardized_reference(student_logits), standardized_reference(teacher_logits)
    student, teacher = (_softened(logits, target_temperature) for logits in (student_logits, teacher_logits))
    confidence_terms, correlation_terms = [], []
    for b, target in enumerate(labels.tolist()):
        q = teacher[b].max()
        p, p_rest = student[b, target], student[b].sum() - student[b, target]
        confidence_terms.append(q * (q / p).log() + (1 - q) * ((1 - q) / p_rest).log())
        below = [i for i in range(student.shape[1]) if teacher_logits[b, i] < teacher_logits[b, target]]
        p_below, q_below = (
            _softened(logits[b : b + 1, below], temperature)[0] for logits in (student_logits, teacher_logits)
        )
        correlation_terms.append((q_below * (q_below / p_below).log()).sum())
    batch_size = len(student)
    return (
        alpha * target_temperature**2 * sum(confidence_terms) / batch_size,
        beta * temperature**2 * sum(correlation_terms) / batch_size,
    )


def tfkd_reference(
    student_logits: Tensor, labels: Tensor, alpha: float = 0.1, temperature: float = 20.0, multiplier: float = 100.0
) -> tuple[Tensor]:
    """Tf-KD, image by image, without the task loss."""
    num_classes = student_logits.shape[1]
    labels = labels if labels.ndim == 2 else F.one_hot(labels, num_classes).to(student_logits.dtype)
    # The virtual teacher of each class, softened only after mixing.
    virtual = torch.full((num_classes, num_classes), 0.01 / (num_classes - 1), dtype=student_logits.dtype)
    virtual.fill_diagonal_(0.99)
    total = 0.0
    for row, label in zip(student_logits, labels, strict=True):
        p, q = _softened(row[None], 1)[0], _softened((label @ virtual)[None], temperature)[0]
        total = total + (q * (q / p).log()).sum() / num_classes
    return (alpha * multiplier * total / len(student_logits),)


def sd_nkd_reference(
    student_region_logits: Tensor,
    teacher_region_logits: Tensor,
    labels: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    """SD-NKD as the official code has it, region by region and image by image: the soft term has all classes."""
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    batch_size, _, num_regions = student_region_logits.shape
    total = 0.0
    for b, target in enumerate(labels.tolist()):
        whole_is_right = teacher_region_logits[b, :, 0].argmax() == target
        for r in range(num_regions):
            rows = student_region_logits[b : b + 1, :, r], teacher_region_logits[b : b + 1, :, r]
            p, q = (_softened(row, 1)[0] for row in rows)
            soft_p, soft_q = (_softened(row, temperature)[0] for row in rows)
            loss = -q[target] * p[target].log() - gamma * temperature**2 * (soft_q * soft_p.log()).sum()
            total = total + (1 if (rows[1].argmax() == target) == whole_is_right else 2) * loss
    return total / (batch_size * num_regions)


def mgd_reference(module: nn.Module, student_map: Tensor, teacher_map: Tensor, noise: Tensor) -> tuple[Tensor]:
    """MGD, image by image and channel by channel."""
    total = 0.0
    for image in range(len(student_map)):
        aligned = module.align(student_map[image : image + 1])[0]
        kept = [
            plane if noise[image, channel] >= module.mask_ratio else torch.zeros_like(plane)
            for channel, plane in enumerate(aligned)
        ]
        generated = module.generator(torch.stack(kept)[None])[0]
        total = total + ((generated - teacher_map[image]) ** 2).sum()
    return (module.alpha * total / len(student_map),)


def srrl_reference(
    module: nn.Module,
    student_map: Tensor,
    teacher_map: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted feature and regression term of SRRL, with the BatchNorm written out."""
    conv, norm, _ = module.connector
    connected = torch.einsum("dc,bchw->bdhw", conv.weight[:, :, 0, 0], student_map)
    mean = connected.mean((0, 2, 3), keepdim=True)
    variance = ((connected - mean) ** 2).mean((0, 2, 3), keepdim=True)
    connected = (connected - mean) / (variance + norm.eps).sqrt()
    connected = (connected * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    batch_size, dim = connected.shape[:2]
    feature, regression = 0.0, 0.0
    for image in range(batch_size):
        student_feature = connected[image].flatten(1).mean(1)
        teacher_feature = teacher_map[image].flatten(1).mean(1)
        feature = feature + ((student_feature - teacher_feature) ** 2).sum() / (batch_size * dim)
        error = weight @ student_feature + bias - teacher_logits[image]
        regression = regression + (error**2).sum() / error.numel() / batch_size
    return module.alpha * feature, module.beta * regression
