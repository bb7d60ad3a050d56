"""Valid clips of moving balls whose true position is known, to follow an object through a model's features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldo.core.rng import numpy_rng
from ldo.sandbox import scenes, simulate

# a ball that rests has no path, one behind the block cannot be seen
_LEFT_OUT = ("stack", "occluder")


@dataclass(frozen=True)
class MovingBalls:
    """Clips [n, T, 3, S, S] in [0, 1], their captions, and where each clip's fastest ball is, [n, T, 2] in [0, 1]."""

    frames: np.ndarray
    captions: list[str]
    positions: np.ndarray


def draw_moving_balls(count: int, seed: int, frames: int, size: int, alone: bool = False) -> MovingBalls:
    """``count`` clips of the test split with ``frames`` frames each, rendered at ``size`` pixels.

    ``alone``: only clips of one ball, where "the ball" can be no other.
    """
    drawn = []
    index = 0
    while len(drawn) < count:
        scene = scenes.sample_scene(numpy_rng(seed, "figure", index), "test")
        index += 1
        if scene.kind not in _LEFT_OUT and not (alone and len(scene.radii) > 1):
            drawn.append(scene)
    tracks = [simulate.track(scene, frames) for scene in drawn]
    return MovingBalls(
        frames=np.stack([simulate.render(track, size) for track in tracks]),
        captions=[scene.caption for scene in drawn],
        positions=np.stack([track.positions[:, _fastest(track)] for track in tracks]),
    )


def _fastest(track: simulate.Track) -> int:
    """The ball that travels farthest."""
    return int(np.linalg.norm(np.diff(track.positions, axis=0), axis=-1).sum(0).argmax())
