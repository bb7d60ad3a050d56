"""The causal reward against its formula, its directions, aggregations and guards."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldo import critic
from ldo.config import Critic

BASE = Critic(contexts=(8,), window=16, stride=8)


def by_hand(judge, x, context, kappa=0.02):
    """Skill and plain of one 16-frame window, straight from the formula."""
    h = judge.encode(x).x_BND[:, context // 2 * 16 :]
    seen, z = (t.x_BND for t in judge.forecast(x, context))
    last = seen[:, -16:].repeat(1, h.shape[1] // 16, 1)
    norm = lambda v: F.layer_norm(v, v.shape[-1:])  # noqa: E731
    s, c = (1 - F.cosine_similarity(norm(v), norm(h), dim=-1).mean(1) for v in (z, last))
    return ((c - s) / (c + kappa)).clamp(-1, 1), -s


def test_forward_reward_is_the_formula(judge, frames):
    skill, plain = by_hand(judge, frames[:, 1:], 8)
    found = critic.score(judge, frames, replace(BASE, direction="forward"))
    assert torch.allclose(found.skill, skill, atol=1e-5) and torch.allclose(found.plain, plain, atol=1e-5)
    assert torch.equal(found.reward, found.skill)
    assert torch.equal(critic.score(judge, frames, replace(BASE, direction="forward", reward="plain")).reward, found.plain)


def test_both_directions_see_the_same_frames(judge, frames):
    found = critic.score(judge, frames, BASE)
    forward, backward = by_hand(judge, frames[:, 1:], 8), by_hand(judge, frames[:, 1:].flip(1), 8)
    assert torch.allclose(found.skill, forward[0] + backward[0], atol=1e-5)
    assert torch.allclose(found.plain, (forward[1] + backward[1]) / 2, atol=1e-5)


def test_a_clip_and_its_reversal_tie(judge, frames):
    turned = torch.cat([frames[:, :1], frames[:, 1:].flip(1)], 1)
    assert torch.allclose(critic.score(judge, frames, BASE).skill, critic.score(judge, turned, BASE).skill, atol=1e-6)


def test_first_frame_is_dropped(judge, frames):
    other = frames.clone()
    other[:, 0] = 0.5
    assert torch.equal(critic.score(judge, frames, BASE).skill, critic.score(judge, other, BASE).skill)


def test_contexts_and_windows_are_averaged(judge, frames):
    both = critic.score(judge, frames, replace(BASE, contexts=(4, 8), direction="forward")).skill
    one = [critic.score(judge, frames, replace(BASE, contexts=(c,), direction="forward")).skill for c in (4, 8)]
    assert torch.allclose(both, (one[0] + one[1]) / 2, atol=1e-6)
    longer = torch.cat([frames, frames[:, 1:]], 1)  # windows at 0, 8, 16
    config = replace(BASE, direction="forward")
    parts = [by_hand(judge, longer[:, 1 + s : 17 + s], 8)[0] for s in (0, 8, 16)]
    assert torch.allclose(critic.score(judge, longer, config).skill, torch.stack(parts).mean(0), atol=1e-5)
    assert torch.allclose(critic.score(judge, longer, replace(config, windows="worst")).skill, torch.stack(parts).min(0).values, atol=1e-5)


def test_top_share_and_horizon(judge, frames):
    x = frames[:, 1:]
    h, z = judge.encode(x).x_BND[:, 64:], judge.forecast(x, 8)[1].x_BND
    token = 1 - F.cosine_similarity(z, h, dim=-1)
    config = replace(BASE, direction="forward", reward="plain")
    top = critic.score(judge, frames, replace(config, aggregation="top", top=0.25)).reward
    assert torch.allclose(top, -token.topk(16, 1).values.mean(1), atol=1e-4)
    near = critic.score(judge, frames, replace(config, horizon=1)).reward
    assert torch.allclose(near, -token[:, :16].mean(1), atol=1e-4)


def test_plain_beside_skill_with_a_horizon_of_its_own(judge, frames):
    alone = critic.score(judge, frames, BASE)
    near = critic.score(judge, frames, replace(BASE, horizon=1))
    mixed = critic.score(judge, frames, replace(BASE, plain_weight=3.0, plain_horizon=1))
    assert torch.equal(mixed.skill, alone.skill) and torch.equal(mixed.plain, near.plain)
    assert not torch.equal(near.plain, alone.plain)
    assert torch.allclose(mixed.reward, alone.skill + 3 * near.plain)
    assert torch.equal(critic.score(judge, frames, replace(BASE, horizon=1, plain_horizon=1)).plain, near.plain)


def test_static_clip_earns_at_most_nothing(judge, frames):
    still = frames[:, :1].expand(-1, 17, -1, -1, -1)
    c_is_small = critic.score(judge, still, replace(BASE, direction="forward"))
    assert (c_is_small.skill <= 0).all()


def test_other_rate_resamples_time(judge, frames):
    config = replace(BASE, fps=4.0, direction="forward")
    slow = torch.cat([frames, frames], 1).repeat_interleave(1, 1)  # 34 frames at 8 fps: 17 at 4
    assert torch.equal(critic.score(judge, slow, config, fps=8.0).skill, critic.score(judge, slow[:, ::2], config, fps=4.0).skill)


def test_a_reward_that_fails_raises(judge, frames):
    broken = frames.clone()
    broken[1, 5] = float("nan")
    with pytest.raises(RuntimeError, match="clip 1 is not finite"):
        critic.score(judge, broken, BASE)


def test_guards_punish_only_below_the_floor(frames):
    config = Critic(motion_floor=0.5, motion_weight=0.7, sharpness_floor=0.8, sharpness_weight=0.2, start_weight=0.1)
    still = frames[:, :1].expand(-1, 17, -1, -1, -1)
    soft = F.avg_pool2d(frames.flatten(0, 1), 5, 1, 2).view_as(frames)
    videos = torch.cat([frames, still, soft])
    penalties, weights, names = critic.guards(videos, frames.repeat(3, 1, 1, 1, 1), config)
    assert names == ["motion", "sharpness", "start"] and torch.allclose(weights, torch.tensor([0.7, 0.2, 0.1]))
    assert (penalties[:2] == 0).all()
    assert (penalties[2:4, 0] == -1).all()  # no motion at all
    assert (penalties[4:, 1] < -0.1).all()
    assert (penalties[4:, 2] < 0).all() and (penalties[2:4, 2] == 0).all()


def test_motion_guard_punishes_unrest_too(frames):
    config = Critic(motion_floor=0.5, motion_ceiling=1.5, sharpness_weight=0)
    slow = frames[:, :1] + 0.3 * (frames - frames[:, :1])
    fast = frames[:, :1] + 3 * (frames - frames[:, :1])
    penalties, _, names = critic.guards(torch.cat([slow, frames, fast]), frames.repeat(3, 1, 1, 1, 1), config)
    assert names == ["motion"]
    assert torch.allclose(penalties[:2], torch.tensor(0.3 / 0.5 - 1), atol=1e-5)
    assert (penalties[2:4] == 0).all()
    assert torch.allclose(penalties[4:], torch.tensor(1 - 3 / 1.5), atol=1e-5)


def test_no_guards(frames):
    config = Critic(motion_weight=0, sharpness_weight=0, start_weight=0)
    penalties, weights, names = critic.guards(frames, frames, config)
    assert penalties.shape == (2, 0) and weights.shape == (0,) and names == []
