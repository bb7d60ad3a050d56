"""The relation loss: how far the pairwise similarities of a student's tokens are from those of a teacher's.

For clips b and tokens i, j with cosine similarities s_ij (student) and y_ij (teacher):

    d_ij  = s_ij - y_ij
    phi   = max(|d| - margin, 0)                       hinge, or its square, or its Huber form
    W_ij  = w_i + w_j - w_i w_j                        soft OR: 0 only where both weights are 0
    L_b   = spatial  * sum_same phi W / sum_same W     pairs within a frame, including the diagonal
          + temporal * sum_diff phi W / sum_diff W     pairs of different frames
    L     = mean_b L_b

Without ``frame_N`` all pairs form one class of share 1: token relation distillation as in VideoREPA. A class whose
weights sum to 0 contributes 0. A zero vector has similarity 0 to everything and gradient exactly 0.

Gradient, with G_ij = W_ij phi'(d_ij) / normaliser (symmetric) and xh = x / |x|:

    h_i = 2 sum_j G_ij xh_j,    dL/dx_i = (h_i - xh_i (xh_i . h_i)) / |x_i|

If all pairs have the same weight and phi is d^2 (squared, margin 0), the N x N pairs need not be visited. With unit
vectors as rows (``ldo/ops/relation_closed.py``):

    sum_ij d_ij^2 = |Xh' Xh|^2 + |Yh' Yh|^2 - 2 |Xh' Yh|^2          dL/dXh = 4 (Xh (Xh' Xh) - Yh (Yh' Xh))

Every impl but the reference does so if it is less work (N above about D + E). It is a difference of sums as large as
the mean of s^2, so its rounding error is relative to these.

Shapes: B clips, N tokens, D and E features of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldo.kernels import support
from ldo.kernels.support import HUBER
from ldo.ops.dispatch import as_given, choose_triton
from ldo.ops.relation_closed import (
    ClosedForm,
    accumulator,
    closed_form_is_cheaper,
    matrix_product,
    normalised,
    project,
    scaled,
)

PENALTIES = ("hinge", "squared", "huber")

# Rows of the pair matrices that the chunked form holds at a time on a CPU; pairs that it holds on a GPU.
PANEL = 512
PANEL_GPU = 2**24


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
    """Distance between the pairwise cosine similarities of student and teacher; a scalar in fp32 (fp64 for fp64 input).

    ``frame_N``: int (within int32), the frame of each token; None compares all pairs as one class. ``weight_BN``: token
    weights in [0, 1]; None gives all pairs weight 1. ``margin`` >= 0. Differentiable only in the student.

    Only the inputs' dtypes decide the precision: autocast changes no bit of the loss or its gradient.

    ``impl``: "reference" (dense, the specification), "chunked" (row panels in PyTorch, no N x N matrix kept), "triton"
    (fused kernels; fp32, bf16, fp16), or "auto": triton on a GPU, else chunked.

    ValueError on shapes that do not fit, a negative margin, or an unknown penalty or impl.
    """
    _check(student_BND, teacher_BNE, frame_N, weight_BN, penalty, margin)
    device = student_BND.device
    missing = support.unavailable(device, student_BND.dtype)
    forms = ("reference", "chunked")
    impl = choose_triton("relation_loss", impl, device, missing, forms, "memory-bounded PyTorch form")
    teacher = teacher_BNE.detach()
    # then every pair counts alike, and sums over pairs have a closed form
    uniform_squares = penalty == "squared" and margin == 0 and frame_N is None and weight_BN is None
    with as_given(device):
        if impl != "reference" and uniform_squares and closed_form_is_cheaper(student_BND, teacher):
            return ClosedForm.apply(student_BND, teacher, _operand(student_BND))
        if impl == "triton":
            # imported here, since it needs Triton
            from ldo.kernels.relation import fused_relation_loss

            options = {"margin": margin, "penalty": penalty, "spatial": spatial, "temporal": temporal}
            return fused_relation_loss(student_BND, teacher, frame_N, weight_BN, **options)
        coefficients = _coefficients(student_BND, frame_N, weight_BN, spatial, temporal)
        if impl == "reference":
            return _reference(student_BND, teacher, frame_N, weight_BN, coefficients, margin, penalty)
        return _Chunked.apply(student_BND, teacher, frame_N, weight_BN, coefficients, margin, penalty)


def _check(
    student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None, penalty: str, margin: float
) -> None:
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"relation_loss: student [B, N, D] and teacher [B, N, E] expected, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if not student.numel():
        raise ValueError(f"relation_loss: student of shape {tuple(student.shape)} holds no tokens")
    if frame is not None and (frame.shape != student.shape[1:2] or frame.is_floating_point()):
        raise ValueError(
            f"relation_loss: frame_N must be {student.shape[1]} integers, got {frame.dtype} {tuple(frame.shape)}"
        )
    if weight is not None and weight.shape != student.shape[:2]:
        raise ValueError(f"relation_loss: weight_BN must be {tuple(student.shape[:2])}, got {tuple(weight.shape)}")
    if penalty not in PENALTIES:
        raise ValueError(f"relation_loss: unknown penalty {penalty!r}; one of {', '.join(PENALTIES)}")
    # this way round, a NaN is refused too
    if not margin >= 0:
        raise ValueError(f"relation_loss: margin must be at least 0, got {margin}")
    devices = {tensor.device for tensor in (student, teacher, frame, weight) if tensor is not None}
    if len(devices) > 1:
        raise ValueError("relation_loss: student, teacher, frame_N and weight_BN must be on one device")


def _coefficients(
    student: Tensor, frame: Tensor | None, weight: Tensor | None, spatial: float, temporal: float
) -> Tensor:
    """Factors [B, 2] of W phi for same-frame and other pairs: class share / (B sum W).

    The sums come from a closed form, without an N x N matrix.
    """
    clips, tokens = student.shape[:2]
    device = student.device
    # in fp64, since the cross-frame sum below is a difference of large numbers
    if weight is None:
        weights = torch.ones(clips, tokens, dtype=torch.float64, device=device)
    else:
        weights = weight.detach().to(torch.float64)

    def sum_over_pairs(count: Tensor | int, summed: Tensor) -> Tensor:
        """The sum of w_i + w_j - w_i w_j over the pairs of ``count`` tokens whose weights add up to ``summed``."""
        return 2 * count * summed - summed.square()

    everything = sum_over_pairs(tokens, weights.sum(1))
    if frame is None:
        sums = torch.stack([everything, everything], 1)
        share = torch.ones(2, dtype=torch.float64, device=device)
    else:
        index = torch.unique(frame, return_inverse=True)[1]
        frames = int(index.max()) + 1
        zeros = torch.zeros(clips, frames, dtype=torch.float64, device=device)
        per_frame = zeros.index_add_(1, index, weights)
        same = sum_over_pairs(torch.bincount(index, minlength=frames), per_frame).sum(1)
        cross = everything - same
        # what rounding leaves of a difference is no weight
        cross = torch.where(cross > 1e-9 * everything.clamp_min(1), cross, 0)
        sums = torch.stack([same, cross], 1)
        share = torch.tensor([spatial, temporal], dtype=torch.float64, device=device)
    factor = torch.where(sums > 0, share / sums.clamp_min(1e-300), 0) / clips
    return factor.to(accumulator(student))


def _phi(difference: Tensor, margin: float, penalty: str) -> Tensor:
    beyond = (difference.abs() - margin).clamp_min(0)
    if penalty == "hinge":
        return beyond
    if penalty == "squared":
        return beyond.square()
    return torch.where(beyond < HUBER, beyond.square() / (2 * HUBER), beyond - HUBER / 2)


def _phi_slope(difference: Tensor, margin: float, penalty: str) -> Tensor:
    beyond = (difference.abs() - margin).clamp_min(0)
    if penalty == "hinge":
        return torch.sign(difference) * (beyond > 0)
    if penalty == "squared":
        return 2 * torch.sign(difference) * beyond
    return torch.sign(difference) * (beyond / HUBER).clamp_max(1)


def _pair_weight(
    weight: Tensor | None, frame: Tensor | None, coefficients: Tensor, clip: int, rows: slice, like: Tensor
) -> Tensor:
    """W_ij times its class factor for one clip's row panel, from its first row to the right edge: [rows, N - start]."""
    right = slice(rows.start, None)
    same, cross = coefficients[clip]
    if frame is None:
        factor = same.expand_as(like)
    else:
        factor = torch.where(frame[rows, None] == frame[None, right], same, cross)
    if weight is None:
        return factor
    weights = weight[clip].to(like.dtype)
    rows_weight, right_weight = weights[rows, None], weights[None, right]
    return factor * (rows_weight + right_weight - rows_weight * right_weight)


def _reference(student, teacher, frame, weight, coefficients, margin, penalty) -> Tensor:
    """Dense autograd, straight from the formula."""
    dtype = accumulator(student)
    unit_x, _ = normalised(student.to(dtype))
    unit_y, _ = normalised(teacher.to(dtype))
    difference = _MatMul.apply(unit_x, unit_x.mT) - unit_y @ unit_y.mT
    clips, tokens, _ = difference.shape
    rows = slice(0, tokens)
    pairs = [_pair_weight(weight, frame, coefficients, clip, rows, difference[clip]) for clip in range(clips)]
    return (torch.stack(pairs) * _phi(difference, margin, penalty)).sum()


class _MatMul(torch.autograd.Function):
    """left @ right, with a gradient that ignores autocast.

    Autocast would round the gradient of autograd's own product if ``backward`` is called inside its region.
    """

    @staticmethod
    def forward(ctx, left, right):
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx, upstream):
        left, right = ctx.saved_tensors
        with as_given(left.device):
            return upstream @ right.mT, left.mT @ upstream


class _Chunked(torch.autograd.Function):
    """Row panels, from the diagonal to the right edge; the gradient is computed in the forward.

    Pairs are symmetric: a panel's square on the diagonal counts once, the rest twice, and its slopes serve its own rows
    and, transposed, all rows below. No N x N matrix is made. On a GPU, half-precision rows are multiplied as given,
    which rounds nothing, and the products are scaled by 1 / norm in fp32.
    """

    @staticmethod
    def forward(ctx, student, teacher, frame, weight, coefficients, margin, penalty):
        dtype = accumulator(student)
        operand = _operand(student)
        clips, tokens, _ = student.shape
        # on a GPU a fixed number of pairs, so that memory does not grow with N and small N still fill the GPU
        panel = max(256, min(2048, PANEL_GPU // tokens)) if student.is_cuda else PANEL
        loss = torch.zeros((), dtype=torch.float64, device=student.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student, dtype=dtype) if wanted else None
        half = operand != dtype
        # Slopes are of the size of 1 / N^2, too small for fp16: until the projection they are multiplied by N^2.
        raised = tokens * tokens if half else 1
        for clip in range(clips):
            own = _Rows(student[clip], dtype, operand)
            other = _Rows(teacher[clip], dtype, operand)
            for start in range(0, tokens, panel):
                rows, below = slice(start, start + panel), slice(start + panel, None)
                difference = own.cosines(start, panel)
                difference -= other.cosines(start, panel)
                pairs = _pair_weight(weight, frame, coefficients, clip, rows, difference)
                terms = _phi(difference, margin, penalty).mul_(pairs)
                # the first square holds both (i, j) and (j, i); the rest stands for its mirror image too
                loss += terms[:, :panel].sum(dtype=torch.float64) + 2 * terms[:, panel:].sum(dtype=torch.float64)
                if not wanted:
                    continue
                slopes = _phi_slope(difference, margin, penalty).mul_(pairs).mul_(2 * raised).to(operand)
                # batches of one clip, since the product that adds up in fp32 takes only batches
                of_clip = gradient[clip : clip + 1]
                support.add_product(of_clip[:, rows], slopes[None], own.unit[None, start:])
                if start + panel < tokens:
                    support.add_product(of_clip[:, below], slopes[None, :, panel:].mT, own.unit[None, rows])
            if wanted:
                project(gradient[clip], student[clip], own.inverse, 1 / raised)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return scaled(ctx, upstream), None, None, None, None, None, None


class _Rows:
    """The rows of one clip [N, D]: unit vectors in the precision ``operand``, 1 / norm, and cosines between rows."""

    def __init__(self, rows: Tensor, dtype: torch.dtype, operand: torch.dtype):
        self.raw = rows.to(operand)
        self.half = operand != dtype
        self.unit, self.inverse = normalised(self.raw, dtype)

    def cosines(self, start: int, count: int) -> Tensor:
        """Of ``count`` rows from ``start`` with all rows from there on, in fp32 (fp64)."""
        rows, right = slice(start, start + count), slice(start, None)
        if not self.half:
            return self.unit[rows] @ self.unit[right].T
        # unit vectors in half precision would be rounded; the rows as given are exact
        products = matrix_product(self.raw[None, rows], self.raw[None, right].mT)[0]
        return products.mul_(self.inverse[rows]).mul_(self.inverse[right].T)


def _operand(student: Tensor) -> torch.dtype:
    """The dtype in which matrices are multiplied: half precision only if tensor cores make it worth while."""
    return student.dtype if student.is_cuda else accumulator(student)
