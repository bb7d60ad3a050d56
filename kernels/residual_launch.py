"""The launches of the predictive residual's row kernels (``residual_rows.py``), and the choice of a program's tile."""

from __future__ import annotations

import triton
from torch import Tensor

from ldo.kernels.residual_rows import OPTIONS, K, row_gradients, row_residuals
from ldo.kernels.support import INTERPRET


def tile(features: int, bare: bool, interpreted: bool = INTERPRET) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps. ``bare``: a forward that keeps no statistics for a gradient.

    A warp holds whole rows, up to 1024 elements of each input: sums then stay within it and wait for no other warp. On
    an H200 that saves a third of the forward's time (docs/kernels.md). Short rows run faster with two to a warp.
    """
    columns = max(triton.next_power_of_2(features), 16)
    warps = min(max(columns // 1024, 1), 16)
    # few programs for the interpreter, since each runs as Python
    if interpreted:
        return 8, columns, warps
    # two short rows a warp, but only without statistics, which need registers too
    elements = 2048 if bare and warps == 1 else 1024
    rows = min(max(elements // columns, 1), 4)
    return rows, columns, warps


def launch_rows(
    predicted: Tensor,
    target: Tensor,
    row: Tensor,
    statistics: Tensor | None,
    metric: str,
    normalize_predicted: bool,
    normalize_target: bool,
) -> None:
    """Run ``row_residuals`` on inputs with contiguous rows. ``statistics`` None means that no gradient will follow."""
    rows, features = predicted.shape
    block_m, block_d, warps = tile(features, statistics is None)
    row_residuals[(triton.cdiv(rows, block_m),)](
        predicted,
        target,
        row,
        statistics,
        rows,
        predicted_stride=predicted.stride(0),
        target_stride=target.stride(0),
        D=features,
        METRIC=metric,
        NORM_Z=normalize_predicted,
        NORM_H=normalize_target,
        K=K[metric],
        FUSE_SUMS=not INTERPRET,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps,
        **OPTIONS,
    )


def launch_gradients(
    upstream: Tensor,
    predicted: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    total: Tensor,
    offsets: Tensor,
    gradient: Tensor,
    metric: str,
    normalize_predicted: bool,
) -> None:
    """Run ``row_gradients``. ``offsets`` may be empty if there is one segment, or one for each row."""
    rows, features = predicted.shape
    segments = len(upstream)
    block_m, block_d, warps = tile(features, False)
    row_gradients[(triton.cdiv(rows, block_m),)](
        upstream,
        predicted,
        target,
        weight,
        statistics,
        total,
        offsets,
        gradient,
        rows,
        segments,
        (segments - 1).bit_length(),
        predicted_stride=predicted.stride(0),
        target_stride=target.stride(0),
        gradient_stride=gradient.stride(0),
        D=features,
        METRIC=metric,
        NORM_Z=normalize_predicted,
        EACH=segments == rows,
        K=K[metric],
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=warps,
        **OPTIONS,
    )
