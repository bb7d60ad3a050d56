"""What stage 2 minimises on one micro-batch of a rollout: GRPO on the transitions, or NFT and AWM on their ends.

Shapes: N samples of one group, D dimensions of a latent; advantages A [N]. Means over dimensions are taken per sample.

    grpo   ratio r of the new to the sampling policy on one stochastic step:  mean max(-A r, -A clip(r, 1-c, 1+c))
           plain    log r = logp_new - logp_old
           guard    log r = <(x' - mu_old) / s . (mu - mu_old)>: the log-ratio without its negative bias, times s,
                    so that its spread is the same at every step (GRPO-Guard); the loss is divided by -dt
    nft    v+- = v_old +- beta (v - v_old), x0+- = x_t - t v+-, q = clip(A / 2c + 1/2, 0, 1):
           c mean [ q <(x0+ - x0)^2 / w+> + (1 - q) <(x0- - x0)^2 / w-> ] / beta,  w+- = <|x0+- - x0|>   (DiffusionNFT)
    awm    log r = W_old - W with W = t ((l + eps)^p - eps^p) / p, l = <(v - (e - x0))^2>, p = 1/4, A / c in [-1, 1],
           clipped as grpo with range 1   (Advantage Weighted Matching)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.models import flow
from ldo.ops import grpo_surrogate


@dataclass(frozen=True)
class Loss:
    """A micro-batch's loss, its policy part, the divergence from the reference, ratios [N] and the share clipped."""

    total: Tensor
    policy: Tensor
    divergence: Tensor
    ratio: Tensor
    clipped: Tensor


def grpo(
    mean: Tensor,
    std: float,
    after: Tensor,
    mean_old: Tensor,
    logp_old: Tensor,
    mean_ref: Tensor | None,
    advantage: Tensor,
    *,
    guard: bool,
    clip: float,
    weight: float,
    kl: float,
) -> Loss:
    """GRPO on one stochastic step of a micro-batch.

    ``after`` is where the sampling policy went from here; ``weight`` scales the policy part (1 / -dt under the guard).
    """
    if guard:
        # The plain log-ratio minus its negative mean, (mean - mean_old)^2 / 2 s^2: without it ratios drift below 1 and
        # the upper clip never acts (GRPO-Guard).
        log_ratio = ((after - mean_old) / std * (mean - mean_old)).flatten(1).mean(1)
        logp, logp_old = log_ratio, None
    else:
        logp = flow.log_prob(after, mean, std)
    divergence = flow.divergence(mean, mean_ref, std) if mean_ref is not None else None
    surrogate = grpo_surrogate(logp, logp_old, advantage, divergence, clip=clip, weight=weight, kl=kl)
    return Loss(surrogate.total, surrogate.policy, surrogate.divergence, surrogate.ratio, surrogate.clipped)


def nft(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    x_t: Tensor,
    x0: Tensor,
    t_B: Tensor,
    advantage: Tensor,
    *,
    beta: float,
    bound: float,
    kl: float,
) -> Loss:
    """DiffusionNFT. ``bound`` is what advantages are clipped to; ``v_old`` the sampling policy's velocity."""
    time = t_B.view(-1, *[1] * (v.ndim - 1))
    share = (advantage / (2 * bound) + 0.5).clamp(0, 1)
    parts = []
    for sign, weight in ((1, share), (-1, 1 - share)):
        estimate = x_t - time * (v_old + sign * beta * (v - v_old))
        gap = estimate - x0
        # a constant: a gradient through the width would shrink the loss by growing the error
        width = gap.detach().abs().flatten(1).mean(1).clamp_min(1e-5)
        parts.append(weight / beta * gap.square().flatten(1).mean(1) / width)
    policy = bound * (parts[0] + parts[1]).mean()
    divergence = _velocity_divergence(v, v_ref)
    return Loss(policy + kl * divergence, policy, divergence, torch.ones_like(advantage), v.new_zeros(()))


def awm(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    noise: Tensor,
    x0: Tensor,
    t_B: Tensor,
    advantage: Tensor,
    *,
    bound: float,
    kl: float,
) -> Loss:
    """Advantage Weighted Matching: the flow-matching loss stands in for -log p.

    ``v_old`` is the sampling policy's velocity, ``bound`` what advantages are clipped to.
    """

    def cost(velocity: Tensor) -> Tensor:
        # A power of the loss tempers it: samples that fit badly would otherwise have ratios that leave the clip at
        # once.
        error = (velocity - (noise - x0)).square().flatten(1).mean(1)
        return t_B * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25

    surrogate = grpo_surrogate(-cost(v), -cost(v_old), advantage / bound, clip=1.0)
    divergence = _velocity_divergence(v, v_ref)
    total = surrogate.policy + kl * divergence
    return Loss(total, surrogate.policy, divergence, surrogate.ratio, surrogate.clipped)


def _velocity_divergence(v: Tensor, v_ref: Tensor | None) -> Tensor:
    """Mean squared difference from the reference's velocity; 0 without one."""
    return v.new_zeros(()) if v_ref is None else (v - v_ref).square().mean()
