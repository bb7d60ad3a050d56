"""Clips that a critic must tell apart: matched pairs of valid and broken ones, controls, and bounces.

Frames are [T, 3, S, S] floats in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldo.core.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate

PAIR_KINDS = ("teleport", "vanish", "freeze", "float", "colour", "jitter", "shuffle", "swap", "interpenetrate")
CONTROLS = ("static", "shuffled", "noise")


@dataclass(frozen=True)
class Broken:
    """A clip that breaks physics, and the index of the valid clip with the same start."""

    valid: int
    frames: np.ndarray


@dataclass(frozen=True)
class MatchedPairs:
    """Valid clips, and for every kind of violation the clips that were broken in that way."""

    valid: list[np.ndarray]
    broken: dict[str, list[Broken]]


def draw_pairs(size: int, pairs: int, seed: int) -> MatchedPairs:
    """At least ``pairs`` matched pairs of each of ``PAIR_KINDS``, rendered at ``size`` pixels.

    Scenes are shared between kinds: each valid clip serves every break that applies to it.
    """
    found = MatchedPairs([], {kind: [] for kind in PAIR_KINDS})
    index = 0
    while any(len(clips) < pairs for clips in found.broken.values()):
        rng = numpy_rng(seed, "gate", index)
        index += 1
        wanted = [kind for kind in PAIR_KINDS if len(found.broken[kind]) < pairs]
        scene = scenes.sample_scene(rng, kind=_scene_for(wanted, index))
        # a scene at rest has no dynamics to judge
        if scene.kind == "stack":
            continue
        tracks = {kind: corrupt.corrupt(scene, rng, kind) for kind in wanted}
        tracks = {kind: track for kind, track in tracks.items() if track is not None}
        for kind, track in tracks.items():
            found.broken[kind].append(Broken(len(found.valid), simulate.render(track, size)))
        if tracks:
            found.valid.append(simulate.render(simulate.track(scene), size))
    return found


def _scene_for(wanted: list[str], index: int) -> str | None:
    """The kind of scene to draw: any as long as all kinds of violations are wanted, then what the last one needs."""
    if len(wanted) == len(PAIR_KINDS):
        return None
    turn = index % 2
    needs = {
        "swap": "occluder",
        "interpenetrate": ("collision_1d", "collision_2d")[turn],
        "float": ("ballistic", "bounce")[turn],
    }
    return needs.get(wanted[-1])


def draw_controls(valid: list[np.ndarray], seed: int) -> dict[str, list[np.ndarray]]:
    """Each valid clip stopped at its first frame, with its frames in another order, and replaced by noise."""
    rng = numpy_rng(seed, "gate controls")
    return {
        "static": [np.repeat(clip[:1], len(clip), 0) for clip in valid],
        "shuffled": [clip[rng.permutation(len(clip))] for clip in valid],
        "noise": [rng.random(clip.shape, np.float32) for clip in valid],
    }


def draw_bounces(size: int, pairs: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Bounces with restitution 1.0, and the same starts with 0.6; both are valid."""
    hard, soft = [], []
    index = 0
    while len(hard) < pairs:
        scene = scenes.sample_scene(numpy_rng(seed, "gate bounce", index), kind="bounce")
        softer = scenes.with_restitution(scene, 0.6)
        index += 1
        if softer is not None:
            hard.append(simulate.render(simulate.track(scene), size))
            soft.append(simulate.render(simulate.track(softer), size))
    return hard, soft
