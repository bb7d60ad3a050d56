"""The causal reward against its formula, its directions, aggregations and guards."""

import pytest
import torch
import torch.nn.functional as F

from ldo.core.config import CriticConfig
from ldo.method.critic import score_clips

BASE = CriticConfig(contexts=(8,), window=16, stride=8)


def by_hand(judge, window, context, kappa=0.02):
    """Skill and plain reward of one 16-frame window, straight from the formula.

    skill = clip((c - s) / (c + kappa), -1, 1) and plain = -s, with the surprise s and the persistence c.
    """
    target = judge.encode(window).x_BND[:, context // 2 * 16 :]
    observed, forecast = judge.forecast(window, context)
    # "Nothing changes": the last observed tubelet, which has 16 tokens, is repeated over those to come.
    last = observed.x_BND[:, -16:].repeat(1, target.shape[1] // 16, 1)
    s = cosine_distance(forecast.x_BND, target)
    c = cosine_distance(last, target)
    return ((c - s) / (c + kappa)).clamp(-1, 1), -s


def cosine_distance(predicted, target):
    """Per clip, the mean over its tokens, after one more layer norm of both."""
    predicted = F.layer_norm(predicted, predicted.shape[-1:])
    target = F.layer_norm(target, target.shape[-1:])
    return 1 - F.cosine_similarity(predicted, target, dim=-1).mean(1)


def test_forward_reward_is_the_formula(judge, frames):
    skill, plain = by_hand(judge, frames[:, 1:], 8)
    scores = score_clips(judge, frames, BASE.changed(direction="forward"))
    assert torch.allclose(scores.skill, skill, atol=1e-5)
    assert torch.allclose(scores.plain, plain, atol=1e-5)
    assert torch.equal(scores.reward, scores.skill)
    plain_scores = score_clips(judge, frames, BASE.changed(direction="forward", reward="plain"))
    assert torch.equal(plain_scores.reward, scores.plain)


def test_both_directions_see_the_same_frames(judge, frames):
    scores = score_clips(judge, frames, BASE)
    forward_skill, forward_plain = by_hand(judge, frames[:, 1:], 8)
    backward_skill, backward_plain = by_hand(judge, frames[:, 1:].flip(1), 8)
    assert torch.allclose(scores.skill, forward_skill + backward_skill, atol=1e-5)
    assert torch.allclose(scores.plain, (forward_plain + backward_plain) / 2, atol=1e-5)


def test_a_clip_and_its_reversal_tie(judge, frames):
    # Frame 0 stays where it is: no direction sees it.
    reversed_clip = torch.cat([frames[:, :1], frames[:, 1:].flip(1)], 1)
    forward = score_clips(judge, frames, BASE).skill
    assert torch.allclose(forward, score_clips(judge, reversed_clip, BASE).skill, atol=1e-6)


def test_first_frame_is_dropped(judge, frames):
    other = frames.clone()
    other[:, 0] = 0.5
    assert torch.equal(score_clips(judge, frames, BASE).skill, score_clips(judge, other, BASE).skill)


def test_contexts_and_windows_are_averaged(judge, frames):
    config = BASE.changed(direction="forward")
    both = score_clips(judge, frames, config.changed(contexts=(4, 8))).skill
    short = score_clips(judge, frames, config.changed(contexts=(4,))).skill
    long = score_clips(judge, frames, config.changed(contexts=(8,))).skill
    assert torch.allclose(both, (short + long) / 2, atol=1e-6)
    # Without frame 0 these are 32 frames, which hold windows of 16 at 0, 8 and 16.
    longer = torch.cat([frames, frames[:, 1:]], 1)
    parts = torch.stack([by_hand(judge, longer[:, 1 + start : 17 + start], 8)[0] for start in (0, 8, 16)])
    assert torch.allclose(score_clips(judge, longer, config).skill, parts.mean(0), atol=1e-5)
    worst = score_clips(judge, longer, config.changed(windows="worst")).skill
    assert torch.allclose(worst, parts.min(0).values, atol=1e-5)


def test_top_share_and_horizon(judge, frames):
    clip = frames[:, 1:]
    # From token 64 on: four observed tubelets of 16 tokens.
    target, forecast = judge.encode(clip).x_BND[:, 64:], judge.forecast(clip, 8)[1].x_BND
    residual = 1 - F.cosine_similarity(forecast, target, dim=-1)
    config = BASE.changed(direction="forward", reward="plain")
    top = score_clips(judge, frames, config.changed(aggregation="top", top=0.25)).reward
    # A quarter of the 64 tokens that were forecast.
    assert torch.allclose(top, -residual.topk(16, 1).values.mean(1), atol=1e-4)
    near = score_clips(judge, frames, config.changed(horizon=1)).reward
    assert torch.allclose(near, -residual[:, :16].mean(1), atol=1e-4)


def test_plain_next_to_skill_with_its_own_horizon(judge, frames):
    skill_only = score_clips(judge, frames, BASE)
    near = score_clips(judge, frames, BASE.changed(horizon=1))
    mixed = score_clips(judge, frames, BASE.changed(plain_weight=3.0, plain_horizon=1))
    assert torch.equal(mixed.skill, skill_only.skill)
    assert torch.equal(mixed.plain, near.plain)
    # With equal rewards at both horizons the lines above would show nothing.
    assert not torch.equal(near.plain, skill_only.plain)
    assert torch.allclose(mixed.reward, skill_only.skill + 3 * near.plain)
    assert torch.equal(score_clips(judge, frames, BASE.changed(horizon=1, plain_horizon=1)).plain, near.plain)


def test_a_static_clip_has_no_skill(judge, frames):
    still = frames[:, :1].expand(-1, 17, -1, -1, -1)
    scores = score_clips(judge, still, BASE.changed(direction="forward"))
    # Persistence predicts a still clip well, so a forecast gains nothing over it.
    assert (scores.skill <= 0).all()


def test_other_rate_resamples_time(judge, frames):
    config = BASE.changed(fps=4.0, direction="forward")
    # 34 frames at 8 fps, of which 17 are left at 4 fps.
    fast = torch.cat([frames, frames], 1)
    resampled = score_clips(judge, fast, config, fps=8.0).skill
    assert torch.equal(resampled, score_clips(judge, fast[:, ::2], config, fps=4.0).skill)


def test_a_reward_that_fails_raises(judge, frames):
    broken = frames.clone()
    broken[1, 5] = float("nan")
    with pytest.raises(RuntimeError, match="clip 1 is not finite"):
        score_clips(judge, broken, BASE)
