"""The three objectives against their formulas, and the facts that make them right at the start."""

import math

import pytest
import torch

from ldo import flow, objectives

N, SHAPE, STD = 6, (6, 2, 3, 4, 4), 0.3


def draw(seed=0):
    torch.manual_seed(seed)
    mean_old = torch.randn(SHAPE)
    after = mean_old + STD * torch.randn(SHAPE)
    return mean_old, after, flow.log_prob(after, mean_old, STD), torch.randn(N)


def run(mean, guard, clip=1e9, kl=0.0, ref=None, weight=1.0, seed=0):
    mean_old, after, logp_old, advantage = draw(seed)
    return objectives.grpo(mean, STD, after, mean_old, logp_old, ref, advantage, guard=guard, clip=clip, weight=weight, kl=kl)


@pytest.mark.parametrize("guard", [False, True])
def test_ratio_is_exactly_one_at_the_start(guard):
    loss = run(draw()[0].clone().requires_grad_(), guard)
    assert (loss.ratio == 1).all() and loss.clipped == 0
    assert torch.isclose(loss.total, -draw()[3].mean())


def test_policy_gradient_at_the_start_is_that_of_the_density():
    """d/dmu of -A logp, averaged over dimensions as logp is."""
    mean_old, after, _, advantage = draw()
    mean = mean_old.clone().requires_grad_()
    run(mean, guard=False).total.backward()
    each = -(advantage.view(-1, 1, 1, 1, 1) * (after - mean_old) / STD**2) / (math.prod(SHAPE[1:]) * N)
    assert torch.allclose(mean.grad, each, atol=1e-8)


def test_guard_is_the_log_ratio_without_its_bias():
    """(log r + <(mu - mu_old)^2> / 2 s^2) s, as GRPO-Guard writes it."""
    mean_old, after, logp_old, _ = draw()
    mean = mean_old + 0.01 * torch.randn(SHAPE)
    plain = flow.log_prob(after, mean, STD) - logp_old
    bias = (mean - mean_old).square().flatten(1).mean(1) / (2 * STD**2)
    assert torch.allclose(run(mean, guard=True).ratio.log(), (plain + bias) * STD, atol=1e-5)


def test_plain_ratio_is_below_one_on_average_and_guarded_is_not():
    """Moving anywhere lowers the mean plain log-ratio; the guard's is centred."""
    plain, guarded = [], []
    for seed in range(40):
        mean = draw(seed)[0] + 0.05 * torch.randn(SHAPE)
        plain.append(run(mean, False, seed=seed).ratio.log().mean())
        guarded.append(run(mean, True, seed=seed).ratio.log().mean())
    plain, guarded = torch.stack(plain), torch.stack(guarded)
    assert plain.mean() < -0.01 and guarded.mean().abs() < 3 * guarded.std() / 40**0.5


@pytest.mark.parametrize("guard", [False, True])
def test_clip_stops_what_has_gone_far_enough(guard):
    mean_old, after, _, advantage = draw()
    good = (advantage > 0).view(-1, 1, 1, 1, 1)
    mean = (mean_old + torch.where(good, 0.2, -0.2) * (after - mean_old)).requires_grad_()  # all moved the way A asks
    loss = run(mean, guard, clip=1e-3)
    assert loss.clipped == 1
    loss.policy.backward()
    assert (mean.grad == 0).all()
    back = (mean_old - torch.where(good, 0.2, -0.2) * (after - mean_old)).requires_grad_()  # moved the wrong way: still taught
    run(back, guard, clip=1e-3).policy.backward()
    assert (back.grad.flatten(1).abs().sum(1) > 0).all()


def test_divergence_pulls_to_the_reference():
    mean_old = draw()[0]
    ref = mean_old + 0.1
    loss = run(mean_old.clone().requires_grad_(), False, kl=0.5, ref=ref)
    assert torch.isclose(loss.divergence, torch.tensor(0.1**2 / (2 * STD**2)), rtol=1e-4)
    assert torch.isclose(loss.total, loss.policy + 0.5 * loss.divergence)


def flow_batch(seed=0):
    torch.manual_seed(seed)
    x0, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.full((N,), 0.4)
    return x0, noise, t, flow.noisy(x0, noise, t), torch.randn(SHAPE), torch.tensor([2.0, -2.0, 1.0, -1.0, 0.0, 5.0])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_against_its_formula(beta):
    x0, _, t, x_t, v_old, advantage = flow_batch()
    v = v_old + 0.1 * torch.randn(SHAPE)
    found = objectives.nft(v, v_old, None, x_t, x0, t, advantage, beta=beta, bound=5.0, kl=0.0).total
    total = 0.0
    for k in range(N):
        q = min(max(float(advantage[k]) / 10 + 0.5, 0), 1)
        for sign, share in ((1, q), (-1, 1 - q)):
            u = (1 - beta) * v_old[k] + beta * v[k] if sign == 1 else (1 + beta) * v_old[k] - beta * v[k]
            guess = x_t[k] - 0.4 * u
            total += 5 * share / beta * ((guess - x0[k]) ** 2).mean() / (guess - x0[k]).abs().mean() / N
    assert torch.isclose(found, total, rtol=1e-4)


def test_nft_moves_toward_the_good_and_away_from_the_bad():
    """At v = v_old the gradient pulls x0's estimate to samples of positive advantage and pushes it from the others."""
    x0, _, t, x_t, v_old, advantage = flow_batch()
    v = v_old.clone().requires_grad_()
    objectives.nft(v, v_old, None, x_t, x0, t, advantage, beta=1.0, bound=5.0, kl=0.0).total.backward()
    guess = x_t - 0.4 * v_old
    toward = (-v.grad * -0.4 * (x0 - guess)).flatten(1).sum(1)  # change of the estimate along the way to x0
    assert (torch.sign(toward) == torch.sign(advantage)).all()


def test_awm_against_its_formula_and_its_direction():
    x0, noise, t, _, v_old, advantage = flow_batch()
    v = v_old.clone().requires_grad_()
    loss = objectives.awm(v, v_old, None, noise, x0, t, advantage, bound=5.0, kl=0.0)
    assert (loss.ratio == 1).all() and torch.isclose(loss.total, -(advantage / 5).mean())
    loss.total.backward()
    toward = (-v.grad * (noise - x0 - v_old)).flatten(1).sum(1)
    assert (torch.sign(toward) == torch.sign(advantage)).all()
    w = v_old * 0.9
    cost = [0.4 * ((((u - (noise - x0)) ** 2).flatten(1).mean(1) + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25 for u in (v_old, w)]
    ratio = objectives.awm(w, v_old, None, noise, x0, t, advantage, bound=5.0, kl=0.0).ratio
    assert torch.allclose(ratio, (cost[0] - cost[1]).exp(), rtol=1e-4)


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_divergence_of_the_flow_objectives_is_in_velocity(name):
    x0, noise, t, x_t, v_old, advantage = flow_batch()
    ref = v_old + 0.3
    if name == "nft":
        loss = objectives.nft(v_old, v_old, ref, x_t, x0, t, advantage, beta=1.0, bound=5.0, kl=2.0)
    else:
        loss = objectives.awm(v_old, v_old, ref, noise, x0, t, advantage, bound=5.0, kl=2.0)
    assert torch.isclose(loss.divergence, torch.tensor(0.09), rtol=1e-4)
    assert torch.isclose(loss.total, loss.policy + 2 * loss.divergence)
