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
from functools import lru_cache

import torch
from torch import Tensor, nn

from ldo.config import Teacher
from ldo.distributed import send
from ldo.ops import relation_loss
from ldo.ops.dispatch import as_given
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
        # Two small matrix products: on a GPU the library's interpolation takes longer than the rest of the step, and its
        # gradient is not deterministic. Space first, since it has the fewer places afterwards.
        with as_given(x.device):
            x = x.flatten(2, 3)  # [B, t-1, h w, D]
            if (h, w) != grid[1:]:
                x = area_weights(h, w, *grid[1:], x.device) @ x
            x = x.flatten(2)  # [B, t-1, S D]
            if x.shape[1] != grid[0]:
                x = time_weights(x.shape[1], grid[0], x.device) @ x
        return x.unflatten(2, (grid[1] * grid[2], -1)).flatten(1, 2)

    def forward(self, hidden: Tokens, target: Target) -> Tensor:
        """L_PDA: the distance between the geometries of ``hidden`` and ``target``; scalar."""
        config, area = self.config, target.grid[1] * target.grid[2]
        cut = target.skip * area
        student = self.resample(hidden, target.grid)[:, cut:].to(hidden.x_BND.dtype)  # the model's own precision: that of tensor cores
        frame = frame_of_tokens(*target.grid, target.skip, student.device)
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


# ---------------------------------------------------------------------------------------------- what is made once


@lru_cache(maxsize=64)
def time_weights(steps_in: int, steps_out: int, device: torch.device) -> Tensor:
    """[out, in] fp32: linear interpolation between half-pixel centres, clamped at both ends (align_corners=False)."""
    with torch.inference_mode(False):
        at = ((torch.arange(steps_out, dtype=torch.float64) + 0.5) * steps_in / steps_out - 0.5).clamp_min(0)
        low = at.long().clamp_max(steps_in - 1)
        high = (low + 1).clamp_max(steps_in - 1)
        rows = torch.arange(steps_out)
        weights = torch.zeros(steps_out, steps_in, dtype=torch.float64)
        weights[rows, low] += 1 - (at - low)
        weights[rows, high] += at - low
        return weights.float().to(device)


@lru_cache(maxsize=64)
def area_weights(height: int, width: int, height_out: int, width_out: int, device: torch.device) -> Tensor:
    """[out, in] fp32, rows of pixels one after another: the mean over each output pixel's area, as adaptive_avg_pool2d has it."""
    with torch.inference_mode(False):
        return torch.kron(_area(height, height_out), _area(width, width_out)).float().to(device)


def _area(size_in: int, size_out: int) -> Tensor:
    """[out, in] fp64: output i is the mean from floor(i in / out) to ceil((i + 1) in / out)."""
    start = torch.arange(size_out) * size_in // size_out
    end = -(-(torch.arange(size_out) + 1) * size_in // size_out)
    place = torch.arange(size_in)
    covered = ((place >= start[:, None]) & (place < end[:, None])).double()
    return covered / covered.sum(1, keepdim=True)


@lru_cache(maxsize=64)
def frame_of_tokens(steps: int, height: int, width: int, skip: int, device: torch.device) -> Tensor:
    """The frame of each token of a grid without its first ``skip`` steps, int32 [N]; the same tensor every time.

    The relation loss keeps what it makes of it for as long as it is given that very tensor.
    """
    with torch.inference_mode(False):
        area = height * width
        return torch.arange(skip, steps, dtype=torch.int32).repeat_interleave(area).to(device)
