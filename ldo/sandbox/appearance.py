"""How much a video looks like the sandbox, whatever its balls do: sharp discs of their colours on a clean ground."""

from __future__ import annotations

import numpy as np

from ldo.sandbox.observe import Prompt, observe
from ldo.sandbox.simulate import Scene, Track, render


def appearance_error(frames: np.ndarray, prompt: Prompt) -> float:
    """Difference of ``frames`` [T, 3, S, S] in [0, 1] from discs drawn where the balls are seen, per pixel of ball.

    0 is perfect. Where a ball is and whether it should be there does not count: blur, halos, wrong tints and dirt do.
    Frames in which some ball is hidden or not seen are left out; where that is all of them, nothing can be measured and
    the error is 1.
    """
    seen = observe(frames, prompt)
    whole = ~np.isnan(seen.position[..., 0]).any(1)
    if not whole.any():
        return 1.0
    positions = seen.position[whole]
    shape = positions.shape[:2]
    scene = Scene(prompt.kind, prompt.colours, seen.radius, positions[0], np.zeros_like(positions[0]))
    colours = np.broadcast_to(np.array(prompt.colours), shape)
    drawn = render(Track(scene, positions, colours, np.ones(shape, bool)), seen.size)
    difference = np.abs(frames[whole] - drawn).mean(1).sum((1, 2))
    return float(difference.mean() / seen.full_area.sum())
