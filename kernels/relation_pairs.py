"""Device code of the relation loss: what runs on the GPU. ``kernels/relation.py`` launches it and holds the design.

Shapes: B clips, N tokens, D student and E teacher features; a tile is ROWS x COLS pairs of tokens, DEPTH features at
a time. Names follow ``ldo/ops/relation.py``: d = s - y, phi the penalty, W the pair weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------- before the pairs


@triton.jit
def prepare_kernel(
    x,
    t,
    inverse,
    ratio,
    unit,
    N,
    padded,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
):
    """Per token: n = |x| (1 for a zero vector), inverse = 1 / n, ratio = n / |t| (0 for t = 0), and x / n where UNIT.

    ``inverse`` and ``ratio`` have ``padded`` places a clip, 0 past its N tokens: the pair kernel then reads them without masks.
    """
    m = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside, at = m % padded < N, m // padded * N + m % padded
    x_norm, t_norm = _norms(x, at, inside, D, TOKENS, BLOCK), _norms(t, at, inside, E, TOKENS, BLOCK)
    n = tl.where(x_norm <= EPS, 1.0, x_norm)  # a NaN fails the comparison and stays
    tl.store(inverse + m, tl.where(inside, 1 / n, 0.0))
    tl.store(ratio + m, tl.where(t_norm <= EPS, 0.0, n / tl.where(t_norm <= EPS, 1.0, t_norm)))
    if UNIT:
        for start in range(0, D, BLOCK):
            c = start + tl.arange(0, BLOCK)
            there = inside[:, None] & (c < D)[None, :]
            value = tl.load(x + at[:, None] * D + c[None, :], mask=there, other=0.0).to(tl.float32)
            tl.store(unit + at[:, None] * D + c[None, :], (value / n[:, None]).to(unit.dtype.element_ty), mask=there)


@triton.jit
def _norms(x, at, inside, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(x + at[:, None] * WIDTH + c[None, :], mask=inside[:, None] & (c < WIDTH)[None, :], other=0.0).to(tl.float32)
        squares += value * value
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def class_sums_kernel(frame, weight, sums, N, FRAMED: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum of W over the same-frame and the cross-frame pairs of ROWS tokens with all of their clip: sums[b, block, 2].

    Row by row, sum_j (w_i + w_j - w_i w_j) = w_i count + (1 - w_i) sum_j w_j. Cross pairs are summed for
    themselves and not by difference, so a class without weight gives exactly 0.
    """
    block, b = tl.program_id(0), tl.program_id(1)
    i = block * ROWS + tl.arange(0, ROWS)
    inside = i < N
    same_count = tl.zeros((ROWS,), tl.float32)
    same = tl.zeros((ROWS,), tl.float32)
    cross = tl.zeros((ROWS,), tl.float32)
    if FRAMED:
        frame_i = tl.load(frame + i, mask=inside, other=0)
    if FRAMED or WEIGHTED:
        for start in range(0, N, COLS):
            j = start + tl.arange(0, COLS)
            if WEIGHTED:
                w_j = tl.load(weight + b.to(tl.int64) * N + j, mask=j < N, other=0.0)
            else:
                w_j = tl.where(j < N, 1.0, 0.0)
            if FRAMED:
                frame_j = tl.load(frame + j, mask=j < N, other=0)
                alike = (frame_i[:, None] == frame_j[None, :]) & (j < N)[None, :]
                same_count += tl.sum(tl.where(alike, 1.0, 0.0), 1)
                same += tl.sum(tl.where(alike, w_j[None, :], 0.0), 1)
                cross += tl.sum(tl.where(alike, 0.0, w_j[None, :]), 1)
            else:
                same += tl.sum(w_j)
    if not FRAMED:
        same_count += N
        if not WEIGHTED:
            same += N
    if WEIGHTED:
        w_i = tl.load(weight + b.to(tl.int64) * N + i, mask=inside, other=0.0)
    else:
        w_i = tl.where(inside, 1.0, 0.0)
    at = sums + 2 * (b * tl.num_programs(0) + block)
    tl.store(at, tl.sum(tl.where(inside, w_i * same_count + (1 - w_i) * same, 0.0)))
    tl.store(at + 1, tl.sum(tl.where(inside, w_i * (N - same_count) + (1 - w_i) * cross, 0.0)))


@triton.jit
def factor_kernel(sums, factor, top, blocks, clips, spatial, temporal, BLOCK: tl.constexpr):
    """One clip: what W phi of each class is multiplied with, share / (B sum W), over the larger of the two (``top``).

    Kept apart, ``factor`` stays near 1 where 1 / N^2 would leave fp16's range.
    """
    b = tl.program_id(0)
    same_parts, cross_parts = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, blocks, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = sums + 2 * (b * blocks + k)
        same_parts += tl.load(at, mask=k < blocks, other=0.0).to(tl.float64)
        cross_parts += tl.load(at + 1, mask=k < blocks, other=0.0).to(tl.float64)
    same, cross = tl.sum(same_parts), tl.sum(cross_parts)
    same = tl.where(same > 0, spatial / tl.where(same > 0, same * clips, 1.0), 0.0)
    cross = tl.where(cross > 0, temporal / tl.where(cross > 0, cross * clips, 1.0), 0.0)
    larger = tl.maximum(tl.abs(same), tl.abs(cross))
    scale = tl.where(larger > 0, larger, 1.0)
    tl.store(factor + 2 * b, (same / scale).to(tl.float32))
    tl.store(factor + 2 * b + 1, (cross / scale).to(tl.float32))
    tl.store(top + b, larger.to(tl.float32))


# ---------------------------------------------------------------------------------------------- the pairs


@triton.jit
def pair_kernel(
    x_rows,
    x_cols,
    t_rows,
    t_cols,
    out,
    out_mirror,
    inverse,
    ratio,
    weight,
    frame,
    factor,
    tiles,
    partial,
    N,
    padded,  # places a clip of inverse, ratio, weight and frame, 0 past its N tokens
    out_rows,  # rows and columns of the workspace of one clip
    out_cols,
    clip0,  # first clip of this launch
    origin,  # first token of this panel of rows, and the one after its last
    end,
    margin,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,  # the epilogue takes COLS / SLICES columns at a time, to spare registers
    SUPER: tl.constexpr,
    PENALTY: tl.constexpr,  # "hinge", "squared", "huber"
    HUBER: tl.constexpr,
    FRAMED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WRITE: tl.constexpr,
    UNIT: tl.constexpr,
    BULK: tl.constexpr,  # x, t, out are tensor descriptors (sm_90 and newer), else pointers
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of pairs: its share of the loss, and where WRITE its part of the matrix A = G / (n_i n_j).

    One accumulator serves both similarities: first T T', then times -(n_i n_j) / (|t_i| |t_j|), then X X' on top;
    times 1 / (n_i n_j) that is d. The operands stay as they came, so norms are exact to fp32. Rows past N are 0.
    """
    tile, b = tl.program_id(0), tl.program_id(1)
    row, col = tl.multiple_of(tl.load(tiles + 2 * tile), ROWS), tl.multiple_of(tl.load(tiles + 2 * tile + 1), COLS)
    clip = clip0 + b
    first = clip.to(tl.int64) * padded

    acc = tl.zeros((ROWS, COLS), tl.float32)
    acc = _gram(acc, t_rows, t_cols, clip, row, col, N, E, ROWS, COLS, DEPTH, BULK, PRECISION, INTERPRET)
    i, j = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    # Masked though padded: without masks the compiler would load all of the ratios at once, and hold them.
    acc = acc * -tl.load(ratio + first + i, mask=i < N, other=0.0)[:, None] * tl.load(ratio + first + j, mask=j < N, other=0.0)[None, :]
    acc = _gram(acc, x_rows, x_cols, clip, row, col, N, D, ROWS, COLS, DEPTH, BULK, PRECISION, INTERPRET)

    off_diagonal = row // SUPER != col // SUPER
    mirrored = off_diagonal & (col < end)
    if SLICES == 1:
        parts = (acc,)
    elif SLICES == 2:
        parts = _halves(acc, ROWS, COLS)
    else:
        left, right = _halves(acc, ROWS, COLS)
        parts = _halves(left, ROWS, COLS // 2) + _halves(right, ROWS, COLS // 2)
    WIDTH: tl.constexpr = COLS // SLICES
    inverse_i = tl.load(inverse + first + i)
    same = tl.load(factor + 2 * clip)
    if FRAMED:
        frame_i, cross = tl.load(frame + i), tl.load(factor + 2 * clip + 1)
    if WEIGHTED:
        w_i = tl.load(weight + first + i)
    total = 0.0
    for s in tl.static_range(SLICES):
        if not WRITE:
            tl.debug_barrier()  # without stores between them the compiler would hold all slices at once, and spill
        j = col + s * WIDTH + tl.arange(0, WIDTH)
        pair = same
        if FRAMED:
            pair = tl.where(frame_i[:, None] == tl.load(frame + j)[None, :], same, cross)
        if WEIGHTED:
            pair = pair * (w_i[:, None] + (1 - w_i)[:, None] * tl.load(weight + first + j)[None, :])
        inverse_ij = inverse_i[:, None] * tl.load(inverse + first + j)[None, :]
        d = parts[s] * inverse_ij
        a = tl.maximum(tl.abs(d) - margin, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if PENALTY == "hinge":
            phi, slope = a, tl.minimum(a * 1e38, 1.0, propagate_nan=tl.PropagateNan.ALL)  # 0, 1 or NaN, without a comparison
        elif PENALTY == "squared":
            phi, slope = a * a, 2 * a
        else:
            bent = tl.minimum(a, HUBER, propagate_nan=tl.PropagateNan.ALL)
            phi, slope = bent * (2 * a - bent) * (0.5 / HUBER), bent * (1 / HUBER)
        total += tl.sum(pair * phi)
        if WRITE:
            g = pair * slope if UNIT else pair * slope * inverse_ij
            g = (g.to(tl.int32, bitcast=True) ^ (d.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)  # the sign of d
            if BULK:
                g = g.to(out.dtype)
                out.store([b, row - origin, col + s * WIDTH - origin], g.reshape(1, ROWS, WIDTH))
                if mirrored:
                    out_mirror.store([b, col + s * WIDTH - origin, row - origin], g.T.reshape(1, WIDTH, ROWS))
            else:
                g = g.to(out.dtype.element_ty)
                base = out + b.to(tl.int64) * out_rows * out_cols
                r, c = (i - origin).to(tl.int64), (j - origin).to(tl.int64)
                inside = (i < N)[:, None] & (j < N)[None, :]
                tl.store(base + r[:, None] * out_cols + c[None, :], g, mask=inside)
                if mirrored:
                    tl.store(base + c[:, None] * out_cols + r[None, :], g.T, mask=inside.T)
    tl.store(partial + b * tl.num_programs(0) + tile, tl.where(off_diagonal, 2 * total, total))


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of the columns."""
    left, right = acc.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
    return left, right


@triton.jit
def _gram(
    acc,
    rows,
    cols,
    clip,
    row,
    col,
    N,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BULK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc + X[row : row + ROWS] X[col : col + COLS]' for one clip."""
    for k in range(0, WIDTH, DEPTH):
        left = _block(rows, clip, row, k, N, WIDTH, ROWS, DEPTH, BULK)
        right = _block(cols, clip, col, k, N, WIDTH, COLS, DEPTH, BULK)
        if INTERPRET:  # Triton's interpreter multiplies bf16 wrongly
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _block(source, clip, row, k, N, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, BULK: tl.constexpr):
    if BULK:
        block = source.load([clip, row, k]).reshape(ROWS, DEPTH)
    else:
        i, c = row + tl.arange(0, ROWS), k + tl.arange(0, DEPTH)
        at = source + (clip.to(tl.int64) * N + i)[:, None] * WIDTH + c[None, :]
        if WIDTH % DEPTH == 0:
            block = tl.load(at, mask=(i < N)[:, None], other=0.0)
        else:
            block = tl.load(at, mask=(i < N)[:, None] & (c < WIDTH)[None, :], other=0.0)
    return block


# ---------------------------------------------------------------------------------------------- after the pairs


@triton.jit
def loss_kernel(partial, top, loss, tiles, clips, BLOCK: tl.constexpr):
    """loss = sum_b top_b sum_tile partial[b, tile], in fp64 and in one order: the same to the bit every time."""
    total = tl.zeros((BLOCK,), tl.float64)
    for b in range(clips):
        clip = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, tiles, BLOCK):
            k = start + tl.arange(0, BLOCK)
            clip += tl.load(partial + k, mask=k < tiles, other=0.0).to(tl.float64)
        total += clip * tl.load(top + b).to(tl.float64)
        partial += tiles
    tl.store(loss, tl.sum(total).to(tl.float32))


@triton.jit
def project_kernel(
    upstream, pull, top, x, grad, count, N, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, EPS: tl.constexpr
):
    """Per token: 2 top upstream (v - x (x . v) / |x|^2), divided by |x| where v was made of unit vectors."""
    m = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    along = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, D, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at, inside = m[:, None] * D + c[None, :], (m < count)[:, None] & (c < D)[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        squares += value * value
        along += value * tl.load(pull + at, mask=inside, other=0.0)
    norm = tl.sqrt(tl.sum(squares, 1))
    zero = norm <= EPS
    n = tl.where(zero, 1.0, norm)
    shift = tl.sum(along, 1) / n / n
    scale = 2 * tl.load(top + m // N, mask=m < count, other=0.0) * tl.load(upstream)
    if UNIT:
        scale = scale / n
    scale = tl.where(zero, 0.0, scale)
    for start in range(0, D, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at, inside = m[:, None] * D + c[None, :], (m < count)[:, None] & (c < D)[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(pull + at, mask=inside, other=0.0)
        tl.store(grad + at, (scale[:, None] * (v - value * shift[:, None])).to(grad.dtype.element_ty), mask=inside)
