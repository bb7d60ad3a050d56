"""Sampling videos with a policy: an ODE with a window of stochastic steps, and what training needs of those.

Noise enters only inside the window (MixGRPO); every other step, always the last one, is the ODE's. Groups are
sampled in micro-batches of one shape, which the update repeats, so that before the first update the policy ratio is
exactly 1.

Shapes: N samples of all groups in order, S stochastic steps; latents [N, ...].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldo import flow
from ldo.generator import Generator, Text


@dataclass(frozen=True)
class Plan:
    """How to sample: ``times`` from 1 to 0, the stochastic ``window`` (step indices), sampler, noise level, guidance."""

    times: tuple[float, ...]
    window: tuple[int, ...]
    sampler: str
    eta: float
    guidance: float

    def __post_init__(self):
        assert len(self.times) - 2 not in self.window, "the last step must be the ODE's"


@dataclass(frozen=True)
class Trajectory:
    """The stochastic steps of a rollout, and where it ended."""

    x_SN: Tensor  # state before each stochastic step
    next_SN: Tensor  # state after it
    mean_SN: Tensor  # the sampling policy's mean
    logp_SN: Tensor  # [S, N] its log-density, averaged over dimensions
    final_N: Tensor  # the video's latents


def guided_velocity(generator: Generator, x: Tensor, t: float, text: Text, null: Text | None, guidance: float) -> Tensor:
    """v, under classifier-free guidance where ``guidance`` is not 1: u + g (c - u), gradients through both branches."""
    t_B = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    v = generator.velocity(x, t_B, text)
    if guidance == 1.0:
        return v
    u = generator.velocity(x, t_B, null.expand(len(x)))
    return u + guidance * (v - u)


def step(generator: Generator, x: Tensor, index: int, plan: Plan, text: Text, null: Text | None) -> tuple[Tensor, float]:
    """Mean and deviation of step ``index`` from x: the one place where policy, update and reference get them."""
    t, t_next = plan.times[index], plan.times[index + 1]
    v = guided_velocity(generator, x, t, text, null, plan.guidance)
    sampler = plan.sampler if index in plan.window else "ode"
    return flow.transition(x, v, t, t_next, sampler, plan.eta)


@torch.no_grad()
def sample(generator: Generator, noise_N: Tensor, text_N: Text, null: Text | None, plan: Plan, kicks_SN: Tensor, micro: int) -> Trajectory:
    """Sample N videos in micro-batches of ``micro``; ``kicks_SN`` is the standard normal noise of the stochastic steps."""
    assert len(noise_N) % micro == 0, "micro-batches must have one shape"
    parts: list[Sequence[Tensor]] = []
    for i in range(0, len(noise_N), micro):
        rows = slice(i, i + micro)
        x, text = noise_N[rows].float(), text_N[rows]
        seen = []
        for index in range(len(plan.times) - 1):
            mean, std = step(generator, x, index, plan, text, null)
            if index in plan.window:
                after = mean + std * kicks_SN[plan.window.index(index), rows]
                seen.append((x, after, mean, flow.log_prob(after, mean, std)))
                x = after
            else:
                x = mean
        parts.append([*(torch.stack(s) for s in zip(*seen, strict=True)), x] if seen else [x.new_zeros(0, micro)] * 4 + [x])
    joined = [torch.cat(p, dim=1 if k < 4 else 0) for k, p in enumerate(zip(*parts, strict=True))]
    return Trajectory(*joined)


@torch.no_grad()
def decode(generator: Generator, latents_N: Tensor, micro: int) -> Tensor:
    """Frames [N, T, 3, H, W] in [0, 1], decoded in micro-batches."""
    return torch.cat([generator.decode_video(part) for part in latents_N.split(micro)])


def kicks(shape: tuple[int, ...], steps: int, rng: torch.Generator) -> Tensor:
    """Standard normal noise [S, N, ...] for the stochastic steps, drawn on the CPU."""
    return torch.randn((steps, *shape), generator=rng)
