"""The teacher of Predictive Dynamics Alignment: what V-JEPA forecasts of a clip, as a target for the generator.

A clip of 4K+1 frames loses frame 0 (the causal VAE gives it a latent of its own) and is cut into windows. From the
first ``context`` frames of each, the world model forecasts the features of the rest; tokens of the first context are
*observed*: they anchor the geometry but teach nothing (weight 0).

Modes:
    forecast  Y = LN(P(E(context))), and LN(E(context)) where observed
    encode    Y = LN(E(window)): plain relation distillation, the control; nothing counts as observed
    delta     Y = forecast minus the last observed tubelet; observed tokens leave the loss

Shapes: B clips, T frames, N = t h w tokens, E teacher features; W windows of S = h w tokens a tubelet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.core.config import TeacherConfig
from ldo.core.distributed import to_device
from ldo.models.world_model import Tokens, WorldModel, window_starts


@dataclass(frozen=True)
class Target:
    """What the student is compared with: features ``y_BNE`` on ``grid`` (t, h, w) and token weights ``weight_BN``.

    The first ``skip`` tubelets are left out of the loss.
    """

    y_BNE: Tensor
    weight_BN: Tensor
    grid: tuple[int, int, int]
    skip: int = 0

    def take(self, index: Tensor) -> Target:
        """The targets of some clips."""
        return Target(self.y_BNE[index], self.weight_BN[index], self.grid, self.skip)

    def to(self, device: torch.device) -> Target:
        """The targets on a device."""
        return Target(to_device(self.y_BNE, device), to_device(self.weight_BN, device), self.grid, self.skip)


@torch.no_grad()
def make_target(world_model: WorldModel, frames_BTCHW: Tensor, config: TeacherConfig) -> Target:
    """Forecast a batch of clips of 4K+1 frames in [0, 1]. Windows are batched into one call of each network."""
    frames = frames_BTCHW[:, 1:]
    starts = window_starts(frames.shape[1], config.window, config.stride)
    features_WBtSE = _window_features(world_model, frames, starts, config)
    tubelet = world_model.tubelet
    # the encoder sees its whole window, so that nothing of it is merely observed
    observed = 0 if config.mode == "encode" else config.context // tubelet
    # In delta mode what is subtracted is the last tubelet that was seen: persistence.
    known = config.context // tubelet

    shape = (len(frames), frames.shape[1] // tubelet, *features_WBtSE.shape[3:])
    target = features_WBtSE.new_zeros(shape)  # [B, t, S, E]
    persistence = torch.zeros_like(target)  # what "nothing changes" would say
    filled = 0
    for window, start in enumerate(starts):
        first = start // tubelet
        end = first + features_WBtSE.shape[2]
        # a later window adds only the tubelets that no earlier one has forecast
        begin = 0 if window == 0 else max(filled - first, observed)
        target[:, first + begin : end] = features_WBtSE[window, :, begin:]
        persistence[:, first + begin : end] = features_WBtSE[window, :, known - 1 : known]
        filled = end

    weight = _motion(target) if config.weights == "motion" else target.new_ones(target.shape[:-1])
    weight[:, :observed] = 0
    skip = 0
    if config.mode == "delta":
        target = target - persistence
        skip = observed
    grid = (shape[1], world_model.side, world_model.side)
    return Target(target.flatten(1, 2), weight.flatten(1, 2), grid, skip)


def _window_features(world_model: WorldModel, frames: Tensor, starts: list[int], config: TeacherConfig) -> Tensor:
    """Features [W, B, t, S, E] of every window: all encoded, or the context encoded and the rest forecast."""
    # Window-major: one batch for each network, and unflatten gives the windows back.
    windows = torch.cat([frames[:, start : start + config.window] for start in starts])  # [W B, window, C, H, W]

    def by_tubelet(tokens: Tokens) -> Tensor:
        return tokens.x_BND.unflatten(1, (tokens.grid[0], -1)).unflatten(0, (len(starts), len(frames)))

    if config.mode == "encode":
        return by_tubelet(world_model.encode(windows))
    seen, forecast = world_model.forecast(windows, config.context)
    return torch.cat([by_tubelet(seen), by_tubelet(forecast)], 2)


def _motion(target: Tensor) -> Tensor:
    """Weights [B, t, S]: each token's change since the tubelet before, over the clip's 95th percentile, in [0.1, 1]."""
    # By the target's own change, since optical flow would need another model; the percentile keeps one flicker from
    # making all else look still, the floor keeps the background in the geometry.
    change = (target[:, 1:] - target[:, :-1]).norm(dim=-1)
    change = torch.cat([change[:, :1], change], 1)
    scale = torch.quantile(change.flatten(1), 0.95, dim=1).clamp_min(1e-6)
    return (change / scale[:, None, None]).clamp(0.1, 1)
