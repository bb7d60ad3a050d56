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
    best = rest.argmin(1)[:, None] == np.arange(len(PALETTE))[:, None, None]
    return np.where(best, np.minimum(share, 1), 0), rest.min(1)


def _largest(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest connected part of one colour in one frame [S, S], with its rim; and the areas of all parts."""
    labels, count = ndimage.label(share > SEEN, _EIGHT)
    if not count:
        return np.zeros_like(share), np.zeros(0)
    areas = ndimage.sum_labels(share, labels, np.arange(1, count + 1))
    mask = ndimage.binary_dilation(labels == 1 + areas.argmax(), _EIGHT)
    return share * mask, areas


def _disc_share(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Share of a unit disc's area with abscissa between ``low`` and ``high``."""

    def below(u):
        u = np.clip(u, -1, 1)
        return (u * np.sqrt(1 - u * u) + np.arcsin(u)) / np.pi + 0.5

    return below(high) - below(low)


def _expected_share(position: np.ndarray, radius: np.ndarray, prompt: Prompt) -> np.ndarray:
    """How much of each ball should show [T, N, 2] (least, largest), one frame of timing error allowed.

    Behind the block a ball is expected where its own motion before it went there, or after it came back, puts it.
    """
    frames, count = position.shape[:2]
    out = np.ones((frames, count, 2))
    if prompt.kind != "occluder":
        return out
    time = np.arange(frames)
    for i in range(count):
        clear = ~np.isnan(position[:, i, 0])
        gone = np.flatnonzero(~clear)
        if not len(gone) or radius[i] == 0:
            continue
        runs = [np.flatnonzero(clear & side) for side in (time < gone[0], time > gone[-1])]
        if len(runs[0]) < 2:
            continue
        shares = []
        for run in [r for r in runs if len(r) >= 2]:
            slope, start = np.polyfit(run, position[run, i, 0], 1)
            x = start + slope * (time[:, None] + np.linspace(-1, 1, 5))
            shares.append(1 - _disc_share((OCCLUDER[0] - x) / radius[i], (OCCLUDER[1] - x) / radius[i]))
        share = np.concatenate(shares, 1)
        out[:, i] = np.stack([share.min(1), share.max(1)], 1)
    return out


def observe(frames: np.ndarray, prompt: Prompt) -> Observed:
    """Find the balls of ``prompt`` in ``frames`` [T, 3, S, S], floats in [0, 1]."""
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] != frames.shape[3]:
        raise ValueError(f"observe: expected square frames [T, 3, S, S], got {tuple(frames.shape)}")
    length, size, count = len(frames), frames.shape[-1], len(prompt.colours)
    cover, rest = _cover(frames.astype(np.float64), prompt)
    axis = (np.arange(size) + 0.5) / size
    position = np.full((length, count, 2), np.nan)
    area, tint = np.zeros((length, count)), np.zeros((length, count))
    parts: list[list[np.ndarray]] = []
    touching = np.zeros((length, count), bool)  # the ball meets the block's edge: only a part of it shows
    for t in range(length):
        parts.append([])
        for i, c in enumerate(prompt.colours):
            share, areas = _largest(cover[t, c])
            parts[t].append(areas)
            area[t, i] = total = share.sum()
            if total < 1:
                continue
            column, row = share.sum(0), share.sum(1)
            position[t, i] = (column * axis).sum() / total, (row * axis).sum() / total
            core = share > 0.8
            if core.any():
                tint[t, i] = np.linalg.norm(frames[t][:, core].mean(1) - PALETTE[c])
            if prompt.kind == "occluder":
                seen = axis[column > SEEN]
                edge = 1.6 / size
                touching[t, i] = len(seen) and seen.max() > OCCLUDER[0] - edge and seen.min() < OCCLUDER[1] + edge
    full = np.zeros(count)
    for i in range(count):
        clear = (area[:, i] >= 1) & ~touching[:, i]
        a = np.median(area[clear, i]) if clear.any() else 0.0
        full[i] = a if RADII[0] < np.sqrt(a / np.pi) / size < RADII[1] else 0.0
    hidden = touching & (area < 0.9 * full)
    position[hidden | (full == 0) | (area < 0.25 * np.maximum(full, 1))] = np.nan
    pieces = np.array([[(p > 0.3 * max(full[i], 1)).sum() for i, p in enumerate(row)] for row in parts])
    unprompted = [c for c in range(len(PALETTE)) if c not in prompt.colours]
    odd = np.where(rest > 0.25, 1.0, 0.0) * (cover.max(1) <= SEEN) + (cover[:, unprompted] * (cover[:, unprompted] > SEEN)).sum(1)
    expected = _expected_share(position, np.sqrt(full / np.pi) / size, prompt)
    return Observed(position, area, full, pieces, expected, tint, odd.sum((1, 2)), size)
