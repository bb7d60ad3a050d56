"""Device code that prepares the relation loss: the norms of every token, and the weight of both classes of pairs.

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
    run_start,  # [N + 1] int32: for each place in that order, where its frame begins; N at the end
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
    """The first B programs compute ``_class_factors`` of one clip each. The others compute, per token, with n = |x|:

        inverse = 1 / n,    ratio = n / |t|,    padded_weight = w,    unit = x / n

    n is 1 for a zero vector, and ratio is 0 for t = 0. ``inverse`` and ``ratio`` are also multiplied by their gains
    (``relation_plan.gains``). They and ``padded_weight`` have ``padded`` places a clip, 0 past its N tokens, so that
    the pair kernel needs no masks.
    """
    program = tl.program_id(0)
    if program < clips:
        _class_factors(
            weight,
            order,
            run_start,
            cumulative,
            observed,
            factor,
            scale,
            program,
            N,
            clips,
            blocks,
            spatial,
            temporal,
            SCAN,
            SKIP,
        )
    else:
        # int32 is enough for the places of all clips together; offsets into features are 64-bit
        place = (program - clips) * TOKENS + tl.arange(0, TOKENS)
        clip = place // padded
        token = place % padded
        inside = token < N
        row = clip.to(tl.int64) * N + token
        student_norm = _norms(student, row, inside, D, TOKENS, BLOCK)
        teacher_norm = _norms(teacher, row, inside, E, TOKENS, BLOCK)
        # compared this way round, a NaN fails the comparison and stays
        norm = tl.where(student_norm <= EPS, 1.0, student_norm)
        tl.store(inverse + place, tl.where(inside, inverse_gain / norm, 0.0))
        divisor = tl.where(teacher_norm <= EPS, 1.0, teacher_norm)
        teacher_inverse = tl.where(teacher_norm <= EPS, 0.0, ratio_gain / divisor)
        tl.store(ratio + place, norm * teacher_inverse)
        if padded_weight is not None:
            token_weight = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)
            tl.store(padded_weight + place, token_weight)
        if unit is not None:
            for start in range(0, D, BLOCK):
                column = start + tl.arange(0, BLOCK)
                there = inside[:, None] & (column < D)[None, :]
                offset = row[:, None] * D + column[None, :]
                value = tl.load(student + offset, mask=there, other=0.0).to(tl.float32)
                tl.store(unit + offset, (value / norm[:, None]).to(unit.dtype.element_ty), mask=there)


@triton.jit
def _norms(features, row, inside, WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The norms of TOKENS rows of ``features``, in fp32; 0 for rows that are not ``inside``."""
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = inside[:, None] & (column < WIDTH)[None, :]
        value = tl.load(features + row[:, None] * WIDTH + column[None, :], mask=there, other=0.0).to(tl.float32)
        squares += value * value
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def _share(share, total):
    """share / total in fp32, 0 for a class without weight."""
    # not in fp64, whose division is a function call
    divisor = total.to(tl.float32)
    return tl.where(divisor > 0, tl.div_rn(share, tl.where(divisor > 0, divisor, 1.0)), 0.0)


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
    """One clip's factors of W phi: share / (B sum W) of same-frame and cross-frame pairs, over the larger of the two.

    With n_f tokens of frame f and s_f the sum of their weights, N and S those of all tokens, the sum of W is

        same  = sum_f  2 n_f s_f - s_f^2                                 pairs of a frame with itself
        cross = sum_f  n_f (S - s_f) + s_f ((N - n_f) - (S - s_f))       pairs with all other frames

    s_f is a difference of running sums in frame order, in fp64. A class without pairs or without weight gets exactly 0,
    because S - s_f and N - n_f, or all of the sums, are then exact zeros. ``scale`` is the larger factor. It is kept
    out of ``factor``, since 1 / N^2 would leave fp16's range. ``observed`` is 1 for each block of SKIP tokens whose
    weights are all 0.
    """
    row = clip.to(tl.int64) * N
    count = N.to(tl.float64)
    if weight is None:
        everything = count
    if (order is not None) or (weight is not None):
        total = count * 0
        for start in range(0, N, SCAN):
            place = start + tl.arange(0, SCAN)
            inside = place < N
            if weight is None:
                value = tl.where(inside, 1.0, 0.0).to(tl.float64)
            else:
                token = place
                if order is not None:
                    token = tl.load(order + place, mask=inside, other=0)
                value = tl.load(weight + row + token, mask=inside, other=0.0).to(tl.float64)
            if order is not None:
                tl.store(cumulative + row + place, total + tl.cumsum(value, 0), mask=inside)
            total += tl.sum(value, 0)
        everything = total
    if order is None:
        same = 2 * count * everything - everything * everything
        cross = count * 0
    else:
        # the running sums were written by other threads of this block
        tl.debug_barrier()
        everything = tl.load(cumulative + row + N - 1)
        same_parts = tl.zeros((SCAN,), tl.float64)
        cross_parts = tl.zeros((SCAN,), tl.float64)
        for start in range(0, N, SCAN):
            place = start + tl.arange(0, SCAN)
            inside = place < N
            begin = tl.load(run_start + place, mask=inside, other=0)
            # a frame is counted at its last place, where all of its weights have been summed
            last = inside & (tl.load(run_start + place + 1, mask=inside, other=0) != begin)
            before = tl.load(cumulative + row + begin - 1, mask=last & (begin > 0), other=0.0)
            frame_sum = tl.load(cumulative + row + place, mask=last, other=0.0) - before
            frame_count = (place + 1 - begin).to(tl.float64)
            other_count, other_sum = count - frame_count, everything - frame_sum
            same_parts += tl.where(last, 2 * frame_count * frame_sum - frame_sum * frame_sum, 0.0)
            cross_parts += tl.where(last, frame_count * other_sum + frame_sum * (other_count - other_sum), 0.0)
        same = tl.sum(same_parts, 0)
        cross = tl.sum(cross_parts, 0)
    same = _share(spatial, same * clips)
    cross = _share(temporal, cross * clips)
    larger = tl.maximum(tl.abs(same), tl.abs(cross))
    divisor = tl.where(larger > 0, larger, 1.0)
    tl.store(factor + 2 * clip, tl.div_rn(same, divisor))
    tl.store(factor + 2 * clip + 1, tl.div_rn(cross, divisor))
    tl.store(scale + clip, larger)
    if observed is not None:
        for start in range(0, blocks, SCAN // SKIP):
            block = start + tl.arange(0, SCAN // SKIP)
            token = block[:, None] * SKIP + tl.arange(0, SKIP)[None, :]
            weights = tl.load(weight + row + token, mask=token < N, other=0.0).to(tl.float32)
            all_zero = (tl.max(tl.abs(weights), 1) == 0).to(tl.int32)
            tl.store(observed + clip * blocks + block, all_zero, mask=block < blocks)
