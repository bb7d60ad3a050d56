"""From pixels to balls: where each prompted ball is in every frame, how much of it shows, and what does not belong.

Nothing is known but the frames and what the prompt says (kind of scene, colours). A ball that cannot be seen has
position NaN; it is never placed by guess.

Shapes: T frames, N prompted balls, S x S pixels. Lengths in box widths, areas in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from ldo.sandbox.simulate import BLOCK, GRAVITY, OCCLUDER, PALETTE, Scene, background, occluder_mask

SEEN = 0.3  # a pixel belongs to a ball when the ball covers at least this much of it
RADII = (0.05, 0.20)  # what can pass for a ball
_EIGHT = np.ones((3, 3), int)


@dataclass(frozen=True)
class Prompt:
    """What a caption promises of the scene."""

    caption: str
    kind: str
    colours: tuple[int, ...]
    path_length: float = float("nan")  # of the simulator's clip for this prompt
    restitution: float = 1.0

    @staticmethod
    def of(scene: Scene, path_length: float = float("nan")) -> Prompt:
        return Prompt(scene.caption, scene.kind, scene.colours, path_length, scene.restitution)

    @property
    def gravity(self) -> float:
        return GRAVITY if self.kind in ("ballistic", "bounce", "stack") else 0.0


@dataclass(frozen=True)
class Observed:
    """What the pixels show. ``position`` [T, N, 2] is NaN where a ball is absent or partly hidden."""

    position: np.ndarray
    area: np.ndarray  # [T, N] pixels of the ball's colour, its largest part
    full_area: np.ndarray  # [N] area of the whole ball, 0 if never seen
    pieces: np.ndarray  # [T, N] parts of the ball's colour that are larger than 30% of it
    expected: np.ndarray  # [T, N, 2] least and largest share of the ball that should show
    tint: np.ndarray  # [T, N] distance of the ball's colour from what it should be
    stray: np.ndarray  # [T] pixels that look like no prompted ball and not like background
    size: int

    @property
    def radius(self) -> np.ndarray:
        return np.sqrt(self.full_area / np.pi) / self.size


@cache
def _backdrop(kind: str, size: int) -> np.ndarray:
    scene = Scene(kind, (), np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2)))
    cover = occluder_mask(scene, size)[None, :, None]
    return background(scene, size) * (1 - cover) + BLOCK * cover


def _cover(frames: np.ndarray, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
    """Share of every pixel that each palette colour covers [T, C, S, S], and what remains unexplained [T, S, S].

    A pixel is background and one colour mixed; the colour that explains it best takes it.
    """
    pixels = frames.transpose(0, 2, 3, 1)
    behind = _backdrop(prompt.kind, frames.shape[-1])
    direction = PALETTE[:, None, None] - behind  # [C, S, S, 3]
    offset = (pixels - behind)[:, None]  # [T, 1, S, S, 3]
    share = np.clip((offset * direction).sum(-1) / (direction**2).sum(-1), 0, 1.2)
    rest = np.linalg.norm(offset - share[..., None] * direction, axis=-1)
    # One colour takes the pixel: colours that shared it would give a ball of one colour a halo of another.
    best = rest.argmin(1)[:, None] == np.arange(len(PALETTE))[:, None, None]
    return np.where(best, np.minimum(share, 1), 0), rest.min(1)


def _largest(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest connected part of one colour in one frame [S, S], with its rim; and the areas of all parts."""
    labels, count = ndimage.label(share > SEEN, _EIGHT)
    if not count:
        return np.zeros_like(share), np.zeros(0)
    areas = ndimage.sum_labels(share, labels, np.arange(1, count + 1))
    # With its rim, where the ball covers less than the threshold: without it the centroid of a small ball shifts.
    mask = ndimage.binary_dilation(labels == 1 + areas.argmax(), _EIGHT)
    return share * mask, areas


def _disc_share(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Share of a unit disc's area with abscissa between ``low`` and ``high``."""

    def below(edge):
        edge = np.clip(edge, -1, 1)
        return (edge * np.sqrt(1 - edge * edge) + np.arcsin(edge)) / np.pi + 0.5

    return below(high) - below(low)


def _expected_share(position: np.ndarray, radius: np.ndarray, prompt: Prompt) -> np.ndarray:
    """How much of each ball should show [T, N, 2] (least, most), give or take one frame of timing.

    Behind the block, a ball's place is extrapolated from its motion before it went there and after it came out.
    """
    frames, count = position.shape[:2]
    out = np.ones((frames, count, 2))
    if prompt.kind != "occluder":
        return out
    time = np.arange(frames)
    for ball in range(count):
        clear = ~np.isnan(position[:, ball, 0])
        gone = np.flatnonzero(~clear)
        if not len(gone) or radius[ball] == 0:
            continue
        before, after = np.flatnonzero(clear & (time < gone[0])), np.flatnonzero(clear & (time > gone[-1]))
        if len(before) < 2:
            continue
        shares = []
        for run in (before, after):
            # One point has no velocity: a ball that comes out at the very end is judged by its way in.
            if len(run) < 2:
                continue
            slope, start = np.polyfit(run, position[run, ball, 0], 1)
            horizontal = start + slope * (time[:, None] + np.linspace(-1, 1, 5))
            left, right = ((edge - horizontal) / radius[ball] for edge in OCCLUDER)
            shares.append(1 - _disc_share(left, right))
        share = np.concatenate(shares, 1)
        out[:, ball] = np.stack([share.min(1), share.max(1)], 1)
    return out


def _full_area(area: np.ndarray, size: int) -> float:
    """Pixels of a whole ball, from its areas in frames that show it whole; 0 if it is never a ball's size."""
    typical = float(np.median(area)) if len(area) else 0.0
    return typical if RADII[0] < np.sqrt(typical / np.pi) / size < RADII[1] else 0.0


def _stray(cover: np.ndarray, rest: np.ndarray, prompt: Prompt) -> np.ndarray:
    """[T] pixels that no prompted colour and no background explains, or that an unprompted colour covers."""
    unexplained = np.where(rest > 0.25, 1.0, 0.0) * (cover.max(1) <= SEEN)
    unprompted = [index for index in range(len(PALETTE)) if index not in prompt.colours]
    wrong = cover[:, unprompted]
    return (unexplained + (wrong * (wrong > SEEN)).sum(1)).sum((1, 2))


def observe(frames: np.ndarray, prompt: Prompt) -> Observed:
    """Find the balls of ``prompt`` in ``frames`` [T, 3, S, S], floats in [0, 1]."""
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] != frames.shape[3]:
        raise ValueError(f"observe: expected square frames [T, 3, S, S], got {tuple(frames.shape)}")
    length, size, count = len(frames), frames.shape[-1], len(prompt.colours)
    cover, rest = _cover(frames.astype(np.float64), prompt)
    axis = (np.arange(size) + 0.5) / size
    position = np.full((length, count, 2), np.nan)
    area, tint = np.zeros((length, count)), np.zeros((length, count))
    parts: list[list[np.ndarray]] = []  # areas of the pieces of each ball's colour, by frame and ball
    touching = np.zeros((length, count), bool)  # the ball meets the block's edge: only a part of it shows
    for frame in range(length):
        parts.append([])
        for ball, colour in enumerate(prompt.colours):
            share, areas = _largest(cover[frame, colour])
            parts[frame].append(areas)
            total = share.sum()
            area[frame, ball] = total
            # Less than a pixel: noise of the background, not a ball.
            if total < 1:
                continue
            column, row = share.sum(0), share.sum(1)
            position[frame, ball] = (column * axis).sum() / total, (row * axis).sum() / total
            # Only pixels that the ball covers nearly whole: those at its edge are mixed with what is behind.
            core = share > 0.8
            if core.any():
                tint[frame, ball] = np.linalg.norm(frames[frame][:, core].mean(1) - PALETTE[colour])
            if prompt.kind == "occluder":
                seen = axis[column > SEEN]
                # Anti-aliasing and the VAE smear the block's edge over more than a pixel.
                edge = 1.6 / size
                meets = len(seen) and seen.max() > OCCLUDER[0] - edge and seen.min() < OCCLUDER[1] + edge
                touching[frame, ball] = bool(meets)
    full = np.zeros(count)
    for ball in range(count):
        clear = (area[:, ball] >= 1) & ~touching[:, ball]
        full[ball] = _full_area(area[clear, ball], size)
    # The centroid of what shows is not the ball's centre, so a partly hidden ball has no position.
    hidden = touching & (area < 0.9 * full)
    position[hidden | (full == 0) | (area < 0.25 * np.maximum(full, 1))] = np.nan
    pieces = np.zeros((length, count), int)
    for frame in range(length):
        for ball in range(count):
            pieces[frame, ball] = (parts[frame][ball] > 0.3 * max(full[ball], 1)).sum()
    expected = _expected_share(position, np.sqrt(full / np.pi) / size, prompt)
    return Observed(position, area, full, pieces, expected, tint, _stray(cover, rest, prompt), size)
