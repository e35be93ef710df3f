"""MGD: masked generative distillation of feature maps."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationLoss
from .checks import check_count, check_maps, check_scalar, compute_dtype


class MGDLoss(DistillationLoss):
    r"""MGD of "Masked Generative Distillation" (ECCV 2022, https://arxiv.org/abs/2205.01529), for classification.

    Some channels of the student's last feature map are masked, and two convolutions must generate the teacher's map, all
    of it, from what is left:

    .. math::
        L_\text{MGD} = \frac\alpha B \lVert G(\bar M \odot A(S)) - T \rVert^2

    where :math:`S, T` are the maps of student and teacher, :math:`A` a 1x1 convolution (omitted when student and teacher
    are of one width), :math:`G` the generator, and :math:`\bar M` is 0 for each channel of each image with probability
    :math:`\lambda`, drawn again from PyTorch's generator. The squares are summed over channels and places, which is why
    the weight is small. Aligner and generator train with the student and are dropped with the loss. Add the student's
    own classification loss to it.

    Args:
        student_channels: of the student's map.
        teacher_channels: of the teacher's map.
        alpha: weight of the loss, >= 0.
        mask_ratio: :math:`\lambda`, the probability of a channel to be masked, 0 <= mask_ratio < 1.

    The defaults are those of github.com/yzd-v/cls_KD, as is the mask of whole channels: the paper writes of a mask of
    places, which the authors' code for detection has.

    Raises:
        ValueError: a number of channels, the weight or the ratio out of range; from the call, maps that do not fit.
        TypeError: from the call, not tensors.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import MGDLoss
        >>> distillation_loss = MGDLoss(student_channels=6, teacher_channels=8)
        >>> list(distillation_loss(torch.randn(4, 6, 7, 7), torch.randn(4, 8, 7, 7)))
        ['mgd']
    """

    name = "MGD"
    paper = "https://arxiv.org/abs/2205.01529"
    citation = """@inproceedings{yang2022masked,
  title     = {Masked Generative Distillation},
  author    = {Yang, Zhendong and Li, Zhe and Shao, Mingqi and Shi, Dachuan and Yuan, Zehuan and Yuan, Chun},
  booktitle = {Proceedings of the European Conference on Computer Vision (ECCV)},
  year      = {2022}
}"""

    def __init__(self, student_channels: int, teacher_channels: int, alpha: float = 7e-5, mask_ratio: float = 0.15):
        super().__init__()
        for name, channels in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
            check_count(name, channels, 1, "count the channels of its last feature map")
        check_scalar("alpha", alpha)
        check_scalar("mask_ratio", mask_ratio)
        if mask_ratio >= 1:
            raise ValueError(
                f"mask_ratio must be below 1, got {mask_ratio}: a map that is masked everywhere has nothing to generate from"
            )
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.alpha = alpha
        self.mask_ratio = mask_ratio
        same = student_channels == teacher_channels
        self.align = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
        )

    @staticmethod
    def check_map_sizes(student_size: tuple[int, int], teacher_size: tuple[int, int]) -> None:
        """ValueError unless heights and widths are equal."""
        if tuple(student_size) != tuple(teacher_size):
            (student_height, student_width), (teacher_height, teacher_width) = student_size, teacher_size
            raise ValueError(
                f"MGD's student map is {student_height}x{student_width}, the teacher's {teacher_height}x{teacher_width}: it "
                "compares them place by place, so choose a teacher whose image size / stride is the student's, or a loss that "
                "pools them (SRRL)"
            )

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> dict[str, Tensor]:
        """Weighted component, a scalar: float64 for a float64 map, otherwise float32, autocast or not.

        Args:
            student_map: [B, student_channels, H, W] float.
            teacher_map: [B, teacher_channels, H, W] float; gets no gradient.
        """
        check_maps(student_map, teacher_map, self.student_channels, self.teacher_channels, "MGDLoss")
        self.check_map_sizes(student_map.shape[2:], teacher_map.shape[2:])
        dtype = compute_dtype(student_map)
        noise = torch.rand((len(student_map), self.teacher_channels, 1, 1), device=student_map.device)
        # A sum over all places and channels needs more than the half precision that autocast would choose.
        with torch.autocast(student_map.device.type, enabled=False):
            aligned = self.align(student_map.to(self.generator[0].weight.dtype))
            generated = self.generator(aligned * (noise >= self.mask_ratio)).to(dtype)
            squares = F.mse_loss(generated, teacher_map.detach().to(dtype), reduction="sum")
        return {"mgd": self.alpha / len(student_map) * squares}

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, mask_ratio={self.mask_ratio}"
