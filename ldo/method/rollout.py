"""Sampling videos with a policy: an ODE with a window of stochastic steps, and what training needs of those steps.

Noise enters only inside the window (MixGRPO); every other step, always the last one, is the ODE's. Groups are
sampled in micro-batches of one shape, which the update repeats, so that before the first update the policy ratio is
exactly 1.

Shapes: N samples of all groups in order, S stochastic steps; latents [N, ...].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.models import flow
from ldo.models.generator.protocol import Generator, Text


@dataclass(frozen=True)
class SamplingPlan:
    """How to sample: ``times`` from 1 to 0, the stochastic ``window`` (step indices), sampler, noise and guidance."""

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


def guided_velocity(
    generator: Generator, x: Tensor, t: float, text: Text, null: Text | None, guidance: float
) -> Tensor:
    """Velocity under classifier-free guidance, with gradients through both branches.

    v = u + g (c - u), where u and c are the velocities without and with the prompt; only c is computed at g = 1.
    """
    # fp32 whatever the model runs in: bf16 has 8 bits, and neighbouring times would round to one.
    t_B = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    c = generator.velocity(x, t_B, text)
    if guidance == 1.0:
        return c
    u = generator.velocity(x, t_B, null.expand(len(x)))
    return u + guidance * (c - u)


def policy_step(
    generator: Generator, x: Tensor, index: int, plan: SamplingPlan, text: Text, null: Text | None
) -> tuple[Tensor, float]:
    """Mean and standard deviation of step ``index`` from x.

    Policy, update and reference all get them here and nowhere else: any difference would show as a ratio other than 1.
    """
    velocity = guided_velocity(generator, x, plan.times[index], text, null, plan.guidance)
    sampler = plan.sampler if index in plan.window else "ode"
    return flow.transition(x, velocity, plan.times[index], plan.times[index + 1], sampler, plan.eta)


@torch.no_grad()
def sample_videos(
    generator: Generator,
    noise_N: Tensor,
    text_N: Text,
    null: Text | None,
    plan: SamplingPlan,
    step_noise_SN: Tensor,
    micro_batch: int,
) -> Trajectory:
    """Sample N videos, ``micro_batch`` at a time; ``step_noise_SN`` is the stochastic steps' standard normal noise."""
    assert len(noise_N) % micro_batch == 0, "micro-batches must have one shape"
    parts = []
    for start in range(0, len(noise_N), micro_batch):
        rows = slice(start, start + micro_batch)
        parts.append(_sample_micro_batch(generator, noise_N[rows], text_N[rows], null, plan, step_noise_SN[:, rows]))
    return Trajectory(
        x_SN=torch.cat([part.x_SN for part in parts], dim=1),
        next_SN=torch.cat([part.next_SN for part in parts], dim=1),
        mean_SN=torch.cat([part.mean_SN for part in parts], dim=1),
        logp_SN=torch.cat([part.logp_SN for part in parts], dim=1),
        final_N=torch.cat([part.final_N for part in parts]),
    )


def _sample_micro_batch(
    generator: Generator, noise: Tensor, text: Text, null: Text | None, plan: SamplingPlan, step_noise: Tensor
) -> Trajectory:
    state = noise.float()
    before, after, means, log_probs = [], [], [], []
    for index in range(len(plan.times) - 1):
        mean, std = policy_step(generator, state, index, plan, text, null)
        if index not in plan.window:
            state = mean
            continue
        before.append(state)
        means.append(mean)
        # The noise belongs to the step's place in the window, not to the step: a window that moves keeps its draws.
        state = mean + std * step_noise[plan.window.index(index)]
        after.append(state)
        log_probs.append(flow.log_prob(state, mean, std))
    if not plan.window:
        nothing = state.new_zeros(0, len(state))
        return Trajectory(nothing, nothing, nothing, nothing, state)
    return Trajectory(torch.stack(before), torch.stack(after), torch.stack(means), torch.stack(log_probs), state)


@torch.no_grad()
def decode_videos(generator: Generator, latents_N: Tensor, micro_batch: int) -> Tensor:
    """Frames [N, T, 3, H, W] in [0, 1], decoded in micro-batches."""
    return torch.cat([generator.decode_video(part) for part in latents_N.split(micro_batch)])


def draw_step_noise(shape: tuple[int, ...], steps: int, rng: torch.Generator) -> Tensor:
    """Standard normal noise [S, N, ...] for the stochastic steps, drawn on the CPU."""
    return torch.randn((steps, *shape), generator=rng)
