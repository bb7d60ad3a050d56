"""The predictive residual: how far predicted features are from the target features, averaged over segments of tokens.

Per row of features z (predicted) and h (target), after an optional layer norm without affine (eps 1e-5):

    cosine   residual = 1 - cos(z, h)
    l1       residual = mean |z - h|
    l2       residual = mean (z - h)^2

A weighted mean over each segment of rows follows. Shapes: M rows, D features, S segments.
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

    ``segments``: S + 1 ascending row offsets from 0 to M, of non-empty segments; None makes one segment, shape [1].
    Offsets on a GPU are fetched to be checked, for which the host waits; it also waits there to check the sums of
    weights. ``normalize_predicted`` defaults to True for cosine and False otherwise. ``weight_M``: non-negative row
    weights. A zero vector has cosine 0 and gradient exactly 0.

    Only the inputs' dtypes decide the precision: autocast changes no bit of the means or their gradient.

    ``impl``: "reference" (plain PyTorch, the specification), "triton" (fused kernels; fp32, bf16, fp16), or "auto":
    triton on a GPU, else the reference.

    ValueError on bad shapes, devices, offsets, metric or impl, and on a segment without weight.
    """
    _check(predicted_MD, target_MD, weight_M, metric)
    device = predicted_MD.device
    if normalize_predicted is None:
        normalize_predicted = metric == "cosine"
    target = target_MD.detach()
    weight = None if weight_M is None else weight_M.detach()
    missing = _no_triton(predicted_MD, target)
    impl = choose_triton("predictive_residual", impl, device, missing, ("reference",), "plain PyTorch")
    with as_given(device):
        if impl == "reference":
            return _reference(predicted_MD, target, segments, weight, metric, normalize_predicted, normalize_target)
        # imported here, since it needs Triton
        from ldo.kernels import residual

        keep = torch.is_grad_enabled() and predicted_MD.requires_grad
        mean, *_ = residual.forward(
            predicted_MD, target, segments, weight, metric, normalize_predicted, normalize_target, keep
        )
        return mean


def _check(predicted: Tensor, target: Tensor, weight: Tensor | None, metric: str) -> None:
    if predicted.ndim != 2 or predicted.shape != target.shape or not predicted.numel():
        raise ValueError(
            f"predictive_residual: two equal shapes [M, D] expected, got {tuple(predicted.shape)} and "
            f"{tuple(target.shape)}"
        )
    if metric not in METRICS:
        raise ValueError(f"predictive_residual: unknown metric {metric!r}; one of {', '.join(METRICS)}")
    rows = len(predicted)
    if weight is not None and weight.shape != (rows,):
        raise ValueError(f"predictive_residual: weight_M must have {rows} entries, got {tuple(weight.shape)}")
    devices = {tensor.device for tensor in (predicted, target, weight) if tensor is not None}
    if len(devices) > 1:
        raise ValueError("predictive_residual: predicted_MD, target_MD and weight_M must be on one device")


def _no_triton(predicted: Tensor, target: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors; None if they can."""
    for tensor in (predicted, target):
        reason = support.unavailable(tensor.device, tensor.dtype)
        if reason:
            return reason
    # imported here, since it needs Triton
    from ldo.kernels.residual_rows import WIDEST

    return f"rows of more than {WIDEST} features" if predicted.shape[1] > WIDEST else None


def _reference(predicted, target, segments, weight, metric, normalize_predicted, normalize_target) -> Tensor:
    rows = len(predicted)
    if segments is None:
        segments = torch.tensor([0, rows])
    else:
        segments = support.csr("predictive_residual", segments, rows)
    # half precision is too coarse for the sums of a layer norm or a mean
    dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
    z, h = predicted.to(dtype), target.to(dtype)
    if normalize_predicted:
        z = F.layer_norm(z, z.shape[-1:])
    if normalize_target:
        h = F.layer_norm(h, h.shape[-1:])
    if metric == "cosine":
        # a zero vector is masked out: otherwise its gradient would have length 1 / EPS
        with torch.no_grad():
            shorter = torch.minimum(torch.linalg.vector_norm(z, dim=-1), torch.linalg.vector_norm(h, dim=-1))
            alive = shorter > EPS
        residual = 1 - F.cosine_similarity(z, h, dim=-1, eps=EPS) * alive
    elif metric == "l1":
        residual = (z - h).abs().mean(-1)
    else:
        residual = (z - h).square().mean(-1)
    weight = torch.ones_like(residual) if weight is None else weight.to(dtype)
    lengths = segments.diff()
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(residual.device)
    zeros = torch.zeros(len(lengths), dtype=dtype, device=residual.device)
    total = zeros.index_add(0, index, weight)
    if (total <= 0).any():
        raise ValueError(f"predictive_residual: segment {int((total <= 0).nonzero()[0])} has no weight")
    return zeros.index_add(0, index, weight * residual) / total
