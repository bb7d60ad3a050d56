"""Self mode: stage 1 on the base model's own videos of the prompts, for the method promises no new data."""

from __future__ import annotations

import json
import logging

import torch

from ldo import data, lora
from ldo.distributed import barrier, gather_objects
from ldo.rng import torch_rng
from ldo.rollout import Plan, decode, kicks, sample
from ldo.run import Run, in_batches
from ldo.sandbox.dataset import to_images

log = logging.getLogger(__name__)
BATCH = 16


def own_clips(run: Run) -> list[data.Clip]:
    """``data.clips`` samples of the base model, prompt after prompt, written once to ``<run>/self`` and read back.

    Processes share the batches; a run that was killed goes on after the last one written.
    """
    recipe, folder = run.recipe, run.folder / "self"
    d, size = recipe.data, recipe.rl.micro_batch or BATCH
    if gather_objects(folder.is_dir(), run.world)[0]:
        return run.read_own(folder)
    if run.world.first:
        log.info("self mode: sampling %d clips from the base model", d.clips)
    part = folder.with_name("self.part")
    shape = run.generator.geometry.latents(d.frames, d.height, d.width)
    plan = Plan(tuple(run.generator.times(recipe.evaluate.steps, shape)), (), "flow", 0.0, recipe.evaluate.guidance)
    null = run.texts([""])
    lines = [run.prompts[i % len(run.prompts)] for i in range(d.clips)]
    with lora.swapped(run.parameters, lora.zeros(run.parameters)):
        for number, rows in enumerate(in_batches(run, "self", d.clips, size)):
            if number % run.world.size != run.world.rank or all((part / f"{i:05d}.mp4").exists() for i in range(rows.start, rows.stop)):
                continue
            index = [i % d.clips for i in range(rows.start, rows.start + size)]  # a last short batch is filled up
            noise = torch.cat([torch.randn((1, *shape), generator=torch_rng(run.seed, "self", i)) for i in index]).to(run.world.device)
            text = run.texts([lines[i].text for i in index])
            no_kicks = kicks(noise.shape, 0, torch_rng(run.seed, "self"))
            final = sample(run.generator, noise, text, null, plan, no_kicks, size).final_N
            for i, frames in zip(range(rows.start, rows.stop), decode(run.generator, final, size).cpu(), strict=False):
                whole, name = part / f"{i:05d}.mp4", part / f".{i:05d}.mp4"
                data.write_video(name, to_images(frames.numpy()), d.fps)
                name.replace(whole)
    barrier(run.world)
    if run.world.first:
        rows = [{"file_name": f"{i:05d}.mp4", "text": line.text, **line.extra} for i, line in enumerate(lines)]
        (part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        part.rename(folder)
    barrier(run.world)
    return run.read_own(folder)
