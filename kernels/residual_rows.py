"""The row kernels of the predictive residual: one pass over the data in the forward, one in the backward.

Per row, with a and b the predicted and target features after their layer norm, if they have one:

    cosine   c = a.b / (|a| |b|),   residual = 1 - c
    l1       residual = mean |a - b|
    l2       residual = mean (a - b)^2

``row_residuals`` holds whole rows in registers and writes 4 bytes a row, and for a gradient also K statistics a row.
From these and the inputs z and h, ``row_gradients`` computes, with t = sign(a - b) for l1 and t = a - b for l2:

    l1, l2   dz = s (t - mean t - a mean(t a)),   s = rstd_z / D for l1, twice that for l2
    cosine   dz = p (z - mean_z) + q (h - mean_h) + r

Without a layer norm of z, l1 and l2 are just dz = s t. For cosine the layer norm's second correction vanishes, as the
gradient is orthogonal to a. All is multiplied by upstream_s weight_m / total_s of the row's segment s.

The forward does not know upstream. It could write the unscaled gradient, to be scaled later: that moves 3 + 2 row
lengths through memory (read z and h, write; read, write), as many as the 2 + 3 here. But here the gradient is rounded
only once, after scaling, so that an fp16 loss scale acts before gradients underflow, and no [M, D] buffer waits for the
backward.

Zero vectors have cosine 0 and gradient 0. Arithmetic is fp32. Divisions and roots are rounded to nearest and nothing is
fused into multiply-adds, so that l1 has a slope of exactly 0 where a and b are equal.

Shapes: M rows, D features, S segments. Offsets into [M, D] are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldo.kernels.support import EPS

# The most features whose rows fit in registers.
WIDEST = 16384

# Statistics a row that the gradient needs.
K = {"cosine": 5, "l1": 6, "l2": 6}

# Launch options: with fused multiply-adds, l1 would have a slope where a and b are equal.
OPTIONS = {"enable_fp_fusion": False}
LN_EPS = tl.constexpr(1e-5)
ZERO = tl.constexpr(EPS)


@triton.jit
def _features(base, rows, stride: tl.constexpr, cols, inside):
    """A tile of features in fp32, 0 outside."""
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _plus2(a, b, x, y):
    return a + x, b + y


@triton.jit
def _plus3(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _sums2(a, b, FUSE_SUMS: tl.constexpr):
    """Row sums of two tiles.

    On a GPU both take one exchange between warps. The interpreter would reduce element by element, so there they are
    summed one by one.
    """
    if FUSE_SUMS:
        return tl.reduce((a, b), 1, _plus2)
    else:
        return tl.sum(a, 1), tl.sum(b, 1)


@triton.jit
def _sums3(a, b, c, FUSE_SUMS: tl.constexpr):
    """Row sums of three tiles; see ``_sums2``."""
    if FUSE_SUMS:
        return tl.reduce((a, b, c), 1, _plus3)
    else:
        return tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1)


@triton.jit
def _rstd(squares, D: tl.constexpr):
    """The layer norm's 1 / standard deviation, from the sum of squares of a centred row."""
    return tl.div_rn(1.0, tl.sqrt_rn(squares / D + LN_EPS))


@triton.jit
def _inverse(squares, rstd):
    """1 / norm of a centred row; 0 if after the layer norm it counts as a zero vector."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm * rstd > ZERO, tl.div_rn(1.0, tl.maximum(norm, 1e-20)), 0.0)


@triton.jit
def _slope(difference, METRIC: tl.constexpr):
    """t of the formula: the metric's derivative in a, up to its factor."""
    if METRIC == "l1":
        return (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32)
    else:
        return difference


@triton.jit(do_not_specialize=["M"])
def row_residuals(
    predicted,  # [M, D]
    target,  # [M, D]
    residual,  # [M] fp32
    statistics,  # [M, K] fp32 for the gradient, or None
    M,
    predicted_stride: tl.constexpr,
    target_stride: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    NORM_Z: tl.constexpr,
    NORM_H: tl.constexpr,
    K: tl.constexpr,
    FUSE_SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The residual of each row and, if ``statistics`` is given, what its gradient needs. With aa = a.a and ab = a.b:

        cosine   p = q ab / aa,   q = 1 / (|a| |b|)     kept: mean_z, mean_h, p, -q, r
        l1, l2   d = a - b                              kept: mean_z, rstd_z, mean_h, rstd_h, mean t, mean(t a)

    r = q mean_h if only z has a layer norm, else 0.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    here = rows < M
    inside = here[:, None] & (cols < D)[None, :]
    a = _features(predicted, rows, predicted_stride, cols, inside)
    b = _features(target, rows, target_stride, cols, inside)
    z_mean = tl.zeros([BLOCK_M], tl.float32)
    h_mean = z_mean
    z_rstd = z_mean + 1.0
    h_rstd = z_rstd
    if NORM_Z or NORM_H:
        z_sum, h_sum = _sums2(a, b, FUSE_SUMS)
        if NORM_Z:
            z_mean = z_sum / D
            a = tl.where(inside, a - z_mean[:, None], 0.0)
        if NORM_H:
            h_mean = h_sum / D
            b = tl.where(inside, b - h_mean[:, None], 0.0)
    if METRIC == "cosine":
        aa, bb, ab = _sums3(a * a, b * b, a * b, FUSE_SUMS)
    elif NORM_Z or NORM_H:
        aa, bb = _sums2(a * a, b * b, FUSE_SUMS)
    if NORM_Z:
        z_rstd = _rstd(aa, D)
    if NORM_H:
        h_rstd = _rstd(bb, D)

    # the scale of a row cancels in the cosine, so there a and b are only centred
    if METRIC == "cosine":
        a_inverse = _inverse(aa, z_rstd)
        b_inverse = _inverse(bb, h_rstd)
        q = a_inverse * b_inverse
        tl.store(residual + rows, 1.0 - ab * q, mask=here)
        if statistics is not None:
            kept = statistics + rows * K
            tl.store(kept, z_mean, mask=here)
            tl.store(kept + 1, h_mean, mask=here)
            # p and q in this ratio, so that rounding leaves little along z
            tl.store(kept + 2, q * tl.div_rn(ab, tl.maximum(aa, 1e-37)), mask=here)
            tl.store(kept + 3, -q, mask=here)
            if NORM_Z and not NORM_H:
                tl.store(kept + 4, q * (h_sum / D), mask=here)
            else:
                tl.store(kept + 4, z_mean * 0.0, mask=here)
    else:
        a = a * z_rstd[:, None]
        b = b * h_rstd[:, None]
        d = a - b
        if METRIC == "l1":
            size = tl.abs(d)
        else:
            size = d * d
        if statistics is None:
            tl.store(residual + rows, tl.sum(size, 1) / D, mask=here)
        else:
            kept = statistics + rows * K
            tl.store(kept, z_mean, mask=here)
            tl.store(kept + 1, z_rstd, mask=here)
            tl.store(kept + 2, h_mean, mask=here)
            tl.store(kept + 3, h_rstd, mask=here)
            if NORM_Z:
                t = _slope(d, METRIC)
                size_sum, t_sum, ta_sum = _sums3(size, t, t * a, FUSE_SUMS)
                tl.store(residual + rows, size_sum / D, mask=here)
                tl.store(kept + 4, t_sum / D, mask=here)
                tl.store(kept + 5, ta_sum / D, mask=here)
            else:
                tl.store(residual + rows, tl.sum(size, 1) / D, mask=here)


@triton.jit(do_not_specialize=["M", "S", "steps"])
def row_gradients(
    upstream,  # [S] fp32
    predicted,  # [M, D]
    target,  # [M, D]
    weight,  # [M] fp32 or None
    statistics,  # [M, K] fp32
    total,  # [S] fp32
    offsets,  # [S + 1] int64; not read if EACH or steps == 0
    gradient,  # [M, D]
    M,
    S,
    steps,  # of the search for a row's segment: ceil(log2 S)
    predicted_stride: tl.constexpr,
    target_stride: tl.constexpr,
    gradient_stride: tl.constexpr,
    D: tl.constexpr,
    METRIC: tl.constexpr,
    NORM_Z: tl.constexpr,
    EACH: tl.constexpr,  # every row is a segment
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of each row: g times the factor of its segment. With a layer norm of z:

        cosine   g = p (z - mean_z) + q (h - mean_h) + r
        l1, l2   g = t - mean t - a mean(t a)

    Without it l1 and l2 have g = t. q is the -q that ``row_residuals`` keeps.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    here = rows < M
    inside = here[:, None] & (cols < D)[None, :]
    z = _features(predicted, rows, predicted_stride, cols, inside)
    h = _features(target, rows, target_stride, cols, inside)
    # all loads come before the first use of any, so that they are in flight together
    kept = statistics + rows * K
    z_mean = tl.load(kept, mask=here, other=0.0)
    if METRIC == "cosine":
        h_mean = tl.load(kept + 1, mask=here, other=0.0)
        p = tl.load(kept + 2, mask=here, other=0.0)
        q = tl.load(kept + 3, mask=here, other=0.0)
        r = tl.load(kept + 4, mask=here, other=0.0)
    else:
        z_rstd = tl.load(kept + 1, mask=here, other=0.0)
        h_mean = tl.load(kept + 2, mask=here, other=0.0)
        h_rstd = tl.load(kept + 3, mask=here, other=0.0)
        if NORM_Z:
            t_mean = tl.load(kept + 4, mask=here, other=0.0)
            ta_mean = tl.load(kept + 5, mask=here, other=0.0)
    if weight is not None:
        row_weight = tl.load(weight + rows, mask=here, other=0.0)

    segment = tl.zeros([BLOCK_M], tl.int64)
    if EACH:
        segment = rows
    else:
        # a binary search that keeps offsets[segment] <= row < offsets[end]
        end = segment + S
        for _ in range(steps):
            middle = (segment + end) // 2
            right = tl.load(offsets + middle, mask=here, other=0) <= rows
            segment = tl.where(right, middle, segment)
            end = tl.where(right, end, middle)
    segment_upstream = tl.load(upstream + segment, mask=here, other=0.0)
    segment_total = tl.load(total + segment, mask=here, other=1.0)
    factor = tl.div_rn(segment_upstream, segment_total)
    if weight is not None:
        factor *= row_weight

    if METRIC == "cosine":
        g = p[:, None] * (z - z_mean[:, None]) + q[:, None] * (h - h_mean[:, None]) + r[:, None]
    else:
        a = (z - z_mean[:, None]) * z_rstd[:, None]
        b = (h - h_mean[:, None]) * h_rstd[:, None]
        g = _slope(a - b, METRIC)
        if NORM_Z:
            g = g - t_mean[:, None] - a * ta_mean[:, None]
        factor *= z_rstd * ((1.0 if METRIC == "l1" else 2.0) / D)
    g *= factor[:, None]
    tl.store(gradient + rows[:, None] * gradient_stride + cols[None, :], g.to(gradient.dtype.element_ty), mask=inside)
