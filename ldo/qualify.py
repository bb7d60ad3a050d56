"""Stage 0 of a run: qualify the critic, write ``gate.json``, and stop where it fails."""

from __future__ import annotations

import json
import math

import torch

from ldo import gate, lora
from ldo.checkpoint import write_text
from ldo.distributed import barrier
from ldo.reinforce import group_noise, latent_shape
from ldo.rollout import Plan, decode, sample
from ldo.run import Run
from ldo.sandbox.dataset import prompt_of
from ldo.update import TrainingError


def gate_videos(run: Run) -> tuple[torch.Tensor, list] | None:
    """The base policy's own samples [P, n, T, 3, H, W] of sandbox prompts, drawn as stage 2 draws them; None elsewhere."""
    rl, g = run.recipe.rl, run.recipe.gate
    prompts = [prompt_of(line.text, line.extra) for line in run.prompts[: g.prompts]]
    if any(p is None for p in prompts):
        return None
    shape = latent_shape(run)
    times = tuple(run.generator.times(rl.steps, shape))
    plan = Plan(times, tuple(range(rl.window_start, rl.window_start + rl.window)), rl.sampler, rl.eta, rl.guidance)
    null, videos, micro = run.texts([""]), [], math.gcd(g.samples, rl.micro_batch or g.samples)
    with lora.swapped(run.parameters, lora.zeros(run.parameters)):
        for number, prompt in enumerate(prompts):
            noise, pushes = group_noise(run, "gate", (number,), shape, g.samples)
            text = run.texts([prompt.caption]).repeat(g.samples)
            trajectory = sample(run.generator, noise.to(run.world.device), text, null, plan, pushes.to(run.world.device), micro)
            videos.append(decode(run.generator, trajectory.final_N, micro))
    return torch.stack(videos), prompts


def qualify(run: Run) -> dict:
    """The gate's result, from ``gate.json`` where this run has one."""
    path = run.folder / "gate.json"
    if not path.exists() and run.world.first:
        found = gate.matched_pairs(run.judge, run.recipe.critic, run.recipe.gate.pairs, active=True)
        own = gate_videos(run)
        if own is not None:
            found["spearman"] = gate.own_samples(run.judge, run.recipe.critic, *own)
        write_text(path, json.dumps(gate.verdict(found, run.recipe.gate), indent=1))
    barrier(run.world)
    return json.loads(path.read_text())


def enforce(run: Run) -> None:
    """Print the table; TrainingError where the critic failed and the recipe does not override."""
    result = qualify(run)
    if run.world.first:
        print(f"gate: {'passed' if result['passed'] else 'FAILED'}\n{gate.table(result)}", flush=True)
    if not result["passed"] and not run.recipe.gate.override:
        raise TrainingError(
            f"the critic failed the gate: {'; '.join(result['failures'])}. Train the world model further, choose other critic settings, "
            "or set gate.override=true to go on all the same"
        )
