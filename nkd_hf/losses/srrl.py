"""SRRL: softmax regression representation learning, which judges the student's feature by the teacher's classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationLoss
from .checks import check_count, check_maps, check_scalar, check_tensor, compute_dtype


class SRRLLoss(DistillationLoss):
    r"""SRRL of "Knowledge Distillation via Softmax Regression Representation Learning" (ICLR 2021,
    https://openreview.net/forum?id=ZzwDy_wiWv), section 3.

    A connector brings the student's last feature map to the teacher's width. Its average over the places shall be the
    teacher's, and shall make the teacher's own, frozen classifier say what the teacher says:

    .. math::
        L_\text{SRRL} = \frac\alpha{BD} \lVert s - t \rVert^2
            + \frac\beta{BC} \lVert (W s + b) - z \rVert^2, \qquad s = \text{pool}(A(S)), \quad t = \text{pool}(T)

    where :math:`S, T` are the maps of student and teacher, :math:`A` the connector (1x1 convolution, BatchNorm, ReLU),
    :math:`W, b` the classifier and :math:`z` the logits of the teacher. The connector trains with the student and is
    dropped with the loss. Its BatchNorm takes the statistics of the local batch, so that the per-device batch size is part
    of the method. Add the student's own classification loss to it.

    Args:
        student_channels: of the student's map.
        teacher_channels: D, of the teacher's map.
        alpha: weight of the feature term, >= 0.
        beta: weight of the regression term, >= 0.

    The defaults are those of github.com/yzd-v/cls_KD.
    Differs from cls_KD: the BatchNorm keeps no running statistics, which nothing reads.

    Raises:
        ValueError: a number of channels or a weight out of range; from the call, tensors that do not fit.
        TypeError: from the call, not tensors.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import SRRLLoss
        >>> distillation_loss = SRRLLoss(student_channels=6, teacher_channels=8)
        >>> student_map, teacher_map = torch.randn(4, 6, 7, 7), torch.randn(4, 8, 5, 5)
        >>> weight, bias = torch.randn(10, 8), torch.randn(10)
        >>> teacher_logits = teacher_map.mean((2, 3)) @ weight.T + bias
        >>> list(distillation_loss(student_map, teacher_map, teacher_logits, weight, bias))
        ['srrl_feature', 'srrl_regression']
    """

    name = "SRRL"
    paper = "https://openreview.net/forum?id=ZzwDy_wiWv"
    citation = """@inproceedings{yang2021knowledge,
  title     = {Knowledge Distillation via Softmax Regression Representation Learning},
  author    = {Yang, Jing and Martinez, Brais and Bulat, Adrian and Tzimiropoulos, Georgios},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2021}
}"""

    def __init__(self, student_channels: int, teacher_channels: int, alpha: float = 1.0, beta: float = 5.0):
        super().__init__()
        for name, channels in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
            check_count(name, channels, 1, "count the channels of its last feature map")
        check_scalar("alpha", alpha)
        check_scalar("beta", beta)
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.alpha = alpha
        self.beta = beta
        self.connector = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(teacher_channels, track_running_stats=False),
            nn.ReLU(),
        )
        # As in the official code.
        nn.init.kaiming_normal_(self.connector[0].weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        student_map: Tensor,
        teacher_map: Tensor,
        teacher_logits: Tensor,
        teacher_head_weight: Tensor,
        teacher_head_bias: Tensor,
    ) -> dict[str, Tensor]:
        """Weighted components, each a scalar: float64 for float64 maps, otherwise float32, autocast or not.

        The maps need not be of one size, since both are averaged.

        Args:
            student_map: [B, student_channels, H, W] float.
            teacher_map: [B, teacher_channels, h, w] float, which the teacher averages and classifies.
            teacher_logits: [B, C] float, what comes of that.
            teacher_head_weight: [C, teacher_channels] float, of the teacher's classifier.
            teacher_head_bias: [C] float. What is the teacher's gets no gradient.
        """
        self._check(student_map, teacher_map, teacher_logits, teacher_head_weight, teacher_head_bias)
        dtype = compute_dtype(student_map)
        # In the precision of the teacher's pooled feature, not in the half precision that autocast would choose.
        with torch.autocast(student_map.device.type, enabled=False):
            student_feature = self.connector(student_map.to(self.connector[0].weight.dtype)).to(dtype).mean((2, 3))
            teacher_feature = teacher_map.detach().to(dtype).mean((2, 3))
            weight, bias = teacher_head_weight.detach().to(dtype), teacher_head_bias.detach().to(dtype)
            student_answer = F.linear(student_feature, weight, bias)
            feature_term = F.mse_loss(student_feature, teacher_feature)
            regression_term = F.mse_loss(student_answer, teacher_logits.detach().to(dtype))
        return {"srrl_feature": self.alpha * feature_term, "srrl_regression": self.beta * regression_term}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}"

    def _check(
        self,
        student_map: Tensor,
        teacher_map: Tensor,
        teacher_logits: Tensor,
        teacher_head_weight: Tensor,
        teacher_head_bias: Tensor,
    ) -> None:
        check_maps(student_map, teacher_map, self.student_channels, self.teacher_channels, "SRRLLoss")
        batch_size, (height, width) = len(student_map), student_map.shape[2:]
        if batch_size * height * width < 2:
            raise ValueError(
                "SRRL's BatchNorm needs two values of a channel, got one image with a map of one place: use a larger batch"
            )
        for name, tensor in (
            ("teacher_logits", teacher_logits),
            ("teacher_head_weight", teacher_head_weight),
            ("teacher_head_bias", teacher_head_bias),
        ):
            check_tensor(name, tensor)
        if teacher_head_weight.ndim != 2 or teacher_head_weight.shape[1] != self.teacher_channels:
            raise ValueError(
                f"teacher_head_weight must be [C, {self.teacher_channels}] to classify teacher_map, got "
                f"{list(teacher_head_weight.shape)}: pass the map that the teacher's classifier averages"
            )
        num_classes = len(teacher_head_weight)
        for name, tensor, expected in (
            ("teacher_logits", teacher_logits, [batch_size, num_classes]),
            ("teacher_head_bias", teacher_head_bias, [num_classes]),
        ):
            if list(tensor.shape) != expected:
                raise ValueError(
                    f"{name} must be {expected} to fit teacher_head_weight {list(teacher_head_weight.shape)} and the "
                    f"batch, got {list(tensor.shape)}: pass what belongs to one teacher and one batch"
                )
