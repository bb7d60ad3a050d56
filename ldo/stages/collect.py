"""Collecting a rollout: the policy's videos of some prompts, their rewards, and their advantages within each group.

Every draw is a function of (seed, update, group), so neither a resume nor another number of processes changes a
sample.

Shapes: G groups of size g, N = G g samples, S stochastic steps, R penalties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ldo.core.distributed import gather_rows
from ldo.core.rng import numpy_rng, torch_rng
from ldo.data.buckets import batch_indices
from ldo.method.critic import score_clips
from ldo.method.guards import guard_penalties, motion
from ldo.method.rollout import (
    SamplingPlan,
    Trajectory,
    decode_videos,
    draw_step_noise,
    policy_step,
    sample_videos,
)
from ldo.models import lora
from ldo.models.generator.protocol import Text
from ldo.ops import group_advantage
from ldo.run.state import Run
from ldo.sandbox.exact import ExactMetrics, exact_metrics


@dataclass(frozen=True)
class Rollout:
    """One rollout of this rank: its groups' numbers within the update, texts, trajectory, advantages and references."""

    groups: list[int]
    text_N: Text
    plan: SamplingPlan
    trajectory: Trajectory
    advantage_N: Tensor
    mean_ref_SN: Tensor | None


@dataclass(frozen=True)
class Judged:
    """What critic and guards say of N videos: tensors [N], and [N, R] of penalties with their weights [R] and names."""

    reward: Tensor
    penalties: Tensor
    skill: Tensor
    plain: Tensor
    motion: Tensor
    reference_motion: Tensor
    weights: Tensor
    names: tuple[str, ...]
    violations: list[bool]  # of each video, by exact metrics; empty where there are none or nobody asked

    @staticmethod
    def join(parts: Sequence[Judged]) -> Judged:
        """All videos of several groups."""
        joined = {}
        for field in fields(Judged):
            values = [getattr(part, field.name) for part in parts]
            joined[field.name] = values[0] if field.name in ("weights", "names") else _join(values)
        return Judged(**joined)

    def gathered(self, groups_N: Tensor, run: Run) -> tuple[Tensor, Judged]:
        """The videos of all ranks, ordered by their group's number [N], and those numbers.

        Only numbers travel, never videos, and the order makes statistics independent of how many ranks there are.
        """
        scalars = ("reward", "skill", "plain", "motion", "reference_motion")
        columns = [groups_N.to(self.reward.dtype), *(getattr(self, name) for name in scalars)]
        packed = gather_rows(torch.cat([torch.stack(columns, 1), self.penalties], 1), run.processes)
        packed = packed[packed[:, 0].argsort(stable=True)]
        group_column, *scalar_columns = packed[:, : len(columns)].unbind(1)
        everyone = Judged(
            **dict(zip(scalars, scalar_columns, strict=True)),
            penalties=packed[:, len(columns) :],
            weights=self.weights,
            names=self.names,
            violations=[],
        )
        return group_column.long(), everyone


def _join(values: list) -> Tensor | list:
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


# ---------------------------------------------------------------------------------------------- what an update samples


def minibatch_groups(run: Run) -> list[list[int]]:
    """For each minibatch of an update, the groups that fall to this rank: equal work everywhere."""
    rl_config = run.recipe.rl
    size = rl_config.prompts // rl_config.minibatches
    own = run.processes.share(size)
    return [[minibatch * size + index for index in own] for minibatch in range(rl_config.minibatches)]


def make_sampling_plan(run: Run, update: int) -> SamplingPlan:
    """The sampling plan of an update; its stochastic window starts where this update's draw says."""
    rl_config = run.recipe.rl
    start = rl_config.window_start + int(numpy_rng(run.seed, "window", update).integers(rl_config.window_range))
    times = run.generator.times(rl_config.steps, video_latent_shape(run))
    return SamplingPlan(
        tuple(times),
        tuple(range(start, start + rl_config.window)),
        rl_config.sampler,
        rl_config.eta,
        rl_config.guidance,
    )


def video_latent_shape(run: Run) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the videos that are sampled."""
    data = run.recipe.data
    return run.generator.geometry.latents(data.frames, data.height, data.width)


def micro_batch(run: Run) -> int:
    """Videos of a group in one forward pass: the same in rollout and update, or the policy ratio is not 1."""
    return run.recipe.rl.micro_batch or run.recipe.rl.group_size


def group_noise(
    run: Run, purpose: str, index: tuple[int, ...], shape: tuple[int, ...], size: int
) -> tuple[Tensor, Tensor]:
    """Initial noise [g, ...], one for the whole group if the recipe says so, and the step noise [S, g, ...]."""
    rl_config = run.recipe.rl
    rng = torch_rng(run.seed, purpose, *index)
    # From one start the group differs only by its step noise, so that advantages speak of the steps that are trained.
    start = torch.randn((1 if rl_config.shared_noise else size, *shape), generator=rng)
    return start.expand(size, *shape), draw_step_noise((size, *shape), rl_config.window, rng)


# ---------------------------------------------------------------------------------------------- the rollout


def collect_rollout(run: Run, update: int, reference: dict[str, Tensor]) -> tuple[Rollout, dict[str, float]]:
    """Sample this rank's groups, score them, compare them. Also the metrics of the rollout over all ranks."""
    rl_config, device = run.recipe.rl, run.processes.device
    groups = [group for minibatch in minibatch_groups(run) for group in minibatch]
    # Every rank draws all prompts of the update and takes its own groups, so that the prompts do not depend on the
    # number of ranks.
    chosen = batch_indices(run.seed, "prompts", update, rl_config.prompts, len(run.prompts))
    lines = [run.prompts[chosen[group]] for group in groups]
    sampling_plan = make_sampling_plan(run, update)
    shape, micro_size = video_latent_shape(run), micro_batch(run)
    # The purpose and the group's number make the noise, not a running generator: a resumed update draws the same.
    drawn = [group_noise(run, "rollout", (update, group), shape, rl_config.group_size) for group in groups]
    noise = torch.cat([start for start, _ in drawn]).to(device)
    step_noise = torch.cat([later for _, later in drawn], 1).to(device)
    text = run.texts([line.text for line in lines]).repeat(rl_config.group_size)
    null_text = run.texts([""])
    trajectory = sample_videos(run.generator, noise, text, null_text, sampling_plan, step_noise, micro_size)

    # what the stage-1 model makes of the same prompts and noise, one video a group: the guards compare with it
    first = slice(None, None, rl_config.group_size)
    quiet_plan = SamplingPlan(sampling_plan.times, (), sampling_plan.sampler, 0.0, sampling_plan.guidance)
    # One shape for all of these passes, and with rl.micro_batch none larger than it: that is what the memory plan
    # counts.
    together = math.gcd(len(groups), micro_size) if rl_config.micro_batch else len(groups)
    mean_ref = None
    # The reference is the same network with other adapter values: a second copy of the base would not fit.
    with lora.swapped(run.parameters, reference):
        quiet = sample_videos(
            run.generator, noise[first], text[first], null_text, quiet_plan, step_noise[:0, first], together
        )
        if rl_config.kl and rl_config.objective == "grpo":
            mean_ref = reference_means(run, trajectory, sampling_plan, text, null_text)

    # exact metrics take the CPU a while, so they are asked for only now and then; they are never trained on
    exact = [exact_metrics(line.text, line.extra) for line in lines] if update % run.recipe.save_every == 0 else []
    judged = judge_videos(run, trajectory.final_N, quiet.final_N, together, exact)
    own_groups = torch.tensor(groups, device=device).repeat_interleave(rl_config.group_size)
    all_groups, everyone = judged.gathered(own_groups, run)
    # Reward and penalties are normalised apart within a group and then weighted: a penalty in raw units would be
    # drowned, or drown the reward.
    rewards = torch.cat([everyone.reward[:, None], everyone.penalties], 1)
    weights = torch.cat([torch.ones(1, device=device), judged.weights])
    advantages, statistics = group_advantage(rewards, all_groups, weights, clip=rl_config.advantage_clip)
    # Back to this rank's order: groups are whole on a rank, but their numbers are not consecutive.
    own = torch.cat([advantages[all_groups == group] for group in groups])
    metrics = {
        "reward": float(everyone.reward.mean()),
        "reward_std": float(statistics.std[:, 0].mean()),
        "reward_skill": float(everyone.skill.mean()),
        "reward_plain": float(everyone.plain.mean()),
        "motion_ratio": float(everyone.motion.sum() / everyone.reference_motion.sum().clamp_min(1e-6)),
        "zero_variance_groups": int(statistics.zero_variance[:, 0].sum()),
    }
    for index, name in enumerate(everyone.names):
        metrics[f"guard_{name}"] = float(everyone.penalties[:, index].mean())
    if judged.violations:
        violations = torch.tensor(judged.violations, dtype=torch.float32)
        metrics["violation_rate"] = float(gather_rows(violations, run.processes).mean())
    return Rollout(groups, text, sampling_plan, trajectory, own, mean_ref), metrics


def judge_videos(
    run: Run, final_N: Tensor, quiet_G: Tensor, together: int, exact: Sequence[ExactMetrics | None]
) -> Judged:
    """Critic and guards on a rollout: ``final_N`` are its videos' latents, ``quiet_G`` those of each group's reference.

    No video outlives its group; ``together`` groups' references are decoded at a time. ``exact`` holds each group's
    exact metrics where they are wanted; they count only if every prompt has them.
    """
    measured = bool(exact) and None not in exact
    parts = []
    for index, group in enumerate(final_N.split(run.recipe.rl.group_size)):
        if index % together == 0:
            references = decode_videos(run.generator, quiet_G[index : index + together], together)
        reference = references[index % together]
        # Group by group, since decoded videos are the largest thing of a rollout: of all of them only one group is
        # alive.
        parts.append(_judge_group(run, group, reference, exact[index] if measured else None))
    return Judged.join(parts)


def _judge_group(run: Run, latents: Tensor, reference: Tensor, exact: ExactMetrics | None) -> Judged:
    """Critic and guards on one group's videos against its reference [T, 3, H, W]."""
    micro_size = micro_batch(run)
    frames = decode_videos(run.generator, latents, micro_size)
    scores = [
        score_clips(run.world_model, part, run.recipe.critic, run.recipe.data.fps) for part in frames.split(micro_size)
    ]
    # One reference serves the whole group: with shared noise it started where they did, else its motion is an estimate.
    before = reference[None].repeat_interleave(len(frames), 0)
    penalties = guard_penalties(frames, before, run.recipe.critic)
    return Judged(
        reward=torch.cat([score.reward for score in scores]),
        penalties=penalties.values,
        skill=torch.cat([score.skill for score in scores]),
        plain=torch.cat([score.plain for score in scores]),
        motion=motion(frames),
        reference_motion=motion(before),
        weights=penalties.weights,
        names=penalties.names,
        violations=[] if exact is None else [exact.violates(video.cpu().numpy()) for video in frames],
    )


@torch.no_grad()
def reference_means(
    run: Run, trajectory: Trajectory, sampling_plan: SamplingPlan, text: Text, null_text: Text
) -> Tensor:
    """The reference's mean at every stochastic step [S, N, ...]; call it with the reference's values swapped in."""
    micro_size = micro_batch(run)
    means = []
    for step, index in enumerate(sampling_plan.window):
        parts = zip(trajectory.x_SN[step].split(micro_size), text.split(micro_size), strict=True)
        means.append(
            torch.cat(
                [policy_step(run.generator, state, index, sampling_plan, part, null_text)[0] for state, part in parts]
            )
        )
    return torch.stack(means)
