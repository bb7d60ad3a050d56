"""The predictive residual: how far forecast features are from what came, averaged over segments of tokens.

Per row of features, after an optional layer norm without affine (eps 1e-5):

    cosine   1 - cos(z, h)
    l1       mean |z - h|
    l2       mean (z - h)^2

then a weighted mean over each segment of rows. Shapes: M rows, D features, S segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldo.ops.dispatch import choose

METRICS = ("cosine", "l1", "l2")


def predictive_residual(
    predicted_MD: Tensor,
    target_MD: Tensor,
    *,
    segments: Tensor | None = None,
    metric: str = "cosine",
    normalize_target: bool = True,
    normalize_predicted: bool | None = None,
    weight_M: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mean residual per segment, fp32 [S] (fp64 for fp64 input); differentiable in ``predicted_MD``.

    ``segments``: S + 1 ascending row offsets from 0 to M, none of them empty; None makes one segment, shape [1].
    ``normalize_predicted`` defaults to True for cosine and False otherwise. ``weight_M``: non-negative row weights.
    A zero vector has cosine 0. ValueError on bad shapes, offsets, metric or impl, and on a segment without weight.
    """
    if predicted_MD.ndim != 2 or predicted_MD.shape != target_MD.shape or not predicted_MD.numel():
        raise ValueError(f"predictive_residual: two equal shapes [M, D] expected, got {tuple(predicted_MD.shape)} and {tuple(target_MD.shape)}")
    if metric not in METRICS:
        raise ValueError(f"predictive_residual: unknown metric {metric!r}; one of {', '.join(METRICS)}")
    choose("predictive_residual", impl, ("reference",), "reference", "plain PyTorch")
    rows = len(predicted_MD)
    if segments is None:
        segments = torch.tensor([0, rows])
    if segments.ndim != 1 or len(segments) < 2 or segments.is_floating_point():
        raise ValueError(f"predictive_residual: segments must be at least two integer offsets, got {segments.dtype} {tuple(segments.shape)}")
    lengths = segments.diff()
    if segments[0] != 0 or segments[-1] != rows or (lengths <= 0).any():
        raise ValueError(f"predictive_residual: segments must rise strictly from 0 to {rows}, got {segments.tolist()[:8]}")
    if weight_M is not None and weight_M.shape != (rows,):
        raise ValueError(f"predictive_residual: weight_M must have {rows} entries, got {tuple(weight_M.shape)}")

    dtype = torch.float64 if predicted_MD.dtype == torch.float64 else torch.float32
    z, h = predicted_MD.to(dtype), target_MD.detach().to(dtype)
    if normalize_predicted if normalize_predicted is not None else metric == "cosine":
        z = F.layer_norm(z, z.shape[-1:])
    if normalize_target:
        h = F.layer_norm(h, h.shape[-1:])
    if metric == "cosine":
        row = 1 - F.cosine_similarity(z, h, dim=-1, eps=1e-12)
    elif metric == "l1":
        row = (z - h).abs().mean(-1)
    else:
        row = (z - h).square().mean(-1)
    weight = torch.ones_like(row) if weight_M is None else weight_M.to(dtype)
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths.cpu()).to(row.device)
    zeros = torch.zeros(len(lengths), dtype=dtype, device=row.device)
    total = zeros.index_add(0, index, weight)
    if (total <= 0).any():
        raise ValueError(f"predictive_residual: segment {int((total <= 0).nonzero()[0])} has no weight")
    return zeros.index_add(0, index, weight * row) / total
