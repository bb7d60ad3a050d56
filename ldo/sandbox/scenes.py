"""Drawing scenes: seven kinds, captions that say what happens, and the splits.

Units as in ``simulate``: box widths and frames.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ldo.sandbox.simulate import FLOOR, FRAMES, NAMES, OCCLUDER, Scene, simulate

WORLD_VERSION = 2  # number of this world and its violations; what was drawn from another is not used again
SCENE_KINDS = ("uniform", "ballistic", "bounce", "collision_1d", "collision_2d", "occluder", "stack")
MIX = dict(zip(SCENE_KINDS, (0.14, 0.18, 0.20, 0.12, 0.14, 0.16, 0.06), strict=True))
SPLITS = ("train", "test", "ood", "combination", "soft")
# Colours that no ball of these scenes has in training, and that the first ball has in the "combination" split.
HELD_OUT_COLOURS = {
    "uniform": "blue",
    "ballistic": "yellow",
    "bounce": "green",
    "occluder": "red",
    "collision_1d": "yellow",
}


def _direction(velocity: np.ndarray) -> str:
    octant = round(math.atan2(velocity[1], velocity[0]) / (math.pi / 4)) % 8
    return (
        "to the right", "down and to the right", "down", "down and to the left",
        "to the left", "up and to the left", "up", "up and to the right",
    )[octant]  # fmt: skip


def _pace(speed: float) -> str:
    return "slowly" if speed < 0.031 else "quickly"


def _place(position: np.ndarray) -> str:
    """Which ninth of the box it is in."""
    column, row = (min(int(3 * coordinate), 2) for coordinate in position)
    vertical, horizontal = ("top", "", "bottom")[row], ("left", "", "right")[column]
    return f"at the {' '.join(filter(None, (vertical, horizontal))) or 'centre'}"


class _Draw:
    """Draws the start of one scene; each method returns (positions, velocities, caption) or None to try again."""

    def __init__(self, rng: np.random.Generator, names: list[str], radii: np.ndarray, split: str):
        self.rng, self.names, self.radii, self.split = rng, names, radii, split
        self.fast = 1.35 if split == "ood" else 1.0

    def balls(self, positions: np.ndarray) -> list[str]:
        """The balls in words, each with where it starts."""
        soft = "soft " if self.split == "soft" else ""
        return [f"a {soft}{name} ball {_place(position)}" for name, position in zip(self.names, positions, strict=True)]

    def inside(self, high: float = 1.0) -> np.ndarray:
        radii = self.radii[:, None]
        return self.rng.uniform(radii, np.array([1.0, high]) - radii)

    def heading(self, low: float, high: float) -> np.ndarray:
        angle, speed = self.rng.uniform(-math.pi, math.pi), self.rng.uniform(low, high) * self.fast
        return speed * np.array([math.cos(angle), math.sin(angle)])

    def uniform(self):
        velocities = np.stack([self.heading(0.020, 0.042) for _ in self.names])
        positions = self.inside()
        parts = [
            f"{ball} rolls {_pace(np.linalg.norm(velocity))} {_direction(velocity)}"
            for ball, velocity in zip(self.balls(positions), velocities, strict=True)
        ]
        return positions, velocities, " and ".join(parts)

    def ballistic(self):
        side = self.rng.choice([-1, 1], size=len(self.names))
        across = side * self.rng.uniform(0.010, 0.036, len(side))
        up = -self.rng.uniform(0.055, 0.088, len(side))
        velocities = np.stack([across, up], 1) * self.fast
        positions = self.inside(FLOOR)
        positions[:, 1] = self.rng.uniform(0.5, FLOOR - self.radii)
        parts = [
            f"{ball} is thrown to the {'right' if direction > 0 else 'left'}"
            for ball, direction in zip(self.balls(positions), side, strict=True)
        ]
        return positions, velocities, " and ".join(parts) + " through the air"

    def bounce(self):
        side = self.rng.choice([-1, 0, 1], size=len(self.names))
        across = side * self.rng.uniform(0.010, 0.036, len(side))
        # A dropped ball starts at rest.
        down = self.rng.uniform(-0.03, 0.02, len(side)) * abs(side)
        velocities = np.stack([across, down], 1) * self.fast
        how = {-1: "is thrown to the left", 0: "is dropped", 1: "is thrown to the right"}
        positions = self.inside(FLOOR)
        parts = [f"{ball} {how[direction]}" for ball, direction in zip(self.balls(positions), side, strict=True)]
        return positions, velocities, " and ".join(parts) + " and bounces off the floor"

    def _meeting(self, velocities: np.ndarray, angle: float):
        """Two balls that touch at frame 4-9 with their line of centres at ``angle``."""
        when = self.rng.uniform(4, 9)
        normal = np.array([math.cos(angle), math.sin(angle)])
        # Ball 0 must run into ball 1, and fast enough for the collision to show.
        if (velocities[0] - velocities[1]) @ normal < 0.02:
            return None
        centre = self.rng.uniform(0.25, 0.75, 2)
        first = centre - normal * self.radii[0] - velocities[0] * when
        second = centre + normal * self.radii[1] - velocities[1] * when
        return np.stack([first, second])

    def collision_1d(self):
        velocities = np.zeros((2, 2))
        velocities[:, 0] = self.rng.uniform([0.015, -0.045], [0.045, 0.0]) * self.fast
        if self.rng.random() < 0.3:
            velocities[1] = 0
        positions = self._meeting(velocities, 0.0)
        if positions is None:
            return None
        first, second = self.balls(positions)
        if velocities[1].any():
            caption = f"{first} and {second} collide head on"
        else:
            caption = f"{first} rolls into {second} that lies still"
        return positions, velocities, caption

    def collision_2d(self):
        velocities = np.stack([self.heading(0.015, 0.042) for _ in self.names])
        positions = self._meeting(velocities, self.rng.uniform(-math.pi, math.pi))
        if positions is None:
            return None
        first, second = self.balls(positions)
        return positions, velocities, f"{first} and {second} collide at an angle"

    def occluder(self):
        side = self.rng.choice([-1, 1], size=len(self.names))
        speed = self.rng.uniform(0.040, 0.051, len(side)) * (1.1 if self.fast > 1 else 1)
        velocities = np.stack([side * speed, np.zeros(len(side))], 1)
        positions = self.inside()
        clear = self.rng.uniform(self.radii, OCCLUDER[0] - self.radii - 0.03)
        positions[:, 0] = np.where(side > 0, clear, 1 - clear)
        parts = [
            f"{ball} passes behind a grey block {_direction(velocity)}"
            for ball, velocity in zip(self.balls(positions), velocities, strict=True)
        ]
        return positions, velocities, " and ".join(parts)

    def stack(self):
        radii, centre = self.radii, self.rng.uniform(0.3, 0.7)
        positions = np.zeros((len(radii), 2))
        positions[:, 1] = FLOOR - radii
        if len(radii) == 1:
            positions[0, 0] = self.rng.uniform(radii[0], 1 - radii[0])
            caption = f"{self.balls(positions)[0]} lies on the floor"
        else:
            positions[:, 0] = centre
            positions[0, 1] = FLOOR - 2 * radii[1] - radii[0]
            above, below = self.balls(positions)
            caption = f"{above} rests on {below}"
        return positions, np.zeros_like(positions), caption


def _acceptable(scene: Scene, frames: int) -> bool:
    """Is the scene what its caption says, with every ball inside and apart at the start?"""
    positions, radii = scene.positions, scene.radii
    largest = np.array([1.0, scene.bottom]) - radii[:, None]
    if (positions < radii[:, None] - 1e-9).any() or (positions > largest + 1e-9).any():
        return False
    # Only the balls of a stack touch at the start.
    if scene.kind != "stack":
        for ball in range(len(radii)):
            for other in range(ball):
                distance = np.linalg.norm(positions[ball] - positions[other])
                if distance < radii[ball] + radii[other] + 0.03:
                    return False
    try:
        path, _, events = simulate(scene, frames)
    except ValueError:
        return False
    # A caption that says nothing of a wall promises that no wall is met.
    if scene.kind in ("uniform", "ballistic"):
        return not events
    # Early or late contacts are not enough: the clip must show the motion before and after.
    if scene.kind == "bounce":
        floor = {event.ball for event in events if event.floor and 3 < event.time < frames - 5}
        return all(event.other < 0 for event in events) and len(floor) == len(radii)
    if scene.kind.startswith("collision"):
        return any(event.other >= 0 and event.time < frames - 5 for event in events)
    if scene.kind == "occluder":
        low, high = OCCLUDER
        sign = np.sign(scene.velocities[:, 0])
        start, end = path[0, :, 0], path[-1, :, 0]
        clear_start = np.where(sign > 0, start + radii < low - 0.03, start - radii > high + 0.03)
        clear_end = np.where(sign > 0, end - radii > high + 0.03, end + radii < low - 0.03)
        hidden = ((path[:, :, 0] - radii > low) & (path[:, :, 0] + radii < high)).any(0)
        return not events and bool((clear_start & clear_end & hidden).all())
    return True


def _sample_kind(rng: np.random.Generator, split: str) -> str:
    if split == "soft":
        return "bounce"
    possible = HELD_OUT_COLOURS if split == "combination" else SCENE_KINDS
    weights = np.array([share * (kind in possible) for kind, share in MIX.items()])
    return str(rng.choice(SCENE_KINDS, p=weights / weights.sum()))


def _sample_colours(rng: np.random.Generator, split: str, held: str | None, count: int) -> np.ndarray:
    """Indices [count] of different colours; ``held`` comes first in "combination", and never otherwise."""
    while True:
        colours = rng.permutation(len(NAMES))[:count]
        names = [NAMES[colour] for colour in colours]
        if held is None or (names[0] == held if split == "combination" else held not in names):
            return colours


def _sample_radii(rng: np.random.Generator, split: str, kind: str, count: int) -> np.ndarray:
    # Smaller behind the block, which must be able to hide a ball whole.
    low, high = (0.085, 0.10) if kind == "occluder" else (0.095, 0.135)
    radii = rng.uniform(low, high, count)
    if split != "ood":
        return radii
    # Out of distribution is smaller or larger; a larger ball would not fit behind the block.
    if kind == "occluder" or rng.random() < 0.5:
        return rng.uniform(low - 0.02, low - 0.005, count)
    return rng.uniform(high + 0.005, high + 0.02, count)


def sample_scene(
    rng: np.random.Generator, split: str = "train", *, kind: str | None = None, frames: int = FRAMES
) -> Scene:
    """Draw a scene.

    ``split``: ``train`` and ``test`` share one distribution (draw them from different seeds); ``ood`` has faster and
    smaller or larger balls; ``combination`` the pairs of scene and colour in ``HELD_OUT_COLOURS``, which ``train`` and
    ``test`` never show; ``soft`` bounces with restitution 0.6.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown sandbox split {split!r}; one of {', '.join(SPLITS)}")
    if kind is None:
        kind = _sample_kind(rng, split)
    held = HELD_OUT_COLOURS.get(kind)
    # At most two: a small generator draws a third ball much worse than it draws two.
    count = 2 if kind.startswith("collision") else 1 + int(rng.random() < 0.35)
    colours = _sample_colours(rng, split, held, count)
    # Rejection sampling: the conditions are easier to check on a simulated clip than to draw for.
    while True:
        radii = _sample_radii(rng, split, kind, count)
        state = getattr(_Draw(rng, [NAMES[colour] for colour in colours], radii, split), kind)()
        if state is None:
            continue
        positions, velocities, caption = state
        elasticity = 0.6 if split == "soft" else 1.0
        indices = tuple(int(colour) for colour in colours)
        scene = Scene(kind, indices, radii, positions, velocities, elasticity, caption)
        if _acceptable(scene, frames):
            return scene


def with_restitution(scene: Scene, restitution: float, frames: int = FRAMES) -> Scene | None:
    """The same start with walls of another restitution; None where balls would then meet."""
    other = replace(scene, restitution=restitution)
    return None if any(event.other >= 0 for event in simulate(other, frames)[2]) else other
