"""Encoded clips as stage 1 trains on them: rows by size, split into training and held-out rows, taken in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldo.data.buckets import Size, bucket_batch
from ldo.method.teacher import Target

HELD_OUT_SHARE = 8  # one row in so many is held out
MOST_HELD_OUT = 32  # of each size


@dataclass(frozen=True)
class EncodedClips:
    """Rows of encoded clips: captions, sizes, files, and ``read``, which gives some rows of one size.

    What it gives are tensors by name: latents [B, C, T, H, W], y [B, N, E], weight [B, N], and grid [B, 4], the
    target's (t, h, w, skip).
    """

    prompts: list[str]
    sizes: list[Size]
    files: list[Path]
    read: Callable[[Tensor], dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Tensor) -> tuple[Tensor, Target]:
        """Latents and teacher targets of some rows of one size."""
        found = self.read(rows)
        steps, height, width, skip = found["grid"][0].tolist()
        return found["latents"], Target(found["y"].float(), found["weight"], (steps, height, width), skip)

    def buckets(self) -> list[list[int]]:
        """All rows by size."""
        by_size: dict[Size, list[int]] = {size: [] for size in self.sizes}
        for row, size in enumerate(self.sizes):
            by_size[size].append(row)
        return list(by_size.values())

    def split(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to train on and rows held out, by size: of each the last eighth, at most 32.

        A file is not on both sides, unless it makes up half of its bucket.
        """
        training, held_out = [], []
        for rows in self.buckets():
            cut = self._cut(rows)
            training.append(rows[:cut])
            held_out.append(rows[cut:])
        return training, held_out

    def _cut(self, rows: list[int]) -> int:
        """How many of a bucket's rows to train on: all but the last eighth, moved back to where a new file begins."""
        cut = max(len(rows) - min(MOST_HELD_OUT, len(rows) // HELD_OUT_SHARE), 1)
        for candidate in range(cut, len(rows) // 2, -1):
            # Windows of one file are nearly the same clip: on both sides they would make the held-out loss a training
            # loss.
            if candidate == len(rows) or self.files[rows[candidate - 1]] != self.files[rows[candidate]]:
                return candidate
        return cut


def clip_batch(rows: list[list[int]], seed: int, purpose: str, step: int, size: int) -> Tensor:
    """Which of ``rows`` (by bucket) a step takes [size]: a function of (seed, step) only, all from one bucket."""
    bucket, index = bucket_batch(seed, purpose, step, size, [len(of_bucket) for of_bucket in rows])
    return torch.from_numpy(np.array(rows[bucket])[index])
