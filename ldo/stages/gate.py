"""Stage 0, the gate: a critic that cannot distinguish broken from correct physics must not judge.

Three tests: matched pairs (a valid clip and a broken one from the same start), controls (static, shuffled and noise
clips rank below real ones), and, on the policy's own samples, rank correlation of reward and exact metrics within a
prompt. Also reported: whether the critic prefers one restitution over another from the same start (it should not),
and, for a forward reward, whether it distinguishes a soft bounce from its reversal.
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ldo.core.batch_sizes import GATE_CLIPS
from ldo.core.config import FAIR_PREFERENCE, CriticConfig, GateConfig, to_plain
from ldo.core.distributed import barrier
from ldo.core.errors import TrainingError
from ldo.core.files import write_text
from ldo.core.progress import Bar, batches
from ldo.method.critic import score_clips
from ldo.method.rollout import SamplingPlan, decode_videos, sample_videos
from ldo.models import lora
from ldo.models.world_model import WorldModel
from ldo.run.state import Run
from ldo.sandbox.exact import ExactMetrics, exact_metrics
from ldo.sandbox.matched_pairs import draw_bounces, draw_controls, draw_pairs
from ldo.stages.collect import group_noise, video_latent_shape


def enforce_gate(run: Run) -> None:
    """Print the table; TrainingError where the critic failed and the recipe does not override."""
    result = qualify_critic(run)
    if run.processes.first:
        print(f"gate: {'passed' if result['passed'] else 'FAILED'}\n{gate_table(result)}", flush=True)
    if not result["passed"] and not run.recipe.gate.override:
        raise TrainingError(
            f"the critic failed the gate: {'; '.join(result['failures'])}. Train the world model further, choose other "
            "critic settings, or set gate.override=true to continue all the same"
        )


def qualify_critic(run: Run) -> dict:
    """The gate's result, from ``gate.json`` where this run has one."""
    path = run.folder / "gate.json"
    recipe = run.recipe
    # Only the first process judges; the result is a file, which the others and a resumed run read.
    if not path.exists() and run.processes.first:
        found = rank_matched_pairs(run.world_model, recipe.critic, recipe.gate.pairs, active=True)
        own = gate_videos(run)
        if own is not None:
            found["spearman"] = correlation_on_samples(run.world_model, recipe.critic, *own)
        write_text(path, json.dumps(gate_verdict(found, recipe.gate), indent=1))
    barrier(run.processes)
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------- matched pairs


def rank_matched_pairs(
    world_model: WorldModel, config: CriticConfig, pairs: int, seed: int = 0, active: bool = False
) -> dict:
    """Rank accuracies for each kind of violation, over all kinds, on the controls, and the restitution preference.

    Each valid clip is scored once and compared with every break that applies to it.
    """
    clips = draw_pairs(world_model.crop, pairs, seed)
    good = _score(world_model, clips.valid, config, "gate: valid", active)
    kinds = {}
    for kind, broken in clips.broken.items():
        # A pair shares its start, so the difference of the two rewards is what the break did.
        bad = _score(world_model, [clip.frames for clip in broken], config, f"gate: {kind}", active)
        kinds[kind] = _accuracy(good[[clip.valid for clip in broken]], bad)
    below = {}
    for name, control in draw_controls(clips.valid[:pairs], seed).items():
        bad = _score(world_model, control, config, f"gate: {name}", active)
        below[name] = _accuracy(good[: len(control)], bad)
    bounces = _rank_bounces(world_model, config, pairs, seed, active)
    return {"kinds": kinds, "all_kinds": float(np.mean(list(kinds.values()))), "controls": below, **bounces}


def _rank_bounces(world_model: WorldModel, config: CriticConfig, pairs: int, seed: int, active: bool) -> dict:
    """Restitution 1.0 against 0.6 from the same start; for forward rewards, a soft bounce against its reversal."""
    hard, soft = draw_bounces(world_model.crop, pairs, seed)
    hard_rewards = _score(world_model, hard, config, "gate: restitution 1", active)
    soft_rewards = _score(world_model, soft, config, "gate: restitution 0.6", active)
    found = {"restitution_preference": _accuracy(hard_rewards, soft_rewards)}
    # A reward that is summed over both directions cannot prefer one of them.
    if config.direction == "forward":
        reversed_clips = [clip[::-1].copy() for clip in soft]
        reversed_rewards = _score(world_model, reversed_clips, config, "gate: reversed", active)
        found["time_reversal"] = _accuracy(soft_rewards, reversed_rewards)
    return found


def _score(
    world_model: WorldModel, clips: list[np.ndarray], config: CriticConfig, name: str, active: bool
) -> np.ndarray:
    """Rewards of rendered clips."""
    rewards = []
    for rows in batches(name, len(clips), GATE_CLIPS, active):
        frames = torch.from_numpy(np.stack(clips[rows])).to(world_model.mean.device)
        rewards.append(score_clips(world_model, frames, config).reward.cpu())
    return torch.cat(rewards).numpy()


def _accuracy(better: np.ndarray, worse: np.ndarray) -> float:
    """Share of pairs ranked correctly; a tie counts half."""
    return float(((better > worse) + 0.5 * (better == worse)).mean())


# ---------------------------------------------------------------------------------------------- the policy's samples


def gate_videos(run: Run) -> tuple[Tensor, list[ExactMetrics]] | None:
    """The base policy's own samples [P, n, T, 3, H, W], drawn as stage 2 draws them, with their prompts' exact metrics.

    None where the prompts have none.
    """
    rl_config, gate = run.recipe.rl, run.recipe.gate
    prompts = [exact_metrics(line.text, line.extra) for line in run.prompts[: gate.prompts]]
    if any(prompt is None for prompt in prompts):
        return None
    shape, device = video_latent_shape(run), run.processes.device
    times = tuple(run.generator.times(rl_config.steps, shape))
    window = tuple(range(rl_config.window_start, rl_config.window_start + rl_config.window))
    sampling_plan = SamplingPlan(times, window, rl_config.sampler, rl_config.eta, rl_config.guidance)
    micro_size = math.gcd(gate.samples, rl_config.micro_batch or gate.samples)
    null_text, videos = run.texts([""]), []
    # The base's own samples: what the critic has to rank in the first updates of stage 2.
    with lora.swapped(run.parameters, lora.zeros(run.parameters)):
        for number, prompt in enumerate(prompts):
            noise, step_noise = group_noise(run, "gate", (number,), shape, gate.samples)
            text = run.texts([prompt.caption]).repeat(gate.samples)
            trajectory = sample_videos(
                run.generator, noise.to(device), text, null_text, sampling_plan, step_noise.to(device), micro_size
            )
            videos.append(decode_videos(run.generator, trajectory.final_N, micro_size))
    return torch.stack(videos), prompts


def correlation_on_samples(
    world_model: WorldModel, config: CriticConfig, videos: Tensor, prompts: list[ExactMetrics]
) -> float:
    """Within-prompt Spearman correlation on the policy's videos [P, n, T, 3, H, W]."""
    rewards, severities = [], []
    with Bar("gate: own samples", len(prompts)) as progress_bar:
        for group, prompt in zip(videos, prompts, strict=True):
            rewards.append(score_clips(world_model, group, config).reward.cpu().numpy())
            severities.append([prompt.severity(video.cpu().numpy()) for video in group])
            progress_bar.advance()
    return within_prompt(np.array(rewards), np.array(severities))


def within_prompt(rewards: np.ndarray, severities: np.ndarray) -> float:
    """Mean over prompts [P, n] of Spearman's correlation of reward and minus severity; without spread it is 0."""
    correlations = []
    for of_prompt, soundness in zip(rewards, -severities, strict=True):
        reward_ranks, soundness_ranks = rankdata(of_prompt), rankdata(soundness)
        spread = reward_ranks.std() > 0 and soundness_ranks.std() > 0
        # Within a prompt, since only there rewards are compared; a correlation over all videos would credit a critic
        # for knowing hard prompts from easy ones.
        correlations.append(float(np.corrcoef(reward_ranks, soundness_ranks)[0, 1]) if spread else 0.0)
    return float(np.mean(correlations))


# ---------------------------------------------------------------------------------------------- the verdict


def gate_verdict(found: dict, gate: GateConfig) -> dict:
    """``found`` with every bar next to its value, ``failures`` in words, and ``passed``."""
    failures = []
    if found["all_kinds"] < gate.all_kinds:
        failures.append(
            f"over all kinds {found['all_kinds']:.1%} of pairs are ranked correctly; {gate.all_kinds:.0%} are needed"
        )
    for kind, value in found["kinds"].items():
        if value < gate.each_kind:
            failures.append(f"{kind}: {value:.1%} of pairs are ranked correctly; {gate.each_kind:.0%} are needed")
    for control, value in found["controls"].items():
        if value < gate.each_kind:
            failures.append(
                f"control {control}: ranks below real in {value:.1%} of pairs; {gate.each_kind:.0%} are needed"
            )
    preference = found["restitution_preference"]
    # Both bounces are sound physics: a critic with a taste in them would teach the policy that taste.
    if abs(preference - 0.5) > FAIR_PREFERENCE:
        failures.append(
            f"restitution 1.0 is preferred to 0.6 in {preference:.1%} of pairs; 40-60% would be no preference"
        )
    if "spearman" in found and found["spearman"] < gate.spearman:
        failures.append(
            f"on the policy's own samples reward and exact metrics correlate by {found['spearman']:.2f}; "
            f"{gate.spearman:.2f} is needed"
        )
    return {**found, "bars": to_plain(gate), "failures": failures, "passed": not failures}


def gate_table(result: dict) -> str:
    """The gate's table as text."""
    bars = result["bars"]
    rows = [(kind, value, bars["each_kind"]) for kind, value in result["kinds"].items()]
    rows.append(("all kinds", result["all_kinds"], bars["all_kinds"]))
    rows += [(f"control: {name}", value, bars["each_kind"]) for name, value in result["controls"].items()]
    lines = [f"  {'matched pairs ranked correctly':32} {'found':>7} {'needed':>7}"]
    for name, value, needed in rows:
        lines.append(f"  {name:32} {value:7.1%} {needed:7.0%}  {'' if value >= needed else 'FAILS'}")
    preference = result["restitution_preference"]
    fair = abs(preference - 0.5) <= FAIR_PREFERENCE
    lines.append(f"  {'restitution 1.0 over 0.6':32} {preference:7.1%}  40-60%  {'' if fair else 'FAILS'}")
    if "spearman" in result:
        value, needed = result["spearman"], bars["spearman"]
        passed = "" if value >= needed else "FAILS"
        lines.append(f"  {'Spearman on own samples':32} {value:7.2f} {needed:7.2f}  {passed}")
    return "\n".join(lines)
