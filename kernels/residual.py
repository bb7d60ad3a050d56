"""The predictive residual in Triton, as PyTorch operators. ldo.ops.residual says what it is.

``row_residuals`` (residual_rows.py) reads the data once and leaves 4 bytes a row. ``segment_means`` then reduces those
over CSR segments: at once where every segment is short, else first over slices of at most SLICE rows, so that one segment
of a million rows keeps the whole GPU busy, and a million segments of one row cost little. All sums have a fixed order and
there are no atomics: results repeat bit for bit.

Without ``segments`` and weights nothing makes the host wait, and nothing is copied to the GPU.

Shapes: M rows, D features, S segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ldo.kernels.residual_rows import OPTIONS, K, launch_gradients, launch_rows
from ldo.kernels.support import csr, written

SLICE = 4096  # rows a program of segment_means sums at most, where a segment is split


@triton.jit(do_not_specialize=["S", "width", "count"])
def segment_means(
    value,  # [count] fp32: rows, or the sums of slices
    weight,  # [count] fp32 or None: of rows, or the sums of slices
    offsets,  # [S + 1] int64, or None: then segments are ``width`` long, the last one up to ``count``
    out,  # [S] fp32: mean, or weighted sum
    total,  # [S] fp32: sum of weights
    S,
    width,
    count,
    ROWS: tl.constexpr,  # values are rows, to be weighted; else sums, to be added
    MEAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    segments = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    here = segments < S
    if offsets is None:
        start = segments * width
        end = tl.minimum(start + width, count)
    else:
        start = tl.load(offsets + segments, mask=here, other=0)
        end = tl.load(offsets + segments + 1, mask=here, other=0)
    length = tl.where(here, end - start, 0)
    longest = tl.max(length, 0)
    sums = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    weights = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    for first in range(0, longest, BLOCK_R):
        place = first + tl.arange(0, BLOCK_R)
        inside = place[None, :] < length[:, None]
        rows = start[:, None] + place[None, :]
        v = tl.load(value + rows, mask=inside, other=0.0)
        if weight is None:
            sums += v
        else:
            w = tl.load(weight + rows, mask=inside, other=0.0)
            weights += w
            sums += v * w if ROWS else v
    summed = tl.sum(sums, 1)
    if weight is None:
        weighed = length.to(tl.float32)
    else:
        weighed = tl.sum(weights, 1)
    tl.store(out + segments, tl.div_rn(summed, tl.where(here, weighed, 1.0)) if MEAN else summed, mask=here)
    tl.store(total + segments, weighed, mask=here)


def segment_tile(segments: int, count: int) -> tuple[int, int]:
    """Segments and rows of a tile of ``segment_means``, by the mean length of a segment."""
    rows = min(max(triton.next_power_of_2(count // segments), 16), 1024)
    return 1024 // rows, rows


def _reduce(value: Tensor, weight: Tensor | None, offsets: Tensor | int, segments: int, rows: bool, mean: bool) -> tuple[Tensor, Tensor]:
    """One launch of ``segment_means``; ``offsets``: int64 on the device, or the length of every segment but the last."""
    out, total = (torch.empty(segments, dtype=torch.float32, device=value.device) for _ in range(2))
    table, width = (None, offsets) if isinstance(offsets, int) else (offsets, 0)
    block_s, block_r = segment_tile(segments, len(value))
    grid = (triton.cdiv(segments, block_s),)
    segment_means[grid](value, weight, table, out, total, segments, width, len(value), rows, mean, block_s, block_r, **OPTIONS)
    return out, total


def _means(row: Tensor, weight: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean [S] and weight [S] of each segment, and the offsets [S + 1] on the device; None for them where nothing needs them."""
    rows = len(row)
    if segments is None:
        slices = triton.cdiv(rows, SLICE)
        if slices == 1:
            return *_reduce(row, weight, rows, 1, True, True), None
        sums, totals = _reduce(row, weight, SLICE, slices, True, False)
        return *_reduce(sums, totals, slices, 1, False, True), None
    n = len(segments) - 1
    if n == rows:
        total = torch.ones_like(row) if weight is None else weight.clone()
        return (row if weight is None else weight * row / total), total, None
    width = min(max(triton.next_power_of_2(triton.cdiv(rows, n)), 256), SLICE)
    counts = (segments.diff() + (width - 1)) // width
    slices = int(counts.sum())
    if slices == n:
        offsets = segments.to(row.device, non_blocking=True)
        return *_reduce(row, weight, offsets, n, True, True), offsets
    coarse = F.pad(counts.cumsum(0), (1, 0))
    first = torch.repeat_interleave(torch.arange(n), counts)  # the segment of each slice
    fine = segments[first] + (torch.arange(slices) - coarse[first]) * width
    tables = torch.cat([fine, segments[-1:], coarse, segments]).to(row.device, non_blocking=True)
    fine, coarse, offsets = tables.split([slices + 1, n + 1, n + 1])
    sums, totals = _reduce(row, weight, fine, slices, True, False)
    return *_reduce(sums, totals, coarse, n, False, True), offsets


# --------------------------------------------------------------------------------------------------- operators


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("ldo::predictive_residual", mutates_args=())
def forward(
    predicted: Tensor,
    target: Tensor,
    segments: Tensor | None,
    weight: Tensor | None,
    metric: str,
    normalize_predicted: bool,
    normalize_target: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means [S]; for the gradient, if ``keep``: row statistics [M, K], segment weights [S], offsets [S + 1] on the device.

    Checks ``segments`` on the CPU: where they are on a GPU, and where there are weights, the host waits for the GPU once.
    """
    rows = len(predicted)
    if segments is not None:
        segments = csr("predictive_residual", segments, rows)
    if weight is not None:
        weight = weight.to(torch.float32).contiguous()
    z, h = _rows(predicted), _rows(target)
    row = torch.empty(rows, dtype=torch.float32, device=z.device)
    statistics = torch.empty(rows, K[metric] if keep else 0, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        launch_rows(z, h, row, statistics if keep else None, metric, normalize_predicted, normalize_target)
        mean, total, offsets = _means(row, weight, segments)
    if weight is not None and bool((total <= 0).any()):
        raise ValueError(f"predictive_residual: segment {int((total <= 0).nonzero()[0])} has no weight")
    if keep and offsets is not None:
        return mean, statistics, total, offsets.clone()  # it may be the caller's own tensor
    return mean, statistics, total, torch.empty(0, dtype=torch.int64, device=z.device)


@forward.register_fake
def _(predicted, target, segments, weight, metric, normalize_predicted, normalize_target, keep):
    rows = predicted.shape[0]
    n = 1 if segments is None else segments.shape[0] - 1
    searched = keep and segments is not None and n != rows
    return (
        predicted.new_empty(n, dtype=torch.float32),
        predicted.new_empty((rows, K[metric] if keep else 0), dtype=torch.float32),
        predicted.new_empty(n, dtype=torch.float32),
        predicted.new_empty(n + 1 if searched else 0, dtype=torch.int64),
    )


@torch.library.custom_op("ldo::predictive_residual_backward", mutates_args=())
def backward(
    upstream: Tensor,
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    total: Tensor,
    offsets: Tensor,
    metric: str,
    normalize_predicted: bool,
) -> Tensor:
    """Gradient [M, D] of predicted, in its dtype, from upstream [S] and what ``forward`` kept."""
    if weight is not None:
        weight = weight.to(torch.float32).contiguous()
    z, h = _rows(predicted), _rows(target)
    gradient = torch.empty(z.shape, dtype=written(z.dtype), device=z.device)
    with torch.cuda.device_of(z):
        launch_gradients(upstream.float().contiguous(), z, h, weight, statistics, total, offsets, gradient, metric, normalize_predicted)
    return gradient.to(z.dtype)


@backward.register_fake
def _(upstream, predicted, *_):
    return predicted.new_empty(predicted.shape)


def _remember(ctx, inputs, output) -> None:
    predicted, target, _, weight, metric, normalize_predicted, _, keep = inputs
    assert keep or not predicted.requires_grad, "a gradient needs keep=True in the forward"
    ctx.save_for_backward(predicted, target, weight, *output[1:])
    ctx.options = metric, normalize_predicted


def _differentiate(ctx, upstream, *_):
    return backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 7


forward.register_autograd(_differentiate, setup_context=_remember)
