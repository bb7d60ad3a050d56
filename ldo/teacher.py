"""The teacher: Predictive Dynamics Alignment. What V-JEPA forecasts of a clip shapes the generator's hidden geometry.

A clip of 4K+1 frames loses frame 0 (the causal VAE gives it a latent of its own) and is cut into windows. From the
first ``context`` frames of each, the world model forecasts the features of the rest; tokens of the first context are
*observed*: they anchor the geometry but teach nothing (weight 0).

Modes:
    forecast  Y = LN(P(E(context))), and LN(E(context)) where observed
    encode    Y = LN(E(window)): plain relation distillation, the control; nothing counts as observed
    delta     Y = forecast minus the last observed tubelet; observed tokens leave the loss

Shapes: B clips, T frames, N = t h w tokens, D student and E teacher features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldo.config import Teacher
from ldo.distributed import send
from ldo.ops import relation_loss
from ldo.world_model import Tokens, WorldModel, window_starts


@dataclass(frozen=True)
class Target:
    """What the student is held against: ``y_BNE`` on ``grid``, token weights ``weight_BN``, and the first ``skip`` tubelets left out."""

    y_BNE: Tensor
    weight_BN: Tensor
    grid: tuple[int, int, int]
    skip: int = 0

    def take(self, index: Tensor) -> Target:
        """The targets of some clips."""
        return Target(self.y_BNE[index], self.weight_BN[index], self.grid, self.skip)

    def to(self, device: torch.device) -> Target:
        return Target(send(self.y_BNE, device), send(self.weight_BN, device), self.grid, self.skip)


@torch.no_grad()
def make_target(world: WorldModel, frames_BTCHW: Tensor, config: Teacher) -> Target:
    """Forecast a batch of clips of 4K+1 frames in [0, 1]. Windows are batched into one call of each network."""
    x = frames_BTCHW[:, 1:]
    b, frames = x.shape[:2]
    starts = window_starts(frames, config.window, config.stride)
    clips = torch.cat([x[:, s : s + config.window] for s in starts])  # window-major: [W B, window, C, H, W]
    tubelet, side = world.tubelet, world.side
    known, tubelets = config.context // tubelet, frames // tubelet

    def by_tubelet(tokens: Tokens) -> Tensor:  # [W, B, t, h w, E]
        return tokens.x_BND.unflatten(1, (tokens.grid[0], -1)).unflatten(0, (len(starts), b))

    if config.mode == "encode":
        parts, first = by_tubelet(world.encode(clips)), 0
    else:
        seen, foretold = map(by_tubelet, world.forecast(clips, config.context))
        parts, first = torch.cat([seen, foretold], 2), known
    y = parts.new_zeros(b, tubelets, side * side, world.dim)
    base = torch.zeros_like(y)  # what persistence would say
    filled = 0
    for w, start in enumerate(starts):  # later windows add only the tubelets that no earlier one told of
        begin = 0 if w == 0 else max(filled - start // tubelet, first)
        at = start // tubelet
        y[:, at + begin : at + parts.shape[2]] = parts[w, :, begin:]
        base[:, at + begin : at + parts.shape[2]] = parts[w, :, known - 1 : known]
        filled = at + parts.shape[2]
    weight = _motion(y) if config.weights == "motion" else y.new_ones(y.shape[:-1])
    observed = 0 if config.mode == "encode" else known
    weight[:, :observed] = 0
    if config.mode == "delta":
        y = y - base
    skip = observed if config.mode == "delta" else 0
    return Target(y.flatten(1, 2), weight.flatten(1, 2), (tubelets, side, side), skip)


def _motion(y: Tensor) -> Tensor:
    """Change of each token since the tubelet before, over the clip's 95th percentile, in [0.1, 1]. y: [B, t, S, E]."""
    change = (y[:, 1:] - y[:, :-1]).norm(dim=-1)
    change = torch.cat([change[:, :1], change], 1)
    scale = torch.quantile(change.flatten(1), 0.95, dim=1).clamp_min(1e-6)
    return (change / scale[:, None, None]).clamp(0.1, 1)


class Aligner(nn.Module):
    """Brings hidden states to the teacher's grid and measures the relation loss. Trainable only with a projector."""

    def __init__(self, config: Teacher, width: int, dim: int, vae_time: int, tubelet: int):
        super().__init__()
        self.config, self.ratio = config, vae_time / tubelet
        self.project = (
            nn.Sequential(nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, dim))
            if config.projector == "mlp"
            else nn.Identity()
        )

    def resample(self, hidden: Tokens, grid: tuple[int, int, int]) -> Tensor:
        """Drop latent frame 0, then linear in time (half-pixel centres) and area in space, to ``grid``: [B, N, D]."""
        t, h, w = hidden.grid
        x = self.project(hidden.x_BND.float()).unflatten(1, (t, h, w))[:, 1:]  # [B, t-1, h, w, D]
        if round((t - 1) * self.ratio) != grid[0]:
            raise ValueError(f"teacher: {t - 1} latent frames do not correspond to {grid[0]} tubelets at a ratio of {self.ratio}")
        b, _, _, _, d = x.shape
        if (h, w) != grid[1:]:
            x = F.adaptive_avg_pool2d(x.permute(0, 1, 4, 2, 3).flatten(0, 1), grid[1:]).unflatten(0, (b, -1)).permute(0, 1, 3, 4, 2)
        if x.shape[1] != grid[0]:
            flat = x.permute(0, 2, 3, 4, 1).flatten(1, 3)  # [B, h w D, t-1]
            flat = F.interpolate(flat, grid[0], mode="linear", align_corners=False)
            x = flat.unflatten(1, (*grid[1:], d)).permute(0, 4, 1, 2, 3)
        return x.flatten(1, 3)

    def forward(self, hidden: Tokens, target: Target) -> Tensor:
        """L_PDA: the distance between the geometries of ``hidden`` and ``target``; scalar."""
        config, area = self.config, target.grid[1] * target.grid[2]
        cut = target.skip * area
        student = self.resample(hidden, target.grid)[:, cut:].to(hidden.x_BND.dtype)  # the model's own precision: that of tensor cores
        frame = torch.arange(target.grid[0], device=student.device).repeat_interleave(area)[cut:]
        return relation_loss(
            student,
            target.y_BNE[:, cut:],
            frame_N=frame if config.geometry == "split" else None,
            weight_BN=target.weight_BN[:, cut:],
            margin=config.margin,
            penalty=config.penalty,
            spatial=config.spatial,
            temporal=config.temporal,
        )
