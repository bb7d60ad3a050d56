"""The same losses as people write them in plain PyTorch, and the gradients in fp64 by which all variants are judged.

The relation loss of student tokens x and teacher tokens y, both of length 1, with token weights w:

    d_ij = x_i x_j - y_i y_j
    W_ij = w_i + w_j - w_i w_j
    loss = sum_ij W_ij phi(d_ij) / sum_ij W_ij, for the pairs of one frame and for the others, each with its share

Each relation baseline is ``f(student_BND, teacher_BNE, frame_N, weight_BN)`` -> scalar, made by a function that takes
the options. It computes in the dtype of its inputs as ordinary code does, with sums in fp32 (fp64 for fp64). The tests
compare them with ``ldo.ops`` and impl="reference" in fp64.

Shapes: B clips, N tokens, D and E features of student and teacher, frames numbered from 0 to below N; T frames of P
tokens; M rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RelationLoss = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _penalised(d: Tensor, margin: float, penalty: str) -> Tensor:
    if penalty == "squared" and margin == 0:
        return d.square()
    excess = F.relu(d.abs() - margin)
    return excess if penalty == "hinge" else excess.square()


def _sums(frame: Tensor | None, weight: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of W over the same-frame pairs and over the others, [B] each, by closed forms.

    Without frames all pairs count as same-frame pairs.
    """
    clips, tokens = like.shape[:2]
    ones = torch.ones(clips, tokens, dtype=torch.float64, device=like.device)
    weights = ones if weight is None else weight.double()
    # sum_ij (w_i + w_j - w_i w_j) over n tokens is 2 n sum(w) - sum(w)^2: no N x N matrix is needed
    everything = 2 * tokens * weights.sum(1) - weights.sum(1).square()
    if frame is None:
        return everything, torch.zeros_like(everything)
    nothing = torch.zeros_like(ones)
    tokens_per_frame = nothing.index_add(1, frame, ones)
    weight_per_frame = nothing.index_add(1, frame, weights)
    together = (2 * tokens_per_frame * weight_per_frame - weight_per_frame.square()).sum(1)
    return together, everything - together


def pair_factors(
    frame: Tensor | None, weight: Tensor | None, like: Tensor, spatial: float, temporal: float
) -> tuple[Tensor, Tensor]:
    """[B] factors of W phi for same-frame and other pairs: N^2 share / (B sum of W).

    N^2 is in them because half precision would lose such small numbers.
    """
    together, other = _sums(frame, weight, like)
    # A class without weight contributes nothing; its sum is the rounding error of the closed form, not exactly 0.
    negligible = 1e-9 * (together + other)
    square = like.shape[1] ** 2 / len(like)

    def factor(total: Tensor, share: float) -> Tensor:
        # clamped: where evaluates both branches, and neither should divide by zero
        return torch.where(total > negligible, share / total.clamp_min(1e-300), 0) * square

    return factor(together, 1.0 if frame is None else spatial), factor(other, temporal)


def _pairs(
    frame_p: Tensor | None,
    frame: Tensor | None,
    weight_p: Tensor | None,
    weight: Tensor | None,
    factors: tuple[Tensor, Tensor],
    like: Tensor,
) -> Tensor:
    """The factor of every pair of some rows (``_p``) and some columns, from ``pair_factors``.

    [B or 1, rows, columns] in the dtype of ``like``.
    """
    together, other = (factor.to(like.dtype)[:, None, None] for factor in factors)
    pairs = together if frame is None else torch.where(frame_p[:, None] == frame[None, :], together, other)
    if weight is not None:
        row_weight = weight_p.to(like.dtype)[:, :, None]
        column_weight = weight.to(like.dtype)[:, None, :]
        pairs = pairs * (row_weight + column_weight - row_weight * column_weight)
    return pairs


def dense(*, margin: float, penalty: str, spatial: float = 0.5, temporal: float = 0.5) -> RelationLoss:
    """The formula written down: normalise, two N x N matrices, penalty, weights; autograd does the rest.

    The variants ``eager`` and ``compile``.
    """

    def loss(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None) -> Tensor:
        tokens = student.shape[1]
        x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        d = x @ x.transpose(1, 2) - y @ y.transpose(1, 2)
        penalties = _penalised(d, margin, penalty)
        if frame is None and weight is None:
            return penalties.mean(dtype=_wide(student))
        pairs = _pairs(frame, frame, weight, weight, pair_factors(frame, weight, student, spatial, temporal), student)
        return (pairs * penalties).sum(dtype=_wide(student)) / tokens**2

    return loss


def checkpointed(
    *,
    margin: float,
    penalty: str,
    spatial: float = 0.5,
    temporal: float = 0.5,
    rows: int = 1024,
    compiled: bool = False,
) -> RelationLoss:
    """Row chunks under torch.utils.checkpoint: no N x N matrix is kept, and the backward computes each chunk again.

    ``compiled``: torch.compile fuses everything that follows the products of a chunk.
    """

    # ``_p``: the rows of one chunk
    def panel(x_p, y_p, x, y, frame_p, frame, weight_p, weight, factors) -> Tensor:
        d = x_p @ x.transpose(1, 2) - y_p @ y.transpose(1, 2)
        penalties = _penalised(d, margin, penalty)
        if factors is not None:
            penalties = _pairs(frame_p, frame, weight_p, weight, factors, x) * penalties
        return penalties.sum(dtype=_wide(x))

    compute = torch.compile(panel, dynamic=False) if compiled else panel

    def loss(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None) -> Tensor:
        tokens = student.shape[1]
        x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        uniform = frame is None and weight is None
        factors = None if uniform else pair_factors(frame, weight, student, spatial, temporal)
        panels = []
        for start in range(0, tokens, rows):
            block = slice(start, start + rows)
            frame_p = None if frame is None else frame[block]
            weight_p = None if weight is None else weight[:, block]
            arguments = (x[:, block], y[:, block], x, y, frame_p, frame, weight_p, weight, factors)
            panels.append(checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False))
        return torch.stack(panels).sum() / (tokens**2 * (len(x) if uniform else 1))

    return loss


def panels(
    *, margin: float, penalty: str, spatial: float = 0.5, temporal: float = 0.5, rows: int = 2048
) -> RelationLoss:
    """The best that PyTorch's own parts give: row panels by cuBLAS, an epilogue by torch.compile, a manual backward.

    Panels cover the upper triangle. A panel's square on the diagonal counts once, and what lies to its right twice,
    since pairs are symmetric. The slopes of a panel give the gradient of its own rows and, transposed, of those below.
    The gradient is computed in the forward, in fp32, and no N x N matrix is kept.
    """

    def epilogue(d, frame_p, frame, weight_p, weight, factors, square: int) -> tuple[Tensor, Tensor]:
        counts = torch.ones(d.shape[-1], dtype=_wide(d), device=d.device)
        counts[square:] = 2
        penalties = _penalised(d, margin, penalty).to(_wide(d))
        slope = _slope(d, margin, penalty)
        if factors is not None:
            pairs = _pairs(frame_p, frame, weight_p, weight, factors, d)
            penalties = penalties * pairs
            slope = slope * pairs
        return (penalties * counts).sum(), slope

    # dynamic: every panel is narrower than the one before, and one compilation must serve them all
    fused = torch.compile(epilogue, dynamic=True)

    class Panels(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, frame, weight, factors):
            tokens = x.shape[1]
            loss = torch.zeros((), dtype=_wide(x), device=x.device)
            gradient = torch.zeros_like(x, dtype=_wide(x)) if ctx.needs_input_grad[0] else None
            for start in range(0, tokens, rows):
                own = slice(start, min(start + rows, tokens))
                right = slice(start, None)
                square = own.stop - start
                d = torch.bmm(x[:, own], x[:, right].mT)
                d.baddbmm_(y[:, own], y[:, right].mT, alpha=-1)
                frames = (None, None) if frame is None else (frame[own], frame[right])
                weights = (None, None) if weight is None else (weight[:, own], weight[:, right])
                total, slope = fused(d, *frames, *weights, factors, square)
                loss += total
                if gradient is not None:
                    # dL/dx_i = 2 sum_j slope_ij x_j; the factor 2 comes in the backward
                    _add_product(gradient[:, own], slope, x[:, right])
                    if own.stop < tokens:
                        _add_product(gradient[:, own.stop :], slope[:, :, square:].mT, x[:, own])
            scale = 1 / (tokens**2 * (len(x) if factors is None else 1))
            ctx.save_for_backward(gradient)
            ctx.scale = scale
            ctx.dtype = x.dtype
            return loss * scale

        @staticmethod
        def backward(ctx, upstream):
            (gradient,) = ctx.saved_tensors
            return (gradient * (2 * ctx.scale * upstream)).to(ctx.dtype), None, None, None, None

    def loss(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None) -> Tensor:
        x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        factors = None if frame is None and weight is None else pair_factors(frame, weight, student, spatial, temporal)
        return Panels.apply(x, y, frame, weight, factors)

    return loss


def _slope(d: Tensor, margin: float, penalty: str) -> Tensor:
    """The derivative of ``_penalised`` in d."""
    if penalty == "squared" and margin == 0:
        return 2 * d
    excess = F.relu(d.abs() - margin)
    return torch.where(excess > 0, d.sign(), 0) if penalty == "hinge" else 2 * d.sign() * excess


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in fp32 for half-precision factors."""
    # Only CUDA multiplies half precision into an fp32 result.
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        torch.baddbmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.baddbmm_(left.to(total.dtype), right.to(total.dtype))


def bmm(*, frames: int, margin: float, penalty: str = "hinge") -> RelationLoss:
    """Token relation distillation as the field computes it: a batched product of every frame with its copy of the clip.

    Tokens are ordered by frame, ``frames`` of equal size. All pairs count equally; there are no weights.
    """

    def relations(x_BND: Tensor) -> Tensor:
        clips, tokens, width = x_BND.shape
        of_frames = x_BND.reshape(clips * frames, tokens // frames, width)
        copies = x_BND.unsqueeze(1).expand(clips, frames, tokens, width).reshape(clips * frames, tokens, width)
        return torch.bmm(of_frames, copies.transpose(1, 2))  # [BT, P, N]

    def loss(student: Tensor, teacher: Tensor, frame: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        if frame is not None or weight is not None:
            raise ValueError("the bmm baseline knows neither classes of pairs nor weights")
        d = relations(F.normalize(student, dim=-1)) - relations(F.normalize(teacher, dim=-1))
        return _penalised(d, margin, penalty).mean(dtype=_wide(student))

    return loss


def gradient_rows(
    student: Tensor,
    teacher: Tensor,
    frame: Tensor | None,
    weight: Tensor | None,
    rows: Tensor,
    *,
    margin: float,
    penalty: str,
    spatial: float = 0.5,
    temporal: float = 0.5,
    panel: int = 512,
) -> Tensor:
    """The exact gradient [B, rows, D] of the relation loss in some student tokens, in fp64.

    Computed by row panels, so that no N x N matrix is needed.
    """
    x, y = student.double(), teacher.double()
    inverse = 1 / x.norm(dim=-1, keepdim=True)
    x, y = x * inverse, F.normalize(y, dim=-1)
    factors = [factor / x.shape[1] ** 2 for factor in pair_factors(frame, weight, x, spatial, temporal)]
    gradient = torch.empty(len(x), len(rows), x.shape[-1], dtype=torch.float64, device=x.device)
    for index in range(len(x)):
        for start in range(0, len(rows), panel):
            chosen = rows[start : start + panel]
            d = x[index, chosen] @ x[index].T - y[index, chosen] @ y[index].T
            excess = (d.abs() - margin).clamp_min(0)
            slope = d.sign() * ((excess > 0) if penalty == "hinge" else 2 * excess)
            if frame is None:
                slope *= factors[0][index]
            else:
                slope *= torch.where(frame[chosen, None] == frame, factors[0][index], factors[1][index])
            if weight is not None:
                weights = weight[index].double()
                slope *= weights[chosen, None] + weights - weights[chosen, None] * weights
            # from the gradient in the normalised tokens to that in the tokens: drop its part along them, over the norm
            unit_gradient = 2 * slope @ x[index]
            along = (x[index, chosen] * unit_gradient).sum(-1, keepdim=True)
            tangent = unit_gradient - x[index, chosen] * along
            gradient[index, start : start + panel] = tangent * inverse[index, chosen]
    return gradient


def residual(predicted: Tensor, target: Tensor, segments: Tensor, *, metric: str, widen: bool = True) -> Tensor:
    """The predictive residual written down, for segments of equal length: [S].

    ``widen``: in fp32 throughout, which costs nothing under torch.compile; else in the inputs' own precision, which
    costs eager code less memory traffic.
    """
    prediction = predicted.to(_wide(predicted)) if widen else predicted
    truth = target.to(_wide(target)) if widen else target
    truth = F.layer_norm(truth, truth.shape[-1:])
    if metric == "cosine":
        per_row = 1 - F.cosine_similarity(F.layer_norm(prediction, prediction.shape[-1:]), truth, dim=-1)
    elif metric == "l1":
        per_row = (prediction - truth).abs().mean(-1)
    else:
        per_row = (prediction - truth).square().mean(-1)
    return per_row.view(len(segments) - 1, -1).mean(1, dtype=_wide(predicted))
