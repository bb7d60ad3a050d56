"""Stage 2: GRPO. For each prompt the generator samples a group of videos, the critic compares them, the policy follows.

The adapter goes on from stage 1's values, of which a frozen copy is the reference. What is exported is an exponential
average of the values. Every draw is a function of (seed, update, group), so neither a resume nor another number of
processes changes a sample.

Shapes: G groups of size g, N = G g samples, S stochastic steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldo import align, checkpoint, critic, data, encode, flow, lora, objectives
from ldo.distributed import gather, send
from ldo.generator import Text
from ldo.metrics import Log
from ldo.ops import group_advantage
from ldo.progress import Bar
from ldo.rng import numpy_rng, torch_rng
from ldo.rollout import Plan, Trajectory, decode, kicks, sample, step
from ldo.run import Run
from ldo.sandbox.dataset import prompt_of
from ldo.sandbox.measure import measure
from ldo.sandbox.observe import Prompt
from ldo.teacher import Aligner
from ldo.update import TrainingError, adamw, apply


@dataclass(frozen=True)
class Rollout:
    """One rollout of this rank: its groups' numbers within the update, texts, trajectory, advantages and references."""

    groups: list[int]
    text_N: Text
    plan: Plan
    trajectory: Trajectory
    advantage_N: Tensor
    mean_ref_SN: Tensor | None


def minibatch_groups(run: Run) -> list[list[int]]:
    """For each minibatch of an update, the groups that fall to this rank: equal work everywhere."""
    rl = run.recipe.rl
    size = rl.prompts // rl.minibatches
    return [[m * size + i for i in run.world.share(size)] for m in range(rl.minibatches)]


def make_plan(run: Run, update: int) -> Plan:
    """The sampling plan of an update; its stochastic window starts where this update's draw says."""
    rl = run.recipe.rl
    start = rl.window_start + int(numpy_rng(run.seed, "window", update).integers(rl.window_range))
    times = run.generator.times(rl.steps, latent_shape(run))
    return Plan(tuple(times), tuple(range(start, start + rl.window)), rl.sampler, rl.eta, rl.guidance)


def latent_shape(run: Run) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the videos that are sampled."""
    d = run.recipe.data
    return run.generator.geometry.latents(d.frames, d.height, d.width)


def micro_batch(run: Run) -> int:
    """Videos of a group in one forward pass: the same in rollout and update, or the policy ratio is not 1."""
    return run.recipe.rl.micro_batch or run.recipe.rl.group_size


def group_noise(run: Run, purpose: str, index: tuple[int, ...], shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """Initial noise [g, ...], one for the whole group if the recipe says so, and the stochastic steps' noise [S, g, ...]."""
    rl = run.recipe.rl
    rng = torch_rng(run.seed, purpose, *index)
    start = torch.randn((1 if rl.shared_noise else size, *shape), generator=rng)
    return start.expand(size, *shape), kicks((size, *shape), rl.window, rng)


def collect(run: Run, update: int, reference: dict[str, Tensor]) -> tuple[Rollout, dict[str, float]]:
    """Sample this rank's groups, score them, compare them. Also the figures of the rollout over all ranks."""
    recipe, rl, device = run.recipe, run.recipe.rl, run.world.device
    groups = [g for part in minibatch_groups(run) for g in part]
    chosen = data.batch_indices(run.seed, "prompts", update, rl.prompts, len(run.prompts))
    lines = [run.prompts[chosen[g]] for g in groups]
    plan = make_plan(run, update)
    shape, micro = latent_shape(run), micro_batch(run)
    drawn = [group_noise(run, "rollout", (update, g), shape, rl.group_size) for g in groups]
    noise, pushes = torch.cat([n for n, _ in drawn]).to(device), torch.cat([k for _, k in drawn], 1).to(device)
    text = run.texts([line.text for line in lines]).repeat(rl.group_size)
    null = run.texts([""])
    trajectory = sample(run.generator, noise, text, null, plan, pushes, micro)

    # what the stage-1 model makes of the same prompts and noise: the guards' measure
    first = slice(None, None, rl.group_size)
    still = Plan(plan.times, (), plan.sampler, 0.0, plan.guidance)
    with lora.swapped(run.parameters, reference):
        few = math.gcd(len(groups), micro) if rl.micro_batch else len(groups)
        quiet = sample(run.generator, noise[first], text[first], null, still, pushes[:0, first], few).final_N
        mean_ref = reference_means(run, trajectory, plan, text, null) if rl.kl and rl.objective == "grpo" else None
    measured = lines if update % recipe.save_every == 0 else []
    columns, weights, names, broken = judge(run, trajectory.final_N, quiet, few, measured)
    ids = torch.tensor(groups, device=device).repeat_interleave(rl.group_size)
    # groups are whole on a rank; gathering rewards alone makes statistics independent of how many ranks there are
    everyone = gather(torch.cat([ids[:, None].float(), columns], 1), run.world)
    everyone = everyone[everyone[:, 0].argsort(stable=True)]
    all_ids, all_rewards = everyone[:, 0].long(), everyone[:, 1 : 2 + len(names)]
    weight = torch.cat([torch.ones(1, device=device), weights])
    advantages, stats = group_advantage(all_rewards, all_ids, weight, clip=rl.advantage_clip)
    mine = torch.cat([advantages[all_ids == g] for g in groups])
    figures = {
        "reward": float(all_rewards[:, 0].mean()),
        "reward_std": float(stats.std[:, 0].mean()),
        "reward_skill": float(everyone[:, 2 + len(names)].mean()),
        "reward_plain": float(everyone[:, 3 + len(names)].mean()),
        "motion_ratio": float(everyone[:, -2].sum() / everyone[:, -1].sum().clamp_min(1e-6)),
        "zero_variance_groups": int(stats.zero_variance[:, 0].sum()),
        **{f"guard_{n}": float(all_rewards[:, 1 + i].mean()) for i, n in enumerate(names)},
    }
    if broken:
        figures["violation_rate"] = float(gather(torch.tensor(broken), run.world).mean())
    return Rollout(groups, text, plan, trajectory, mine, mean_ref), figures


def judge(run: Run, final_N: Tensor, quiet_G: Tensor, few: int, lines: list[data.PromptLine]) -> tuple[Tensor, Tensor, list[str], list[float]]:
    """What the critic and the guards say of a rollout. No video outlives its group; ``few`` groups' references are decoded together.

    ``final_N``: latents of the groups' videos, ``quiet_G`` the reference's of each group. Returns per video [N, R + 5] the reward,
    R penalties, skill, plain, its motion and its reference's; weights and names of the penalties; and, where ``lines`` are given
    and all are the sandbox's, 1 for each video that breaks physics, which is never trained on.
    """
    prompts = [prompt_of(line.text, line.extra) for line in lines]
    known = bool(prompts) and None not in prompts
    columns, broken = [], []
    for i, group in enumerate(final_N.split(run.recipe.rl.group_size)):
        if i % few == 0:
            references = decode(run.generator, quiet_G[i : i + few], few)
        found, weights, names, wrong = _judge_group(run, group, references[i % few], prompts[i] if known else None)
        columns.append(found)
        broken += wrong
    return torch.cat(columns), weights, names, broken


def _judge_group(run: Run, latents: Tensor, reference: Tensor, prompt: Prompt | None) -> tuple[Tensor, Tensor, list[str], list[float]]:
    micro = micro_batch(run)
    frames = decode(run.generator, latents, micro)
    scores = [critic.score(run.judge, part, run.recipe.critic, run.recipe.data.fps) for part in frames.split(micro)]
    reward, skill, plain = (torch.cat([getattr(s, name) for s in scores])[:, None] for name in ("reward", "skill", "plain"))
    before = reference[None].repeat_interleave(len(frames), 0)
    penalties, weights, names = critic.guards(frames, before, run.recipe.critic)
    moved = torch.stack([critic.motion(frames), critic.motion(before)], 1)
    wrong = [] if prompt is None else [float(bool(measure(video.cpu().numpy(), prompt).violations)) for video in frames]
    return torch.cat([reward, penalties, skill, plain, moved], 1), weights, names, wrong


@torch.no_grad()
def reference_means(run: Run, trajectory: Trajectory, plan: Plan, text: Text, null: Text) -> Tensor:
    """The reference's mean at every stochastic step [S, N, ...]; to be called with its values swapped in."""
    size = micro_batch(run)
    out = []
    for s, index in enumerate(plan.window):
        rows = zip(trajectory.x_SN[s].split(size), text.split(size), strict=True)
        out.append(torch.cat([step(run.generator, x, index, plan, t, null)[0] for x, t in rows]))
    return torch.stack(out)


def micro_losses(
    run: Run, rollout: Rollout, groups: list[int], update: int, old: dict[str, Tensor] | None, reference: dict[str, Tensor]
) -> Iterator[objectives.Loss]:
    """The losses of some groups, one forward pass each: over stochastic steps (grpo) or drawn noise levels (nft, awm).

    ``old``: the adapter values that sampled (nft, awm); None as long as they are still the present ones.
    """
    size, micro, null = run.recipe.rl.group_size, micro_batch(run), run.texts([""])
    differ = rollout.advantage_N.unflatten(0, (-1, size)).any(1).tolist()
    for group in groups:
        number = rollout.groups.index(group)
        if not differ[number]:  # nothing to tell apart in this group
            continue
        at = number * size
        parts = [slice(i, i + micro) for i in range(at, at + size, micro)]
        if run.recipe.rl.objective == "grpo":
            yield from _transition_losses(run, rollout, parts, null)
        else:
            yield from _level_losses(run, rollout, parts, torch_rng(run.seed, "levels", update, group), old, reference)


def _transition_losses(run: Run, rollout: Rollout, parts: list[slice], null: Text) -> Iterator[objectives.Loss]:
    """A group's losses on the stochastic steps of its rollout, micro-batch by micro-batch."""
    rl, trajectory, plan = run.recipe.rl, rollout.trajectory, rollout.plan
    spans = [plan.times[i] - plan.times[i + 1] for i in plan.window]
    for s, index in enumerate(plan.window):
        for rows in parts:
            mean, std = step(run.generator, trajectory.x_SN[s, rows], index, plan, rollout.text_N[rows], null)
            yield objectives.grpo(
                mean,
                std,
                trajectory.next_SN[s, rows],
                trajectory.mean_SN[s, rows],
                trajectory.logp_SN[s, rows],
                None if rollout.mean_ref_SN is None else rollout.mean_ref_SN[s, rows],
                rollout.advantage_N[rows],
                guard=rl.guard,
                clip=rl.guard_clip if rl.guard else rl.clip,
                # equal weight for every step, the mean of the weights being 1
                weight=(1 / spans[s]) / (sum(1 / a for a in spans) / len(spans)) if rl.guard else 1.0,
                kl=rl.kl,
            )


def _level_losses(
    run: Run, rollout: Rollout, parts: list[slice], rng: torch.Generator, old: dict[str, Tensor] | None, reference: dict[str, Tensor]
) -> Iterator[objectives.Loss]:
    """A group's losses on its videos, noised anew to levels drawn from ``rng``, micro-batch by micro-batch."""
    rl, final_N = run.recipe.rl, rollout.trajectory.final_N
    levels = torch.randperm(rl.steps - 1, generator=rng)[: rl.train_times] + 1  # not pure noise
    for level in levels.tolist():
        drawn = torch.randn((rl.group_size, *final_N.shape[1:]), generator=rng).split(micro_batch(run))
        for rows, noise in zip(parts, drawn, strict=True):
            x0, text, advantage = final_N[rows], rollout.text_N[rows], rollout.advantage_N[rows]
            noise = send(noise, x0.device)
            t_B = torch.full((len(x0),), rollout.plan.times[level], device=x0.device)
            x_t = flow.noisy(x0, noise, t_B)
            v_old, v_ref = None, None
            with torch.no_grad():
                if old is not None:
                    with lora.swapped(run.parameters, old):
                        v_old = run.generator.velocity(x_t, t_B, text)
                if rl.kl:
                    with lora.swapped(run.parameters, reference):
                        v_ref = run.generator.velocity(x_t, t_B, text)
            v = run.generator.velocity(x_t, t_B, text)
            v_old = v.detach() if v_old is None else v_old
            if rl.objective == "nft":
                yield objectives.nft(v, v_old, v_ref, x_t, x0, t_B, advantage, beta=rl.nft_beta, bound=rl.advantage_clip, kl=rl.kl)
            else:
                yield objectives.awm(v, v_old, v_ref, noise, x0, t_B, advantage, bound=rl.advantage_clip, kl=rl.kl)


def stage_one(run: Run) -> dict[str, Any] | None:
    """The last checkpoint of the finished stage 1; None if this run has no stage 1."""
    if "align" not in run.recipe.stages:
        return None
    state = checkpoint.load(run.checkpoint("align"))
    if state is None or state["step"] < run.recipe.align.steps:
        raise TrainingError("stage 2 needs the checkpoint of a finished stage 1; run the align stage first")
    return state


def start_values(run: Run, state: dict[str, Any] | None) -> dict[str, Tensor]:
    """The adapter that stage 2 goes on from: stage 1's, or a fresh one if there was no stage 1."""
    return run.fresh if state is None else {k: v.to(run.world.device) for k, v in state["lora"].items()}


def start_aligner(run: Run, state: dict[str, Any] | None) -> Aligner | None:
    """L_PDA beside the reward; None where its weight is 0. Its projector is frozen as stage 1 left it."""
    if not run.recipe.rl.align_weight:
        return None
    aligner = align.make_aligner(run)
    if run.recipe.teacher.projector != "none":  # ldo.check has seen to it that there was a stage 1
        aligner.load_state_dict(state["aligner"])
    return aligner.requires_grad_(False)


def train(run: Run) -> dict[str, Tensor]:
    """Run stage 2; returns and exports the averaged adapter values."""
    recipe, rl, world = run.recipe, run.recipe.rl, run.world
    parameters = run.parameters
    state = stage_one(run)
    reference, aligner = start_values(run, state), start_aligner(run, state)
    lora.restore(parameters, reference)
    average = {k: v.clone() for k, v in reference.items()}
    trained = list(parameters.values())
    optimizer = adamw(trained, rl.lr, rl.weight_decay)
    update, recent, stopped = 0, [], ""
    state = checkpoint.load(run.checkpoint("reinforce"))
    if state:
        update, recent, stopped = state["step"], state["recent"], state["stopped"]
        lora.restore(parameters, state["lora"])
        average = {k: v.to(world.device) for k, v in state["average"].items()}
        optimizer.load_state_dict(state["optimizer"])
    log = Log(run.folder, "reinforce", update, world.first, run.recipe)
    with Bar("reinforce", rl.updates, update, world.first) as bar:
        while update < rl.updates and not stopped:
            rollout, figures = collect(run, update, reference)
            figures |= learn(run, rollout, update, optimizer, reference, aligner)
            update += 1
            if update % rl.ema_every == 0:
                n = update // rl.ema_every - 1
                keep = min(rl.ema, (1 + n) / (10 + n))
                average = {k: torch.lerp(parameters[k].detach(), v, keep) for k, v in average.items()}
            recent = [*recent, figures["motion_ratio"]][-5:]
            if len(recent) == 5 and sum(recent) / 5 < rl.stop_motion:
                stopped = f"motion fell to {sum(recent) / 5:.2f} of the stage-1 model's at update {update}"
            log.write(update - 1, **figures)
            if world.first and (update % recipe.save_every == 0 or update == rl.updates or stopped):
                kept = {"step": update, "lora": lora.snapshot(parameters), "average": average, "optimizer": optimizer.state_dict()}
                checkpoint.save(run.checkpoint("reinforce"), kept | {"recent": recent, "stopped": stopped})
            bar.advance(f"reward {figures['reward']:.3f}  motion {figures['motion_ratio']:.2f}")
    log.close()
    if stopped and world.first:
        print(f"stage 2 stopped early: {stopped}")
    run.export("ldo", average)
    return average


def learn(
    run: Run, rollout: Rollout, update: int, optimizer: torch.optim.Optimizer, reference: dict[str, Tensor], aligner: Aligner | None = None
) -> dict[str, float]:
    """The optimizer steps on one rollout; returns their mean figures. ``aligner``: ``start_aligner``'s."""
    rl, parameters = run.recipe.rl, run.parameters
    trained = list(parameters.values())
    old = lora.snapshot(parameters) if rl.objective != "grpo" else {}
    assert aligner is not None or not rl.align_weight, "rl.align_weight needs start_aligner's aligner"
    sums: dict[str, float] = {}
    steps = 0
    for epoch in range(rl.epochs):
        for number, groups in enumerate(minibatch_groups(run)):
            parts = len(groups) * (rl.window if rl.objective == "grpo" else rl.train_times) * (rl.group_size // micro_batch(run))
            first, seen = epoch == number == 0, []
            for loss in micro_losses(run, rollout, groups, update * rl.epochs + epoch, None if first else old, reference):
                (loss.total / parts).backward()
                off = (loss.ratio.detach() - 1).abs()
                seen.append(torch.stack([v.detach() for v in (loss.policy, loss.divergence, loss.clipped, off.mean(), off.max())]))
            for *found, worst in torch.stack(seen).tolist() if seen else []:  # fetched together: a GPU is waited for once
                if first and worst != 0:
                    raise TrainingError(f"update {update}: the policy ratio is off 1 by {worst:.1e} before any step; rollout and update disagree")
                for key, value in zip(("policy_loss", "kl", "clipped", "ratio_off"), found, strict=True):
                    sums[key] = sums.get(key, 0.0) + value / (parts * rl.minibatches * rl.epochs)
            if rl.align_weight or rl.flow_weight:
                extra_losses(run, aligner, (update * rl.epochs + epoch) * rl.minibatches + number)
            where = f"update {update}, groups {groups}"
            if any(p.grad is not None for p in trained) or run.world.size > 1:
                sums["grad_norm"] = sums.get("grad_norm", 0.0) + apply(optimizer, trained, run.world, rl.max_grad_norm, rl.lr, where)
                steps += 1
    if steps:
        sums["grad_norm"] /= steps
    return sums


def extra_losses(run: Run, aligner: Aligner | None, index: int) -> None:
    """Gradients of L_PDA and of the flow loss on clips, at stage 2's weights for them."""
    recipe, clips = run.recipe, align.prepare(run)
    batch = recipe.align.batch
    rows = encode.batch(clips.buckets(), run.seed, "reinforce clips", index, batch)
    rng = torch_rng(run.seed, "reinforce clips", index)
    shape = align.latent_shape(run, clips, rows)
    noise = torch.randn((batch, *shape), generator=rng)
    t_B = run.generator.training_times(torch.rand(batch, generator=rng), shape, recipe.align.time_shift)
    mine = list(run.world.share(batch))
    for part in align.micro_batches(mine, recipe.align.micro_batch):
        flow_loss, pda = align.losses(run, aligner, clips, rows[part], noise[part], t_B[part])
        ((recipe.rl.flow_weight * flow_loss + recipe.rl.align_weight * pda) * (len(part) / len(mine))).backward()
