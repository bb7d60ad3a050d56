"""The critic: how predictable are a video's dynamics? A frozen V-JEPA 2 scores it.

For a window with h = LN(E(window)), z = LN(P(E(first C frames))) and last = the last tubelet of LN(E(first C frames)):

    surprise     s = residual of z against h over the tokens after the context
    persistence  c = residual of last, repeated, against h: what "nothing changes" would have scored
    plain  R = -mean s
    skill  R = mean clip((c - s) / (c + kappa), -1, 1)

Plain surprise is smallest for a frozen or empty video. Skill asks how much better the world model predicts the clip
than standing still would, so a frozen clip earns nothing. It is summed over both directions of time: an object that
vanishes is easy to predict forward, and only its sudden appearance in reversed time is surprising. Frame 0 is dropped
first, so that both directions see the same frames.

Shapes: B clips, T frames, W windows, K contexts. Frames are [B, T, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.core.config import CriticConfig
from ldo.models.world_model import WorldModel, window_starts
from ldo.ops import predictive_residual


@dataclass(frozen=True)
class Score:
    """Per clip [B]: ``reward`` as the recipe asks, and both kinds of reward for the record. Higher is better."""

    reward: Tensor
    skill: Tensor
    plain: Tensor


@dataclass(frozen=True)
class WindowScores:
    """What B windows score: rewards [K, B], one for each context, and curves [B, tubelets] where asked for.

    ``surprise`` and ``persistence`` are those of each tubelet, given the frames of its window before it; NaN in the
    tubelets before the shortest context.
    """

    skill: Tensor
    plain: Tensor
    surprise: Tensor | None = None
    persistence: Tensor | None = None


@torch.no_grad()
def score_clips(world_model: WorldModel, frames_BTCHW: Tensor, config: CriticConfig, fps: float = 0.0) -> Score:
    """Score clips; all windows of all clips go through the world model together.

    ``fps`` is the clips' own rate, used where ``config.fps`` asks for another. Raises where a score is not finite.
    """
    frames = frames_BTCHW
    if config.fps and fps and abs(config.fps - fps) > 1e-6:
        count = int((frames.shape[1] - 1) * config.fps / fps) + 1
        # Whole frames are picked, never blended: a blend of two frames is a double exposure, which surprises.
        nearest = (torch.arange(count) * fps / config.fps).round().long()
        frames = frames[:, nearest]
    # Frame 0 has a latent of its own in a causal VAE, and one direction of time would otherwise see it and the other
    # not.
    forward = frames[:, 1:]
    directions = [_one_direction(world_model, forward, config)]
    if config.direction == "both":
        directions.append(_one_direction(world_model, forward.flip(1), config))
    return combine_scores(directions, config)


def combine_scores(directions: list[tuple[Tensor, Tensor]], config: CriticConfig) -> Score:
    """The score of clips from their rewards by window and context.

    Skill and plain [K W, B] for each direction of time.
    """

    def over_windows(rewards: Tensor) -> Tensor:
        return rewards.min(0).values if config.windows == "worst" else rewards.mean(0)

    skill = torch.stack([over_windows(skill) for skill, _ in directions]).sum(0)
    plain = torch.stack([over_windows(plain) for _, plain in directions]).mean(0)
    for name, values in (("skill", skill), ("plain", plain)):
        infinite = (~torch.isfinite(values)).nonzero()
        if len(infinite):
            raise RuntimeError(f"critic: the {name} reward of clip {int(infinite[0])} is not finite")
    reward = skill + config.plain_weight * plain if config.reward == "skill" else plain
    return Score(reward, skill, plain)


def _one_direction(world_model: WorldModel, frames: Tensor, config: CriticConfig) -> tuple[Tensor, Tensor]:
    """Skill and plain rewards [K W, B] in one direction of time."""
    starts = window_starts(frames.shape[1], config.window, config.stride)
    windows = torch.cat([frames[:, start : start + config.window] for start in starts])  # [W B, window, ...]
    scores = look_at_windows(world_model, windows, config)

    def by_window(rewards: Tensor) -> Tensor:
        return rewards.unflatten(1, (len(starts), len(frames))).flatten(0, 1)

    return by_window(scores.skill), by_window(scores.plain)


@torch.no_grad()
def look_at_windows(
    world_model: WorldModel, windows_BTCHW: Tensor, config: CriticConfig, curves: bool = False
) -> WindowScores:
    """Rewards of single windows in one direction of time.

    ``curves`` asks for the surprise and the persistence of each tubelet too, which takes a forecast for every context.
    """
    area, tubelet = world_model.side**2, world_model.tubelet
    encoded = world_model.encode(windows_BTCHW).x_BND
    tubelets = encoded.shape[1] // area
    surprise, persistence = encoded.new_full((2, len(encoded), tubelets), torch.nan)
    contexts = list(config.contexts)
    if curves:
        # A curve needs the surprise just after every context; the rewards need only their own contexts.
        every = range(min(contexts), config.window, tubelet)
        contexts += [context for context in every if context not in contexts]
    skills, plains = [], []
    for context in contexts:
        seen, forecast = world_model.forecast(windows_BTCHW, context)
        predicted, target = forecast.x_BND, encoded[:, context // tubelet * area :]
        last = seen.x_BND[:, -area:]
        if curves:
            at = context // tubelet
            surprise[:, at] = _residual(predicted[:, :area], target[:, :area], config)
            persistence[:, at] = _residual(last, target[:, :area], config)
        if context in config.contexts:
            skill, plain = _rewards(predicted, target, last, config)
            skills.append(skill)
            plains.append(plain)
    found = (surprise, persistence) if curves else ()
    return WindowScores(torch.stack(skills), torch.stack(plains), *found)


def _rewards(predicted: Tensor, target: Tensor, last: Tensor, config: CriticConfig) -> tuple[Tensor, Tensor]:
    """Skill and plain reward [B] of forecasts [B, N, D] from one context; ``last`` is the context's last tubelet.

    skill = clip((c - s) / (c + kappa), -1, 1) and plain = -s, with the surprise s and the persistence c.
    """
    area = last.shape[1]
    end = config.horizon * area or target.shape[1]
    plain_end = config.plain_horizon * area or end
    near = target[:, :end]
    s = _residual(predicted[:, :end], near, config)
    c = _residual(last.repeat(1, near.shape[1] // area, 1), near, config)
    # kappa keeps scenes at rest, where persistence is nearly perfect, from scoring by noise; the clip keeps one window
    # from deciding a group.
    skill = ((c - s) / (c + config.kappa)).clamp(-1, 1)
    plain = -s if plain_end == end else -_residual(predicted[:, :plain_end], target[:, :plain_end], config)
    return skill, plain


def _residual(predicted_BND: Tensor, target_BND: Tensor, config: CriticConfig) -> Tensor:
    """The residual of each window [B]: the mean over its tokens, or over the most surprising share of them."""
    windows, tokens, features = predicted_BND.shape
    predicted = predicted_BND.reshape(-1, features)
    target = target_BND.reshape(-1, features)
    if config.aggregation == "mean":
        segments = torch.arange(0, (windows + 1) * tokens, tokens)
        return predictive_residual(predicted, target, segments=segments, metric=config.metric)
    each_row = torch.arange(windows * tokens + 1)
    residuals = predictive_residual(predicted, target, segments=each_row, metric=config.metric)
    most = max(round(config.top * tokens), 1)
    return residuals.view(windows, tokens).topk(most, dim=1).values.mean(1)
