"""Device code of the relation loss after its pairs: the loss itself, and the projection that makes A X a gradient.

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
    """loss = sum_b scale_b sum_tile partial[b, tile], in fp64 and in one order: the same to the bit every time."""
    total = tl.zeros((BLOCK,), tl.float64)
    for clip in range(clips):
        parts = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, tiles, BLOCK):
            k = start + tl.arange(0, BLOCK)
            parts += tl.load(partial + k, mask=k < tiles, other=0.0).to(tl.float64)
        total += parts * tl.load(scale + clip).to(tl.float64)
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
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
):
    """Per token: 2 scale upstream (v - x (x . v) / |x|^2), over |x| where v was made of unit vectors."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(product + at, mask=inside, other=0.0)
    factor = 2 * tl.load(scale + row // N, mask=row < rows, other=0.0) * tl.load(upstream)
    norm = tl.sqrt(tl.sum(x * x, 1))
    zero = norm <= EPS
    norm = tl.where(zero, 1.0, norm)
    along = tl.sum(x * v, 1) / norm / norm
    if UNIT:
        factor = factor / norm
    factor = tl.where(zero, 0.0, factor)
    found = factor[:, None] * (v - x * along[:, None])
    tl.store(gradient + at, found.to(gradient.dtype.element_ty), mask=inside)
