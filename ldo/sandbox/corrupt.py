"""Clips that break physics, each made from a valid one with the same start.

Every function takes a scene and a generator and returns a ``Track`` that equals the valid clip before its ``event``
frame and visibly differs from it afterwards, or None where the scene has nothing to break in that way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ldo.sandbox.scenes import sample_scene
from ldo.sandbox.simulate import FRAMES, GRAVITY, NAMES, OCCLUDER, Scene, Track, simulate, track

VIOLATION_SHARE = 0.3  # of a mix like the web's


def _event(rng: np.random.Generator, frames: int) -> int:
    """The frame of the break: after a third of the clip, and early enough to be seen."""
    return int(rng.integers(frames // 3, frames - 4))


def _clip_inside(scene: Scene, positions: np.ndarray) -> np.ndarray:
    r = scene.radii[:, None]
    return np.clip(positions, r, np.array([1.0, scene.bottom]) - r)


def _shown(clip: Track) -> np.ndarray:
    """[T, N] True where at least half of the ball can be seen beside the block."""
    x = clip.positions[..., 0]
    return ~((x > OCCLUDER[0]) & (x < OCCLUDER[1])) if clip.scene.occluded else np.ones(x.shape, bool)


def _hidden(clip: Track) -> np.ndarray:
    """[T, N] True where the block covers the ball wholly."""
    x, r = clip.positions[..., 0], clip.radii
    return (x - r > OCCLUDER[0]) & (x + r < OCCLUDER[1]) if clip.scene.occluded else np.zeros(x.shape, bool)


def _spare_colour(clip: Track, rng: np.random.Generator) -> int:
    return int(rng.choice([c for c in range(len(NAMES)) if c not in clip.scene.colours]))


def _differs(clip: Track, other: Track, at_least: float = 0.06) -> int | None:
    """First frame at which a ball is ``at_least`` away from where it should be, followed back to the first difference."""
    gap = np.linalg.norm(clip.positions - other.positions, axis=-1).max(1)
    return int(np.argmax(gap > 1e-6)) if gap.max() > at_least else None


def teleport(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball jumps elsewhere and goes on from there."""
    clip, k, i = track(scene, frames), _event(rng, frames), int(rng.integers(len(scene.radii)))
    path = clip.positions.copy()
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.5)
    path[k:, i] += length * np.array([np.cos(angle), np.sin(angle)])
    path = _clip_inside(scene, path)
    others = [j for j in range(len(scene.radii)) if j != i]
    apart = all(np.linalg.norm(path[k, i] - path[k, j]) > scene.radii[i] + scene.radii[j] for j in others)
    bad = replace(clip, positions=path, violation="teleport", event=k)
    shown = _shown(bad)
    jump = np.linalg.norm((path - clip.positions)[k, i])
    return bad if apart and jump > 0.2 and shown[k - 1, i] and shown[k, i] else None


def vanish(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball ceases to be; behind the block too."""
    clip, k, i = track(scene, frames), _event(rng, frames), int(rng.integers(len(scene.radii)))
    present = clip.present.copy()
    present[k:, i] = False
    return replace(clip, present=present, violation="vanish", event=k)


def freeze(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Everything stops in mid-motion."""
    clip, k = track(scene, frames), _event(rng, frames)
    path = clip.positions.copy()
    path[k:] = path[k - 1]
    return replace(clip, positions=path, violation="freeze", event=k) if _differs(clip, replace(clip, positions=path), 0.1) else None


def float_away(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Gravity turns upward."""
    if not scene.gravity or scene.kind == "stack":
        return None
    clip, k = track(scene, frames), _event(rng, frames)
    path, speed, _ = simulate(scene, frames)
    bent, _, _ = simulate(replace(scene, positions=path[k - 1], velocities=speed[k - 1]), frames - k + 1, gravity=-GRAVITY)
    bad = replace(clip, positions=np.concatenate([path[: k - 1], bent]), violation="float", event=k)
    return bad if _differs(clip, bad, 0.1) else None


def colour(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball changes colour in plain sight."""
    clip, k, i = track(scene, frames), _event(rng, frames), int(rng.integers(len(scene.radii)))
    colours = clip.colours.copy()
    colours[k:, i] = _spare_colour(clip, rng)
    shown = _shown(clip)[k - 1 : k + 1, i].all()
    return replace(clip, colours=colours, violation="colour", event=k) if shown else None


def swap(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball goes behind the block and another one comes out."""
    clip, i = track(scene, frames), int(rng.integers(len(scene.radii)))
    hidden = np.flatnonzero(_hidden(clip)[:, i])
    if not len(hidden):
        return None
    k = int(hidden[0])
    colours = clip.colours.copy()
    colours[k:, i] = _spare_colour(clip, rng)
    return replace(clip, colours=colours, violation="swap", event=k)


def interpenetrate(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Balls pass through each other."""
    if not scene.kind.startswith("collision"):
        return None
    clip = track(scene, frames)
    path, _, _ = simulate(scene, frames, collide=False)
    bad = replace(clip, positions=path, violation="interpenetrate")
    r, count = scene.radii, len(scene.radii)
    depth = max(((r[i] + r[j] - np.linalg.norm(path[:, i] - path[:, j], axis=-1)) / min(r[i], r[j])).max() for i in range(count) for j in range(i))
    k = _differs(clip, bad)
    return replace(bad, event=k) if k and depth > 0.5 else None


def restitution(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """The floor gives back too much or too little."""
    if scene.kind != "bounce":
        return None
    clip = track(scene, frames)
    path, _, events = simulate(scene, frames, restitution=float(rng.choice([0.25, 1.5])))
    if any(e.j >= 0 for e in events):
        return None
    bad = replace(clip, positions=path, violation="restitution")
    k = _differs(clip, bad, 0.1)
    return replace(bad, event=k) if k else None


def jitter(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Balls tremble about their paths."""
    clip, k = track(scene, frames), _event(rng, frames)
    path = clip.positions.copy()
    path[k:] += rng.normal(0, 0.03, path[k:].shape)
    return replace(clip, positions=_clip_inside(scene, path), violation="jitter", event=k)


def shuffle(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """The later frames come in another order."""
    clip, k = track(scene, frames), _event(rng, frames) - 2
    order = np.arange(frames)
    order[k:] = rng.permutation(order[k:])
    bad = replace(clip, positions=clip.positions[order], violation="shuffle", event=k)
    moved = _differs(clip, bad, 0.1)
    return replace(bad, event=moved) if moved else None


KINDS: dict[str, Callable[[Scene, np.random.Generator, int], Track | None]] = {
    "teleport": teleport,
    "vanish": vanish,
    "freeze": freeze,
    "float": float_away,
    "colour": colour,
    "swap": swap,
    "interpenetrate": interpenetrate,
    "restitution": restitution,
    "jitter": jitter,
    "shuffle": shuffle,
}
# What a web-like training mix contains. Trembling and shuffled clips are left to the tests of metrics and critic.
PLANTED = ("teleport", "vanish", "freeze", "float", "colour", "swap", "interpenetrate")


def corrupt(scene: Scene, rng: np.random.Generator, kind: str, frames: int = FRAMES) -> Track | None:
    """Break ``scene`` in the way ``kind``; None where it cannot be (tried 20 times with different events)."""
    if kind not in KINDS:
        raise ValueError(f"unknown violation {kind!r}; one of {', '.join(KINDS)}")
    for _ in range(20):
        bad = KINDS[kind](scene, rng, frames)
        if bad is not None:
            return bad
    return None


def plant(scene: Scene, rng: np.random.Generator, frames: int = FRAMES) -> Track:
    """Break ``scene`` in one of the ``PLANTED`` ways that apply to it, each equally likely."""
    for kind in rng.permutation(PLANTED):
        bad = corrupt(scene, rng, str(kind), frames)
        if bad is not None:
            return bad
    raise AssertionError(f"nothing to break in {scene.caption!r}")  # vanish and colour apply to every scene


def mixed(rng: np.random.Generator, split: str = "train", frames: int = FRAMES) -> Track:
    """A clip of the mix that the base generator learns from: ``VIOLATION_SHARE`` of its clips break physics."""
    scene = sample_scene(rng, split, frames=frames)
    return plant(scene, rng, frames) if rng.random() < VIOLATION_SHARE else track(scene, frames)
