"""The policy's losses on a rollout, micro-batch by micro-batch, as the update of stage 2 adds them up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.core.distributed import to_device
from ldo.core.rng import torch_rng
from ldo.method import objectives
from ldo.method.rollout import policy_step
from ldo.models import flow, lora
from ldo.models.generator.protocol import Text
from ldo.run.state import Run
from ldo.stages.collect import Rollout, micro_batch


@dataclass(frozen=True)
class Policies:
    """Adapter values other than the present ones.

    ``sampling``: those that sampled the rollout, None as long as they are still the present ones; ``reference``: stage
    1's, from which the divergence is measured.
    """

    sampling: dict[str, Tensor] | None
    reference: dict[str, Tensor]


def losses_of_group(run: Run) -> int:
    """How many losses ``micro_losses`` gives for a group."""
    rl_config = run.recipe.rl
    times = rl_config.window if rl_config.objective == "grpo" else rl_config.train_times
    return times * (rl_config.group_size // micro_batch(run))


def micro_losses(
    run: Run, rollout: Rollout, groups: list[int], update: int, policies: Policies
) -> Iterator[objectives.Loss]:
    """The losses of some groups, one forward pass each.

    Over stochastic steps (grpo) or drawn noise levels (nft, awm).
    """
    size, micro_size, null_text = run.recipe.rl.group_size, micro_batch(run), run.texts([""])
    differ = rollout.advantage_N.unflatten(0, (-1, size)).any(1).tolist()
    for group in groups:
        number = rollout.groups.index(group)
        # in a group of equal rewards all advantages are 0: nothing to learn, and forward passes saved
        if not differ[number]:
            continue
        first = number * size
        parts = [slice(start, start + micro_size) for start in range(first, first + size, micro_size)]
        if run.recipe.rl.objective == "grpo":
            yield from _transition_losses(run, rollout, parts, null_text)
        else:
            yield from _level_losses(run, rollout, parts, torch_rng(run.seed, "levels", update, group), policies)


def _transition_losses(run: Run, rollout: Rollout, parts: list[slice], null_text: Text) -> Iterator[objectives.Loss]:
    """A group's losses on the stochastic steps of its rollout."""
    rl_config, trajectory, sampling_plan = run.recipe.rl, rollout.trajectory, rollout.plan
    spans = [sampling_plan.times[index] - sampling_plan.times[index + 1] for index in sampling_plan.window]
    mean_inverse_span = sum(1 / span for span in spans) / len(spans)
    for step, index in enumerate(sampling_plan.window):
        # GRPO-Guard: equal weight for every step, the mean of the weights being 1
        weight = (1 / spans[step]) / mean_inverse_span if rl_config.guard else 1.0
        for rows in parts:
            state, text = trajectory.x_SN[step, rows], rollout.text_N[rows]
            # The micro-batches of the rollout again: another batch size would round otherwise, and the ratio not be
            # exactly 1.
            mean, deviation = policy_step(run.generator, state, index, sampling_plan, text, null_text)
            yield objectives.grpo(
                mean,
                deviation,
                trajectory.next_SN[step, rows],
                trajectory.mean_SN[step, rows],
                trajectory.logp_SN[step, rows],
                None if rollout.mean_ref_SN is None else rollout.mean_ref_SN[step, rows],
                rollout.advantage_N[rows],
                guard=rl_config.guard,
                clip=rl_config.guard_clip if rl_config.guard else rl_config.clip,
                weight=weight,
                kl=rl_config.kl,
            )


def _level_losses(
    run: Run, rollout: Rollout, parts: list[slice], rng: torch.Generator, policies: Policies
) -> Iterator[objectives.Loss]:
    """A group's losses on its videos, noised anew to levels drawn from ``rng``."""
    rl_config, final_N = run.recipe.rl, rollout.trajectory.final_N
    # level 0 is pure noise, where a velocity says nothing about the sample
    levels = torch.randperm(rl_config.steps - 1, generator=rng)[: rl_config.train_times] + 1
    for level in levels.tolist():
        # Drawn for the group as a whole and then split: micro-batches must not change the noise.
        drawn = torch.randn((rl_config.group_size, *final_N.shape[1:]), generator=rng).split(micro_batch(run))
        for rows, cpu_noise in zip(parts, drawn, strict=True):
            clean_latents, text, advantage = final_N[rows], rollout.text_N[rows], rollout.advantage_N[rows]
            noise = to_device(cpu_noise, clean_latents.device)
            times_B = torch.full((len(clean_latents),), rollout.plan.times[level], device=clean_latents.device)
            noisy_latents = flow.noisy(clean_latents, noise, times_B)
            sampling_velocity = _velocity_under(run, policies.sampling, noisy_latents, times_B, text)
            reference_velocity = _velocity_under(
                run, policies.reference if rl_config.kl else None, noisy_latents, times_B, text
            )
            velocity = run.generator.velocity(noisy_latents, times_B, text)
            if sampling_velocity is None:
                # On the first minibatch the sampling policy is the present one: its velocity is this very pass, and the
                # ratio 1.
                sampling_velocity = velocity.detach()
            bound = rl_config.advantage_clip
            if rl_config.objective == "nft":
                yield objectives.nft(
                    velocity,
                    sampling_velocity,
                    reference_velocity,
                    noisy_latents,
                    clean_latents,
                    times_B,
                    advantage,
                    beta=rl_config.nft_beta,
                    bound=bound,
                    kl=rl_config.kl,
                )
            else:
                yield objectives.awm(
                    velocity,
                    sampling_velocity,
                    reference_velocity,
                    noise,
                    clean_latents,
                    times_B,
                    advantage,
                    bound=bound,
                    kl=rl_config.kl,
                )


@torch.no_grad()
def _velocity_under(
    run: Run, values: dict[str, Tensor] | None, noisy_latents: Tensor, times_B: Tensor, text: Text
) -> Tensor | None:
    """The velocity under other adapter values; None without any."""
    if values is None:
        return None
    with lora.swapped(run.parameters, values):
        return run.generator.velocity(noisy_latents, times_B, text)
