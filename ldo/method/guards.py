"""Guards: penalties that stop the known ways to earn a reward without better dynamics.

A still video is easy to predict, a restless one beats "nothing changes", a blurred one has few details to get wrong.

Shapes: B clips, T frames, R penalties. Frames are [B, T, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.core.config import CriticConfig


@dataclass(frozen=True)
class Penalties:
    """``values`` [B, R] (0 is best), their ``weights`` [R] and their ``names``."""

    values: Tensor
    weights: Tensor
    names: tuple[str, ...]


def motion(frames_BTCHW: Tensor) -> Tensor:
    """Mean absolute change between frames [B], in units of the pixel range."""
    return frames_BTCHW.diff(dim=1).abs().flatten(1).mean(1)


def sharpness(frames_BTCHW: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels [B].

    A blurred edge has as much absolute difference as a sharp one, but less of its square.
    """
    across = frames_BTCHW.diff(dim=-1).square().flatten(1).mean(1)
    down = frames_BTCHW.diff(dim=-2).square().flatten(1).mean(1)
    return (across + down).sqrt()


def guard_penalties(frames_BTCHW: Tensor, reference_BTCHW: Tensor, config: CriticConfig) -> Penalties:
    """Penalties against the stage-1 model's videos of the same prompts. A guard of weight 0 is left out.

    Normalise each within its group before weighting it.
    """
    columns: list[tuple[str, float, Tensor]] = []
    if config.motion_weight:
        moved, reference = motion(frames_BTCHW), motion(reference_BTCHW)
        # Restless videos are as easy a way to a reward as still ones: skill compares with persistence, which fares
        # badly there.
        above = -(moved / (config.motion_ceiling * reference).clamp_min(1e-6) - 1).clamp_min(0)
        columns.append(("motion", config.motion_weight, _below(moved, reference, config.motion_floor) + above))
    if config.sharpness_weight:
        below = _below(sharpness(frames_BTCHW), sharpness(reference_BTCHW), config.sharpness_floor)
        columns.append(("sharpness", config.sharpness_weight, below))
    if config.start_weight:
        # For image-to-video, or where the first frame is known: the policy must not change what it starts from.
        change = (frames_BTCHW[:, 0] - reference_BTCHW[:, 0]).abs().flatten(1).mean(1)
        columns.append(("start", config.start_weight, -change))
    if not columns:
        return Penalties(frames_BTCHW.new_zeros(len(frames_BTCHW), 0), frames_BTCHW.new_zeros(0), ())
    names, weights, values = zip(*columns, strict=True)
    return Penalties(torch.stack(values, 1), torch.tensor(weights, device=frames_BTCHW.device), names)


def _below(values: Tensor, reference: Tensor, share: float) -> Tensor:
    """How far values [B] fall below a share of the reference's: 0 at that share and above, -1 at nothing."""
    return -(1 - values / (share * reference).clamp_min(1e-6)).clamp_min(0)
