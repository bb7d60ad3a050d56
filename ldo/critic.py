"""The critic: how predictable are a video's dynamics? A frozen V-JEPA 2 judges, and guards stop the known ways to cheat.

For a window with h = LN(E(window)), z = LN(P(E(first C frames))) and last = the last tubelet of LN(E(first C frames)):

    surprise     s = residual of z against h over the tokens after the context
    persistence  c = residual of last, repeated, against h: what "nothing changes" would have scored
    plain  R = -mean s
    skill  R = mean clip((c - s) / (c + kappa), -1, 1)

Plain surprise is least for a frozen or empty video. Skill asks how much better the world model foretells the clip than
standing still would, so a frozen clip earns nothing. It is summed over both directions of time: an object that
vanishes is easy to foretell forward, and only its sudden appearance in reversed time is surprising. Frame 0 is
dropped before both, so that both see the same frames.

Shapes: B clips, T frames, W windows, K contexts. Frames are [B, T, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.config import Critic
from ldo.ops import predictive_residual
from ldo.world_model import WorldModel, window_starts


@dataclass(frozen=True)
class Score:
    """Per clip [B]: ``reward`` as the recipe asks, and both kinds of reward for the record. Higher is better."""

    reward: Tensor
    skill: Tensor
    plain: Tensor


@torch.no_grad()
def score(world: WorldModel, frames_BTCHW: Tensor, config: Critic, fps: float = 0.0) -> Score:
    """Score clips; all windows of all clips go through the world model together.

    ``fps`` is the clips' own rate, used where ``config.fps`` asks for another. Raises where a score is not finite.
    """
    x = frames_BTCHW
    if config.fps and fps and abs(config.fps - fps) > 1e-6:
        count = int((x.shape[1] - 1) * config.fps / fps) + 1
        x = x[:, (torch.arange(count) * fps / config.fps).round().long()]
    x = x[:, 1:]
    ways = [x, x.flip(1)] if config.direction == "both" else [x]
    return combine([_one_way(world, way, config) for way in ways], config)


def combine(ways: list[tuple[Tensor, Tensor]], config: Critic) -> Score:
    """The score of clips from their skill and plain rewards [K W, B] by window and context, a pair of them a direction of time."""
    worst = config.windows == "worst"
    ways = [tuple(v.min(0).values if worst else v.mean(0) for v in way) for way in ways]
    skill = torch.stack([way[0] for way in ways]).sum(0)
    plain = torch.stack([way[1] for way in ways]).mean(0)
    for name, values in (("skill", skill), ("plain", plain)):
        if not torch.isfinite(values).all():
            raise RuntimeError(f"critic: the {name} reward of clip {int((~torch.isfinite(values)).nonzero()[0])} is not finite")
    return Score(skill + config.plain_weight * plain if config.reward == "skill" else plain, skill, plain)


def _one_way(world: WorldModel, x: Tensor, config: Critic) -> tuple[Tensor, Tensor]:
    """Skill and plain rewards [K W, B] in one direction of time."""
    starts = window_starts(x.shape[1], config.window, config.stride)
    seen = look(world, torch.cat([x[:, s : s + config.window] for s in starts]), config)  # [W B, window, ...]
    return tuple(v.unflatten(1, (len(starts), len(x))).flatten(0, 1) for v in (seen.skill, seen.plain))


@dataclass(frozen=True)
class Look:
    """What one look at B windows gives: rewards [K, B] a context, and curves [B, tubelets] where asked for.

    ``surprise`` and ``persistence`` are those of each tubelet alone, given the frames of its window before it; NaN in the
    tubelets before the shortest context.
    """

    skill: Tensor
    plain: Tensor
    surprise: Tensor | None = None
    persistence: Tensor | None = None


@torch.no_grad()
def look(world: WorldModel, windows_BTCHW: Tensor, config: Critic, curves: bool = False) -> Look:
    """Rewards of single windows in one direction of time; with ``curves`` also, from more forecasts, how surprise comes and goes."""
    area, tubelet = world.side**2, world.tubelet
    h = world.encode(windows_BTCHW).x_BND
    skills, plains, contexts = [], [], list(config.contexts)
    near_s, near_c = h.new_full((2, len(h), h.shape[1] // area), torch.nan)
    if curves:
        contexts += [c for c in range(min(contexts), config.window, tubelet) if c not in contexts]
    for context in contexts:
        seen, foretold = world.forecast(windows_BTCHW, context)
        z, target = foretold.x_BND, h[:, context // tubelet * area :]
        last = seen.x_BND[:, -area:]
        if curves:
            near_s[:, context // tubelet] = _residual(z[:, :area], target[:, :area], config)
            near_c[:, context // tubelet] = _residual(last, target[:, :area], config)
        if context not in config.contexts:
            continue
        end = config.horizon * area or None
        near = config.plain_horizon * area or end
        goal = target[:, :end]
        s, c = _residual(z[:, :end], goal, config), _residual(last.repeat(1, goal.shape[1] // area, 1), goal, config)  # [B]
        skills.append(((c - s) / (c + config.kappa)).clamp(-1, 1))
        plains.append(-s if near == end else -_residual(z[:, :near], target[:, :near], config))
    return Look(torch.stack(skills), torch.stack(plains), *((near_s, near_c) if curves else ()))


def _residual(z_BND: Tensor, h_BND: Tensor, config: Critic) -> Tensor:
    """The residual of each window [B]: the mean over its tokens, or over the most surprising share of them."""
    b, n, d = z_BND.shape
    if config.aggregation == "mean":
        segments = torch.arange(0, (b + 1) * n, n)
        return predictive_residual(z_BND.reshape(-1, d), h_BND.reshape(-1, d), segments=segments, metric=config.metric)
    rows = torch.arange(b * n + 1)
    each = predictive_residual(z_BND.reshape(-1, d), h_BND.reshape(-1, d), segments=rows, metric=config.metric).view(b, n)
    return each.topk(max(round(config.top * n), 1), dim=1).values.mean(1)


# ---------------------------------------------------------------------------------------------- guards


def motion(frames_BTCHW: Tensor) -> Tensor:
    """Mean absolute change between frames [B], in units of the pixel range."""
    return frames_BTCHW.diff(dim=1).abs().flatten(1).mean(1)


def sharpness(frames_BTCHW: Tensor) -> Tensor:
    """Root mean square difference of neighbouring pixels [B]: a blurred edge has as much absolute difference, but less of this."""
    x = frames_BTCHW
    return (x.diff(dim=-1).square().flatten(1).mean(1) + x.diff(dim=-2).square().flatten(1).mean(1)).sqrt()


def guards(frames_BTCHW: Tensor, reference_BTCHW: Tensor, config: Critic) -> tuple[Tensor, Tensor, list[str]]:
    """Penalties [B, R] (0 is best), their weights [R] and names, against the stage-1 model's videos of the same prompts.

    Each is to be normalised within its group before it is weighted. A guard of weight 0 is left out.
    """
    columns: list[tuple[str, float, Tensor]] = []

    def floor(values: Tensor, reference: Tensor, share: float) -> Tensor:
        return -(1 - values / (share * reference).clamp_min(1e-6)).clamp_min(0)

    if config.motion_weight:
        now, before = motion(frames_BTCHW), motion(reference_BTCHW)
        above = -(now / (config.motion_ceiling * before).clamp_min(1e-6) - 1).clamp_min(0)
        columns.append(("motion", config.motion_weight, floor(now, before, config.motion_floor) + above))
    if config.sharpness_weight:
        value = floor(sharpness(frames_BTCHW), sharpness(reference_BTCHW), config.sharpness_floor)
        columns.append(("sharpness", config.sharpness_weight, value))
    if config.start_weight:
        value = -(frames_BTCHW[:, 0] - reference_BTCHW[:, 0]).abs().flatten(1).mean(1)
        columns.append(("start", config.start_weight, value))
    if not columns:
        return frames_BTCHW.new_zeros(len(frames_BTCHW), 0), frames_BTCHW.new_zeros(0), []
    weights = torch.tensor([w for _, w, _ in columns], device=frames_BTCHW.device)
    return torch.stack([v for _, _, v in columns], 1), weights, [n for n, _, _ in columns]
