"""Random generators derived from (seed, purpose, index).

No draw in the project depends on what was drawn before it, on the number of processes or on a saved generator
state: the same (seed, purpose, index) always gives the same numbers, so a resumed run needs no generator state.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def _sequence(seed: int, purpose: str, index: tuple[int, ...]) -> np.random.SeedSequence:
    # the length of the index is part of the seed: SeedSequence takes [a] and [a, 0] for the same
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), len(index), *index])


def numpy_rng(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A NumPy generator for one purpose, e.g. ``numpy_rng(seed, "batch", step)``."""
    return np.random.default_rng(_sequence(seed, purpose, index))


def torch_rng(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU ``torch.Generator`` for one purpose.

    Draw on the CPU and move, so that every device sees the same numbers.
    """
    # here, since buckets and prompts are ordered with NumPy only, without waiting for PyTorch
    import torch

    state = int(_sequence(seed, purpose, index).generate_state(1, np.uint64)[0])
    # manual_seed takes a signed 64-bit number; one bit of the state is dropped.
    return torch.Generator().manual_seed(state & (2**63 - 1))
