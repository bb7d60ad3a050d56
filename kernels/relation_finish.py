"""Device code that finishes the relation loss: the sum of the loss, and the projection of A X to the gradient.

Shapes: B clips, N tokens, D student features.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tiles", "clips"])
def loss_kernel(
    partial,  # [B, tiles] fp32
    scale,  # [B] fp32
    loss,  # [] fp32
    tiles,
    clips,
    BLOCK: tl.constexpr,
):
    """loss = sum_b scale_b sum_tile partial[b, tile], in fp64 and in a fixed order: repeats are bitwise equal."""
    # one program adds everything: with several, atomics would leave the order of the sum open
    total = tl.zeros((BLOCK,), tl.float64)
    for clip in range(clips):
        clip_total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, tiles, BLOCK):
            index = start + tl.arange(0, BLOCK)
            clip_total += tl.load(partial + index, mask=index < tiles, other=0.0).to(tl.float64)
        total += clip_total * tl.load(scale + clip).to(tl.float64)
        partial += tiles
    tl.store(loss, tl.sum(total).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "N"])
def project_kernel(
    upstream,  # [] fp32
    product,  # [B N, D] fp32: A X / scale
    scale,  # [B] fp32
    student,  # [B N, D]
    gradient,  # [B N, D]
    rows,  # B N
    N,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,  # D, rounded up to a power of two: whole rows stay in registers
    UNIT: tl.constexpr,  # A multiplied unit vectors
    EPS: tl.constexpr,
):
    """The gradient of each token, with v = A X / scale:

        gradient = 2 scale upstream (v - x (x . v) / |x|^2)

    A zero vector has gradient 0.
    """
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    offset = row[:, None] * D + column[None, :]
    x = tl.load(student + offset, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(product + offset, mask=inside, other=0.0)
    factor = 2 * tl.load(scale + row // N, mask=row < rows, other=0.0) * tl.load(upstream)
    norm = tl.sqrt(tl.sum(x * x, 1))
    is_zero = norm <= EPS
    norm = tl.where(is_zero, 1.0, norm)
    along = tl.sum(x * v, 1) / norm / norm
    # A already holds the norms, unless it multiplied unit vectors
    if UNIT:
        factor = factor / norm
    factor = tl.where(is_zero, 0.0, factor)
    projected = factor[:, None] * (v - x * along[:, None])
    tl.store(gradient + offset, projected.to(gradient.dtype.element_ty), mask=inside)
