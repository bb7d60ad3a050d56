"""Device code of the relation loss for its pairs of tokens. ``kernels/relation.py`` launches it and holds the design.

Shapes: B clips, N tokens, D student and E teacher features. A tile is ROWS x COLS pairs of tokens, and takes DEPTH
features at a time. Names follow ``ldo/ops/relation.py``: d = s - y, phi is the penalty, W the pair weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------- the pairs


@triton.jit(
    do_not_specialize=["partial_stride", "first_partial", "N", "blocks", "out_rows", "first_clip", "origin", "end"]
)
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
    observed,  # [B, blocks] int32, or None: 1 for a block of SKIP tokens that all have weight 0
    factor,
    tiles,
    partial,
    partial_stride,  # partial sums of one clip, over all panels
    first_partial,  # of this panel
    N,
    padded,  # places of a clip in inverse, ratio, weight and frame; 0 past its N tokens
    blocks,
    out_rows,  # rows and columns of the workspace of one clip
    out_cols,
    first_clip,  # of this launch
    origin,  # first token of this panel of rows
    end,  # the one after its last
    margin,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,  # the epilogue takes COLS / SLICES columns at a time, to save registers
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
    """One tile of pairs: its share of the loss, and if WRITE also its part of the matrix A_ij = G_ij / (n_i n_j).

    One accumulator serves both similarities. It first takes T T', is multiplied by -(n_i n_j) / (|t_i| |t_j|), and then
    takes X X' on top. Times 1 / (n_i n_j) it is d. The operands are the inputs as given, not unit vectors, so norms are
    exact to fp32. Rows past N are 0. Per pair, with H the bend of the Huber penalty:

        a     = max(|d| - margin, 0)
        hinge     phi = a,                                     slope = (a > 0)
        squared   phi = a^2,                                   slope = 2 a
        huber     phi = min(a, H) (2 a - min(a, H)) / (2 H),   slope = min(a, H) / H
        g     = W slope sign(d) / (n_i n_j)
    """
    tile = tl.program_id(0)
    clip_of_launch = tl.program_id(1)
    clip = first_clip + clip_of_launch
    row = tl.multiple_of(tl.load(tiles + 2 * tile), ROWS)
    column = tl.multiple_of(tl.load(tiles + 2 * tile + 1), COLS)
    first = clip.to(tl.int64) * padded
    origin = tl.multiple_of(origin, 16)
    teacher_depth, student_depth = E, D
    # Between two tokens of weight 0 there is nothing to learn: W is 0, whatever the similarities.
    if observed is not None:
        blank = 1
        for block in tl.static_range(ROWS // SKIP):
            blank &= tl.load(observed + clip * blocks + row // SKIP + block)
        for block in tl.static_range(COLS // SKIP):
            blank &= tl.load(observed + clip * blocks + column // SKIP + block)
        teacher_depth = tl.where(blank != 0, 0, E)
        student_depth = tl.where(blank != 0, 0, D)

    accumulator = tl.zeros((ROWS, COLS), tl.float32)
    accumulator = _gram(
        accumulator,
        t_rows,
        t_cols,
        clip,
        row,
        column,
        N,
        teacher_depth,
        E,
        ROWS,
        COLS,
        DEPTH,
        USE_TMA,
        PRECISION,
        INTERPRET,
    )
    token_i = row + tl.arange(0, ROWS)
    token_j = column + tl.arange(0, COLS)
    # Masked, although padded: without masks the compiler would load all of the ratios at once, and hold them.
    ratio_i = -tl.load(ratio + first + token_i, mask=token_i < N, other=0.0)
    ratio_j = tl.load(ratio + first + token_j, mask=token_j < N, other=0.0)
    accumulator = accumulator * ratio_i[:, None] * ratio_j[None, :]
    accumulator = _gram(
        accumulator,
        x_rows,
        x_cols,
        clip,
        row,
        column,
        N,
        student_depth,
        D,
        ROWS,
        COLS,
        DEPTH,
        USE_TMA,
        PRECISION,
        INTERPRET,
    )

    off_diagonal = row // SQUARE != column // SQUARE
    mirrored = off_diagonal & (column < end)
    if SLICES == 1:
        parts = (accumulator,)
    elif SLICES == 2:
        parts = _halves(accumulator, ROWS, COLS)
    else:
        left, right = _halves(accumulator, ROWS, COLS)
        parts = _halves(left, ROWS, COLS // 2) + _halves(right, ROWS, COLS // 2)
    WIDTH: tl.constexpr = COLS // SLICES
    inverse_i = tl.load(inverse + first + token_i)
    same = tl.load(factor + 2 * clip)
    if FRAMED:
        frame_i = tl.load(frame + token_i)
        cross = tl.load(factor + 2 * clip + 1)
    if WEIGHTED:
        weight_i = tl.load(weight + first + token_i)
    total = 0.0
    for part in tl.static_range(SLICES):
        # Without stores between the slices the compiler would hold all of them at once, and spill.
        if not WRITE:
            tl.debug_barrier()
        token_j = column + part * WIDTH + tl.arange(0, WIDTH)
        pair = same
        if FRAMED:
            pair = tl.where(frame_i[:, None] == tl.load(frame + token_j)[None, :], same, cross)
        if WEIGHTED:
            pair = pair * (weight_i[:, None] + (1 - weight_i)[:, None] * tl.load(weight + first + token_j)[None, :])
        inverse_ij = inverse_i[:, None] * tl.load(inverse + first + token_j)[None, :]
        d = parts[part] * inverse_ij
        a = tl.maximum(tl.abs(d) - margin, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if PENALTY == "hinge":
            phi = a
            # 0, 1 or NaN: a comparison would lose the NaN
            slope = tl.minimum(a * 1e38, 1.0, propagate_nan=tl.PropagateNan.ALL)
        elif PENALTY == "squared":
            phi = a * a
            slope = 2 * a
        else:
            bent = tl.minimum(a, HUBER, propagate_nan=tl.PropagateNan.ALL)
            phi = bent * (2 * a - bent) * (0.5 / HUBER)
            slope = bent * (1 / HUBER)
        total += tl.sum(pair * phi)
        if WRITE:
            g = pair * slope if UNIT else pair * slope * inverse_ij
            # flips the sign bit of g where d is negative
            sign = d.to(tl.int32, bitcast=True) & -0x80000000
            g = (g.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
            if USE_TMA:
                g = g.to(out.dtype)
                out_row, out_col = row - origin, column + part * WIDTH - origin
                out.store([clip_of_launch, out_row, out_col], g.reshape(1, ROWS, WIDTH))
                if mirrored:
                    out_mirror.store([clip_of_launch, out_col, out_row], g.T.reshape(1, WIDTH, ROWS))
            else:
                g = g.to(out.dtype.element_ty)
                base = out + clip_of_launch.to(tl.int64) * out_rows * out_cols
                out_row, out_col = (token_i - origin).to(tl.int64), (token_j - origin).to(tl.int64)
                inside = (token_i < N)[:, None] & (token_j < N)[None, :]
                tl.store(base + out_row[:, None] * out_cols + out_col[None, :], g, mask=inside)
                if mirrored:
                    tl.store(base + out_col[:, None] * out_cols + out_row[None, :], g.T, mask=inside.T)
    # a tile off the diagonal stands for its mirror image too
    tl.store(partial + clip * partial_stride + first_partial + tile, tl.where(off_diagonal, 2 * total, total))


@triton.jit
def _halves(accumulator, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of the columns."""
    left, right = accumulator.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
    return left, right


@triton.jit
def _gram(
    accumulator,
    rows,
    cols,
    clip,
    row,
    column,
    N,
    depth,  # WIDTH, or 0 to add nothing
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """accumulator + X[row : row + ROWS] X[column : column + COLS]' for one clip."""
    for start in range(0, depth, DEPTH):
        left = _block(rows, clip, row, start, N, WIDTH, ROWS, DEPTH, USE_TMA)
        right = _block(cols, clip, column, start, N, WIDTH, COLS, DEPTH, USE_TMA)
        # Triton's interpreter multiplies bf16 wrongly
        if INTERPRET:
            left, right = left.to(tl.float32), right.to(tl.float32)
        accumulator = tl.dot(left, right.T, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def _block(
    source, clip, row, start, N, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, USE_TMA: tl.constexpr
):
    """DEPTH features from ``start`` of ROWS tokens from ``row`` of one clip; 0 past the N tokens and WIDTH features."""
    if USE_TMA:
        block = source.load([clip, row, start]).reshape(ROWS, DEPTH)
    else:
        token = row + tl.arange(0, ROWS)
        feature = start + tl.arange(0, DEPTH)
        offset = source + (clip.to(tl.int64) * N + token)[:, None] * WIDTH + feature[None, :]
        # widths that DEPTH divides need no mask for the features, which is cheaper
        if WIDTH % DEPTH == 0:
            block = tl.load(offset, mask=(token < N)[:, None], other=0.0)
        else:
            block = tl.load(offset, mask=(token < N)[:, None] & (feature < WIDTH)[None, :], other=0.0)
    return block
