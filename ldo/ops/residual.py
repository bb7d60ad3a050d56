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

from ldo.kernels import support
from ldo.kernels.support import EPS
from ldo.ops.dispatch import as_given, choose_triton

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
    Offsets on a GPU are fetched to be checked, for which the host waits; so it does to check the sums of weights there.
    ``normalize_predicted`` defaults to True for cosine and False otherwise. ``weight_M``: non-negative row weights.
    The inputs' dtypes alone decide the precision: autocast changes no bit of the means or their gradient.
    A zero vector has cosine 0 and gradient exactly 0. ``impl``: "reference" (plain PyTorch, the specification), "triton"
    (fused kernels; fp32, bf16, fp16), or "auto": triton on a GPU, else the reference.
    ValueError on bad shapes, devices, offsets, metric or impl, and on a segment without weight.
    """
    if predicted_MD.ndim != 2 or predicted_MD.shape != target_MD.shape or not predicted_MD.numel():
        raise ValueError(f"predictive_residual: two equal shapes [M, D] expected, got {tuple(predicted_MD.shape)} and {tuple(target_MD.shape)}")
    if metric not in METRICS:
        raise ValueError(f"predictive_residual: unknown metric {metric!r}; one of {', '.join(METRICS)}")
    rows = len(predicted_MD)
    if weight_M is not None and weight_M.shape != (rows,):
        raise ValueError(f"predictive_residual: weight_M must have {rows} entries, got {tuple(weight_M.shape)}")
    if len({t.device for t in (predicted_MD, target_MD, weight_M) if t is not None}) > 1:
        raise ValueError("predictive_residual: predicted_MD, target_MD and weight_M must be on one device")
    if normalize_predicted is None:
        normalize_predicted = metric == "cosine"
    target, weight = target_MD.detach(), None if weight_M is None else weight_M.detach()
    missing = _no_triton(predicted_MD, target)
    impl = choose_triton("predictive_residual", impl, predicted_MD.device, missing, ("reference",), "plain PyTorch")
    with as_given(predicted_MD.device):
        if impl == "reference":
            return _reference(predicted_MD, target, segments, weight, metric, normalize_predicted, normalize_target)
        from ldo.kernels import residual  # here, since it needs Triton

        keep = torch.is_grad_enabled() and predicted_MD.requires_grad
        return residual.forward(predicted_MD, target, segments, weight, metric, normalize_predicted, normalize_target, keep)[0]


def _no_triton(predicted: Tensor, target: Tensor) -> str | None:
    """Why the Triton kernels cannot take these; None if they can."""
    for x in (predicted, target):
        if reason := support.unavailable(x.device, x.dtype):
            return reason
    from ldo.kernels.residual_rows import WIDEST

    return f"rows of more than {WIDEST} features" if predicted.shape[1] > WIDEST else None


def _reference(predicted, target, segments, weight, metric, normalize_predicted, normalize_target) -> Tensor:
    rows = len(predicted)
    segments = torch.tensor([0, rows]) if segments is None else support.csr("predictive_residual", segments, rows)
    dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
    z, h = predicted.to(dtype), target.to(dtype)
    if normalize_predicted:
        z = F.layer_norm(z, z.shape[-1:])
    if normalize_target:
        h = F.layer_norm(h, h.shape[-1:])
    if metric == "cosine":
        with torch.no_grad():
            alive = torch.minimum(torch.linalg.vector_norm(z, dim=-1), torch.linalg.vector_norm(h, dim=-1)) > EPS
        # without this, the gradient of a zero vector would be 1 / EPS long
        row = 1 - F.cosine_similarity(z, h, dim=-1, eps=EPS) * alive
    elif metric == "l1":
        row = (z - h).abs().mean(-1)
    else:
        row = (z - h).square().mean(-1)
    lengths = segments.diff()
    weight = torch.ones_like(row) if weight is None else weight.to(dtype)
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(row.device)
    zeros = torch.zeros(len(lengths), dtype=dtype, device=row.device)
    total = zeros.index_add(0, index, weight)
    if (total <= 0).any():
        raise ValueError(f"predictive_residual: segment {int((total <= 0).nonzero()[0])} has no weight")
    return zeros.index_add(0, index, weight * row) / total
