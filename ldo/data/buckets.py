"""Buckets: the sizes that clips are sorted into, and which clips a step takes. A batch holds one bucket.

Every choice is a function of the clips and of (seed, step), never of the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldo.core.rng import numpy_rng
from ldo.data.video import VideoInfo

Size = tuple[int, ...]  # frames, height, width
# An enlarged picture holds nothing at its finest scale, and a model that learns from it learns blur. A tenth allows for
# the common near misses (848 x 478 for 832 x 480), and no more.
UPSCALE = 1.1
CROP = 0.05  # shares of the picture cut away that differ by less than this are alike


def choose_bucket(info: VideoInfo, fps: float, sizes: Sequence[Size]) -> Size:
    """The size for a clip: among those it is long and large enough for, the nearest in shape.

    Of sizes that are alike in shape it is the largest. ValueError says why there is none. Where a recipe gives a single
    size, pictures of any size are scaled to it.
    """
    count = info.count(fps)
    long_enough = [size for size in sizes if size[0] <= count]
    if not long_enough:
        raise ValueError(f"it gives {count} frames at {fps:g} fps and {min(size[0] for size in sizes)} are needed")
    if len(sizes) == 1:
        return long_enough[0]
    large_enough = [size for size in long_enough if max(size[1] / info.height, size[2] / info.width) <= UPSCALE]
    if not large_enough:
        smallest = min(long_enough, key=lambda size: size[1] * size[2])
        raise ValueError(
            f"its {info.width} x {info.height} pixels are too few for the smallest bucket that it is long enough for, "
            f"{smallest[2]} x {smallest[1]}"
        )
    cropped = {size: _cut(info, size) for size in large_enough}
    similar = [size for size in large_enough if cropped[size] < min(cropped.values()) + CROP]
    # the largest of them, then the least cropped; the size itself comes last, so that the order in the recipe does not
    # matter
    return max(similar, key=lambda size: (size[0] * size[1] * size[2], -cropped[size], size))


def _cut(info: VideoInfo, size: Size) -> float:
    """Share of the picture that the centre crop to ``size`` cuts away."""
    ratios = info.width / info.height, size[2] / size[1]
    return 1 - min(ratios) / max(ratios)


def batch_indices(seed: int, purpose: str, step: int, batch: int, count: int) -> np.ndarray:
    """Which items step ``step`` takes [batch]: epoch after epoch in fresh order, a function of (seed, step) only."""
    drawn_before = step * batch
    indices: list[int] = []
    # a batch may reach into the next epoch, or over several of a small set
    while len(indices) < batch:
        epoch, position = divmod(drawn_before + len(indices), count)
        order = numpy_rng(seed, f"{purpose} order", epoch).permutation(count)
        indices.extend(order[position : position + batch - len(indices)])
    return np.array(indices)


def bucket_batch(seed: int, purpose: str, step: int, batch: int, counts: Sequence[int]) -> tuple[int, np.ndarray]:
    """The bucket of step ``step`` and which of its ``counts[bucket]`` items it takes [batch].

    In an epoch of steps each bucket has its share of batches, rounded, at least one, in an order drawn afresh. Within a
    bucket no item comes again before all have come. A single bucket is ``batch_indices``.
    """
    if len(counts) == 1:
        return 0, batch_indices(seed, purpose, step, batch, counts[0])
    turns = [max(round(count / batch), 1) for count in counts]
    epoch, position = divmod(step, sum(turns))
    # how often the bucket came in earlier epochs and in this one says which of its own batches is next
    order = numpy_rng(seed, f"{purpose} buckets", epoch).permutation(np.repeat(np.arange(len(counts)), turns))
    bucket = int(order[position])
    turn = epoch * turns[bucket] + int((order[:position] == bucket).sum())
    return bucket, batch_indices(seed, f"{purpose} {bucket}", turn, batch, counts[bucket])
