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
    """[B] factors of W phi for same-frame and other pairs: share over the sum of W, and over B."""
    same, other = _sums(frame, weight, like)
    least = 1e-9 * (same + other)  # rounding is not weight
    shares = ((same, 1.0 if frame is None else spatial), (other, temporal))
    return tuple(torch.where(total > least, share / total.clamp_min(1e-300), 0) / len(total) for total, share in shares)


def _factor(rows: slice, frame, weight, factors: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """The factor of every pair of a row panel, [B or 1, rows, N] in the dtype of ``like``, times N^2 lest fp16 lose it."""
    n = like.shape[1]
    same, other = ((f * n**2).to(like.dtype)[:, None, None] for f in factors)
    pairs = same if frame is None else torch.where(frame[rows, None] == frame[None, :], same, other)
    if weight is not None:
        w = weight.to(like.dtype)
        pairs = pairs * (w[:, rows, None] + w[:, None, :] - w[:, rows, None] * w[:, None, :])
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
        pairs = _factor(slice(0, n), frame, weight, pair_factors(frame, weight, student, spatial, temporal), student)
        return (pairs * phi).sum(dtype=_wide(student)) / n**2

    return loss


def checkpointed(*, margin: float, penalty: str, spatial: float = 0.5, temporal: float = 0.5, rows: int = 1024) -> RelationLoss:
    """Row chunks under torch.utils.checkpoint: no N x N matrix is kept, each chunk is computed again in the backward."""

    def loss(student: Tensor, teacher: Tensor, frame: Tensor | None, weight: Tensor | None) -> Tensor:
        n = student.shape[1]
        x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        plain = frame is None and weight is None
        factors = None if plain else pair_factors(frame, weight, student, spatial, temporal)

        def panel(x: Tensor, y: Tensor, start: int) -> Tensor:
            part = slice(start, start + rows)
            d = x[:, part] @ x.transpose(1, 2) - y[:, part] @ y.transpose(1, 2)
            phi = _penalised(d, margin, penalty)
            if not plain:
                phi = _factor(part, frame, weight, factors, x) * phi
            return phi.sum(dtype=_wide(x))

        total = torch.stack([checkpoint(panel, x, y, start, use_reentrant=False) for start in range(0, n, rows)]).sum()
        return total / (n**2 * (len(x) if plain else 1))

    return loss


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
    factors = pair_factors(frame, weight, x, spatial, temporal)
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


def residual(predicted: Tensor, target: Tensor, segments: Tensor, *, metric: str) -> Tensor:
    """The predictive residual as one writes it in fp32, for segments of equal length: [S]. ``eager`` and ``compile``."""
    z, h = predicted.to(_wide(predicted)), F.layer_norm(target.to(_wide(target)), target.shape[-1:])
    if metric == "cosine":
        row = 1 - F.cosine_similarity(F.layer_norm(z, z.shape[-1:]), h, dim=-1)
    else:
        row = (z - h).abs().mean(-1) if metric == "l1" else (z - h).square().mean(-1)
    return row.view(len(segments) - 1, -1).mean(1)
