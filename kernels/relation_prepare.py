"""Device code of the relation loss before its pairs: numbers of every token, and the weight of both classes of pairs.

Shapes: B clips, N tokens, D student and E teacher features. Names follow ``ldo/ops/relation.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "clips", "blocks"])
def prepare_kernel(
    student,  # [B, N, D]
    teacher,  # [B, N, E]
    weight,  # [B, N], any floating type, or None: all 1
    order,  # [N] int32: tokens sorted by frame; None: one class of pairs
    run_start,  # [N + 1] int32: where in that order a token's frame begins; N at the end
    inverse,  # [B, padded] fp32
    ratio,  # [B, padded] fp32
    padded_weight,  # [B, padded] fp32, or None
    unit,  # [B, N, D] in the student's type, or None
    cumulative,  # [B, N] fp64: scratch, or None
    observed,  # [B, blocks] int32, or None
    factor,  # [B, 2] fp32
    scale,  # [B] fp32
    N,
    padded,
    clips,
    blocks,  # padded / SKIP
    spatial,
    temporal,
    inverse_gain,
    ratio_gain,
    D: tl.constexpr,
    E: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
    SKIP: tl.constexpr,
    EPS: tl.constexpr,
):
    """The first B programs: ``_class_factors`` of a clip. The others, per token, with n = |x| (1 for a zero vector):

        inverse = 1 / n,    ratio = n / |t| (0 for t = 0),    padded_weight = w,    unit = x / n

    the first two times their gains (``relation_plan.gains``). The first three have ``padded`` places a clip, 0 past its N
    tokens, so that the pair kernel needs no masks.
    """
    program = tl.program_id(0)
    if program < clips:
        _class_factors(weight, order, run_start, cumulative, observed, factor, scale, program, N, clips, blocks, spatial, temporal, SCAN, SKIP)
    else:
        place = (program - clips) * TOKENS + tl.arange(0, TOKENS)  # tokens in all, far below 2^31
        clip, token = place // padded, place % padded
        inside = token < N
        row = clip.to(tl.int64) * N + token
        student_norm = _norms(student, row, inside, D, TOKENS, BLOCK)
        teacher_norm = _norms(teacher, row, inside, E, TOKENS, BLOCK)
        norm = tl.where(student_norm <= EPS, 1.0, student_norm)  # a NaN fails the comparison and stays
        tl.store(inverse + place, tl.where(inside, inverse_gain / norm, 0.0))
        teacher_inverse = tl.where(teacher_norm <= EPS, 0.0, ratio_gain / tl.where(teacher_norm <= EPS, 1.0, teacher_norm))
        tl.store(ratio + place, norm * teacher_inverse)
        if padded_weight is not None:
            tl.store(padded_weight + place, tl.load(weight + row, mask=inside, other=0.0).to(tl.float32))
        if unit is not None:
            for start in range(0, D, BLOCK):
                column = start + tl.arange(0, BLOCK)
                there = inside[:, None] & (column < D)[None, :]
                at = row[:, None] * D + column[None, :]
                value = tl.load(student + at, mask=there, other=0.0).to(tl.float32)
                tl.store(unit + at, (value / norm[:, None]).to(unit.dtype.element_ty), mask=there)


@triton.jit
def _norms(features, row, inside, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = inside[:, None] & (column < WIDTH)[None, :]
        value = tl.load(features + row[:, None] * WIDTH + column[None, :], mask=there, other=0.0).to(tl.float32)
        squares += value * value
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def _share(share, total):
    """share / total in fp32, 0 for a class without weight; an fp64 division would be a call."""
    by = total.to(tl.float32)
    return tl.where(by > 0, tl.div_rn(share, tl.where(by > 0, by, 1.0)), 0.0)


@triton.jit
def _class_factors(
    weight,
    order,
    run_start,
    cumulative,
    observed,
    factor,
    scale,
    clip,
    N,
    clips,
    blocks,
    spatial,
    temporal,
    SCAN: tl.constexpr,
    SKIP: tl.constexpr,
):
    """One clip's factors of W phi, share / (B sum W) of the same-frame and the cross-frame pairs, over the larger of both.

    With n_f tokens of frame f and s_f the sum of their weights, N and S those of all:

        sum of W over the pairs of frame f with itself        2 n_f s_f - s_f^2
                              with all other frames           n_f (S - s_f) + s_f ((N - n_f) - (S - s_f))

    s_f is a difference of running sums in frame order, in fp64. Both vanish exactly where a class has no pairs or no
    weight: then S - s_f and N - n_f, or all of the sums, are exact zeros. ``scale`` is the larger factor: kept apart, since
    1 / N^2 would leave fp16's range. ``observed``: 1 for each block of SKIP tokens whose weights are all 0.
    """
    row = clip.to(tl.int64) * N
    count = N.to(tl.float64)
    if weight is None:
        everything = count
    if (order is not None) or (weight is not None):
        total = count * 0
        for start in range(0, N, SCAN):
            k = start + tl.arange(0, SCAN)
            inside = k < N
            if weight is None:
                w = tl.where(inside, 1.0, 0.0).to(tl.float64)
            else:
                token = k
                if order is not None:
                    token = tl.load(order + k, mask=inside, other=0)
                w = tl.load(weight + row + token, mask=inside, other=0.0).to(tl.float64)
            if order is not None:
                tl.store(cumulative + row + k, total + tl.cumsum(w, 0), mask=inside)
            total += tl.sum(w, 0)
        everything = total
    if order is None:
        same = 2 * count * everything - everything * everything
        cross = count * 0
    else:
        tl.debug_barrier()  # the sums were written by other threads of this block
        everything = tl.load(cumulative + row + N - 1)
        same_parts = tl.zeros((SCAN,), tl.float64)
        cross_parts = tl.zeros((SCAN,), tl.float64)
        for start in range(0, N, SCAN):
            k = start + tl.arange(0, SCAN)
            inside = k < N
            begin = tl.load(run_start + k, mask=inside, other=0)
            last = inside & (tl.load(run_start + k + 1, mask=inside, other=0) != begin)
            before = tl.load(cumulative + row + begin - 1, mask=last & (begin > 0), other=0.0)
            s = tl.load(cumulative + row + k, mask=last, other=0.0) - before
            n = (k + 1 - begin).to(tl.float64)
            other_n, other_s = count - n, everything - s
            same_parts += tl.where(last, 2 * n * s - s * s, 0.0)
            cross_parts += tl.where(last, n * other_s + s * (other_n - other_s), 0.0)
        same, cross = tl.sum(same_parts, 0), tl.sum(cross_parts, 0)
    same, cross = _share(spatial, same * clips), _share(temporal, cross * clips)
    larger = tl.maximum(tl.abs(same), tl.abs(cross))
    by = tl.where(larger > 0, larger, 1.0)
    tl.store(factor + 2 * clip, tl.div_rn(same, by))
    tl.store(factor + 2 * clip + 1, tl.div_rn(cross, by))
    tl.store(scale + clip, larger)
    if observed is not None:
        for start in range(0, blocks, SCAN // SKIP):
            block = start + tl.arange(0, SCAN // SKIP)
            token = block[:, None] * SKIP + tl.arange(0, SKIP)[None, :]
            w = tl.load(weight + row + token, mask=token < N, other=0.0).to(tl.float32)
            tl.store(observed + clip * blocks + block, (tl.max(tl.abs(w), 1) == 0).to(tl.int32), mask=block < blocks)
