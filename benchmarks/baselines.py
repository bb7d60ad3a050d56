"""What people write without us: the same losses in plain PyTorch, and the gradients in fp64 by which all are judged.

Each relation baseline is ``f(student_BND, teacher_BNE, frame_N, weight_BN)`` -> scalar, made by a function that takes
the options, and computes in the dtype of its inputs as ordinary code does, with sums in fp32 (fp64 for fp64). The
tests hold them to ``ldo.ops`` with impl="reference" in fp64.

Shapes: B clips, N tokens, D and E features of student and teacher, frames numbered from 0 to below N; T frames of P tokens; M rows.
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
    a = F.relu(d.abs() - margin)
    return a if penalty == "hinge" else a.square()


def _sums(frame: Tensor | None, weight: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of W over the same-frame pairs and over the others, [B] each, by closed forms; without frames all pairs are "same"."""
    b, n = like.shape[:2]
    w = torch.ones(b, n, dtype=torch.float64, device=like.device) if weight is None else weight.double()
    everything = 2 * n * w.sum(1) - w.sum(1).square()
    if frame is None:
        return everything, torch.zeros_like(everything)
    zeros = torch.zeros(b, n, dtype=torch.float64, device=like.device)
    count, per_frame = zeros.index_add(1, frame, torch.ones_like(w)), zeros.index_add(1, frame, w)
    same = (2 * count * per_frame - per_frame.square()).sum(1)
    return same, everything - same


def pair_factors(frame: Tensor | None, weight: Tensor | None, like: Tensor, spatial: float, temporal: float) -> tuple[Tensor, Tensor]:
    """[B] factors of W phi for same-frame and other pairs: share over the sum of W, and over B; times N^2, lest half precision lose them."""
    same, other = _sums(frame, weight, like)
    least = 1e-9 * (same + other)  # rounding is not weight
    shares = ((same, 1.0 if frame is None else spatial), (other, temporal))
    scale = like.shape[1] ** 2 / len(like)
    return tuple(torch.where(total > least, share / total.clamp_min(1e-300), 0) * scale for total, share in shares)


def _pairs(frame_p, frame, weight_p, weight, factors: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """The factor of every pair of some rows (``_p``) and some columns, [B or 1, rows, columns] in the dtype of ``like``; see ``pair_factors``."""
    same, other = (f.to(like.dtype)[:, None, None] for f in factors)
    pairs = same if frame is None else torch.where(frame_p[:, None] == frame[None, :], same, other)
    if weight is not None:
        u, v = weight_p.to(like.dtype)[:, :, None], weight.to(like.dtype)[:, None, :]
        pairs = pairs * (u + v - u * v)
    return pairs


def dense(*, margin: float, penalty: str, spatial: float = 0.5, temporal: float = 0.5) -> RelationLoss:
    """The formula as one writes it: normalise, two N x N matrices, penalty, weights; autograd does the rest. ``eager`` and ``compile``."""

    def loss(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None) -> Tensor:
        n = student.shape[1]
        x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        d = x @ x.transpose(1, 2) - y @ y.transpose(1, 2)
        phi = _penalised(d, margin, penalty)
        if frame is None and weight is None:
            return phi.mean(dtype=_wide(student))
        pairs = _pairs(frame, frame, weight, weight, pair_factors(frame, weight, student, spatial, temporal), student)
        return (pairs * phi).sum(dtype=_wide(student)) / n**2

    return loss


def checkpointed(
    *, margin: float, penalty: str, spatial: float = 0.5, temporal: float = 0.5, rows: int = 1024, compiled: bool = False
) -> RelationLoss:
    """Row chunks under torch.utils.checkpoint: no N x N matrix is kept, each chunk is computed again in the backward.

    ``compiled``: a chunk by torch.compile, which fuses all that follows its products.
    """

    def panel(x_p, y_p, x, y, frame_p, frame, weight_p, weight, factors) -> Tensor:
        d = x_p @ x.transpose(1, 2) - y_p @ y.transpose(1, 2)
        phi = _penalised(d, margin, penalty)
        if factors is not None:
            phi = _pairs(frame_p, frame, weight_p, weight, factors, x) * phi
        return phi.sum(dtype=_wide(x))

    run = torch.compile(panel, dynamic=False) if compiled else panel

    def loss(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None) -> Tensor:
        n = student.shape[1]
        x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        plain = frame is None and weight is None
        factors = None if plain else pair_factors(frame, weight, student, spatial, temporal)
        total = []
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            frame_p, weight_p = None if frame is None else frame[part], None if weight is None else weight[:, part]
            given = (x[:, part], y[:, part], x, y, frame_p, frame, weight_p, weight, factors)
            total.append(checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False))
        return torch.stack(total).sum() / (n**2 * (len(x) if plain else 1))

    return loss


def panels(*, margin: float, penalty: str, spatial: float = 0.5, temporal: float = 0.5, rows: int = 2048) -> RelationLoss:
    """The best that PyTorch's own parts give: row panels of the upper triangle by cuBLAS, an epilogue by torch.compile, the backward by hand.

    A panel's square on the diagonal counts once and what lies right of it twice, since pairs are symmetric. The slopes of a panel serve its
    own rows and, transposed, those below; the gradient is made in the forward, in fp32, and no N x N matrix is kept.
    """

    def epilogue(d, frame_p, frame, weight_p, weight, factors, square: int) -> tuple[Tensor, Tensor]:
        n = torch.ones(d.shape[-1], dtype=_wide(d), device=d.device)
        n[square:] = 2
        phi, slope = _penalised(d, margin, penalty).to(_wide(d)), _slope(d, margin, penalty)
        if factors is not None:
            pairs = _pairs(frame_p, frame, weight_p, weight, factors, d)
            phi, slope = phi * pairs, slope * pairs
        return (phi * n).sum(), slope

    fused = torch.compile(epilogue, dynamic=True)  # panels become narrower: one compilation for all

    class Panels(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, frame, weight, factors):
            n = x.shape[1]
            loss = torch.zeros((), dtype=_wide(x), device=x.device)
            gradient = torch.zeros_like(x, dtype=_wide(x)) if ctx.needs_input_grad[0] else None
            for start in range(0, n, rows):
                part, right = slice(start, min(start + rows, n)), slice(start, None)
                square = part.stop - start
                d = torch.bmm(x[:, part], x[:, right].mT)
                d.baddbmm_(y[:, part], y[:, right].mT, alpha=-1)
                of_frame = (None, None) if frame is None else (frame[part], frame[right])
                of_weight = (None, None) if weight is None else (weight[:, part], weight[:, right])
                total, slope = fused(d, *of_frame, *of_weight, factors, square)
                loss += total
                if gradient is not None:  # dL/dx_i = 2 sum_j slope_ij x_j
                    _add_product(gradient[:, part], slope, x[:, right])
                    if part.stop < n:
                        _add_product(gradient[:, part.stop :], slope[:, :, square:].mT, x[:, part])
            scale = 1 / (n**2 * (len(x) if factors is None else 1))
            ctx.save_for_backward(gradient)
            ctx.scale, ctx.dtype = scale, x.dtype
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
    if penalty == "squared" and margin == 0:
        return 2 * d
    a = F.relu(d.abs() - margin)
    return torch.where(a > 0, d.sign(), 0) if penalty == "hinge" else 2 * d.sign() * a


def _add_product(c: Tensor, a: Tensor, b: Tensor) -> None:
    """c += a b, in fp32 for half-precision a and b."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.baddbmm(c, a, b, out_dtype=c.dtype, out=c)
    else:
        c.baddbmm_(a.to(c.dtype), b.to(c.dtype))


def bmm(*, frames: int, margin: float, penalty: str = "hinge") -> RelationLoss:
    """Token relation distillation as the field computes it: every frame, by one batched product, against a copy of the whole clip of its own.

    Tokens are ordered by frame, ``frames`` of equal size. All pairs count alike; there are no weights.
    """

    def relations(x_BND: Tensor) -> Tensor:
        b, n, d = x_BND.shape
        of_frames = x_BND.reshape(b * frames, n // frames, d)
        copies = x_BND.unsqueeze(1).expand(b, frames, n, d).reshape(b * frames, n, d)
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
    """The exact gradient [B, rows, D] of the relation loss in some student tokens, in fp64 by row panels: never N x N."""
    x, y = student.double(), teacher.double()
    inverse = 1 / x.norm(dim=-1, keepdim=True)
    x, y = x * inverse, F.normalize(y, dim=-1)
    factors = [factor / x.shape[1] ** 2 for factor in pair_factors(frame, weight, x, spatial, temporal)]
    out = torch.empty(len(x), len(rows), x.shape[-1], dtype=torch.float64, device=x.device)
    for b in range(len(x)):
        for start in range(0, len(rows), panel):
            part = rows[start : start + panel]
            d = x[b, part] @ x[b].T - y[b, part] @ y[b].T
            a = (d.abs() - margin).clamp_min(0)
            slope = d.sign() * ((a > 0) if penalty == "hinge" else 2 * a)
            slope *= factors[0][b] if frame is None else torch.where(frame[part, None] == frame, factors[0][b], factors[1][b])
            if weight is not None:
                w = weight[b].double()
                slope *= w[part, None] + w - w[part, None] * w
            h = 2 * slope @ x[b]
            out[b, start : start + panel] = (h - x[b, part] * (x[b, part] * h).sum(-1, keepdim=True)) * inverse[b, part]
    return out


def residual(predicted: Tensor, target: Tensor, segments: Tensor, *, metric: str, widen: bool = True) -> Tensor:
    """The predictive residual as one writes it, for segments of equal length: [S].

    ``widen``: in fp32 throughout, as torch.compile fuses it at no cost; else in the inputs' own precision, as eager code does it with less traffic.
    """
    z, h = (predicted.to(_wide(predicted)), target.to(_wide(target))) if widen else (predicted, target)
    h = F.layer_norm(h, h.shape[-1:])
    if metric == "cosine":
        row = 1 - F.cosine_similarity(F.layer_norm(z, z.shape[-1:]), h, dim=-1)
    else:
        row = (z - h).abs().mean(-1) if metric == "l1" else (z - h).square().mean(-1)
    return row.view(len(segments) - 1, -1).mean(1, dtype=_wide(predicted))
