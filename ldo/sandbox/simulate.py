"""The sandbox world: discs in a box, simulated exactly (event-driven, float64), and rendered with anti-aliasing.

Units: lengths in box widths, time in frames; x to the right, y down. A scene with gravity is seen from the side and
stands on a floor strip; one without is a table seen from above. Every wall bounces. Mass is proportional to r^2.

Shapes: T frames, N balls, H x W pixels. Positions are [T, N, 2].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

GRAVITY = 0.010  # box widths per frame^2
FLOOR = 0.9375  # y of the floor where there is gravity (two of 32 pixel rows are floor)
OCCLUDER = (11 / 32, 21 / 32)  # x range of the block
FRAMES = 17  # 4K + 1 frames, as causal video VAEs take
FPS = 8
REST = 0.003  # a soft ball that leaves the floor slower than this (half a thousandth of a box high) stays on it

COLOURS = {
    "red": (0.95, 0.18, 0.18),
    "green": (0.15, 0.85, 0.25),
    "blue": (0.22, 0.42, 1.00),
    "yellow": (0.98, 0.88, 0.15),
}
NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()))  # [4, 3]
SIDE, TABLE, GROUND, BLOCK = (np.array(c) for c in ((0.07, 0.07, 0.11), (0.10, 0.15, 0.13), (0.36, 0.28, 0.20), (0.55, 0.55, 0.58)))


@dataclass(frozen=True)
class Scene:
    """Initial state and laws of one clip. ``velocities`` are per frame; ``restitution`` is that of the walls."""

    kind: str
    colours: tuple[int, ...]  # indices into NAMES
    radii: np.ndarray  # [N]
    positions: np.ndarray  # [N, 2]
    velocities: np.ndarray  # [N, 2]
    restitution: float = 1.0
    caption: str = ""

    @property
    def gravity(self) -> float:
        return GRAVITY if self.kind in ("ballistic", "bounce", "stack") else 0.0

    @property
    def bottom(self) -> float:
        return FLOOR if self.gravity else 1.0

    @property
    def occluded(self) -> bool:
        return self.kind == "occluder"


@dataclass(frozen=True)
class Track:
    """What is drawn: ``positions`` [T, N, 2], ``colours`` and ``present`` [T, N], ``radii`` [N]."""

    scene: Scene
    positions: np.ndarray
    colours: np.ndarray
    present: np.ndarray
    violation: str | None = None
    event: int | None = None  # first frame that differs from the valid clip

    @property
    def radii(self) -> np.ndarray:
        return self.scene.radii

    @property
    def path_length(self) -> float:
        """Sum over balls of the way travelled, in box widths."""
        return float(np.linalg.norm(np.diff(self.positions, axis=0), axis=-1).sum())


# ---------------------------------------------------------------------------------------------- dynamics


def _time_to_wall(p: float, v: float, a: float, low: float, high: float) -> tuple[float, int]:
    """First t > 0 at which p + v t + a t^2 / 2 leaves [low, high] outward; and the wall's side (-1, +1)."""
    best, side = math.inf, 0
    for wall, sign in ((low, -1), (high, 1)):
        if a == 0:
            roots = ((wall - p) / v,) if v else ()
        else:
            disc = v * v - 2 * a * (p - wall)
            if disc < 0:
                continue
            root = math.sqrt(disc)
            roots = ((-v - root) / a, (-v + root) / a)
        for t in roots:
            if -1e-9 < t < best and (v + a * t) * sign > 1e-12:  # moving outward there
                best, side = max(t, 0.0), sign
    return best, side


def _time_to_touch(dp: np.ndarray, dv: np.ndarray, reach: float) -> float:
    """First t >= 0 at which two balls at relative position dp and relative velocity dv touch.

    Gravity cancels between two balls that fall; scenes in which a falling ball meets a resting one are not drawn.
    """
    b, a = float(dp @ dv), float(dv @ dv)
    if b >= 0 or a == 0:
        return math.inf
    disc = b * b - a * (float(dp @ dp) - reach * reach)
    return max((-b - math.sqrt(disc)) / a, 0.0) if disc >= 0 else math.inf


@dataclass(frozen=True)
class Event:
    """A contact at ``time``: ball ``i`` with ball ``j``, or with a wall (``j`` is -1)."""

    time: float
    i: int
    j: int
    floor: bool = False


def simulate(
    scene: Scene, frames: int = FRAMES, *, gravity: float | None = None, restitution: float | None = None, collide: bool = True
) -> tuple[np.ndarray, np.ndarray, list[Event]]:
    """Exact positions and velocities [T, N, 2] at whole frames, and the contacts on the way.

    ``gravity`` and ``restitution`` replace the scene's own; ``collide=False`` lets balls pass through each other.
    """
    p, v = scene.positions.astype(float).copy(), scene.velocities.astype(float).copy()
    g = scene.gravity if gravity is None else gravity
    e = scene.restitution if restitution is None else restitution
    r, count = scene.radii, len(scene.radii)
    if scene.kind == "stack" and g == GRAVITY:  # resting contacts carry the weight
        return np.repeat(p[None], frames, 0), np.repeat(v[None], frames, 0), []
    fall = np.full(count, g)  # 0 for a ball that has come to rest on the floor
    path, speeds, events, now = [p.copy()], [v.copy()], [], 0.0
    for frame in range(1, frames):
        while True:
            left, hit = frame - now, None
            for i in range(count):
                for axis, high, a in ((0, 1.0, 0.0), (1, scene.bottom, fall[i])):
                    t, side = _time_to_wall(p[i, axis], v[i, axis], a, r[i], high - r[i])
                    if t < left:
                        left, hit = t, (i, -1, axis, side)
                for j in range(i + 1, count) if collide else ():
                    t = _time_to_touch(p[i] - p[j], v[i] - v[j], r[i] + r[j])
                    if t < left:
                        left, hit = t, (i, j, 0, 0)
            p += v * left
            p[:, 1] += 0.5 * fall * left * left
            v[:, 1] += fall * left
            now += left
            if hit is None:
                now = float(frame)
                break
            i, j, axis, side = hit
            events.append(Event(now, i, j, axis == 1 and side > 0))
            if j < 0:
                v[i, axis] = -side * e * abs(v[i, axis])
                if axis == 1 and g * side > 0 and e < 1 and abs(v[i, 1]) < REST:
                    v[i, 1] = fall[i] = 0.0
            else:
                fall[i] = fall[j] = g
                n = (p[i] - p[j]) / np.linalg.norm(p[i] - p[j])
                m_i, m_j = r[i] ** 2, r[j] ** 2
                impulse = 2 * m_i * m_j / (m_i + m_j) * ((v[i] - v[j]) @ n)
                v[i] -= impulse / m_i * n
                v[j] += impulse / m_j * n
            if len(events) > 200:
                raise ValueError(f"sandbox scene {scene.caption!r}: more than 200 contacts; raise the restitution or shorten the clip")
        path.append(p.copy())
        speeds.append(v.copy())
    return np.array(path), np.array(speeds), events


def track(scene: Scene, frames: int = FRAMES) -> Track:
    """The valid clip of a scene."""
    positions, _, _ = simulate(scene, frames)
    colours = np.broadcast_to(np.array(scene.colours), positions.shape[:2]).copy()
    return Track(scene, positions, colours, np.ones(positions.shape[:2], bool))


# ---------------------------------------------------------------------------------------------- drawing


def background(scene: Scene, size: int) -> np.ndarray:
    """The scene without its balls and block, [H, W, 3] in [0, 1]."""
    image = np.broadcast_to(SIDE if scene.gravity else TABLE, (size, size, 3)).copy()
    if scene.gravity:
        rows = np.clip((np.arange(1, size + 1) / size - FLOOR) * size, 0, 1)[:, None, None]
        image = image * (1 - rows) + GROUND * rows
    return image


def occluder_mask(scene: Scene, size: int) -> np.ndarray:
    """Coverage [W] of each pixel column by the block, in [0, 1]."""
    if not scene.occluded:
        return np.zeros(size)
    edges = np.arange(size + 1) / size
    low, high = np.clip(edges[:-1], *OCCLUDER), np.clip(edges[1:], *OCCLUDER)
    return (high - low) * size


def render(clip: Track, size: int = 32) -> np.ndarray:
    """Frames [T, 3, H, W], float32 in [0, 1]; a pixel's share of a disc is linear across its rim."""
    axis = (np.arange(size) + 0.5) / size
    p = clip.positions
    dx = axis[None, None, None, :] - p[..., 0, None, None]
    dy = axis[None, None, :, None] - p[..., 1, None, None]
    cover = np.clip((clip.radii[None, :, None, None] - np.sqrt(dx * dx + dy * dy)) * size + 0.5, 0, 1)
    cover *= clip.present[..., None, None]  # [T, N, H, W]
    frames = np.broadcast_to(background(clip.scene, size), (len(p), size, size, 3))
    for i in range(p.shape[1]):
        a = cover[:, i, ..., None]
        frames = frames * (1 - a) + a * PALETTE[clip.colours[:, i]][:, None, None]
    if clip.scene.occluded:
        a = occluder_mask(clip.scene, size)[None, None, :, None]
        frames = frames * (1 - a) + a * BLOCK
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), dtype=np.float32)
