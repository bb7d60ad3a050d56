"""Exact metrics of a clip, from its pixels and what its prompt says. No judge model, no reference clip.

    missing        share of frames and balls where a ball is not there once, whole, and of its own size
    law_residual   |a - g| / G of the worst free flight, a from a least-squares parabola over 7 frames; at most 10
    impact_error   worst distance, in radii, between the outcome of a contact and what the exact simulator makes of
                   the observed state before it: restitution, momentum and energy are all in it; at most 10
    penetration    deepest overlap of two balls, or of a ball and a wall, in radii
    teleport_rate  share of steps longer than both neighbouring steps by two pixels of 32
    colour_error   the largest share of a ball's area that has a colour no prompted ball has, or a ball's change of tint
    stillness      1 where a scene that should move covers less than half the least way the simulator ever does

Each is 0 for a perfect clip. What cannot be measured (a ball is never seen) takes its largest value: a violation.
A clip *violates* when any of them passes its threshold: the 99th percentile of VAE-reconstructed valid clips of the
same kind of scene, frozen in ``thresholds.json`` before anything else was trained.

Shapes: T frames, N balls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ldo.sandbox.observe import Observed, Prompt, observe
from ldo.sandbox.simulate import FLOOR, GRAVITY, Scene, Track, simulate

METRICS = ("missing", "law_residual", "impact_error", "penetration", "teleport_rate", "colour_error", "stillness")
THRESHOLDS = Path(__file__).with_name("thresholds.json")
WINDOW = 7  # frames of a free-flight fit
NEAR = 0.02  # a contact is possible where balls or walls come this close
HORIZON = 8  # frames over which the outcome of a contact is foretold
CAP = 10.0


@dataclass(frozen=True)
class Measured:
    """The metrics of one clip. ``path_length`` is the way all balls travelled, in box widths."""

    missing: float
    law_residual: float
    impact_error: float
    penetration: float
    teleport_rate: float
    colour_error: float
    stillness: float
    path_length: float
    violations: tuple[str, ...] = ()  # names of the metrics past their threshold
    first: int | None = None  # first frame at which something is wrong, where a frame can be named

    @property
    def existence(self) -> float:
        return 1.0 - self.missing


@cache
def thresholds() -> dict:
    """The frozen thresholds: ``{"thresholds": {kind: {metric: value}}, "least_path": {kind: box widths}, ...}``."""
    return json.loads(THRESHOLDS.read_text())


# ---------------------------------------------------------------------------------------------- contacts


def _steps(position: np.ndarray) -> np.ndarray:
    return np.diff(position, axis=0)  # [T-1, N, 2], NaN where either end is missing


def _path_length(position: np.ndarray) -> float:
    """The way of all balls, straight from where a ball was last seen to where it is seen next."""
    seen = [p[~np.isnan(p[:, 0])] for p in position.transpose(1, 0, 2)]
    return float(sum(np.linalg.norm(np.diff(p, axis=0), axis=-1).sum() for p in seen))


def _possible_contacts(seen: Observed, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Steps in which a ball may have met a wall [T-1, N], or another ball [T-1, N, N].

    A step may hold a contact when its motion, carried on from before or back from after, would come within ``NEAR``.
    """
    p, r = seen.position, seen.radius
    frames, count = p.shape[:2]
    step = _steps(p)
    g = np.array([0.0, prompt.gravity])
    ahead = np.concatenate([step[:1], step[:-1] + g])  # the step as its predecessor foretells it
    back = np.concatenate([step[1:] - g, step[-1:]])  # and as its successor does
    start, end = p[:-1], p[1:]
    low, high = r[:, None], np.array([1.0, FLOOR if prompt.gravity else 1.0]) - r[:, None]
    wall = np.zeros((frames - 1, count), bool)
    pair = np.zeros((frames - 1, count, count), bool)
    with np.errstate(invalid="ignore"):
        for point in (start, end, start + ahead, end - back):
            wall |= ((point < low + NEAR / 2) | (point > high - NEAR / 2)).any(-1)
        for i in range(count):
            for j in range(i):
                for base, move in ((start, ahead), (start, step), (end, -back)):
                    gap, drift = base[:, i] - base[:, j], move[:, i] - move[:, j]
                    s = np.clip(-(gap * drift).sum(-1) / np.maximum((drift**2).sum(-1), 1e-12), 0, 1)
                    nearest = np.linalg.norm(gap + s[:, None] * drift, axis=-1)
                    pair[:, i, j] |= nearest < r[i] + r[j] + NEAR
        pair |= pair.transpose(0, 2, 1)
    return wall, pair


# ---------------------------------------------------------------------------------------------- laws


def _law(seen: Observed, prompt: Prompt, contact: np.ndarray) -> tuple[float, np.ndarray]:
    """Worst |a - g| / G over free flights, and per frame [T] the worst fit that it takes part in."""
    p = seen.position
    frames, count = p.shape[:2]
    per_frame = np.zeros(frames)
    if prompt.kind == "stack":
        shift = np.linalg.norm(p - p[0], axis=-1)  # over the fall that the same time would bring
        per_frame = np.nan_to_num(shift.max(1)) / (0.5 * GRAVITY * WINDOW**2)
        return float(per_frame.max()), per_frame
    g = np.array([0.0, prompt.gravity])
    for i in range(count):
        joined = ~contact[:, i] & ~np.isnan(_steps(p[:, i])).any(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], joined, [False]]).astype(int)))
        for first, last in zip(edges[::2], edges[1::2], strict=True):  # frames first..last are one free flight
            n = min(WINDOW, last - first + 1)
            for t in range(first, last - n + 2) if n >= 4 else ():
                fit = np.polyfit(np.arange(n), p[t : t + n, i], 2)
                # a parabola over n frames tells the acceleration to within noise * n^-2.5
                error = np.linalg.norm(2 * fit[0] - g) / GRAVITY * (n / WINDOW) ** 2.5
                per_frame[t : t + n] = np.maximum(per_frame[t : t + n], error)
    if prompt.kind == "occluder":  # before and behind the block the motion is one and the same
        for i in range(count):
            t = np.flatnonzero(~np.isnan(p[:, i, 0]))
            if len(t) >= 4:
                rms = np.sqrt(np.mean([np.polyfit(t, p[t, i, a], 1, full=True)[1].sum() for a in (0, 1)]) / len(t))
                per_frame[t] = np.maximum(per_frame[t], rms / GRAVITY)
    return float(per_frame.max()), per_frame


def _clusters(contact: np.ndarray, pair: np.ndarray) -> list[tuple[int, int, list[int]]]:
    """Possible contacts that overlap in time and share balls: (first step, last step, balls)."""
    merged: list[list] = []
    for i in range(contact.shape[1]):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], contact[:, i], [False]]).astype(int)))
        for a, b in zip(edges[::2], edges[1::2] - 1, strict=True):
            new = [int(a), int(b), {i} | {j for j in range(contact.shape[1]) if pair[a : b + 1, i, j].any()}]
            for old in [m for m in merged if m[2] & new[2] and m[0] <= new[1] + 1 and new[0] <= m[1] + 1]:
                new = [min(old[0], new[0]), max(old[1], new[1]), old[2] | new[2]]
                merged.remove(old)
            merged.append(new)
    return [(a, b, sorted(balls)) for a, b, balls in merged]


def _state(p: np.ndarray, g: float) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity [N, 2] at the last of a few frames of free flight [n, N, 2], gravity known."""
    t = np.arange(len(p)) - (len(p) - 1)
    flat = p - 0.5 * np.array([0, g]) * (t**2)[:, None, None]
    slope = (t - t.mean()) @ (flat - flat.mean(0)).transpose(1, 0, 2) / ((t - t.mean()) ** 2).sum()
    return flat.mean(0) - slope * t.mean(), slope


def _impacts(seen: Observed, prompt: Prompt, contact: np.ndarray, pair: np.ndarray) -> tuple[float, int | None]:
    """Worst departure, in radii, of a contact's outcome from the simulator's, started on the observed state before it.

    Where a contact comes too early to know that state, the clip is run backward (elastic scenes). Also the first
    frame of the worst departure.
    """
    worst, where = 0.0, None
    if prompt.kind == "stack":
        return worst, where
    for first, last, balls in _clusters(contact, pair):
        for backward in (False, True):
            p = seen.position[::-1, balls] if backward else seen.position[:, balls]
            a = len(p) - 2 - last if backward else first  # the frame at which the contact's first step starts
            b = len(p) - 2 - first if backward else last
            busy = contact[::-1, balls] if backward else contact[:, balls]
            free = 0
            while free < 4 and a - free >= 0 and not np.isnan(p[a - free]).any() and not (free and busy[a - free].any()):
                free += 1
            if free < 3 or (backward and prompt.restitution != 1.0):
                continue
            horizon = min(b + 4, len(p) - 1, a + HORIZON) - a
            start, speed = _state(p[a - free + 1 : a + 1], prompt.gravity)
            r = seen.radius[balls]
            scene = Scene(prompt.kind, (), r, start, speed, prompt.restitution)
            path, _, _ = simulate(scene, horizon + 1)
            gap = np.linalg.norm(path - p[a : a + horizon + 1], axis=-1) / r
            gap = np.nan_to_num(gap).max(1)
            if gap.max() > worst:
                worst, at = float(gap.max()), a + int((gap > gap.max() / 2).argmax())
                where = len(p) - 1 - at if backward else at
            break
    return worst, where


def _penetration(seen: Observed, prompt: Prompt) -> np.ndarray:
    """[T] deepest overlap with a wall or another ball, in radii of the smaller ball."""
    p, r = seen.position, np.maximum(seen.radius, 1e-6)
    count = p.shape[1]
    high = np.array([1.0, FLOOR if prompt.gravity else 1.0]) - r[:, None]
    depth = np.nan_to_num(np.maximum(r[:, None] - p, p - high).max(-1) / r).max(1)
    for i in range(count):
        for j in range(i):
            gap = np.linalg.norm(p[:, i] - p[:, j], axis=-1)
            depth = np.maximum(depth, np.nan_to_num((r[i] + r[j] - gap) / min(r[i], r[j])))
    return np.maximum(depth, 0)


# ---------------------------------------------------------------------------------------------- the whole


def measure(frames: np.ndarray, prompt: Prompt, limits: dict | None = None) -> Measured:
    """Measure one clip: ``frames`` [T, 3, S, S] in [0, 1]. ``limits`` defaults to the frozen thresholds; {} applies none."""
    limits = thresholds() if limits is None else limits
    seen = observe(frames, prompt)
    never = bool((seen.full_area == 0).any())
    share = seen.area / np.maximum(seen.full_area, 1)
    whole = (share > seen.expected[..., 0] - 0.25) & (share < seen.expected[..., 1] + 0.25) & (seen.full_area > 0)
    single = (seen.pieces == 1) | ((seen.expected[..., 0] < 0.5) & (seen.pieces <= 1))
    absent = ~(whole & single)
    step = np.linalg.norm(_steps(seen.position), axis=-1)  # [T-1, N]
    longest = np.maximum(np.concatenate([step[1:2], step[:-1]]), np.concatenate([step[1:], step[-2:-1]]))
    with np.errstate(invalid="ignore"):
        jump = step > longest + prompt.gravity + 2 / 32
    wall, pair = _possible_contacts(seen, prompt)
    contact = wall | pair.any(-1)
    law, law_frames = _law(seen, prompt, contact)
    impact, impact_frame = _impacts(seen, prompt, contact, pair)
    depth = _penetration(seen, prompt)
    tint = np.where(share > 0.5, seen.tint, 0).max(1)
    smallest = seen.full_area.min()
    colour = np.full(len(frames), CAP) if never else np.minimum(np.maximum(seen.stray / smallest, tint), CAP)
    path = _path_length(seen.position)
    least = limits.get("least_path", {}).get(prompt.kind, 0.0)
    values = dict(
        missing=float(absent.mean()),
        law_residual=CAP if never else min(law, CAP),
        impact_error=min(impact, CAP),
        penetration=float(depth.max()),
        teleport_rate=float(jump.mean()),
        colour_error=float(colour.max()),
        stillness=float(path < 0.5 * least),
    )
    bound = limits.get("thresholds", {}).get(prompt.kind, {})
    broken = tuple(k for k in METRICS if k in bound and values[k] > bound[k])
    starts = {
        "missing": absent.any(1),
        "law_residual": law_frames > bound.get("law_residual", np.inf),
        "penetration": depth > bound.get("penetration", np.inf),
        "teleport_rate": np.concatenate([[False], jump.any(1)]),
        "colour_error": colour > bound.get("colour_error", np.inf),
    }
    frames_wrong = [int(starts[k].argmax()) for k in broken if k in starts and starts[k].any()]
    frames_wrong += [impact_frame] if "impact_error" in broken and impact_frame is not None else []
    return Measured(**values, path_length=path, violations=broken, first=min(frames_wrong, default=None))


def trajectory_error(frames: np.ndarray, clip: Track) -> tuple[float, float]:
    """Root mean square error of centroids (box widths) and of velocities (box widths a frame) against the true track."""
    seen = observe(frames, Prompt.of(clip.scene)).position
    gap = seen - clip.positions
    return float(np.sqrt(np.nanmean((gap**2).sum(-1)))), float(np.sqrt(np.nanmean((np.diff(gap, axis=0) ** 2).sum(-1))))


def severity(found: Measured, kind: str, limits: dict | None = None) -> float:
    """How broken a clip of some kind of scene is: every metric x in units of its threshold, as log(1 + x), summed."""
    bound = (thresholds() if limits is None else limits)["thresholds"][kind]
    return float(sum(np.log1p(getattr(found, k) / max(bound[k], 0.02)) for k in METRICS))
