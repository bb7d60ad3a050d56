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
MOST_CONTACTS = 200  # in one clip; more means that balls rattle between each other
REST = 0.003  # a soft ball that leaves the floor slower than this (half a thousandth of a box high) stays on it

COLOURS = {
    "red": (0.95, 0.18, 0.18),
    "green": (0.15, 0.85, 0.25),
    "blue": (0.22, 0.42, 1.00),
    "yellow": (0.98, 0.88, 0.15),
}
NAMES = tuple(COLOURS)
PALETTE = np.array(list(COLOURS.values()))  # [4, 3]
# Backgrounds seen from the side and from above, the floor strip, and the block.
SIDE = np.array((0.07, 0.07, 0.11))
TABLE = np.array((0.10, 0.15, 0.13))
GROUND = np.array((0.36, 0.28, 0.20))
BLOCK = np.array((0.55, 0.55, 0.58))


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
            discriminant = v * v - 2 * a * (p - wall)
            if discriminant < 0:
                continue
            root = math.sqrt(discriminant)
            roots = ((-v - root) / a, (-v + root) / a)
        for time in roots:
            # Only where it moves outward: a ball that has just bounced touches the wall at time 0 too.
            if -1e-9 < time < best and (v + a * time) * sign > 1e-12:
                best, side = max(time, 0.0), sign
    return best, side


def _time_to_touch(dp: np.ndarray, dv: np.ndarray, reach: float) -> float:
    """First t >= 0 at which two balls at relative position dp and relative velocity dv touch.

    Gravity cancels between two balls that fall; scenes in which a falling ball meets a resting one are not drawn.
    """
    approach, speed_squared = float(dp @ dv), float(dv @ dv)
    if approach >= 0 or speed_squared == 0:
        return math.inf
    discriminant = approach * approach - speed_squared * (float(dp @ dp) - reach * reach)
    if discriminant < 0:
        return math.inf
    return max((-approach - math.sqrt(discriminant)) / speed_squared, 0.0)


@dataclass(frozen=True)
class Event:
    """A contact at ``time``: of ``ball`` with ball ``other``, or with a wall (``other`` is -1)."""

    time: float
    ball: int
    other: int
    floor: bool = False


def simulate(
    scene: Scene,
    frames: int = FRAMES,
    *,
    gravity: float | None = None,
    restitution: float | None = None,
    collide: bool = True,
) -> tuple[np.ndarray, np.ndarray, list[Event]]:
    """Exact positions and velocities [T, N, 2] at whole frames, and the contacts on the way.

    ``gravity`` and ``restitution`` replace the scene's own; ``collide=False`` lets balls pass through each other.
    """
    state = _State(scene, scene.gravity if gravity is None else gravity)
    elasticity = scene.restitution if restitution is None else restitution
    positions, velocities = state.positions, state.velocities
    # Resting contacts carry the weight; event by event a stack would bounce forever in ever smaller steps.
    if scene.kind == "stack" and state.gravity == GRAVITY:
        return np.repeat(positions[None], frames, 0), np.repeat(velocities[None], frames, 0), []
    path, speeds, events = [positions.copy()], [velocities.copy()], []
    now = 0.0
    for frame in range(1, frames):
        while True:
            wait, contact = state.next_contact(frame - now, collide)
            state.fly(wait)
            now += wait
            if contact is None:
                # Set, not summed: rounding would carry over to every later frame.
                now = float(frame)
                break
            on_floor = contact.axis == 1 and contact.side > 0
            events.append(Event(now, contact.ball, contact.other, on_floor))
            if contact.other < 0:
                state.bounce_off_wall(contact, elasticity)
            else:
                state.collide_balls(contact)
            if len(events) > MOST_CONTACTS:
                raise ValueError(
                    f"sandbox scene {scene.caption!r}: more than {MOST_CONTACTS} contacts; raise the restitution or "
                    "shorten the clip"
                )
        path.append(positions.copy())
        speeds.append(velocities.copy())
    return np.array(path), np.array(speeds), events


@dataclass(frozen=True)
class _Contact:
    """Ball ``ball`` meets ball ``other``, or (-1) the wall on ``side`` (-1, +1) of ``axis``."""

    ball: int
    other: int
    axis: int = 0
    side: int = 0


class _State:
    """Positions and velocities [N, 2] at one moment, changed in place."""

    def __init__(self, scene: Scene, gravity: float):
        self.positions = scene.positions.astype(float).copy()
        self.velocities = scene.velocities.astype(float).copy()
        self.radii, self.bottom, self.gravity = scene.radii, scene.bottom, gravity
        self.fall = np.full(len(scene.radii), gravity)  # 0 for a ball that has come to rest on the floor

    def next_contact(self, within: float, collide: bool) -> tuple[float, _Contact | None]:
        """Time until the next contact, at most ``within``, and the contact, None if there is none by then."""
        wait, contact = within, None
        count = len(self.radii)
        for ball in range(count):
            position, velocity, radius = self.positions[ball], self.velocities[ball], self.radii[ball]
            for axis, high, acceleration in ((0, 1.0, 0.0), (1, self.bottom, self.fall[ball])):
                time, side = _time_to_wall(position[axis], velocity[axis], acceleration, radius, high - radius)
                if time < wait:
                    wait, contact = time, _Contact(ball, -1, axis, side)
            if not collide:
                continue
            for other in range(ball + 1, count):
                apart, drift = position - self.positions[other], velocity - self.velocities[other]
                time = _time_to_touch(apart, drift, radius + self.radii[other])
                if time < wait:
                    wait, contact = time, _Contact(ball, other)
        return wait, contact

    def fly(self, time: float) -> None:
        """Free flight."""
        self.positions += self.velocities * time
        self.positions[:, 1] += 0.5 * self.fall * time * time
        self.velocities[:, 1] += self.fall * time

    def bounce_off_wall(self, contact: _Contact, elasticity: float) -> None:
        """A wall gives back a share of the speed; on the floor a soft ball comes to rest."""
        ball, axis, side = contact.ball, contact.axis, contact.side
        velocity = self.velocities[ball]
        velocity[axis] = -side * elasticity * abs(velocity[axis])
        on_floor = axis == 1 and self.gravity * side > 0
        if on_floor and elasticity < 1 and abs(velocity[1]) < REST:
            velocity[1] = self.fall[ball] = 0.0

    def collide_balls(self, contact: _Contact) -> None:
        """An elastic collision of smooth discs: momentum is exchanged along the line of centres."""
        ball, other = contact.ball, contact.other
        # A ball at rest on the floor is set free, whatever hits it.
        self.fall[ball] = self.fall[other] = self.gravity
        apart = self.positions[ball] - self.positions[other]
        normal = apart / np.linalg.norm(apart)
        mass, other_mass = self.radii[ball] ** 2, self.radii[other] ** 2
        approach = (self.velocities[ball] - self.velocities[other]) @ normal
        impulse = 2 * mass * other_mass / (mass + other_mass) * approach
        self.velocities[ball] -= impulse / mass * normal
        self.velocities[other] += impulse / other_mass * normal


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
    positions = clip.positions
    across = axis[None, None, None, :] - positions[..., 0, None, None]
    down = axis[None, None, :, None] - positions[..., 1, None, None]
    distance = np.sqrt(across * across + down * down)
    cover = np.clip((clip.radii[None, :, None, None] - distance) * size + 0.5, 0, 1)
    cover *= clip.present[..., None, None]  # [T, N, H, W]
    frames = np.broadcast_to(background(clip.scene, size), (len(positions), size, size, 3))
    for ball in range(positions.shape[1]):
        share = cover[:, ball, ..., None]
        frames = frames * (1 - share) + share * PALETTE[clip.colours[:, ball]][:, None, None]
    # The block comes last because it stands in front.
    if clip.scene.occluded:
        share = occluder_mask(clip.scene, size)[None, None, :, None]
        frames = frames * (1 - share) + share * BLOCK
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), dtype=np.float32)
