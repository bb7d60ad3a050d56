"""Rollouts: noise only inside the window, densities that the update repeats to the bit, guidance, micro-batches."""

import pytest
import torch

from ldo import flow, generator
from ldo.rollout import Plan, decode, guided_velocity, kicks, sample, step

TIMES = tuple(flow.schedule(6, 3.0))


def rollout(wan, plan, n=4, micro=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 4, 5, 8, 8, generator=rng)
    pushes = kicks(noise.shape, len(plan.window), rng)
    text = wan.encode_text(["a red ball", "a blue ball rolls"] * (n // 2))
    null = wan.encode_text([""])
    return sample(wan, noise, text, null, plan, pushes, micro), noise, pushes, text, null


@pytest.mark.parametrize("sampler", ["flow", "dance", "cps"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_update_repeats_the_rollout_to_the_bit(wan, sampler, guidance):
    """Mean and log-density under gradient equal those of the no-grad rollout: the ratio starts at exactly 1."""
    plan = Plan(TIMES, (1, 3), sampler, 0.5, guidance)
    found, _, pushes, text, null = rollout(wan, plan)
    wan.transformer.requires_grad_(True)
    for s, index in enumerate(plan.window):
        mean, std = step(wan, found.x_SN[s], index, plan, text, null)
        assert mean.requires_grad
        assert torch.equal(mean, found.mean_SN[s])
        assert torch.equal(found.next_SN[s], mean + std * pushes[s])
        assert torch.equal(flow.log_prob(found.next_SN[s], mean, std), found.logp_SN[s])


def test_outside_the_window_is_the_ode(wan):
    plan = Plan(TIMES, (1,), "flow", 0.7, 1.0)
    found, noise, _, text, null = rollout(wan, plan)
    x, _ = flow.transition(noise, guided_velocity(wan, noise, TIMES[0], text, null, 1.0), TIMES[0], TIMES[1])
    with torch.no_grad():
        assert torch.equal(found.x_SN[0], x)
        x = found.next_SN[0]
        for i in range(2, 6):
            x = x + guided_velocity(wan, x, TIMES[i], text, null, 1.0) * (TIMES[i + 1] - TIMES[i])
    assert torch.allclose(found.final_N, x, atol=1e-6)


def test_without_window_nothing_is_random(wan):
    plan = Plan(TIMES, (), "flow", 0.7, 1.0)
    a, b = rollout(wan, plan)[0], rollout(wan, plan)[0]
    assert a.x_SN.shape[0] == 0 and torch.equal(a.final_N, b.final_N)


def test_last_step_may_not_be_stochastic():
    with pytest.raises(AssertionError, match="last step"):
        Plan(TIMES, (5,), "flow", 0.7, 1.0)


def test_micro_batches_change_no_sample(wan):
    plan = Plan(TIMES, (0, 1), "flow", 0.7, 1.0)
    one, many = rollout(wan, plan, 8, 8)[0], rollout(wan, plan, 8, 4)[0]
    for a, b in zip(vars(one).values(), vars(many).values(), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def test_guidance_is_the_stock_formula_and_both_branches_learn(wan):
    x, text, null = torch.randn(4, 4, 5, 8, 8), wan.encode_text(["a red ball"] * 4), wan.encode_text([""])
    t = torch.full((4,), 0.5)
    c, u = wan.velocity(x, t, text), wan.velocity(x, t, null.expand(4))
    assert torch.equal(guided_velocity(wan, x, 0.5, text, null, 3.0), u + 3.0 * (c - u))
    null = generator.Text({"embeds": null.tensors["embeds"].clone().requires_grad_()})
    guided_velocity(wan, x, 0.5, text, null, 3.0).sum().backward()
    assert null.tensors["embeds"].grad.abs().sum() > 0


def test_decode_in_parts(wan):
    z = torch.randn(4, 4, 5, 8, 8)
    assert torch.allclose(decode(wan, z, 2), decode(wan, z, 4), atol=1e-5)
