"""SD-NKD: scale decoupled distillation with NKD, for the regions of an image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillationLoss
from .checks import check_count, check_labels, check_scalar, check_tensor, compute_dtype


def sd_nkd_loss(
    student_region_logits: Tensor,
    teacher_region_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Tensor:
    r"""SD-NKD loss of "Scale Decoupled Distillation" (CVPR 2024, https://arxiv.org/abs/2403.13512), as its official code has it.

    Each region of an image has logits of its own, since the classifier is linear: the last feature map is averaged over the
    region in place of the whole image. Each of them is distilled with the label of the image. A region counts twice where the
    teacher's answers for region and image are not both right or both wrong:

    .. math::
        L_\text{SD-NKD} = -\frac1R \sum_r w_r \Big( T^r_t \log S^r_t
            + \gamma \lambda^2 \sum_i T^{r,\lambda}_i \log S^{r,\lambda}_i \Big), \qquad
        w_r = \begin{cases} 2 & [\arg\max T^r = t] \ne [\arg\max T^1 = t] \\ 1 & \text{otherwise} \end{cases}

    as the mean over the batch, where :math:`T^r` and :math:`S^r` are the softmax of teacher and student for region :math:`r`, the
    first of which is the whole image, :math:`t` is the target and :math:`\cdot^\lambda` marks the softmax at temperature
    :math:`\lambda`. Add the student's own classification loss to it.

    The second sum runs over all classes. The paper has NKD there, whose second sum omits the target, but the mask of the
    official code (github.com/shicaiwei123/SDD-CVPR2024) drops no class; so with one region and gamma alike this is not
    [`nkd_loss`].

    Args:
        student_region_logits: [B, C, R] float logits of the student; `[:, :, 0]` are those of the whole image.
        teacher_region_logits: [B, C, R] float logits of the teacher, of any float dtype; they get no gradient.
        labels: [B] integer classes, or [B, C] float mixup / cutmix labels, whose heaviest class is the target.
        gamma: weight of the soft term, >= 0.
        temperature: :math:`\lambda`, of the soft term, > 0.

    The defaults are NKD's for CNN students on ImageNet. The official code has gamma 0.5 for ResNet-34 to ResNet-18 and 2 for
    ResNet-50 to MobileNet, both at temperature 1.
    Differs from the official code: mixup labels are taken, in NKD's way; the loss begins with its full weight (there it grows
    over 20 epochs on CIFAR-100); and a loss that is not finite stays so (there it becomes 0).

    Returns:
        A scalar: float64 for float64 student logits, otherwise float32, in which the arithmetic runs, autocast or not.

    Raises:
        ValueError: shapes or dtypes don't fit, C < 2, B = 0, R = 0, gamma or temperature out of range, or labels that are
            outside 0..C-1 or rows that don't sum to one (looked at on the CPU only, since a GPU would have to wait).
        TypeError: not a tensor.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import sd_nkd_loss
        >>> student_region_logits = torch.tensor([[[1.0, 0.5], [2.0, 1.0], [0.5, 0.0]]], requires_grad=True)
        >>> teacher_region_logits = torch.tensor([[[1.0, 3.0], [4.0, 2.0], [0.0, 0.5]]])
        >>> loss = sd_nkd_loss(student_region_logits, teacher_region_logits, torch.tensor([1]))
        >>> loss.backward()
        >>> f"{loss.item():.4f}"
        '2.4151'
    """
    return sum(_components(student_region_logits, teacher_region_logits, labels, gamma, temperature))


class SDNKDLoss(DistillationLoss):
    """[`sd_nkd_loss`] of two models' last feature maps and classifiers, as a module that returns its two components by name.

    The regions are the cells of m x m grids on the map, for each m of `scales`. The maps need not be of one size.
    Differs from the official code: each grid is averaged from the map itself. There the coarser ones are averages of the cells
    of the 4 x 4 grid, which overlap on a map of 7 x 7, so that the first region's logits are not the model's own.

    Args:
        gamma: as in [`sd_nkd_loss`].
        temperature: as in [`sd_nkd_loss`].
        scales: the sizes m of the grids. The first is 1, the whole image. The official code has 1, 2, 4 on CIFAR-100, and 1, 2
            for MobileNet on ImageNet.

    Raises:
        ValueError: gamma, temperature or scales out of range; from the call, tensors that do not fit, and maps with fewer
            places on a side than the largest scale.
        TypeError: from the call, not tensors.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import SDNKDLoss
        >>> distillation_loss = SDNKDLoss(scales=(1, 2))
        >>> distillation_loss
        SDNKDLoss(gamma=1.5, temperature=1.0, scales=(1, 2))
        >>> student_map, teacher_map = torch.randn(4, 6, 7, 7), torch.randn(4, 8, 7, 7)
        >>> student_head, teacher_head = torch.nn.Linear(6, 10), torch.nn.Linear(8, 10)
        >>> heads = student_head.weight, student_head.bias, teacher_head.weight, teacher_head.bias
        >>> list(distillation_loss(student_map, teacher_map, *heads, torch.tensor([0, 3, 5, 9])))
        ['sdnkd_target', 'sdnkd_soft']
    """

    name = "SD-NKD"
    paper = "https://arxiv.org/abs/2403.13512"
    citation = """@inproceedings{wei2024scale,
  title     = {Scale Decoupled Distillation},
  author    = {Wei, Shicai and Luo, Chunbo and Luo, Yang},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2024}
}"""

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, scales: Sequence[int] = (1, 2, 4)):
        super().__init__()
        check_scalar("gamma", gamma)
        check_scalar("temperature", temperature, positive=True)
        if not isinstance(scales, Sequence) or isinstance(scales, str) or not scales:
            raise ValueError(f"scales must be a list of grid sizes, got {scales!r:.60}: pass, for example, [1, 2, 4]")
        for scale in scales:
            check_count("scales", scale, 1, "each is the number of cells on a side")
        if scales[0] != 1 or len(set(scales)) < len(scales):
            raise ValueError(
                f"scales must begin with 1, the whole image, and name each grid once, got {list(scales)}: pass, for example, "
                "[1, 2, 4]"
            )
        self.gamma = gamma
        self.temperature = temperature
        self.scales = tuple(scales)

    def forward(
        self,
        student_map: Tensor,
        teacher_map: Tensor,
        student_head_weight: Tensor,
        student_head_bias: Tensor,
        teacher_head_weight: Tensor,
        teacher_head_bias: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Weighted components, each a scalar: float64 for a float64 student map, otherwise float32, autocast or not.

        Args:
            student_map: [B, D, H, W] float, which the student averages and classifies.
            teacher_map: [B, d, h, w] float, which the teacher averages and classifies.
            student_head_weight: [C, D] float, of the student's classifier, which this loss trains, too.
            student_head_bias: [C] float.
            teacher_head_weight: [C, d] float, of the teacher's classifier.
            teacher_head_bias: [C] float. What is the teacher's gets no gradient.
            labels: as in [`sd_nkd_loss`].
        """
        self._check("student", student_map, student_head_weight, student_head_bias)
        self._check("teacher", teacher_map, teacher_head_weight, teacher_head_bias)
        dtype = compute_dtype(student_map)
        # Not in the half precision that autocast would choose.
        with torch.autocast(student_map.device.type, enabled=False):
            student = self._region_logits(student_map, student_head_weight, student_head_bias, dtype)
            with torch.no_grad():
                teacher = self._region_logits(teacher_map, teacher_head_weight, teacher_head_bias, dtype)
        target_term, soft_term = _components(student, teacher, labels, self.gamma, self.temperature)
        return {"sdnkd_target": target_term, "sdnkd_soft": soft_term}

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, temperature={self.temperature}, scales={self.scales}"

    def _region_logits(self, feature_map: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, C, R]."""
        height, width = feature_map.shape[2:]
        # The averages as one matrix product, since the backward pass of adaptive_avg_pool2d is not deterministic on GPUs.
        places = torch.eye(height * width, dtype=dtype, device=feature_map.device).view(-1, height, width)
        cells = torch.cat([F.adaptive_avg_pool2d(places, scale).flatten(1) for scale in self.scales], dim=1)
        regions = feature_map.to(dtype).flatten(2) @ cells
        return weight.to(dtype) @ regions + bias.to(dtype).unsqueeze(-1)

    def _check(self, side: str, feature_map: Tensor, weight: Tensor, bias: Tensor) -> None:
        for name, tensor in (
            (f"{side}_map", feature_map),
            (f"{side}_head_weight", weight),
            (f"{side}_head_bias", bias),
        ):
            check_tensor(name, tensor)
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{name} must be of a float dtype, got {tensor.dtype}: pass what the {side} computes with"
                )
        shape = list(feature_map.shape)
        if len(shape) != 4 or 0 in shape:
            raise ValueError(
                f"{side}_map must be [B, D, H, W], got {shape}: pass a feature map of at least one image and one place, "
                "channels first"
            )
        if weight.ndim != 2 or weight.shape[1] != shape[1] or list(bias.shape) != [len(weight)]:
            raise ValueError(
                f"{side}_head_weight and {side}_head_bias must be [C, {shape[1]}] and [C] to classify {side}_map, got "
                f"{list(weight.shape)} and {list(bias.shape)}: pass the classifier that averages this map"
            )
        if min(shape[2:]) < max(self.scales):
            raise ValueError(
                f"{side}_map must have {max(self.scales)} places or more on each side for the scales {list(self.scales)}, got "
                f"{shape[2]}x{shape[3]}: set smaller scales in loss_args, or a larger image_size"
            )


def _components(
    student_region_logits: Tensor, teacher_region_logits: Tensor, labels: Tensor, gamma: float, temperature: float
) -> tuple[Tensor, Tensor]:
    check_scalar("gamma", gamma)
    check_scalar("temperature", temperature, positive=True)
    _check_region_logits(student_region_logits, teacher_region_logits)
    batch_size, num_classes, num_regions = student_region_logits.shape
    check_labels(labels, (batch_size, num_classes))

    target = labels.argmax(-1) if labels.ndim == 2 else labels.long()
    target = target.view(-1, 1, 1).expand(-1, num_regions, 1)
    dtype = compute_dtype(student_region_logits)
    # [B, R, C]: the classes last, as softmax reads them fastest
    student, teacher = (
        logits.to(dtype).transpose(1, 2) for logits in (student_region_logits, teacher_region_logits.detach())
    )
    student_log_prob, teacher_prob = student.log_softmax(-1), teacher.softmax(-1)
    target_term = -(teacher_prob.gather(-1, target) * student_log_prob.gather(-1, target)).squeeze(-1)
    if temperature != 1:
        student_log_prob, teacher_prob = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    soft_term = -(teacher_prob * student_log_prob).sum(-1)

    is_right = teacher.argmax(-1) == target.squeeze(-1)
    weight = 1 + (is_right != is_right[:, :1]).to(dtype)
    return (weight * target_term).mean(), gamma * temperature**2 * (weight * soft_term).mean()


def _check_region_logits(student_region_logits: Tensor, teacher_region_logits: Tensor) -> None:
    for name, logits in (
        ("student_region_logits", student_region_logits),
        ("teacher_region_logits", teacher_region_logits),
    ):
        check_tensor(name, logits)
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {logits.dtype}: pass logits, not class indices")
    shape, got = list(student_region_logits.shape), list(teacher_region_logits.shape)
    if len(shape) != 3 or 0 in shape or shape[1] < 2:
        raise ValueError(
            f"student_region_logits must be [B, C, R] of one image, two classes and one region at least, got {shape}: pass a "
            "column of class logits for each region, the whole image first"
        )
    if got != shape:
        mend = f"load a {shape[1]}-class teacher" if len(got) == 3 and got[1] != shape[1] else "cut both alike"
        raise ValueError(f"teacher_region_logits must be {shape} like student_region_logits, got {got}: {mend}")
