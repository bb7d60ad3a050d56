"""Device code of the relation loss: its pairs of tokens. ``kernels/relation.py`` launches it and holds the design.

Shapes: B clips, N tokens, D student and E teacher features; a tile is ROWS x COLS pairs of tokens, DEPTH features at
a time. Names follow ``ldo/ops/relation.py``: d = s - y, phi the penalty, W the pair weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------- the pairs


@triton.jit(do_not_specialize=["partial_stride", "first_partial", "N", "blocks", "out_rows", "first_clip", "origin", "end"])
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
    observed,  # [B, blocks] int32, or None: 1 where all of SKIP tokens have weight 0
    factor,
    tiles,
    partial,
    partial_stride,  # partial sums of one clip, over all panels
    first_partial,  # of this panel
    N,
    padded,  # places a clip of inverse, ratio, weight and frame, 0 past its N tokens
    blocks,
    out_rows,  # rows and columns of the workspace of one clip
    out_cols,
    first_clip,  # of this launch
    origin,  # first token of this panel of rows, and the one after its last
    end,
    margin,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,  # the epilogue takes COLS / SLICES columns at a time, to spare registers
    SQUARE: tl.constexpr,
    SKIP: tl.constexpr,
    PENALTY: tl.constexpr,  # "hinge", "squared", "huber"
    HUBER: tl.constexpr,
    FRAMED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WRITE: tl.constexpr,
    UNIT: tl.constexpr,
    USE_TMA: tl.constexpr,  # x, t, out are tensor descriptors (sm_90 and newer), else pointers
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of pairs: its share of the loss, and where WRITE its part of the matrix A = G / (n_i n_j).

    One accumulator serves both similarities: first T T', then times -(n_i n_j) / (|t_i| |t_j|), then X X' on top;
    times 1 / (n_i n_j) that is d. The operands stay as they came, so norms are exact to fp32. Rows past N are 0.
    """
    tile, b = tl.program_id(0), tl.program_id(1)
    row, col = tl.multiple_of(tl.load(tiles + 2 * tile), ROWS), tl.multiple_of(tl.load(tiles + 2 * tile + 1), COLS)
    clip = first_clip + b
    first = clip.to(tl.int64) * padded
    origin = tl.multiple_of(origin, 16)
    teacher_depth, student_depth = E, D
    if observed is not None:  # between two tokens of weight 0 there is nothing to learn: W is 0, whatever the similarities
        blank = 1
        for block in tl.static_range(ROWS // SKIP):
            blank &= tl.load(observed + clip * blocks + row // SKIP + block)
        for block in tl.static_range(COLS // SKIP):
            blank &= tl.load(observed + clip * blocks + col // SKIP + block)
        teacher_depth, student_depth = tl.where(blank != 0, 0, E), tl.where(blank != 0, 0, D)

    acc = tl.zeros((ROWS, COLS), tl.float32)
    acc = _gram(acc, t_rows, t_cols, clip, row, col, N, teacher_depth, E, ROWS, COLS, DEPTH, USE_TMA, PRECISION, INTERPRET)
    i, j = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    # Masked though padded: without masks the compiler would load all of the ratios at once, and hold them.
    acc = acc * -tl.load(ratio + first + i, mask=i < N, other=0.0)[:, None] * tl.load(ratio + first + j, mask=j < N, other=0.0)[None, :]
    acc = _gram(acc, x_rows, x_cols, clip, row, col, N, student_depth, D, ROWS, COLS, DEPTH, USE_TMA, PRECISION, INTERPRET)

    off_diagonal = row // SQUARE != col // SQUARE
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
            if USE_TMA:
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
    tl.store(partial + clip * partial_stride + first_partial + tile, tl.where(off_diagonal, 2 * total, total))


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
    depth,  # WIDTH, or 0 to leave it out
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc + X[row : row + ROWS] X[col : col + COLS]' for one clip."""
    for k in range(0, depth, DEPTH):
        left = _block(rows, clip, row, k, N, WIDTH, ROWS, DEPTH, USE_TMA)
        right = _block(cols, clip, col, k, N, WIDTH, COLS, DEPTH, USE_TMA)
        if INTERPRET:  # Triton's interpreter multiplies bf16 wrongly
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _block(source, clip, row, k, N, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, USE_TMA: tl.constexpr):
    if USE_TMA:
        block = source.load([clip, row, k]).reshape(ROWS, DEPTH)
    else:
        i, c = row + tl.arange(0, ROWS), k + tl.arange(0, DEPTH)
        at = source + (clip.to(tl.int64) * N + i)[:, None] * WIDTH + c[None, :]
        if WIDTH % DEPTH == 0:
            block = tl.load(at, mask=(i < N)[:, None], other=0.0)
        else:
            block = tl.load(at, mask=(i < N)[:, None] & (c < WIDTH)[None, :], other=0.0)
    return block
