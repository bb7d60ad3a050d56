"""Self mode: stage 1 on the base model's own videos of the prompts, for the method promises no new data."""

from __future__ import annotations

import json
import logging
import shutil

import torch

from ldo import data, lora
from ldo.distributed import barrier
from ldo.rng import torch_rng
from ldo.rollout import Plan, decode, kicks, sample
from ldo.run import Run, in_batches
from ldo.sandbox.dataset import to_images

log = logging.getLogger(__name__)
BATCH = 16


def own_clips(run: Run) -> list[data.Clip]:
    """``data.clips`` samples of the base model, prompt after prompt, written once to ``<run>/self`` and read back."""
    recipe, folder = run.recipe, run.folder / "self"
    d = recipe.data
    if run.world.first and not folder.is_dir():
        log.info("self mode: sampling %d clips from the base model", d.clips)
        part = folder.with_name("self.part")
        shutil.rmtree(part, ignore_errors=True)
        shape = run.generator.geometry.latents(d.frames, d.height, d.width)
        plan = Plan(tuple(run.generator.times(recipe.evaluate.steps, shape)), (), "flow", 0.0, recipe.evaluate.guidance)
        null = run.texts([""])
        lines = []
        with lora.swapped(run.parameters, lora.zeros(run.parameters)):
            for rows in in_batches(run, "self", d.clips, BATCH):
                index = [i % d.clips for i in range(rows.start, rows.start + BATCH)]  # a last short batch is filled up
                prompts = [run.prompts[i % len(run.prompts)] for i in index]
                noise = torch.cat([torch.randn((1, *shape), generator=torch_rng(run.seed, "self", i)) for i in index]).to(run.world.device)
                text = run.texts([p.text for p in prompts])
                no_kicks = kicks(noise.shape, 0, torch_rng(run.seed, "self"))
                final = sample(run.generator, noise, text, null, plan, no_kicks, BATCH).final_N
                for i, prompt, frames in zip(index, prompts, decode(run.generator, final, BATCH).cpu(), strict=True):
                    if i < rows.stop and i >= rows.start:
                        name = f"{i:05d}.mp4"
                        data.write_video(part / name, to_images(frames.numpy()), d.fps)
                        lines.append({"file_name": name, "text": prompt.text, **prompt.extra})
        (part / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        part.rename(folder)
    barrier(run.world)
    return run.read_own(folder)
