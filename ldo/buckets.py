"""Buckets: the sizes that clips are sorted into, and which clips a step takes. A batch holds one bucket.

Every choice is a function of the clips and of (seed, step), never of the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldo.rng import numpy_rng
from ldo.video import Info

Size = tuple[int, ...]  # frames, height, width
# A picture that is enlarged has nothing to show at its finest scale: who learns from it learns blur. A tenth forgives
# the common near misses (848 x 478 for 832 x 480), and no more.
UPSCALE = 1.1
CROP = 0.05  # shares of the picture cut away that differ by less than this are alike


def choose(info: Info, fps: float, sizes: Sequence[Size]) -> Size:
    """The size for a clip: among those it is long and large enough for, the nearest in shape; of those alike, the largest.

    ValueError says why there is none. Where a recipe gives a single size, pictures of any size are scaled to it.
    """
    count = info.count(fps)
    long = [s for s in sizes if s[0] <= count]
    if not long:
        raise ValueError(f"it gives {count} frames at {fps:g} fps and {min(s[0] for s in sizes)} are needed")
    if len(sizes) == 1:
        return long[0]
    large = [s for s in long if max(s[1] / info.height, s[2] / info.width) <= UPSCALE]
    if not large:
        least = min(long, key=lambda s: s[1] * s[2])
        raise ValueError(
            f"its {info.width} x {info.height} pixels are too few for the smallest bucket that it is long enough for, {least[2]} x {least[1]}"
        )
    cut = {s: _cut(info, s) for s in large}
    alike = [s for s in large if cut[s] < min(cut.values()) + CROP]
    return max(alike, key=lambda s: (s[0] * s[1] * s[2], -cut[s], s))


def _cut(info: Info, size: Size) -> float:
    """Share of the picture that the centre crop to ``size`` cuts away."""
    shapes = info.width / info.height, size[2] / size[1]
    return 1 - min(shapes) / max(shapes)


def batch_indices(seed: int, purpose: str, step: int, batch: int, count: int) -> np.ndarray:
    """Which items step ``step`` takes [batch]: epoch after epoch in fresh order, a function of (seed, step) alone."""
    first = step * batch
    out = []
    while len(out) < batch:
        epoch, at = divmod(first + len(out), count)
        out.extend(numpy_rng(seed, f"{purpose} order", epoch).permutation(count)[at : at + batch - len(out)])
    return np.array(out)


def bucket_batch(seed: int, purpose: str, step: int, batch: int, counts: Sequence[int]) -> tuple[int, np.ndarray]:
    """The bucket of step ``step`` and which of its ``counts[bucket]`` items it takes [batch].

    In an epoch of steps each bucket has its share of batches, rounded, at least one, in an order drawn afresh. Within a
    bucket no item comes again before all have come. A single bucket is ``batch_indices``.
    """
    if len(counts) == 1:
        return 0, batch_indices(seed, purpose, step, batch, counts[0])
    turns = [max(round(c / batch), 1) for c in counts]
    epoch, at = divmod(step, sum(turns))
    order = numpy_rng(seed, f"{purpose} buckets", epoch).permutation(np.repeat(np.arange(len(counts)), turns))
    bucket = int(order[at])
    turn = epoch * turns[bucket] + int((order[:at] == bucket).sum())
    return bucket, batch_indices(seed, f"{purpose} {bucket}", turn, batch, counts[bucket])
