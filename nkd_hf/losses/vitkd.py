"""ViTKD: feature distillation from a vision transformer to a smaller one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import DistillationLoss
from .checks import check_count, check_scalar, check_tensor, compute_dtype


class ViTKDLoss(DistillationLoss):
    r"""ViTKD of "ViTKD: Practical Guidelines for ViT feature knowledge distillation" (https://arxiv.org/abs/2209.02432).

    The student mimics the teacher's patch tokens after the first two blocks. Of its last tokens a random part is replaced
    by a trained mask token, and two convolutions must generate the teacher's tokens there from what is left:

    .. math::
        L_\text{ViTKD} = \frac\alpha B \sum_{l=1}^2 \lVert A_l(S_l) - T_l \rVert^2
            + \frac\beta{\lambda B} \lVert M \odot (G(\bar M \odot A(S) + M \odot m) - T) \rVert^2

    where :math:`S_l, T_l` are the low and :math:`S, T` the high tokens of student and teacher, :math:`A` linear aligners
    (omitted when student and teacher are of one width), :math:`m` the mask token, :math:`G` the generator, and
    :math:`M` a mask that is drawn for each image and covers the share :math:`\lambda` of its tokens, from PyTorch's
    generator. The squares are summed over tokens and channels, which is why the weights are small. Aligners, mask token
    and generator train with the student and are dropped with the loss. Add the student's own classification loss to it,
    and NKD's, with which the official DeiT configurations combine it.

    Args:
        student_dim: channels of the student's tokens.
        teacher_dim: channels of the teacher's tokens.
        alpha: weight of the mimicking term, >= 0.
        beta: weight of the generation term, >= 0.
        mask_ratio: :math:`\lambda`, the share of tokens that are masked, 0 < mask_ratio <= 1.

    The defaults are those of the official configurations (github.com/yzd-v/cls_KD, deit-*3_distill_deit-*_img.py), the
    same for DeiT-Tiny, -Small and -Base.

    Raises:
        ValueError: a width, a weight or the ratio out of range; from the call, tokens that do not fit.
        TypeError: from the call, not tensors.

    Example:
        >>> import torch
        >>> from nkd_hf.losses import ViTKDLoss
        >>> distillation_loss = ViTKDLoss(student_dim=6, teacher_dim=8)
        >>> student_low, student_high = torch.randn(4, 2, 9, 6), torch.randn(4, 9, 6)
        >>> teacher_low, teacher_high = torch.randn(4, 2, 9, 8), torch.randn(4, 9, 8)
        >>> list(distillation_loss(student_low, student_high, teacher_low, teacher_high))
        ['vitkd_mimicking', 'vitkd_generation']
    """

    name = "ViTKD"
    paper = "https://arxiv.org/abs/2209.02432"
    citation = """@article{yang2022vitkd,
  title   = {ViTKD: Practical Guidelines for ViT feature knowledge distillation},
  author  = {Yang, Zhendong and Li, Zhe and Zeng, Ailing and Li, Zexian and Yuan, Chun and Li, Yu},
  journal = {arXiv preprint arXiv:2209.02432},
  year    = {2022}
}"""
    always_decays = ("mask_token",)  # as the optimiser of cls_KD's configurations does

    def __init__(
        self, student_dim: int, teacher_dim: int, alpha: float = 3e-5, beta: float = 3e-6, mask_ratio: float = 0.5
    ):
        super().__init__()
        for name, dim in (("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            check_count(name, dim, 1, "count the channels of its patch tokens")
        check_scalar("alpha", alpha)
        check_scalar("beta", beta)
        check_scalar("mask_ratio", mask_ratio)
        if not 0 < mask_ratio <= 1:
            raise ValueError(
                f"mask_ratio must be above 0 and at most 1, got {mask_ratio}: beta=0 switches the generation term off"
            )
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.alpha = alpha
        self.beta = beta
        self.mask_ratio = mask_ratio

        def aligner() -> nn.Module:
            return nn.Identity() if student_dim == teacher_dim else nn.Linear(student_dim, teacher_dim)

        self.align_low = nn.ModuleList([aligner(), aligner()])
        self.align_high = aligner()
        self.mask_token = nn.Parameter(torch.zeros(teacher_dim))
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_dim, teacher_dim, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, kernel_size=3, padding=1),
        )

    def forward(
        self,
        student_low: Tensor,
        student_high: Tensor,
        teacher_low: Tensor,
        teacher_high: Tensor,
        token_grid: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """Weighted components, each a scalar: float64 for float64 tokens, otherwise float32, autocast or not.

        The P patch tokens are a grid, row by row, without class tokens and their like.

        Args:
            student_low: [B, 2, P, student_dim] float tokens after the first and the second block.
            student_high: [B, P, student_dim] float tokens after the last block and the final norm.
            teacher_low: [B, 2, P, teacher_dim] float, as `student_low`; gets no gradient.
            teacher_high: [B, P, teacher_dim] float, as `student_high`; gets no gradient.
            token_grid: height and width of the grid, whose product is P. Default: a square.
        """
        for name, tokens in (
            ("student_low", student_low),
            ("student_high", student_high),
            ("teacher_low", teacher_low),
            ("teacher_high", teacher_high),
        ):
            check_tensor(name, tokens)
        self._check(student_low, student_high, teacher_low, teacher_high, token_grid)
        side = math.isqrt(student_high.shape[1])
        grid = (side, side) if token_grid is None else token_grid
        noise = torch.rand(student_high.shape[:2], device=student_high.device)
        masked = random_token_mask(noise, self.mask_ratio)
        return self._components(student_low, student_high, teacher_low.detach(), teacher_high.detach(), masked, grid)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, mask_ratio={self.mask_ratio}"

    def _components(
        self,
        student_low: Tensor,
        student_high: Tensor,
        teacher_low: Tensor,
        teacher_high: Tensor,
        masked: Tensor,
        grid: tuple[int, int],
    ) -> dict[str, Tensor]:
        batch_size, dtype = student_high.shape[0], compute_dtype(student_high)
        # Sums over all tokens and channels need more than the half precision that autocast would choose.
        with torch.autocast(student_high.device.type, enabled=False):
            student_low = student_low.to(self.mask_token.dtype).unbind(1)
            low = torch.stack(
                [align(tokens) for align, tokens in zip(self.align_low, student_low, strict=True)], dim=1
            )
            mimicking = F.mse_loss(low.to(dtype), teacher_low.to(dtype), reduction="sum")

            high = self.align_high(student_high.to(self.mask_token.dtype))
            # nan where a token is not finite, which the mask could hide
            overflow = (0 * student_high.detach()).sum(dtype=dtype)
            high = torch.where(masked, self.mask_token, high)
            generated = self.generator(high.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
            generation = F.mse_loss(generated.to(dtype) * masked, teacher_high.to(dtype) * masked, reduction="sum")
            generation = generation + overflow
        return {
            "vitkd_mimicking": self.alpha / batch_size * mimicking,
            "vitkd_generation": self.beta / (batch_size * self.mask_ratio) * generation,
        }

    def _check(
        self,
        student_low: Tensor,
        student_high: Tensor,
        teacher_low: Tensor,
        teacher_high: Tensor,
        token_grid: tuple[int, int] | None,
    ) -> None:
        shape = list(student_high.shape)
        if len(shape) != 3 or 0 in shape:
            raise ValueError(
                f"student_high must be [B, P, {self.student_dim}], got {shape}: pass the patch tokens of a ViT"
            )
        batch_size, num_tokens = shape[:2]
        if token_grid is None and math.isqrt(num_tokens) ** 2 != num_tokens:
            raise ValueError(
                f"student_high must hold a square grid of patch tokens, got {num_tokens}, which is no square: omit class "
                "tokens, and pass token_grid for images that are not square"
            )
        if token_grid is not None and math.prod(token_grid) != num_tokens:
            raise ValueError(
                f"student_high must hold the {token_grid[0]}x{token_grid[1]} patch tokens of token_grid, got {num_tokens}: "
                "omit class tokens"
            )
        for name, tokens, layers, side in (
            ("student_low", student_low, (2,), "student"),
            ("student_high", student_high, (), "student"),
            ("teacher_low", teacher_low, (2,), "teacher"),
            ("teacher_high", teacher_high, (), "teacher"),
        ):
            dim = self.student_dim if side == "student" else self.teacher_dim
            expected, got = [batch_size, *layers, num_tokens, dim], list(tokens.shape)
            if got != expected:
                if got[:-1] == expected[:-1]:
                    mend = f"make ViTKDLoss with {side}_dim={got[-1]}"
                elif len(got) == len(expected) and [got[0], *got[1:-2]] == expected[:-2]:
                    mend = "student and teacher must have one patch size and one image size"
                else:
                    mend = "pass the tokens of the same batch"
                raise ValueError(f"{name} must be {expected} to fit student_high {shape}, got {got}: {mend}")
            if not tokens.is_floating_point():
                raise ValueError(f"{name} must be of a float dtype, got {tokens.dtype}: pass a layer's output")


def random_token_mask(noise: Tensor, mask_ratio: float) -> Tensor:
    """The tokens [B, P, 1] (bool) that are masked: all but the `int(P * (1 - mask_ratio))` of the smallest noise [B, P]."""
    num_kept = int(noise.shape[1] * (1 - mask_ratio))
    place = noise.argsort(dim=1).argsort(dim=1)
    return (place >= num_kept).unsqueeze(-1)
