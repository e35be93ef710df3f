"""The normalised loss that NKD and USKD share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def normalized_loss(
    student_logits: Tensor,
    target_index: Tensor,
    target_weight: Tensor,
    non_target_label: Tensor,
    temperature: float = 1.0,
    task_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""The target term and the non-target term of the normalised loss, each a mean over the batch, and the task loss.

    With :math:`S` the student's softmax, :math:`\hat S` its softmax at temperature :math:`\lambda` over the classes that
    are not targets, :math:`P` the target weights and :math:`Q` the soft label of the other classes:

    .. math::
        L_\text{target} = -\frac1B \sum_b \sum_k P_{bk} \log S_{b,t_{bk}} \qquad
        L_\text{non-target} = -\frac{\lambda^2}B \sum_b \sum_{i \notin t_b} Q_{bi} \log \hat S_{bi}

    The gradient is prepared in the forward pass and costs no exponentials in the backward pass (at temperature 1, K = 1;
    otherwise one softmax). The task loss costs none of its own. The gradient flows to `student_logits` alone, and can't be
    differentiated again.

    Args:
        student_logits: [B, C] float logits.
        target_index: [B, K] int64 target classes. A class may stand twice in a row if its second weight is zero.
        target_weight: [B, K] soft label of the targets, in the dtype of `compute_dtype(student_logits)`, in which all
            the arithmetic runs; need not sum to one.
        non_target_label: [B, C] soft label of the other classes, in that dtype: zero at the targets; rows sum to one, or
            are zero where every class is a target.
        temperature: of the student's softmax in the non-target term.
        task_labels: [B] int64 classes, which are then the targets, or [B, C] float rows that sum to one: asks for the
            task loss, the student's cross-entropy with them.
        label_smoothing: of the task loss.

    Returns:
        Three scalars in the dtype of `target_weight`; without `task_labels` the third is None.
    """
    target_term, non_target_term, task_loss = _NormalizedLoss.apply(
        student_logits, target_index, target_weight, non_target_label, temperature, task_labels, label_smoothing
    )
    return target_term, non_target_term, None if task_labels is None else task_loss


class _NormalizedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_logits, target_index, target_weight, non_target_label, temperature, task_labels, label_smoothing
    ):
        batch_size, num_classes = student_logits.shape
        dtype = target_weight.dtype
        is_mixed = task_labels is not None and task_labels.ndim == 2
        task_rows = task_labels.to(dtype) if is_mixed else None
        task_loss, task_weight = target_weight.new_zeros(()), None

        log_prob = drop_targets(student_logits, target_index, temperature, dtype)
        peak = log_prob.amax(-1, keepdim=True)
        non_target_prob = log_prob.softmax(-1)
        log_peak = non_target_prob.amax(-1, keepdim=True).log()
        if temperature == 1 and target_index.shape[1] == 1:
            log_odds = target_log_odds(student_logits, target_index, peak, log_peak)
            target_log_prob = F.logsigmoid(log_odds)
            rest_prob = torch.sigmoid(-log_odds)
        else:
            full_log_prob = student_logits.log_softmax(-1, dtype=dtype)
            target_log_prob = full_log_prob.gather(-1, target_index)
            rest_prob = None
            if task_labels is not None:
                label_log_prob = full_log_prob * task_rows if is_mixed else target_log_prob
                task_loss = (1 - label_smoothing) * label_log_prob.sum()
                if label_smoothing:
                    task_loss = task_loss + label_smoothing / num_classes * full_log_prob.sum()
                # Not in place: Dynamo of torch 2.11 gives a result that was changed in place no gradient.
                task_loss = task_loss / -batch_size
                del label_log_prob
            del full_log_prob
        target_term = (target_weight * target_log_prob).sum() / -batch_size

        # The logarithm of non_target_prob, from two subtractions where a logarithm would take as long as a softmax. log 0
        # at the targets would make 0 * -inf = nan; their label is zero, so any finite number serves.
        log_prob.sub_(peak).add_(log_peak).scatter_(-1, target_index, 0)
        if task_labels is not None and rest_prob is not None:
            # the target's share of the task's label; the other classes share the rest of it
            task_weight = torch.full_like(rest_prob, 1 - label_smoothing + label_smoothing / num_classes)
            rest_term = label_smoothing / num_classes * log_prob.sum(-1, keepdim=True) if label_smoothing else 0
            if is_mixed:
                task_weight += (1 - label_smoothing) * (task_rows.gather(-1, target_index) - 1)
                rest_term += (1 - label_smoothing) * (task_rows * log_prob).sum(-1, keepdim=True)
            rest_term += (1 - task_weight) * F.logsigmoid(-log_odds)
            task_loss = (task_weight * target_log_prob + rest_term).sum() / -batch_size
        non_target_term = log_prob.mul_(non_target_label).sum() * (-(temperature**2) / batch_size)

        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(
                student_logits, target_index, target_weight, non_target_label,
                non_target_prob.scatter_(-1, target_index, 0), rest_prob, task_weight, task_rows,
            )  # fmt: skip
            ctx.temperature = temperature
            ctx.label_smoothing = label_smoothing
            ctx.has_task = task_labels is not None
        return target_term, non_target_term, task_loss

    # Not `once_differentiable`: it objects only when the incoming gradient itself requires a gradient, so that a gradient
    # penalty, whose incoming gradient is the constant 1, would silently lose this loss's share.
    @staticmethod
    def backward(ctx, grad_target, grad_non_target, grad_task):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "expected a first derivative of the NKD / USKD loss, got create_graph=True: its gradient is prepared in "
                "the forward pass and can't be differentiated again; call backward without create_graph"
            )
        (
            student_logits, target_index, target_weight, non_target_label,
            non_target_prob, rest_prob, task_weight, task_rows,
        ) = ctx.saved_tensors  # fmt: skip
        batch_size, num_classes = student_logits.shape
        # with s the softmax over all classes, P and Q the labels and Y that of the task, the terms' gradients are
        # (sum_k P_k) s - P, temperature * (non_target_prob - Q) and s - Y
        target_scale = target_weight * (grad_target / batch_size)
        non_target_scale = grad_non_target * (ctx.temperature / batch_size)
        task_scale = grad_task / batch_size
        if rest_prob is None:
            grad = student_logits.softmax(-1, dtype=non_target_prob.dtype)
            softmax_scale = target_scale.sum(-1, keepdim=True)
            if ctx.has_task:
                softmax_scale = softmax_scale + task_scale
                if task_rows is None:
                    target_scale = target_scale + (1 - ctx.label_smoothing) * task_scale
            grad.mul_(softmax_scale).addcmul_(non_target_prob, non_target_scale)
            grad.addcmul_(non_target_label, non_target_scale, value=-1).scatter_add_(-1, target_index, -target_scale)
        else:
            # off the target s is rest_prob * non_target_prob; at the target s - 1 is -rest_prob, without cancellation
            if ctx.has_task:
                target_scale = target_scale + task_scale
            target_scale = target_scale * rest_prob
            grad = non_target_prob * (target_scale + non_target_scale)
            grad.addcmul_(non_target_label, non_target_scale, value=-1)
            target_grad = -target_scale
            if ctx.has_task:
                target_grad = target_grad + task_scale * (1 - task_weight)
        if ctx.has_task:
            if ctx.label_smoothing:
                grad.sub_(task_scale * (ctx.label_smoothing / num_classes))
            if task_rows is not None:
                grad.addcmul_(task_rows, task_scale, value=ctx.label_smoothing - 1)
        if rest_prob is not None:
            # in place of sums that would cancel there
            grad.scatter_(-1, target_index, target_grad)
        return grad.to(student_logits.dtype), None, None, None, None, None, None


def drop_targets(logits: Tensor, target_index: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """A copy of [B, C] logits in `dtype` with the targets [B, K] at minus infinity, up to a shift divided by temperature."""
    logits = logits.to(dtype, copy=True).scatter_(-1, target_index, -math.inf)
    if temperature != 1:
        # the shift keeps the digits of large logits, which the division would round away
        peak = logits.amax(-1, keepdim=True)
        logits.sub_(peak.masked_fill_(peak == -math.inf, 0)).div_(temperature)
    return logits


def target_log_odds(logits: Tensor, target_index: Tensor, peak: Tensor, log_peak: Tensor) -> Tensor:
    """Log-odds [B, 1] of one target against all other classes together: its probability is their sigmoid.

    Args:
        logits: [B, C] float.
        target_index: [B, 1] int64.
        peak: [B, 1], the largest logit of the other classes.
        log_peak: [B, 1], its log-probability in the softmax over them.
    """
    # The logsumexp of the others is peak - log_peak: no second pass of exponentials over [B, C]. In this order large
    # logits cancel before anything small is added.
    target_logits = logits.gather(-1, target_index).to(peak.dtype)
    log_odds = target_logits - peak + log_peak
    # nan where the target's logit has overflowed to inf, as in a softmax: its sigmoid would be a perfect 1
    return log_odds + 0 * target_logits.relu()
