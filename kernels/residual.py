"""The predictive residual in Triton, as PyTorch operators. ``ldo.ops.residual`` defines it.

``row_residuals`` (``residual_rows.py``) reads the data once and writes 4 bytes a row. ``segment_means`` then reduces
these over CSR segments. If every segment is short, it does so in one launch. Otherwise it first sums slices of at most
SLICE rows, so that one segment of a million rows keeps the whole GPU busy, and a million segments of one row stay
cheap. All sums have a fixed order and there are no atomics: results repeat bit for bit.

Without ``segments`` and weights the host never waits, and nothing is copied to the GPU.

Shapes: M rows, D features, S segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ldo.kernels.residual_launch import launch_gradients, launch_rows
from ldo.kernels.residual_rows import OPTIONS, K
from ldo.kernels.support import csr, written

# Rows that a program of segment_means sums at most, where a segment is split.
SLICE = 4096


@triton.jit(do_not_specialize=["S", "width", "count"])
def segment_means(
    value,  # [count] fp32: rows, or the sums of slices
    weight,  # [count] fp32 or None: of rows, or the sums of slices
    offsets,  # [S + 1] int64, or None: segments are ``width`` long, and the last ends at ``count``
    out,  # [S] fp32: mean, or weighted sum
    total,  # [S] fp32: sum of weights
    S,
    width,
    count,
    ROWS: tl.constexpr,  # values are rows and get weighted; else they are sums and get added
    MEAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Mean (or weighted sum) and weight of each segment; a program takes BLOCK_S segments, BLOCK_R rows at a time."""
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
        values = tl.load(value + rows, mask=inside, other=0.0)
        if weight is None:
            sums += values
        else:
            row_weights = tl.load(weight + rows, mask=inside, other=0.0)
            weights += row_weights
            sums += values * row_weights if ROWS else values
    segment_sum = tl.sum(sums, 1)
    if weight is None:
        segment_weight = length.to(tl.float32)
    else:
        segment_weight = tl.sum(weights, 1)
    if MEAN:
        # segments past S would divide 0 by 0
        tl.store(out + segments, tl.div_rn(segment_sum, tl.where(here, segment_weight, 1.0)), mask=here)
    else:
        tl.store(out + segments, segment_sum, mask=here)
    tl.store(total + segments, segment_weight, mask=here)


def segment_tile(segments: int, count: int) -> tuple[int, int]:
    """Segments and rows of a tile of ``segment_means``, by the mean length of a segment."""
    # a tile has 1024 values: many short segments, or part of a long one
    mean_length = triton.next_power_of_2(count // segments)
    rows = min(max(mean_length, 16), 1024)
    return 1024 // rows, rows


def _reduce(
    value: Tensor, weight: Tensor | None, offsets: Tensor | int, segments: int, rows: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    """One launch of ``segment_means``: its results and the weights, both [S].

    ``offsets``: int64 on the device, or the length that all segments but the last have.
    """
    count = len(value)
    out = torch.empty(segments, dtype=torch.float32, device=value.device)
    total = torch.empty(segments, dtype=torch.float32, device=value.device)
    table, width = offsets, 0
    if isinstance(offsets, int):
        table, width = None, offsets
    block_s, block_r = segment_tile(segments, count)
    grid = (triton.cdiv(segments, block_s),)
    segment_means[grid](
        value, weight, table, out, total, segments, width, count, rows, mean, block_s, block_r, **OPTIONS
    )
    return out, total


def _means(row: Tensor, weight: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean [S] and weight [S] of each segment, and the offsets [S + 1] on the device.

    The offsets are None without ``segments``, or if every row is a segment: then the gradient needs none.
    """
    rows = len(row)
    if segments is None:
        mean, total = _mean_of_all(row, weight)
        return mean, total, None
    count = len(segments) - 1
    if count == rows:
        if weight is None:
            return row, torch.ones_like(row), None
        # multiplied and divided as a mean is, so that a weight of 0 or NaN shows in the same way
        return weight * row / weight, weight.clone(), None
    # slices about as long as the mean segment, so that most segments are one slice
    width = min(max(triton.next_power_of_2(triton.cdiv(rows, count)), 256), SLICE)
    slices = (segments.diff() + (width - 1)) // width
    if int(slices.sum()) == count:
        offsets = segments.to(row.device, non_blocking=True)
        mean, total = _reduce(row, weight, offsets, count, True, True)
        return mean, total, offsets
    return _means_by_slices(row, weight, segments, slices, width)


def _mean_of_all(row: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean [1] and weight [1] of all rows, without a table of offsets on the device."""
    rows = len(row)
    slices = triton.cdiv(rows, SLICE)
    if slices == 1:
        return _reduce(row, weight, rows, 1, True, True)
    sums, totals = _reduce(row, weight, SLICE, slices, True, False)
    return _reduce(sums, totals, slices, 1, False, True)


def _means_by_slices(
    row: Tensor, weight: Tensor | None, segments: Tensor, slices: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``_means`` in two launches: over ``slices`` [S] slices of ``width`` rows in each segment, then over segments."""
    count = len(slices)
    total_slices = int(slices.sum())
    # offsets of the segments, counted in slices
    coarse = F.pad(slices.cumsum(0), (1, 0))
    # offsets of the slices, counted in rows: the start of their segment and ``width`` for each slice before them in it
    segment = torch.repeat_interleave(torch.arange(count), slices)
    fine = segments[segment] + (torch.arange(total_slices) - coarse[segment]) * width
    # one copy to the device for all three tables
    tables = torch.cat([fine, segments[-1:], coarse, segments]).to(row.device, non_blocking=True)
    fine, coarse, offsets = tables.split([total_slices + 1, count + 1, count + 1])
    sums, totals = _reduce(row, weight, fine, total_slices, True, False)
    mean, total = _reduce(sums, totals, coarse, count, False, True)
    return mean, total, offsets


# --------------------------------------------------------------------------------------------------- operators


def _rows(features: Tensor) -> Tensor:
    """``features`` with contiguous rows, as the kernels read them; the rows may lie apart."""
    return features if features.stride(1) == 1 else features.contiguous()


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
    """Means [S] and what the gradient needs: row statistics [M, K], segment weights [S], offsets [S + 1] on the device.

    Without ``keep`` the statistics and offsets are empty. ``segments`` are checked on the CPU: the host waits for the
    GPU once if they are on one, and once if there are weights.
    """
    rows = len(predicted)
    if segments is not None:
        segments = csr("predictive_residual", segments, rows)
    if weight is not None:
        weight = weight.to(torch.float32).contiguous()
    predicted, target = _rows(predicted), _rows(target)
    device = predicted.device
    row = torch.empty(rows, dtype=torch.float32, device=device)
    statistics = torch.empty(rows, K[metric] if keep else 0, dtype=torch.float32, device=device)
    with torch.cuda.device_of(predicted):
        kept = statistics if keep else None
        launch_rows(predicted, target, row, kept, metric, normalize_predicted, normalize_target)
        mean, total, offsets = _means(row, weight, segments)
    # only with weights can a segment be empty, so without them the host does not wait for the GPU here
    if weight is not None and bool((total <= 0).any()):
        raise ValueError(f"predictive_residual: segment {int((total <= 0).nonzero()[0])} has no weight")
    if keep and offsets is not None:
        # cloned, since the offsets may be the caller's own tensor, and an operator must not return its inputs
        return mean, statistics, total, offsets.clone()
    return mean, statistics, total, torch.empty(0, dtype=torch.int64, device=device)


@forward.register_fake
def _(predicted, target, segments, weight, metric, normalize_predicted, normalize_target, keep):
    rows = predicted.shape[0]
    count = 1 if segments is None else segments.shape[0] - 1
    # only then does the backward search the offsets for a row's segment
    searched = keep and segments is not None and count != rows
    return (
        predicted.new_empty(count, dtype=torch.float32),
        predicted.new_empty((rows, K[metric] if keep else 0), dtype=torch.float32),
        predicted.new_empty(count, dtype=torch.float32),
        predicted.new_empty(count + 1 if searched else 0, dtype=torch.int64),
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
    predicted, target = _rows(predicted), _rows(target)
    upstream = upstream.float().contiguous()
    gradient = torch.empty(predicted.shape, dtype=written(predicted.dtype), device=predicted.device)
    with torch.cuda.device_of(predicted):
        launch_gradients(
            upstream,
            predicted,
            target,
            weight,
            statistics,
            total,
            offsets,
            gradient,
            metric,
            normalize_predicted,
        )
    return gradient.to(predicted.dtype)


@backward.register_fake
def _(upstream, predicted, *_):
    return predicted.new_empty(predicted.shape)


def _remember(ctx, inputs, output) -> None:
    predicted, target, _, weight, metric, normalize_predicted, _, keep = inputs
    assert keep or not predicted.requires_grad, "a gradient needs keep=True in the forward"
    _, statistics, total, offsets = output
    ctx.save_for_backward(predicted, target, weight, statistics, total, offsets)
    ctx.options = metric, normalize_predicted


def _differentiate(ctx, upstream, *_):
    gradient = backward(upstream, *ctx.saved_tensors, *ctx.options)
    # none for the other seven inputs of the forward
    return gradient, None, None, None, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_remember)
