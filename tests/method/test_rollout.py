"""Rollouts: noise only inside the window, densities that the update repeats to the bit, guidance, micro-batches."""

import pytest
import torch

from ldo.method.rollout import SamplingPlan, decode_videos, draw_step_noise, guided_velocity, policy_step, sample_videos
from ldo.models import flow
from ldo.models.generator.protocol import Text

TIMES = tuple(flow.schedule(6, 3.0))


def rollout(wan, plan, count=4, micro=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 4, 5, 8, 8, generator=generator)
    pushes = draw_step_noise(noise.shape, len(plan.window), generator)
    text = wan.encode_text(["a red ball", "a blue ball rolls"] * (count // 2))
    null = wan.encode_text([""])
    return sample_videos(wan, noise, text, null, plan, pushes, micro), noise, pushes, text, null


@pytest.mark.parametrize("sampler", ["flow", "dance", "cps"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_update_repeats_the_rollout_to_the_bit(wan, sampler, guidance):
    """Mean and log-density under gradient equal those of the no-grad rollout: the ratio starts at exactly 1."""
    plan = SamplingPlan(TIMES, (1, 3), sampler, 0.5, guidance)
    trajectory, _, pushes, text, null = rollout(wan, plan)
    # A loaded generator is frozen; only one that learns can show that gradients change no bit.
    wan.transformer.requires_grad_(True)
    for place, index in enumerate(plan.window):
        mean, std = policy_step(wan, trajectory.x_SN[place], index, plan, text, null)
        assert mean.requires_grad
        assert torch.equal(mean, trajectory.mean_SN[place])
        assert torch.equal(trajectory.next_SN[place], mean + std * pushes[place])
        assert torch.equal(flow.log_prob(trajectory.next_SN[place], mean, std), trajectory.logp_SN[place])


def test_outside_the_window_is_the_ode(wan):
    plan = SamplingPlan(TIMES, (1,), "flow", 0.7, 1.0)
    trajectory, noise, _, text, null = rollout(wan, plan)
    first_velocity = guided_velocity(wan, noise, TIMES[0], text, null, 1.0)
    state, _ = flow.transition(noise, first_velocity, TIMES[0], TIMES[1])
    with torch.no_grad():
        assert torch.equal(trajectory.x_SN[0], state)
        # Step 1 is the stochastic one; after it the ODE takes over again.
        state = trajectory.next_SN[0]
        for index in range(2, 6):
            velocity = guided_velocity(wan, state, TIMES[index], text, null, 1.0)
            state = state + velocity * (TIMES[index + 1] - TIMES[index])
    assert torch.allclose(trajectory.final_N, state, atol=1e-6)


def test_without_window_nothing_is_random(wan):
    plan = SamplingPlan(TIMES, (), "flow", 0.7, 1.0)
    first, second = rollout(wan, plan)[0], rollout(wan, plan)[0]
    assert first.x_SN.shape[0] == 0
    assert torch.equal(first.final_N, second.final_N)


def test_last_step_may_not_be_stochastic():
    with pytest.raises(AssertionError, match="last step"):
        SamplingPlan(TIMES, (5,), "flow", 0.7, 1.0)


def test_micro_batches_change_no_sample(wan):
    plan = SamplingPlan(TIMES, (0, 1), "flow", 0.7, 1.0)
    whole, split = rollout(wan, plan, 8, 8)[0], rollout(wan, plan, 8, 4)[0]
    for expected, found in zip(vars(whole).values(), vars(split).values(), strict=True):
        # allclose broadcasts, so that a part of the samples could pass for all.
        assert expected.shape == found.shape
        assert torch.allclose(expected, found, atol=1e-5)


def test_guidance_is_the_stock_formula_and_both_branches_learn(wan):
    """v = u + g (c - u), where u and c are the velocities without and with the prompt."""
    latents, text, null = torch.randn(4, 4, 5, 8, 8), wan.encode_text(["a red ball"] * 4), wan.encode_text([""])
    times = torch.full((4,), 0.5)
    c, u = wan.velocity(latents, times, text), wan.velocity(latents, times, null.expand(4))
    assert torch.equal(guided_velocity(wan, latents, 0.5, text, null, 3.0), u + 3.0 * (c - u))
    null = Text({"embeds": null.tensors["embeds"].clone().requires_grad_()})
    guided_velocity(wan, latents, 0.5, text, null, 3.0).sum().backward()
    assert null.tensors["embeds"].grad.abs().sum() > 0


def test_decode_in_parts(wan):
    latents = torch.randn(4, 4, 5, 8, 8)
    assert torch.allclose(decode_videos(wan, latents, 2), decode_videos(wan, latents, 4), atol=1e-5)
