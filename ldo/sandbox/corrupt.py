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

VIOLATION_SHARE = 0.4  # of a mix like the web's
# What a break must change at least, so that a person sees it. Radii are about 0.1.
DEPARTURE = 0.2  # how far a ball gets from where it should be: about two radii
SHOWN = 2  # frames in which it is that far
STOP = 0.04  # speed that a ball loses when it freezes: a third of a radius a frame


def _event(rng: np.random.Generator, frames: int) -> int:
    """The frame of the break: after a third of the clip, and early enough to be seen."""
    return int(rng.integers(frames // 3, frames - 4))


def _clip_inside(scene: Scene, positions: np.ndarray) -> np.ndarray:
    radii = scene.radii[:, None]
    return np.clip(positions, radii, np.array([1.0, scene.bottom]) - radii)


def _shown(clip: Track) -> np.ndarray:
    """[T, N] True where at least half of the ball shows outside the block."""
    horizontal = clip.positions[..., 0]
    if not clip.scene.occluded:
        return np.ones(horizontal.shape, bool)
    return ~((horizontal > OCCLUDER[0]) & (horizontal < OCCLUDER[1]))


def _clear(clip: Track) -> np.ndarray:
    """[T, N] True where the block covers nothing of the ball."""
    horizontal, radii = clip.positions[..., 0], clip.radii
    if not clip.scene.occluded:
        return np.ones(horizontal.shape, bool)
    return (horizontal + radii < OCCLUDER[0]) | (horizontal - radii > OCCLUDER[1])


def _hidden(clip: Track) -> np.ndarray:
    """[T, N] True where the block covers the ball wholly."""
    horizontal, radii = clip.positions[..., 0], clip.radii
    if not clip.scene.occluded:
        return np.zeros(horizontal.shape, bool)
    return (horizontal - radii > OCCLUDER[0]) & (horizontal + radii < OCCLUDER[1])


def _spare_colour(clip: Track, rng: np.random.Generator) -> int:
    return int(rng.choice([index for index in range(len(NAMES)) if index not in clip.scene.colours]))


def _differs(clip: Track, other: Track, at_least: float = DEPARTURE) -> int | None:
    """First frame that differs at all, if some ball is ``at_least`` away from where it should be in SHOWN frames."""
    gap = np.linalg.norm(clip.positions - other.positions, axis=-1).max(1)
    return int(np.argmax(gap > 1e-6)) if (gap > at_least).sum() >= SHOWN else None


def teleport(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball jumps elsewhere and continues from there."""
    clip, event, ball = track(scene, frames), _event(rng, frames), int(rng.integers(len(scene.radii)))
    path = clip.positions.copy()
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 0.5)
    path[event:, ball] += length * np.array([np.cos(angle), np.sin(angle)])
    path = _clip_inside(scene, path)
    # Where two balls would overlap after the jump, the clip would break two laws at once.
    others = [index for index in range(len(scene.radii)) if index != ball]
    apart = all(
        np.linalg.norm(path[event, ball] - path[event, other]) > scene.radii[ball] + scene.radii[other]
        for other in others
    )
    broken = replace(clip, positions=path, violation="teleport", event=event)
    # A jump that begins or ends behind the block would look like a ball that vanishes.
    shown = _shown(broken)
    jump = np.linalg.norm((path - clip.positions)[event, ball])
    return broken if apart and jump > 0.2 and shown[event - 1, ball] and shown[event, ball] else None


def vanish(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball disappears for good, perhaps while it is behind the block."""
    clip, event, ball = track(scene, frames), _event(rng, frames), int(rng.integers(len(scene.radii)))
    present = clip.present.copy()
    present[event:, ball] = False
    return replace(clip, present=present, violation="vanish", event=event)


def freeze(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Everything stops in mid-motion."""
    clip, event = track(scene, frames), _event(rng, frames)
    path = clip.positions.copy()
    path[event:] = path[event - 1]
    broken = replace(clip, positions=path, violation="freeze", event=event)
    # A ball that stops from a slow roll, or behind the block, hardly shows.
    lost = np.linalg.norm(clip.positions[event - 1] - clip.positions[event - 2], axis=-1)
    seen = (lost > STOP) & _shown(clip)[event - 1]
    return broken if seen.any() and _differs(clip, broken) else None


def float_away(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Gravity turns upward."""
    if not scene.gravity or scene.kind == "stack":
        return None
    clip, event = track(scene, frames), _event(rng, frames)
    path, speed, _ = simulate(scene, frames)
    # Started on the last valid frame, so that position and velocity stay continuous and only the law changes.
    start = replace(scene, positions=path[event - 1], velocities=speed[event - 1])
    bent, _, _ = simulate(start, frames - event + 1, gravity=-GRAVITY)
    broken = replace(clip, positions=np.concatenate([path[: event - 1], bent]), violation="float", event=event)
    return broken if _differs(clip, broken) else None


def colour(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball changes colour in plain sight."""
    clip, event, ball = track(scene, frames), _event(rng, frames), int(rng.integers(len(scene.radii)))
    colours = clip.colours.copy()
    colours[event:, ball] = _spare_colour(clip, rng)
    shown = _shown(clip)[event - 1 : event + 1, ball].all()
    return replace(clip, colours=colours, violation="colour", event=event) if shown else None


def swap(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """A ball goes behind the block and another one comes out."""
    clip, ball = track(scene, frames), int(rng.integers(len(scene.radii)))
    hidden = np.flatnonzero(_hidden(clip)[:, ball])
    if not len(hidden):
        return None
    event = int(hidden[0])
    colours = clip.colours.copy()
    colours[event:, ball] = _spare_colour(clip, rng)
    return replace(clip, colours=colours, violation="swap", event=event)


def interpenetrate(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Balls pass through each other."""
    if not scene.kind.startswith("collision"):
        return None
    clip = track(scene, frames)
    path, _, _ = simulate(scene, frames, collide=False)
    broken = replace(clip, positions=path, violation="interpenetrate")
    radii, count = scene.radii, len(scene.radii)
    # A graze does not show: the overlap must reach half the smaller ball's radius.
    depth = 0.0
    for ball in range(count):
        for other in range(ball):
            distance = np.linalg.norm(path[:, ball] - path[:, other], axis=-1)
            overlap = (radii[ball] + radii[other] - distance) / min(radii[ball], radii[other])
            depth = max(depth, overlap.max())
    event = _differs(clip, broken, 0.1)
    return replace(broken, event=event) if event and depth > 0.5 else None


def restitution(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """The floor gives back too much or too little."""
    if scene.kind != "bounce":
        return None
    clip = track(scene, frames)
    # Far from any restitution that a prompt promises (1.0 and 0.6), in either direction.
    path, _, events = simulate(scene, frames, restitution=float(rng.choice([0.25, 1.75])))
    # Another bounce may send balls into each other, which would be a second difference.
    if any(event.other >= 0 for event in events):
        return None
    broken = replace(clip, positions=path, violation="restitution")
    first_difference = _differs(clip, broken)
    return replace(broken, event=first_difference) if first_difference else None


def jitter(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """Balls tremble about their paths, by half a radius to a whole one in each frame."""
    clip, event = track(scene, frames), _event(rng, frames)
    path = clip.positions.copy()
    shape = path[event:].shape[:2]
    angle, length = rng.uniform(0, 2 * np.pi, shape), rng.uniform(0.5, 1.0, shape) * scene.radii
    path[event:] += length[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    broken = replace(clip, positions=_clip_inside(scene, path), violation="jitter", event=event)
    # Behind the block nobody sees it.
    return broken if _clear(broken)[event:].sum(0).max() >= 4 else None


def shuffle(scene: Scene, rng: np.random.Generator, frames: int) -> Track | None:
    """The later frames come in another order."""
    clip, event = track(scene, frames), _event(rng, frames) - 2
    # Earlier than other breaks, to have enough frames to shuffle; the frames before show how things move.
    order = np.arange(frames)
    order[event:] = rng.permutation(order[event:])
    broken = replace(clip, positions=clip.positions[order], violation="shuffle", event=event)
    moved = _differs(clip, broken)
    return replace(broken, event=moved) if moved else None


VIOLATIONS: dict[str, Callable[[Scene, np.random.Generator, int], Track | None]] = {
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
# What a web-like training mix contains. Only the tests of metrics and critic use ``jitter`` and ``shuffle``.
PLANTED = ("teleport", "vanish", "freeze", "float", "colour", "swap", "interpenetrate")


def corrupt(scene: Scene, rng: np.random.Generator, kind: str, frames: int = FRAMES) -> Track | None:
    """Break ``scene`` in the way ``kind``; None where it cannot be (tried 20 times with different events)."""
    if kind not in VIOLATIONS:
        raise ValueError(f"unknown violation {kind!r}; one of {', '.join(VIOLATIONS)}")
    # The draw of the event can miss what the break needs, such as a ball in plain sight.
    for _ in range(20):
        broken = VIOLATIONS[kind](scene, rng, frames)
        if broken is not None:
            return broken
    return None


def plant(scene: Scene, rng: np.random.Generator, frames: int = FRAMES) -> Track:
    """Break ``scene`` in one of the ``PLANTED`` ways that apply to it, each equally likely."""
    # All kinds are tried, in random order: a single draw would often name a kind that does not apply here.
    for kind in rng.permutation(PLANTED):
        broken = corrupt(scene, rng, str(kind), frames)
        if broken is not None:
            return broken
    # ``vanish`` applies to every scene, so the loop always returns.
    raise AssertionError(f"nothing to break in {scene.caption!r}")


def mixed(rng: np.random.Generator, split: str = "train", frames: int = FRAMES) -> Track:
    """A clip of the mix that the base generator learns from: ``VIOLATION_SHARE`` of its clips break physics."""
    scene = sample_scene(rng, split, frames=frames)
    return plant(scene, rng, frames) if rng.random() < VIOLATION_SHARE else track(scene, frames)
