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

Where all pairs weigh alike and phi is d^2 (squared, margin 0), N x N pairs need not be visited: with unit vectors as rows,

    sum_ij d_ij^2 = |Xh' Xh|^2 + |Yh' Yh|^2 - 2 |Xh' Yh|^2          dL/dXh = 4 (Xh (Xh' Xh) - Yh (Yh' Xh))

which every impl but the reference does when it is less work (N above about D + E). It is a difference of sums as large
as mean s^2, so what is lost to rounding is measured against those.

Shapes: B clips, N tokens, D and E features of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ldo.kernels import support
from ldo.kernels.support import EPS, HUBER
from ldo.ops.dispatch import as_given, choose_triton

PENALTIES = ("hinge", "squared", "huber")
PANEL = 512  # rows of the pair matrices that the chunked form holds at a time on a CPU; on a GPU it holds PANEL_GPU pairs
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
    """Distance between the pairwise cosine geometries of student and teacher; a scalar in fp32 (fp64 for fp64 input).

    ``frame_N``: int (within int32), the frame of each token; None compares all pairs as one class. ``weight_BN``: token
    weights in [0, 1]; None weighs all pairs 1. ``margin`` >= 0. Differentiable in the student alone.
    The inputs' dtypes alone decide the precision: autocast changes no bit of the loss or its gradient.
    ``impl``: "reference" (dense, the specification), "chunked" (row panels in PyTorch, no N x N matrix kept), "triton"
    (fused kernels; fp32, bf16, fp16), or "auto": triton on a GPU, else chunked.
    ValueError on shapes that do not fit, a negative margin, or an unknown penalty or impl.
    """
    _check(student_BND, teacher_BNE, frame_N, weight_BN, penalty, margin)
    missing = support.unavailable(student_BND.device, student_BND.dtype)
    impl = choose_triton("relation_loss", impl, student_BND.device, missing, ("reference", "chunked"), "memory-bounded PyTorch form")
    teacher = teacher_BNE.detach()
    uniform_squares = penalty == "squared" and margin == 0 and frame_N is None and weight_BN is None
    with as_given(student_BND.device):
        if impl != "reference" and uniform_squares and _closed_form_is_cheaper(student_BND, teacher):
            return _ClosedForm.apply(student_BND, teacher)
        if impl == "triton":
            from ldo.kernels import relation  # here, since it needs Triton

            options = {"margin": margin, "penalty": penalty, "spatial": spatial, "temporal": temporal}
            return relation.relation_loss(student_BND, teacher, frame_N, weight_BN, **options)
        coefficients = _coefficients(student_BND, frame_N, weight_BN, spatial, temporal)
        if impl == "reference":
            return _reference(student_BND, teacher, frame_N, weight_BN, coefficients, margin, penalty)
        return _Chunked.apply(student_BND, teacher, frame_N, weight_BN, coefficients, margin, penalty)


def _check(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None, penalty: str, margin: float) -> None:
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
    if not margin >= 0:
        raise ValueError(f"relation_loss: margin must be at least 0, got {margin}")
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


def _normalised(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Unit vectors, rounded once to the dtype of ``x``, and 1 / norm in ``dtype`` (that of ``x``), both 0 for zero vectors."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    inverse = torch.where(norm > EPS, 1 / norm.clamp_min(EPS), 0)
    if dtype in (None, x.dtype):
        return x * inverse, inverse  # differentiable
    return torch.mul(x, inverse, out=torch.empty_like(x)), inverse


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
    """W_ij times its class factor for one clip's row panel, from its first row to the right edge: [rows, N - start]."""
    right = slice(rows.start, None)
    if frame is None:
        factor = coefficients[b, 0].expand_as(like)
    else:
        factor = torch.where(frame[rows, None] == frame[None, right], coefficients[b, 0], coefficients[b, 1])
    if weight is None:
        return factor
    w = weight[b].to(like.dtype)
    return factor * (w[rows, None] + w[None, right] - w[rows, None] * w[None, right])


def _reference(student, teacher, frame, weight, coefficients, margin, penalty) -> Tensor:
    """Dense autograd, straight from the formula."""
    dtype = _accumulate(student)
    x, _ = _normalised(student.to(dtype))
    y, _ = _normalised(teacher.to(dtype))
    d = _MatMul.apply(x, x.mT) - y @ y.mT
    rows = slice(0, d.shape[1])
    pairs = torch.stack([_pair_weight(weight, frame, coefficients, b, rows, d[b]) for b in range(len(d))])
    return (pairs * _phi(d, margin, penalty)).sum()


class _MatMul(torch.autograd.Function):
    """a b. Autograd's own product would have its gradient rounded by autocast where ``backward`` is called in its region."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, upstream):
        a, b = ctx.saved_tensors
        with as_given(a.device):
            return upstream @ b.mT, a.mT @ upstream


class _Chunked(torch.autograd.Function):
    """Row panels, from the diagonal to the right edge; the gradient is made in the forward.

    Pairs are symmetric: a panel's square on the diagonal counts once, the rest twice, and its slopes serve its own rows
    and, transposed, all rows below. Nothing of size N x N is made. On a GPU half-precision rows are multiplied as they came,
    which rounds nothing, and the products scaled by 1 / norm in fp32.
    """

    @staticmethod
    def forward(ctx, student, teacher, frame, weight, coefficients, margin, penalty):
        dtype, operand = _accumulate(student), _operand(student)
        n = student.shape[1]
        panel = max(256, min(2048, PANEL_GPU // n)) if student.is_cuda else PANEL
        loss = torch.zeros((), dtype=torch.float64, device=student.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student, dtype=dtype) if wanted else None
        for b in range(len(student)):
            x, y = _Rows(student[b], dtype, operand), _Rows(teacher[b], dtype, operand)
            for start in range(0, n, panel):
                rows, below = slice(start, start + panel), slice(start + panel, None)
                d = x.cosines(start, panel)
                d -= y.cosines(start, panel)
                pairs = _pair_weight(weight, frame, coefficients, b, rows, d)
                terms = _phi(d, margin, penalty).mul_(pairs)
                loss += terms[:, :panel].sum(dtype=torch.float64) + 2 * terms[:, panel:].sum(dtype=torch.float64)
                if wanted:
                    g = _phi_slope(d, margin, penalty).mul_(pairs).mul_(2 * n * n if x.half else 2).to(operand)
                    support.add_product(gradient[b : b + 1, rows], g[None], x.unit[None, start:])
                    if start + panel < n:
                        support.add_product(gradient[b : b + 1, below], g[None, :, panel:].mT, x.unit[None, rows])
            if wanted:
                _project(gradient[b], student[b], x.inverse, 1 / (n * n) if x.half else 1.0)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return _scaled(ctx, upstream), *[None] * 6


class _Rows:
    """The rows of one clip [N, D]: as unit vectors in the ``operand``'s precision, with their 1 / norm, and the cosines between them."""

    def __init__(self, rows: Tensor, dtype: torch.dtype, operand: torch.dtype):
        self.raw, self.half = rows.to(operand), operand != dtype
        self.unit, self.inverse = _normalised(self.raw, dtype)

    def cosines(self, start: int, count: int) -> Tensor:
        """Of ``count`` rows from ``start`` with all rows from there on, in fp32 (fp64)."""
        rows, right = slice(start, start + count), slice(start, None)
        if not self.half:
            return self.unit[rows] @ self.unit[right].T
        return _product(self.raw[None, rows], self.raw[None, right].mT)[0].mul_(self.inverse[rows]).mul_(self.inverse[right].T)


class _ClosedForm(torch.autograd.Function):
    """The squared penalty over all pairs from D x D, E x E and D x E matrices.

    Half precision costs little here: the rows that are multiplied are those that came, the matrices are split into two
    parts, and of Xh' Xh the multiple of the identity, which only moves rows along themselves, is left out.
    """

    @staticmethod
    def forward(ctx, student, teacher):
        dtype, operand = _accumulate(student), _operand(student)
        b, n, _ = student.shape
        x, y = student.to(operand), teacher.to(operand)
        (unit_x, inverse_x), (unit_y, inverse_y) = _normalised(x, dtype), _normalised(y, dtype)
        xx, yy, xy = (_product(u.mT, v).div_(n) for u, v in ((unit_x, unit_x), (unit_y, unit_y), (unit_x, unit_y)))
        parts = [m.square().sum(dtype=torch.float64) for m in (xx, yy, xy)]
        gradient = None
        if ctx.needs_input_grad[0]:
            diagonal = xx.diagonal(dim1=-2, dim2=-1)
            diagonal -= diagonal.mean(-1, keepdim=True)
            gradient = _product_split(x, xx).mul_(inverse_x).addcmul_(_product_split(y, xy.mT), inverse_y, value=-1)
            _project(gradient, x, inverse_x, 4 / (b * n))
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return ((parts[0] + parts[1] - 2 * parts[2]).clamp_min(0) / b).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return _scaled(ctx, upstream), None


def _closed_form_is_cheaper(student: Tensor, teacher: Tensor) -> bool:
    n, d, e = *student.shape[1:], teacher.shape[2]
    closed, pairs = 2 * (d * d + e * e + d * e), n * (d + e)
    if student.requires_grad and torch.is_grad_enabled():
        closed, pairs = closed + 2 * (d * d + d * e), pairs + 2 * n * d
    return closed < pairs


def _operand(student: Tensor) -> torch.dtype:
    """What matrices are multiplied in: half precision only where tensor cores make it worth while."""
    return student.dtype if student.is_cuda else _accumulate(student)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, accumulated and returned in fp32 where the operands are half precision."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    accumulate = _accumulate(a)
    return a.to(accumulate) @ b.to(accumulate)


def _product_split(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows matrix, where rounding the matrix to the rows' precision would lose too much of it: as the sum of two."""
    high = matrix.to(rows.dtype)
    whole = _product(rows, high)
    if high.dtype != matrix.dtype:
        support.add_product(whole, rows, (matrix - high).to(rows.dtype))
    return whole


def _project(h: Tensor, x: Tensor, inverse: Tensor, scale: float) -> None:
    """The gradient of unit vectors to that of the rows ``x`` themselves, in place and times ``scale``: (h - u (u h)) / norm with u = x / norm."""
    along = (x * h).sum(-1, keepdim=True).mul_(inverse).mul_(inverse)
    h.addcmul_(x, along, value=-1).mul_(inverse * scale)


def _scaled(ctx, upstream: Tensor) -> Tensor | None:
    """The saved gradient times what comes from above, scaled before it is rounded: in fp16 a loss scale must still act."""
    (gradient,) = ctx.saved_tensors
    if gradient is None:
        return None
    return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=ctx.dtype))
