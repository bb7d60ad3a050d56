"""Exact metrics of a clip, from its pixels and what its prompt says. No judge model, no reference clip.

    missing        share of frames and balls where a ball is not there once, whole, and of its own size
    law_residual   |a - g| / G of the worst free flight, a from a least-squares parabola over 7 frames; at most 10
    impact_error   worst distance, in radii, between the outcome of a contact and the exact simulator's outcome from
                   the state observed before it: it sees wrong restitution, momentum and energy; at most 10
    penetration    deepest overlap of two balls, or of a ball and a wall, in radii
    teleport_rate  share of steps longer than both neighbouring steps by two pixels of 32
    colour_error   largest share of a ball's area in a colour that no prompted ball has, or a ball's change of tint
    stillness      1 where the balls cover less than half the shortest path of valid clips of this kind of scene

Each is 0 for a perfect clip. A metric that cannot be measured (a ball is never seen) takes its largest value.

There are two sets of thresholds. A clip violates *visibly* when a metric passes ``VISIBLE``: physical units, the same
for every clip, at what a person sees. It violates *strictly* when a metric passes the 99th percentile of
VAE-reconstructed valid clips of the same kind of scene, frozen in ``thresholds.json`` before anything else was trained:
what is worse is not the VAE's doing. ``severity`` is graded.

Shapes: T frames, N balls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ldo.sandbox.observe import Observed, Prompt, observe
from ldo.sandbox.simulate import FLOOR, GRAVITY, Scene, simulate

EXACT_METRICS = ("missing", "law_residual", "impact_error", "penetration", "teleport_rate", "colour_error", "stillness")
THRESHOLDS = Path(__file__).with_name("thresholds.json")
WINDOW = 7  # frames of a free-flight fit
NEAR = 0.02  # a contact is possible where balls or walls come this close
HORIZON = 8  # frames over which the outcome of a contact is predicted
CAP = 10.0  # of the metrics that have no largest value of their own

# What a person sees. Chosen from physics, and checked on sound and planted clips alone (``build/calibrate.py``).
VISIBLE = {
    "missing": 0.1,  # gone or doubled in more than two frames of 17
    # Within seven frames, a path that is off by 1 G bends by half a radius too much or too little. A ball that hangs in
    # the air is off by exactly 1 G, so the threshold has to lie below.
    "law_residual": 0.8,
    "impact_error": 1.0,  # a radius from where the contact sends it
    "penetration": 0.25,  # overlap of a quarter of the smaller radius
    "teleport_rate": 0.0,  # any jump
    "colour_error": 0.5,  # half of a ball
    "stillness": 0.0,  # whether a scene that should move does
}
VISIBLE_SHIFT = 0.2  # law_residual of a stack that moves by half a radius; its units are those of a fall of 7 frames
# Units of severity where the visible threshold is 0: one jump of one ball, and stillness itself.
_UNITS = VISIBLE | {"teleport_rate": 1 / 16, "stillness": 1.0}


@dataclass(frozen=True)
class Measured:
    """The metrics of one clip. ``path_length`` is the distance that all balls travelled, in box widths."""

    missing: float
    law_residual: float
    impact_error: float
    penetration: float
    teleport_rate: float
    colour_error: float
    stillness: float
    path_length: float
    visible: tuple[str, ...] = ()  # names of the metrics past what a person sees
    violations: tuple[str, ...] = ()  # names of the metrics past their strict threshold
    first: int | None = None  # first frame that is visibly wrong, where a frame can be named

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
    """Distance travelled by all balls; where a ball is not seen, straight to where it is seen next."""
    seen = [positions[~np.isnan(positions[:, 0])] for positions in position.transpose(1, 0, 2)]
    return float(sum(np.linalg.norm(np.diff(positions, axis=0), axis=-1).sum() for positions in seen))


def _possible_contacts(seen: Observed, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Steps in which a ball may have met a wall [T-1, N], or another ball [T-1, N, N].

    A step may hold a contact when its motion, carried on from before or back from after, would come within ``NEAR``.
    """
    positions, radii = seen.position, seen.radius
    frames, count = positions.shape[:2]
    motion = _steps(positions)
    gravity = np.array([0.0, prompt.gravity])
    # A contact may happen between two frames, so both neighbours extrapolate into the step.
    ahead = np.concatenate([motion[:1], motion[:-1] + gravity])  # the step as the one before predicts it
    back = np.concatenate([motion[1:] - gravity, motion[-1:]])  # and as the one after does
    start, end = positions[:-1], positions[1:]
    low, high = radii[:, None], np.array([1.0, FLOOR if prompt.gravity else 1.0]) - radii[:, None]
    wall = np.zeros((frames - 1, count), bool)
    pair = np.zeros((frames - 1, count, count), bool)
    with np.errstate(invalid="ignore"):
        for point in (start, end, start + ahead, end - back):
            wall |= ((point < low + NEAR / 2) | (point > high - NEAR / 2)).any(-1)
        for ball in range(count):
            for other in range(ball):
                for base, move in ((start, ahead), (start, motion), (end, -back)):
                    gap, drift = base[:, ball] - base[:, other], move[:, ball] - move[:, other]
                    moment = np.clip(-(gap * drift).sum(-1) / np.maximum((drift**2).sum(-1), 1e-12), 0, 1)
                    nearest = np.linalg.norm(gap + moment[:, None] * drift, axis=-1)
                    pair[:, ball, other] |= nearest < radii[ball] + radii[other] + NEAR
        pair |= pair.transpose(0, 2, 1)
    return wall, pair


# ---------------------------------------------------------------------------------------------- laws


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of True in a row of flags; ``end`` is one past its last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield int(first), int(end)


def _law(seen: Observed, prompt: Prompt, contact: np.ndarray) -> tuple[float, np.ndarray]:
    """Worst |a - g| / G over free flights, and for each frame [T] the worst of the fits that include it."""
    positions = seen.position
    frames, count = positions.shape[:2]
    per_frame = np.zeros(frames)
    if prompt.kind == "stack":
        # A stack must not move: its shift, in units of the fall that gravity brings in the same time.
        shift = np.linalg.norm(positions - positions[0], axis=-1)
        per_frame = np.nan_to_num(shift.max(1)) / (0.5 * GRAVITY * WINDOW**2)
        return float(per_frame.max()), per_frame
    gravity = np.array([0.0, prompt.gravity])
    for ball in range(count):
        # Only where no contact is possible: a kink at a wall is physics, the same kink in the air is not.
        free = ~contact[:, ball] & ~np.isnan(_steps(positions[:, ball])).any(-1)
        # Steps first..end-1 connect frames first..end, so ``end`` is the last frame of the flight.
        for first, last in _runs(free):
            length = min(WINDOW, last - first + 1)
            # Four points are the fewest that a parabola does not fit exactly.
            if length < 4:
                continue
            for time in range(first, last - length + 2):
                fit = np.polyfit(np.arange(length), positions[time : time + length, ball], 2)
                # Over n frames a parabola gives the acceleration to within noise * n^-2.5, so short fits count less.
                error = np.linalg.norm(2 * fit[0] - gravity) / GRAVITY * (length / WINDOW) ** 2.5
                per_frame[time : time + length] = np.maximum(per_frame[time : time + length], error)
    if prompt.kind == "occluder":
        # The block splits a ball's flight in two; one straight line must fit both parts.
        for ball in range(count):
            time = np.flatnonzero(~np.isnan(positions[:, ball, 0]))
            if len(time) >= 4:
                squares = [np.polyfit(time, positions[time, ball, axis], 1, full=True)[1].sum() for axis in (0, 1)]
                deviation = np.sqrt(np.mean(squares) / len(time))
                per_frame[time] = np.maximum(per_frame[time], deviation / GRAVITY)
    return float(per_frame.max()), per_frame


# ---------------------------------------------------------------------------------------------- impacts


@dataclass(frozen=True)
class _Cluster:
    """Steps ``first`` to ``last`` (both included) in which some of ``balls`` may have met each other or a wall."""

    first: int
    last: int
    balls: frozenset[int]

    def touches(self, other: _Cluster) -> bool:
        """Whether they share a ball and overlap in time or follow each other directly."""
        in_time = self.first <= other.last + 1 and other.first <= self.last + 1
        return in_time and bool(self.balls & other.balls)

    def union(self, other: _Cluster) -> _Cluster:
        return _Cluster(min(self.first, other.first), max(self.last, other.last), self.balls | other.balls)


def _clusters(contact: np.ndarray, pair: np.ndarray) -> list[_Cluster]:
    """Possible contacts, merged where they overlap in time and share balls: only together can they be simulated."""
    merged: list[_Cluster] = []
    count = contact.shape[1]
    for ball in range(count):
        for first, end in _runs(contact[:, ball]):
            partners = [other for other in range(count) if pair[first:end, ball, other].any()]
            cluster = _Cluster(first, end - 1, frozenset([ball, *partners]))
            # A list of its own: union() may make the cluster touch others, but only those of the start are merged.
            for overlapping in [earlier for earlier in merged if earlier.touches(cluster)]:
                cluster = cluster.union(overlapping)
                merged.remove(overlapping)
            merged.append(cluster)
    return merged


def _state(positions: np.ndarray, gravity: float) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity [N, 2] at the last of a few frames of free flight [n, N, 2], gravity known."""
    time = np.arange(len(positions)) - (len(positions) - 1)
    flat = positions - 0.5 * np.array([0, gravity]) * (time**2)[:, None, None]
    slope = (time - time.mean()) @ (flat - flat.mean(0)).transpose(1, 0, 2) / ((time - time.mean()) ** 2).sum()
    return flat.mean(0) - slope * time.mean(), slope


def _free_frames(positions: np.ndarray, contact: np.ndarray, frame: int) -> int:
    """How many frames up to and with ``frame`` show free flight of all balls, at most 4."""
    free = 0
    while free < 4 and frame - free >= 0:
        if np.isnan(positions[frame - free]).any():
            break
        # The step that starts at ``frame`` is the contact itself; the steps before it must be free.
        if free and contact[frame - free].any():
            break
        free += 1
    return free


def _impacts(seen: Observed, prompt: Prompt, contact: np.ndarray, pair: np.ndarray) -> tuple[float, int | None]:
    """Worst distance, in radii, of a contact's outcome from the simulator's, started from the state observed before it.

    Where a contact comes too early to know that state, the clip is run backward (elastic scenes). Also the first
    frame that is off by half of that.
    """
    worst, where = 0.0, None
    if prompt.kind == "stack":
        return worst, where
    frames = len(seen.position)
    for cluster in _clusters(contact, pair):
        balls = sorted(cluster.balls)
        for backward in (False, True):
            positions, busy = seen.position[:, balls], contact[:, balls]
            # The frame at which the contact's first step starts, and that of its last step.
            before, after = cluster.first, cluster.last
            if backward:
                positions, busy = positions[::-1], busy[::-1]
                before, after = frames - 2 - cluster.last, frames - 2 - cluster.first
            free = _free_frames(positions, busy, before)
            # Position and velocity need three frames. Soft walls lose energy, so their clips do not run backward.
            if free < 3 or (backward and prompt.restitution != 1.0):
                continue
            # A few frames past the contact: later ones would add other contacts, and the errors of the start grow.
            horizon = min(after + 4, frames - 1, before + HORIZON) - before
            start, speed = _state(positions[before - free + 1 : before + 1], prompt.gravity)
            radii = seen.radius[balls]
            scene = Scene(prompt.kind, (), radii, start, speed, prompt.restitution)
            path, _, _ = simulate(scene, horizon + 1)
            distance = np.linalg.norm(path - positions[before : before + horizon + 1], axis=-1) / radii
            distance = np.nan_to_num(distance).max(1)
            largest = distance.max()
            if largest > worst:
                worst = float(largest)
                frame = before + int((distance > largest / 2).argmax())
                where = frames - 1 - frame if backward else frame
            break
    return worst, where


def _penetration(seen: Observed, prompt: Prompt) -> np.ndarray:
    """[T] deepest overlap with a wall or another ball, in radii of the smaller ball."""
    positions, radii = seen.position, np.maximum(seen.radius, 1e-6)
    count = positions.shape[1]
    high = np.array([1.0, FLOOR if prompt.gravity else 1.0]) - radii[:, None]
    depth = np.nan_to_num(np.maximum(radii[:, None] - positions, positions - high).max(-1) / radii).max(1)
    for ball in range(count):
        for other in range(ball):
            distance = np.linalg.norm(positions[:, ball] - positions[:, other], axis=-1)
            # In radii of the smaller ball, of which the same overlap hides more.
            overlap = (radii[ball] + radii[other] - distance) / min(radii[ball], radii[other])
            depth = np.maximum(depth, np.nan_to_num(overlap))
    return np.maximum(depth, 0)


# ---------------------------------------------------------------------------------------------- all metrics


def _absent(seen: Observed, share: np.ndarray) -> np.ndarray:
    """[T, N] True where a ball is not there once, whole and of its own size; ``share`` of it is what shows."""
    least, most = seen.expected[..., 0], seen.expected[..., 1]
    whole = (share > least - 0.25) & (share < most + 0.25) & (seen.full_area > 0)
    # Less than half of a hidden ball may be too small to count as a piece.
    single = (seen.pieces == 1) | ((least < 0.5) & (seen.pieces <= 1))
    return ~(whole & single)


def _jumps(seen: Observed, prompt: Prompt) -> np.ndarray:
    """[T-1, N] True where a ball's step is longer than both neighbouring steps allow."""
    step = np.linalg.norm(_steps(seen.position), axis=-1)
    # The first and the last step have one neighbour, which is taken twice.
    previous = np.concatenate([step[1:2], step[:-1]])
    following = np.concatenate([step[1:], step[-2:-1]])
    with np.errstate(invalid="ignore"):
        # Compared with the neighbours, not with a limit: fast balls may be fast, but not for one step only.
        return step > np.maximum(previous, following) + prompt.gravity + 2 / 32


def measure(frames: np.ndarray, prompt: Prompt, limits: dict | None = None) -> Measured:
    """Measure one clip: ``frames`` [T, 3, S, S] in [0, 1].

    ``limits`` defaults to the frozen thresholds; {} applies none.
    """
    limits = thresholds() if limits is None else limits
    seen = observe(frames, prompt)
    # A ball that is never seen has no path to measure; every metric then takes its largest value below.
    never = bool((seen.full_area == 0).any())
    share = seen.area / np.maximum(seen.full_area, 1)
    absent = _absent(seen, share)
    jump = _jumps(seen, prompt)
    wall, pair = _possible_contacts(seen, prompt)
    contact = wall | pair.any(-1)
    law, law_frames = _law(seen, prompt, contact)
    impact, impact_frame = _impacts(seen, prompt, contact, pair)
    depth = _penetration(seen, prompt)
    tint = np.where(share > 0.5, seen.tint, 0).max(1)
    colour = np.full(len(frames), CAP)
    if not never:
        colour = np.minimum(np.maximum(seen.stray / seen.full_area.min(), tint), CAP)
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
    strict = limits.get("thresholds", {}).get(prompt.kind, {})
    eye = _visible_limits(prompt.kind)
    visible = tuple(name for name in EXACT_METRICS if values[name] > eye[name])
    starts = {
        "missing": absent.any(1),
        "law_residual": law_frames > eye["law_residual"],
        "penetration": depth > eye["penetration"],
        "teleport_rate": np.concatenate([[False], jump.any(1)]),
        "colour_error": colour > eye["colour_error"],
    }
    frames_wrong = [int(starts[name].argmax()) for name in visible if name in starts and starts[name].any()]
    if "impact_error" in visible and impact_frame is not None:
        frames_wrong.append(impact_frame)
    return Measured(
        **values,
        path_length=path,
        visible=visible,
        violations=tuple(name for name in EXACT_METRICS if name in strict and values[name] > strict[name]),
        first=min(frames_wrong, default=None),
    )


def _visible_limits(kind: str) -> dict[str, float]:
    return VISIBLE | {"law_residual": VISIBLE_SHIFT} if kind == "stack" else VISIBLE


def severity(found: Measured, kind: str) -> float:
    """How broken a clip of this kind of scene is: the sum of log(1 + x), x each metric in units of what is visible.

    0 is perfect. One metric at its visible threshold adds 0.7, one at ten times that 2.4.
    """
    units = _UNITS | {"law_residual": _visible_limits(kind)["law_residual"]}
    return float(sum(np.log1p(getattr(found, name) / unit) for name, unit in units.items()))
