"""The relation loss: how far the token-pair geometry of a student is from that of a teacher.

For clips b and tokens i, j with cosine similarities s_ij (student) and y_ij (teacher):

    d_ij  = s_ij - y_ij
    phi   = max(|d| - margin, 0)                       hinge, or its square, or its Huber form
    W_ij  = w_i + w_j - w_i w_j                        soft OR: 0 only where both weights are 0
    L_b   = spatial  * sum_same phi W / sum_same W     pairs of one frame, the diagonal among them
          + temporal * sum_diff phi W / sum_diff W     pairs of different frames
    L     = mean_b L_b

Without ``frame_N`` all pairs form one class of weight 1: token relation distillation as in VideoREPA. A class whose
weights sum to 0 contributes 0. A zero vector has similarity 0 to everything and gradient exactly 0.

Gradient, with G_ij = W_ij phi'(d_ij) / normaliser (symmetric) and xh = x / |x|:

    h_i = 2 sum_j G_ij xh_j,    dL/dx_i = (h_i - xh_i (xh_i . h_i)) / |x_i|

Shapes: B clips, N tokens, D and E features of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldo.ops.dispatch import choose

PENALTIES = ("hinge", "squared", "huber")
HUBER = 0.1  # where the Huber form turns from a parabola into a line
EPS = 1e-12  # norms below this are zero vectors
PANEL = 512  # rows of the pair matrices that the chunked form holds at a time


def relation_loss(
    student_BND: Tensor,
    teacher_BNE: Tensor,
    *,
    frame_N: Tensor | None = None,
    weight_BN: Tensor | None = None,
    margin: float = 0.1,
    penalty: str = "hinge",
    spatial: float = 0.5,
    temporal: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """Distance between the pairwise cosine geometries of student and teacher; a scalar in fp32 (fp64 for fp64 input).

    ``frame_N``: int, the frame of each token; None compares all pairs as one class. ``weight_BN``: token weights in
    [0, 1]; None weighs all pairs 1. Differentiable in the student alone.
    ``impl``: "reference" (dense, the specification), "chunked" (row panels, no N x N matrix kept), or "auto".
    ValueError on shapes that do not fit or an unknown penalty or impl.
    """
    _check(student_BND, teacher_BNE, frame_N, weight_BN, penalty)
    impl = choose("relation_loss", impl, ("reference", "chunked"), "chunked", "memory-bounded PyTorch form")
    coefficients = _coefficients(student_BND, frame_N, weight_BN, spatial, temporal)
    teacher = teacher_BNE.detach()
    if impl == "reference":
        return _reference(student_BND, teacher, frame_N, weight_BN, coefficients, margin, penalty)
    return _Chunked.apply(student_BND, teacher, frame_N, weight_BN, coefficients, margin, penalty)


def _check(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None, penalty: str) -> None:
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"relation_loss: student [B, N, D] and teacher [B, N, E] expected, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if not student.numel():
        raise ValueError(f"relation_loss: student of shape {tuple(student.shape)} holds no tokens")
    if frame is not None and (frame.shape != student.shape[1:2] or frame.is_floating_point()):
        raise ValueError(f"relation_loss: frame_N must be {student.shape[1]} integers, got {frame.dtype} {tuple(frame.shape)}")
    if weight is not None and weight.shape != student.shape[:2]:
        raise ValueError(f"relation_loss: weight_BN must be {tuple(student.shape[:2])}, got {tuple(weight.shape)}")
    if penalty not in PENALTIES:
        raise ValueError(f"relation_loss: unknown penalty {penalty!r}; one of {', '.join(PENALTIES)}")
    if len({t.device for t in (student, teacher, frame, weight) if t is not None}) > 1:
        raise ValueError("relation_loss: student, teacher, frame_N and weight_BN must be on one device")


def _accumulate(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _coefficients(student: Tensor, frame: Tensor | None, weight: Tensor | None, spatial: float, temporal: float) -> Tensor:
    """[B, 2] factor of W phi for same-frame and other pairs: class share / (B sum W). Closed forms, no N x N."""
    b, n = student.shape[:2]
    dtype = torch.float64
    w = torch.ones(b, n, dtype=dtype, device=student.device) if weight is None else weight.detach().to(dtype)

    def total(count, summed):  # sum over pairs of w_i + w_j - w_i w_j
        return 2 * count * summed - summed.square()

    everything = total(n, w.sum(1))
    if frame is None:
        sums = torch.stack([everything, everything], 1)
        share = torch.ones(2, dtype=dtype, device=student.device)
    else:
        index = torch.unique(frame, return_inverse=True)[1]
        frames = int(index.max()) + 1
        per_frame = torch.zeros(b, frames, dtype=dtype, device=student.device).index_add_(1, index, w)
        same = total(torch.bincount(index, minlength=frames), per_frame).sum(1)
        cross = everything - same
        cross = torch.where(cross > 1e-9 * everything.clamp_min(1), cross, 0)  # rounding is not weight
        sums = torch.stack([same, cross], 1)
        share = torch.tensor([spatial, temporal], dtype=dtype, device=student.device)
    factor = torch.where(sums > 0, share / sums.clamp_min(1e-300), 0) / b
    return factor.to(_accumulate(student))


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and 1 / norm, both 0 for zero vectors."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.where(norm > EPS, 1 / norm.clamp_min(EPS), 0)
    return x * inverse, inverse


def _phi(d: Tensor, margin: float, penalty: str) -> Tensor:
    a = (d.abs() - margin).clamp_min(0)
    if penalty == "hinge":
        return a
    if penalty == "squared":
        return a.square()
    return torch.where(a < HUBER, a.square() / (2 * HUBER), a - HUBER / 2)


def _phi_slope(d: Tensor, margin: float, penalty: str) -> Tensor:
    a = (d.abs() - margin).clamp_min(0)
    if penalty == "hinge":
        return torch.sign(d) * (a > 0)
    if penalty == "squared":
        return 2 * torch.sign(d) * a
    return torch.sign(d) * (a / HUBER).clamp_max(1)


def _pair_weight(weight: Tensor | None, frame: Tensor | None, coefficients: Tensor, b: int, rows: slice, like: Tensor) -> Tensor:
    """W_ij times its class factor for one clip's row panel, [rows, N]."""
    if frame is None:
        factor = coefficients[b, 0].expand_as(like)
    else:
        factor = torch.where(frame[rows, None] == frame[None, :], coefficients[b, 0], coefficients[b, 1])
    if weight is None:
        return factor
    w = weight[b].to(like.dtype)
    return factor * (w[rows, None] + w[None, :] - w[rows, None] * w[None, :])


def _reference(student, teacher, frame, weight, coefficients, margin, penalty) -> Tensor:
    """Dense autograd, straight from the formula."""
    dtype = _accumulate(student)
    x, _ = _normalised(student.to(dtype))
    y, _ = _normalised(teacher.to(dtype))
    d = x @ x.transpose(1, 2) - y @ y.transpose(1, 2)
    rows = slice(0, d.shape[1])
    pairs = torch.stack([_pair_weight(weight, frame, coefficients, b, rows, d[b]) for b in range(len(d))])
    return (pairs * _phi(d, margin, penalty)).sum()


class _Chunked(torch.autograd.Function):
    """Row panels of ``PANEL`` pairs; the gradient is made in the forward, so nothing of size N x N is kept."""

    @staticmethod
    def forward(ctx, student, teacher, frame, weight, coefficients, margin, penalty):
        dtype = _accumulate(student)
        loss = torch.zeros((), dtype=torch.float64, device=student.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student, dtype=dtype) if wanted else None
        for b in range(len(student)):
            x, inverse = _normalised(student[b].to(dtype))
            y, _ = _normalised(teacher[b].to(dtype))
            for start in range(0, len(x), PANEL):
                rows = slice(start, start + PANEL)
                d = x[rows] @ x.T
                d.addmm_(y[rows], y.T, alpha=-1)
                pairs = _pair_weight(weight, frame, coefficients, b, rows, d)
                loss += (pairs * _phi(d, margin, penalty)).sum(dtype=torch.float64)
                if wanted:
                    h = 2 * (pairs * _phi_slope(d, margin, penalty)) @ x
                    along = (x[rows] * h).sum(-1, keepdim=True)
                    gradient[b, rows] = (h - x[rows] * along) * inverse[rows]
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        # scaled before it is rounded: in fp16 a loss scale must still act
        return (gradient * upstream).to(ctx.dtype) if gradient is not None else None, *[None] * 6
