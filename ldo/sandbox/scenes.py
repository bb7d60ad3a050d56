"""Drawing scenes: seven kinds, captions that tell what happens, and the splits.

Units as in ``simulate``: box widths and frames.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ldo.sandbox.simulate import FLOOR, FRAMES, NAMES, OCCLUDER, Scene, simulate

KINDS = ("uniform", "ballistic", "bounce", "collision_1d", "collision_2d", "occluder", "stack")
MIX = dict(zip(KINDS, (0.14, 0.18, 0.20, 0.12, 0.14, 0.16, 0.06), strict=True))
SPLITS = ("train", "test", "ood", "combination", "soft")
# In these kinds of scene no ball has this colour in training; in the "combination" split the first ball always has.
HELD_OUT = {"uniform": "blue", "ballistic": "yellow", "bounce": "green", "occluder": "red", "collision_1d": "yellow"}


def _direction(v: np.ndarray) -> str:
    octant = round(math.atan2(v[1], v[0]) / (math.pi / 4)) % 8
    return (
        "to the right", "down and to the right", "down", "down and to the left",
        "to the left", "up and to the left", "up", "up and to the right",
    )[octant]  # fmt: skip


def _pace(speed: float) -> str:
    return "slowly" if speed < 0.031 else "quickly"


def _ball(name: str, soft: bool = False) -> str:
    return f"a {'soft ' if soft else ''}{name} ball"


class _Draw:
    """Draws the initial state of one scene; each method returns (positions, velocities, caption) or None to try again."""

    def __init__(self, rng: np.random.Generator, names: list[str], radii: np.ndarray, split: str):
        self.rng, self.names, self.radii, self.split = rng, names, radii, split
        self.fast = 1.35 if split == "ood" else 1.0

    def inside(self, high: float = 1.0) -> np.ndarray:
        r = self.radii[:, None]
        return self.rng.uniform(r, np.array([1.0, high]) - r)

    def heading(self, low: float, high: float) -> np.ndarray:
        angle, speed = self.rng.uniform(-math.pi, math.pi), self.rng.uniform(low, high) * self.fast
        return speed * np.array([math.cos(angle), math.sin(angle)])

    def uniform(self):
        v = np.stack([self.heading(0.020, 0.042) for _ in self.names])
        parts = [f"{_ball(n)} rolls {_pace(np.linalg.norm(u))} {_direction(u)}" for n, u in zip(self.names, v, strict=True)]
        return self.inside(), v, " and ".join(parts)

    def ballistic(self):
        side = self.rng.choice([-1, 1], size=len(self.names))
        v = np.stack([side * self.rng.uniform(0.010, 0.036, len(side)), -self.rng.uniform(0.055, 0.088, len(side))], 1) * self.fast
        parts = [f"{_ball(n)} is thrown to the {'right' if s > 0 else 'left'}" for n, s in zip(self.names, side, strict=True)]
        p = self.inside(FLOOR)
        p[:, 1] = self.rng.uniform(0.5, FLOOR - self.radii)
        return p, v, " and ".join(parts) + " through the air"

    def bounce(self):
        soft = self.split == "soft"
        side = self.rng.choice([-1, 0, 1], size=len(self.names))
        v = np.stack([side * self.rng.uniform(0.010, 0.036, len(side)), self.rng.uniform(-0.03, 0.02, len(side)) * abs(side)], 1) * self.fast
        how = {-1: "is thrown to the left", 0: "is dropped", 1: "is thrown to the right"}
        parts = [f"{_ball(n, soft)} {how[s]}" for n, s in zip(self.names, side, strict=True)]
        return self.inside(FLOOR), v, " and ".join(parts) + " and bounces off the floor"

    def _meeting(self, v: np.ndarray, angle: float):
        """Two balls that touch at frame 4-9 with their line of centres at ``angle``."""
        when = self.rng.uniform(4, 9)
        normal = np.array([math.cos(angle), math.sin(angle)])
        if (v[0] - v[1]) @ normal < 0.02:  # ball 0 must run into ball 1
            return None
        centre = self.rng.uniform(0.25, 0.75, 2)
        return np.stack([centre - normal * self.radii[0] - v[0] * when, centre + normal * self.radii[1] - v[1] * when])

    def collision_1d(self):
        v = np.zeros((2, 2))
        v[:, 0] = self.rng.uniform([0.015, -0.045], [0.045, 0.0]) * self.fast
        if self.rng.random() < 0.3:
            v[1] = 0
        p = self._meeting(v, 0.0)
        if p is None:
            return None
        a, b = (_ball(n) for n in self.names)
        return p, v, f"{a} rolls into {b} that lies still" if not v[1].any() else f"{a} and {b} collide head on"

    def collision_2d(self):
        v = np.stack([self.heading(0.015, 0.042) for _ in self.names])
        p = self._meeting(v, self.rng.uniform(-math.pi, math.pi))
        if p is None:
            return None
        if len(self.names) == 3:
            p = np.concatenate([p, self.inside()[2:]])
        listed = ", ".join(_ball(n) for n in self.names[:-1])
        return p, v, f"{listed} and {_ball(self.names[-1])} collide at an angle"

    def occluder(self):
        side = self.rng.choice([-1, 1], size=len(self.names))
        speed = self.rng.uniform(0.040, 0.051, len(side)) * (1.1 if self.fast > 1 else 1)
        v = np.stack([side * speed, np.zeros(len(side))], 1)
        parts = [f"{_ball(n)} passes behind a grey block {_direction(u)}" for n, u in zip(self.names, v, strict=True)]
        p = self.inside()
        clear = self.rng.uniform(self.radii, OCCLUDER[0] - self.radii - 0.03)
        p[:, 0] = np.where(side > 0, clear, 1 - clear)
        return p, v, " and ".join(parts)

    def stack(self):
        r, x = self.radii, self.rng.uniform(0.3, 0.7)
        p = np.zeros((len(r), 2))
        p[:, 1] = FLOOR - r
        if len(r) == 1:
            p[0, 0] = self.rng.uniform(r[0], 1 - r[0])
            caption = f"{_ball(self.names[0])} lies on the floor"
        elif len(r) == 2:
            p[:, 0] = x
            p[0, 1] = FLOOR - 2 * r[1] - r[0]
            caption = f"{_ball(self.names[0])} rests on {_ball(self.names[1])}"
        else:  # balls 1 and 2 on the floor, touching; ball 0 in the dip between them
            gap = math.sqrt((r[1] + r[2]) ** 2 - (r[1] - r[2]) ** 2)
            p[1, 0], p[2, 0] = x - gap / 2, x + gap / 2
            d = p[2] - p[1]
            length = float(np.linalg.norm(d))
            a, b = r[0] + r[1], r[0] + r[2]
            along = (a * a - b * b + length * length) / (2 * length)
            u = d / length
            p[0] = p[1] + along * u + math.sqrt(a * a - along * along) * np.array([u[1], -u[0]])
            caption = f"{_ball(self.names[0])} rests on {_ball(self.names[1])} and {_ball(self.names[2])}"
        return p, np.zeros_like(p), caption


def _acceptable(scene: Scene, frames: int) -> bool:
    """Is the scene what its caption says, with every ball inside and apart at the start?"""
    p, r = scene.positions, scene.radii
    if (p < r[:, None] - 1e-9).any() or (p[:, 0] > 1 - r + 1e-9).any() or (p[:, 1] > scene.bottom - r + 1e-9).any():
        return False
    for i in range(len(r)):
        for j in range(i):
            if scene.kind != "stack" and np.linalg.norm(p[i] - p[j]) < r[i] + r[j] + 0.03:
                return False
    try:
        path, _, events = simulate(scene, frames)
    except ValueError:
        return False
    if scene.kind in ("uniform", "ballistic"):
        return not events
    if scene.kind == "bounce":
        floor = {e.i for e in events if e.floor and 3 < e.time < frames - 5}
        return all(e.j < 0 for e in events) and len(floor) == len(r)
    if scene.kind.startswith("collision"):
        return any(e.j >= 0 and e.time < frames - 5 for e in events)
    if scene.kind == "occluder":
        low, high = OCCLUDER
        sign = np.sign(scene.velocities[:, 0])
        start, end = path[0, :, 0], path[-1, :, 0]
        clear_start = np.where(sign > 0, start + r < low - 0.03, start - r > high + 0.03)
        clear_end = np.where(sign > 0, end - r > high + 0.03, end + r < low - 0.03)
        hidden = ((path[:, :, 0] - r > low) & (path[:, :, 0] + r < high)).any(0)
        return not events and bool((clear_start & clear_end & hidden).all())
    return True


def sample_scene(rng: np.random.Generator, split: str = "train", *, kind: str | None = None, frames: int = FRAMES) -> Scene:
    """Draw a scene.

    ``split``: ``train`` and ``test`` share one distribution (draw them from different seeds); ``ood`` has faster and
    smaller or larger balls; ``combination`` the colour and scene pairs of ``HELD_OUT``, which ``train`` and ``test`` never show;
    ``soft`` bounces with restitution 0.6.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown sandbox split {split!r}; one of {', '.join(SPLITS)}")
    if kind is None:
        weights = np.array([w * (split != "combination" or k in HELD_OUT) for k, w in MIX.items()])
        kind = "bounce" if split == "soft" else str(rng.choice(KINDS, p=weights / weights.sum()))
    held = HELD_OUT.get(kind)
    fixed = {"collision_1d": 2, "collision_2d": 2 + int(rng.random() < 0.25), "stack": int(rng.integers(1, 4))}
    count = fixed.get(kind, 1 + int(rng.random() < 0.35))
    colours = rng.permutation(len(NAMES))[:count]
    while held and (NAMES[colours[0]] != held if split == "combination" else held in [NAMES[c] for c in colours]):
        colours = rng.permutation(len(NAMES))[:count]
    low, high = (0.085, 0.10) if kind == "occluder" else (0.095, 0.135)
    while True:
        radii = rng.uniform(low, high, count)
        if split == "ood":
            smaller = kind == "occluder" or rng.random() < 0.5
            radii = rng.uniform(low - 0.02, low - 0.005, count) if smaller else rng.uniform(high + 0.005, high + 0.02, count)
        state = getattr(_Draw(rng, [NAMES[c] for c in colours], radii, split), kind)()
        if state is None:
            continue
        p, v, caption = state
        scene = Scene(kind, tuple(int(c) for c in colours), radii, p, v, 0.6 if split == "soft" else 1.0, caption)
        if _acceptable(scene, frames):
            return scene


def with_restitution(scene: Scene, restitution: float, frames: int = FRAMES) -> Scene | None:
    """The same start with walls of another restitution; None where balls would then meet."""
    other = replace(scene, restitution=restitution)
    return None if any(e.j >= 0 for e in simulate(other, frames)[2]) else other
