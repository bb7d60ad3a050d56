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

from ldo import flow
from ldo.ops import grpo_surrogate


@dataclass(frozen=True)
class Loss:
    """A micro-batch's loss, its policy part, the divergence from the reference, the ratios [N] and the share clipped."""

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
    """``after`` is where the sampling policy went from here; ``weight`` scales the policy part (1 / -dt under the guard)."""
    if guard:
        logp, old = ((after - mean_old) / std * (mean - mean_old)).flatten(1).mean(1), None
    else:
        logp, old = flow.log_prob(after, mean, std), logp_old
    away = flow.divergence(mean, mean_ref, std) if mean_ref is not None else None
    found = grpo_surrogate(logp, old, advantage, away, clip=clip, weight=weight, kl=kl)
    return Loss(found.total, found.policy, found.divergence, found.ratio, found.clipped)


def nft(
    v: Tensor, v_old: Tensor, v_ref: Tensor | None, x_t: Tensor, x0: Tensor, t_B: Tensor, advantage: Tensor, *, beta: float, bound: float, kl: float
) -> Loss:
    """``bound`` is what advantages are clipped to; ``v_old`` the sampling policy's velocity."""
    t = t_B.view(-1, *[1] * (v.ndim - 1))
    share = (advantage / (2 * bound) + 0.5).clamp(0, 1)
    parts = []
    for sign, part in ((1, share), (-1, 1 - share)):
        guess = x_t - t * (v_old + sign * beta * (v - v_old))
        gap = guess - x0
        width = gap.detach().abs().flatten(1).mean(1).clamp_min(1e-5)
        parts.append(part / beta * gap.square().flatten(1).mean(1) / width)
    policy = bound * (parts[0] + parts[1]).mean()
    away = (v - v_ref).square().mean() if v_ref is not None else v.new_zeros(())
    return Loss(policy + kl * away, policy, away, torch.ones_like(advantage), v.new_zeros(()))


def awm(
    v: Tensor, v_old: Tensor, v_ref: Tensor | None, noise: Tensor, x0: Tensor, t_B: Tensor, advantage: Tensor, *, bound: float, kl: float
) -> Loss:
    """The flow-matching loss as a stand-in for -log p; ``v_old`` the sampling policy's velocity."""

    def cost(u: Tensor) -> Tensor:
        error = (u - (noise - x0)).square().flatten(1).mean(1)
        return t_B * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25

    found = grpo_surrogate(-cost(v), -cost(v_old), advantage / bound, clip=1.0)
    away = (v - v_ref).square().mean() if v_ref is not None else v.new_zeros(())
    return Loss(found.policy + kl * away, found.policy, away, found.ratio, found.clipped)
