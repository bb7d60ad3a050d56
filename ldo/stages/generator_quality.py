"""How good a sandbox generator is, compared with the shipped one (``python -m ldo.sandbox.build.quality``).

The shipped generator and each FOLDER, on the same clips, noise and prompts:

    flow loss      of clips that no training has drawn, at four noise levels; ``seen``: of clips that training had
    resampled      valid clips noised to a level and sampled down again: the share that is visibly wrong in each metric,
                   and the law residual's median
    samples        sampled and measured as by ``ldo.evaluate``, with intervals and differences from the shipped one; the
                   share of videos that is visibly wrong in each metric; the law residual's median; the existence of
                   scenes with one ball and with two; and, of what is visibly wrong, the share that is as wrong as
                   planted clips are

As wrong as planted clips are those whose severity reaches that of the weakest tenth of clips that were broken on
purpose. What is left is the generator's own imprecision.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ldo.core.config import DEFAULT_RECIPE
from ldo.core.distributed import Processes
from ldo.core.progress import quiet_libraries
from ldo.core.recipe_file import read_recipe
from ldo.core.rng import torch_rng
from ldo.data.captions import PromptLine
from ldo.models import flow
from ldo.models.generator.protocol import Generator, Text
from ldo.models.world_model import WorldModel
from ldo.sandbox import simulate
from ldo.sandbox.build.calibrate import broken_clips, through_vae, valid_clips
from ldo.sandbox.build.further.clips import LatentClips, load_latent_clips
from ldo.sandbox.build.further.slices import load_generator_folder
from ldo.sandbox.corrupt import PLANTED
from ldo.sandbox.measure import Measured, measure, severity
from ldo.sandbox.observe import Prompt
from ldo.sandbox.shipped import WORLD_MODEL
from ldo.stages.arm_statistics import arm_statistics, visible_shares
from ldo.stages.evaluate import arm_records, prompt_lines

TIMES = (0.2, 0.45, 0.7, 0.9)
LEVELS = (0.45, 0.75)
BATCH = 64
PLANTED_CLIPS = 40  # of each planted kind
HELD_OUT = 1  # seed of the clips that no training has drawn


@torch.no_grad()
def flow_losses(model: Generator, data: LatentClips) -> dict[str, float]:
    """Mean squared error of the velocity at each of TIMES, over all of ``data`` with their captions, on fixed noise."""
    losses = {}
    for time in TIMES:
        total = 0.0
        for start in range(0, len(data.latents), BATCH):
            clean = data.latents[start : start + BATCH].float()
            texts = data.texts[data.caption[start : start + BATCH]]
            # The noise depends on the batch only, so that all generators and all times get the same.
            noise = torch.randn(clean.shape, generator=torch_rng(0, "quality flow", start)).to(clean.device)
            times_B = torch.full((len(clean),), time, device=clean.device)
            velocity = model.velocity(flow.noisy(clean, noise, times_B), times_B, Text({"embeds": texts}))
            total += (velocity - (noise - clean)).square().mean().item() * len(clean)
        losses[str(time)] = total / len(data.latents)
    return losses


@torch.no_grad()
def resampled(model: Generator, tracks: list[simulate.Track], level: float, steps: int) -> list[Measured]:
    """Valid clips noised to ``level``, brought down by the ODE in ``steps`` steps, and measured."""
    time_shift = model.shift((1,))
    # the uniform number that the shift takes to ``level``
    highest = level / (time_shift - (time_shift - 1) * level)
    times = flow.training_times(torch.linspace(highest, 0, steps + 1), time_shift).tolist()
    measured = []
    for start in range(0, len(tracks), BATCH):
        batch = tracks[start : start + BATCH]
        frames = torch.from_numpy(np.stack([simulate.render(track) for track in batch])).float()
        clean = model.encode_video(frames.to(model.device))
        text = model.encode_text([track.scene.caption for track in batch])
        noise = torch.randn(clean.shape, generator=torch_rng(0, f"quality {level}", start)).to(clean.device)
        latents = flow.noisy(clean, noise, torch.full((len(batch),), times[0], device=clean.device))
        for time, next_time in pairwise(times):
            velocity = model.velocity(latents, torch.full((len(batch),), time, device=latents.device), text)
            latents, _ = flow.transition(latents, velocity, time, next_time)
        videos = model.decode_video(latents).cpu().numpy()
        for video, track in zip(videos, batch, strict=True):
            measured.append(measure(video, Prompt.of(track.scene)))
    return measured


def planted_severity(model: Generator) -> float:
    """The severity that nine in ten planted clips reach, through the generator's VAE."""
    tracks = [track for kind in PLANTED for track in broken_clips(HELD_OUT, kind, PLANTED_CLIPS)]
    videos = through_vae(model.vae.float(), [simulate.render(track) for track in tracks])
    found = [
        severity(measure(video, Prompt.of(track.scene)), track.scene.kind)
        for video, track in zip(videos, tracks, strict=True)
    ]
    return float(np.quantile(found, 0.1))


def sample_precision(records: list[dict], prompts: list[PromptLine], planted: float) -> dict[str, float]:
    """What is asked of a base for LDO: precise paths, balls that exist, and violations like those that were planted."""
    balls = [len(prompts[record["prompt"]].extra["colours"]) for record in records]
    found = {"law_residual_median": float(np.median([record["law_residual"] for record in records]))}
    for count in sorted(set(balls)):
        of_count = [record["existence"] for record, own in zip(records, balls, strict=True) if own == count]
        found[f"existence_{count}_balls"] = float(np.mean(of_count))
    wrong = [record["severity"] for record in records if record["visible"]]
    # Without anything wrong there is nothing to be like.
    found["as_strong_as_planted"] = float(np.mean(np.array(wrong) >= planted)) if wrong else float("nan")
    return found


def compare_generators(
    folders: dict[str, Path], cache: Path, device: str, loss_clips: int, sound_clips: int, prompts: int
) -> dict:
    """Everything above for each named folder; ``base`` is what the others are compared with."""
    quiet_libraries()
    processes = Processes(device=torch.device(device))
    recipe = read_recipe(DEFAULT_RECIPE, [f"out={cache}", f"evaluate.count={prompts}"])
    prompt_texts = prompt_lines(recipe)
    world_model = WorldModel.load(str(WORLD_MODEL)).to(device)
    # Drawn once: every generator is measured on the same clips.
    tracks = valid_clips(HELD_OUT, "quality", sound_clips)
    results = {}
    records = {}
    for name, folder in folders.items():
        model = load_generator_folder(folder)
        model.pipeline.to(device).set_progress_bar_config(disable=True)
        # Both sets are rendered and encoded once, and kept in the cache for the next generator and the next comparison.
        unseen = load_latent_clips(cache, model, loss_clips, device, HELD_OUT)
        seen = load_latent_clips(cache, model, loss_clips, device)
        result = {"flow_loss": flow_losses(model, unseen), "flow_loss_seen": flow_losses(model, seen)}
        for level in LEVELS:
            measured = resampled(model, tracks, level, recipe.evaluate.steps)
            residual = float(np.median([clip.law_residual for clip in measured]))
            shares = visible_shares([asdict(clip) for clip in measured])
            result[f"resampled_{level}"] = shares | {"law_residual_median": residual}
        records[name] = arm_records(model.pipeline, recipe, prompt_texts, f"samples: {name}", world_model, processes)
        result["samples_visible"] = visible_shares(records[name])
        result["samples_precision"] = sample_precision(records[name], prompt_texts, planted_severity(model))
        results[name] = result
        losses = ", ".join(f"{loss:.4f} at {time}" for time, loss in result["flow_loss"].items())
        print(f"{name}: flow loss {losses}", flush=True)
        precision = ", ".join(f"{key} {value:.3f}" for key, value in result["samples_precision"].items())
        print(f"{name}: visibly wrong {result['samples_visible']['any']:.3f}, {precision}", flush=True)
    # Statistics come last: the intervals of the differences pair each generator's samples with those of ``base``.
    metrics, minus_base = arm_statistics(records, recipe.evaluate.seeds, recipe.seed)
    for name, result in results.items():
        result["samples"] = metrics[name]
        result["samples_minus_base"] = minus_base.get(name, {})
    return {
        "device": device,
        "torch": torch.__version__,
        "loss_clips": loss_clips,
        "sound_clips": sound_clips,
        "prompts": prompts,
        "seeds": recipe.evaluate.seeds,
        "steps": recipe.evaluate.steps,
        "models": results,
    }
