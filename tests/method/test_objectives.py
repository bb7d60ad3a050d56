"""The three objectives against their formulas, and the facts that make them right at the start."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldo.method import objectives
from ldo.models import flow

N = 6
SHAPE = (6, 2, 3, 4, 4)
STD = 0.3


def draw(seed=0):
    torch.manual_seed(seed)
    mean_old = torch.randn(SHAPE)
    after = mean_old + STD * torch.randn(SHAPE)
    return mean_old, after, flow.log_prob(after, mean_old, STD), torch.randn(N)


def run(mean, guard, clip=1e9, kl=0.0, reference=None, weight=1.0, seed=0):
    mean_old, after, logp_old, advantage = draw(seed)
    options = {"guard": guard, "clip": clip, "weight": weight, "kl": kl}
    return objectives.grpo(mean, STD, after, mean_old, logp_old, reference, advantage, **options)


@pytest.mark.parametrize("guard", [False, True])
def test_ratio_is_exactly_one_at_the_start(guard):
    mean_old, _, _, advantage = draw()
    loss = run(mean_old.clone().requires_grad_(), guard)
    assert (loss.ratio == 1).all()
    assert loss.clipped == 0
    assert torch.isclose(loss.total, -advantage.mean())


def test_policy_gradient_at_the_start_is_that_of_the_density():
    """d/dmu of -A logp, averaged over dimensions as logp is."""
    mean_old, after, _, advantage = draw()
    mean = mean_old.clone().requires_grad_()
    run(mean, guard=False).total.backward()
    expected = -(advantage.view(-1, 1, 1, 1, 1) * (after - mean_old) / STD**2) / (math.prod(SHAPE[1:]) * N)
    assert torch.allclose(mean.grad, expected, atol=1e-8)


def test_guard_is_the_log_ratio_without_its_bias():
    """(log r + <(mu - mu_old)^2> / 2 s^2) s, as GRPO-Guard writes it."""
    mean_old, after, logp_old, _ = draw()
    mean = mean_old + 0.01 * torch.randn(SHAPE)
    plain = flow.log_prob(after, mean, STD) - logp_old
    bias = (mean - mean_old).square().flatten(1).mean(1) / (2 * STD**2)
    assert torch.allclose(run(mean, guard=True).ratio.log(), (plain + bias) * STD, atol=1e-5)


def test_plain_ratio_is_below_one_on_average_and_guarded_is_not():
    """Moving anywhere lowers the mean plain log-ratio; the guard's is centred."""
    plain, guarded = torch.empty(40), torch.empty(40)
    for seed in range(40):
        mean = draw(seed)[0] + 0.05 * torch.randn(SHAPE)
        plain[seed] = run(mean, False, seed=seed).ratio.log().mean()
        guarded[seed] = run(mean, True, seed=seed).ratio.log().mean()
    assert plain.mean() < -0.01
    # Three standard errors of a mean over 40 draws.
    assert guarded.mean().abs() < 3 * guarded.std() / 40**0.5


@pytest.mark.parametrize("guard", [False, True])
def test_clip_stops_what_has_gone_far_enough(guard):
    mean_old, after, _, advantage = draw()
    good = (advantage > 0).view(-1, 1, 1, 1, 1)
    wanted = torch.where(good, 0.2, -0.2) * (after - mean_old)
    mean = (mean_old + wanted).requires_grad_()
    loss = run(mean, guard, clip=1e-3)
    assert loss.clipped == 1
    loss.policy.backward()
    assert (mean.grad == 0).all()
    # What has moved just as far in the wrong direction must still learn.
    wrong = (mean_old - wanted).requires_grad_()
    run(wrong, guard, clip=1e-3).policy.backward()
    assert (wrong.grad.flatten(1).abs().sum(1) > 0).all()


def test_divergence_pulls_to_the_reference():
    mean_old = draw()[0]
    loss = run(mean_old.clone().requires_grad_(), False, kl=0.5, reference=mean_old + 0.1)
    assert torch.isclose(loss.divergence, torch.tensor(0.1**2 / (2 * STD**2)), rtol=1e-4)
    assert torch.isclose(loss.total, loss.policy + 0.5 * loss.divergence)


@dataclass(frozen=True)
class FlowBatch:
    """Videos that a rollout ended at, and the same with noise at time 0.4. Advantages are clipped to 5."""

    video: Tensor
    noise: Tensor
    times: Tensor
    noisy: Tensor
    velocity_old: Tensor
    advantage: Tensor

    def nft(self, velocity, beta, kl=0.0, reference=None):
        return objectives.nft(
            velocity,
            self.velocity_old,
            reference,
            self.noisy,
            self.video,
            self.times,
            self.advantage,
            beta=beta,
            bound=5.0,
            kl=kl,
        )

    def awm(self, velocity, kl=0.0, reference=None):
        return objectives.awm(
            velocity,
            self.velocity_old,
            reference,
            self.noise,
            self.video,
            self.times,
            self.advantage,
            bound=5.0,
            kl=kl,
        )


def flow_batch(seed=0):
    torch.manual_seed(seed)
    video, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    times = torch.full((N,), 0.4)
    # Of both signs, none at all, and one at the bound.
    advantage = torch.tensor([2.0, -2.0, 1.0, -1.0, 0.0, 5.0])
    return FlowBatch(video, noise, times, flow.noisy(video, noise, times), torch.randn(SHAPE), advantage)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_against_its_formula(beta):
    batch = flow_batch()
    velocities = batch.velocity_old + 0.1 * torch.randn(SHAPE)
    found = batch.nft(velocities, beta).total
    total = 0.0
    for index in range(N):
        old, new = batch.velocity_old[index], velocities[index]
        positive_share = min(max(float(batch.advantage[index]) / 10 + 0.5, 0), 1)
        positive, negative = (1 - beta) * old + beta * new, (1 + beta) * old - beta * new
        for share, velocity in ((positive_share, positive), (1 - positive_share, negative)):
            error = batch.noisy[index] - 0.4 * velocity - batch.video[index]
            total += 5 * share / beta * (error**2).mean() / error.abs().mean() / N
    assert torch.isclose(found, total, rtol=1e-4)


def test_nft_moves_toward_the_good_and_away_from_the_bad():
    """At the old velocity, the estimate is pulled to videos of positive advantage and pushed away from the others."""
    batch = flow_batch()
    velocity = batch.velocity_old.clone().requires_grad_()
    batch.nft(velocity, beta=1.0).total.backward()
    estimate = batch.noisy - 0.4 * batch.velocity_old
    # How a step against the gradient changes the estimate, along the way to the video.
    toward = (-velocity.grad * -0.4 * (batch.video - estimate)).flatten(1).sum(1)
    assert (torch.sign(toward) == torch.sign(batch.advantage)).all()


def test_awm_against_its_formula_and_its_direction():
    batch = flow_batch()
    true_velocity = batch.noise - batch.video

    def cost(velocity):
        error = ((velocity - true_velocity) ** 2).flatten(1).mean(1)
        return 0.4 * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25

    velocity = batch.velocity_old.clone().requires_grad_()
    loss = batch.awm(velocity)
    assert (loss.ratio == 1).all()
    assert torch.isclose(loss.total, -(batch.advantage / 5).mean())
    loss.total.backward()
    toward = (-velocity.grad * (true_velocity - batch.velocity_old)).flatten(1).sum(1)
    assert (torch.sign(toward) == torch.sign(batch.advantage)).all()
    # At the old velocity every ratio is 1, whatever the cost: the formula shows only elsewhere.
    other = batch.velocity_old * 0.9
    assert torch.allclose(batch.awm(other).ratio, (cost(batch.velocity_old) - cost(other)).exp(), rtol=1e-4)


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_divergence_of_the_flow_objectives_is_in_velocity(name):
    batch = flow_batch()
    reference = batch.velocity_old + 0.3
    if name == "nft":
        loss = batch.nft(batch.velocity_old, beta=1.0, kl=2.0, reference=reference)
    else:
        loss = batch.awm(batch.velocity_old, kl=2.0, reference=reference)
    assert torch.isclose(loss.divergence, torch.tensor(0.09), rtol=1e-4)
    assert torch.isclose(loss.total, loss.policy + 2 * loss.divergence)
