"""Self mode: stage 1 on the base model's own videos of the prompts, since the method promises no new data.

With ``data.best_of`` above 1 each clip is the one that the critic likes best among so many samples (rejection
sampling): a model that learns from all its samples alike learns its errors once more.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from ldo.core.batch_sizes import SELF_CLIPS
from ldo.core.distributed import barrier, gather_objects
from ldo.core.files import write_json_lines
from ldo.core.rng import torch_rng
from ldo.data.folder import Clip
from ldo.data.video import to_images, write_video
from ldo.method.critic import score_clips
from ldo.method.rollout import SamplingPlan, decode_videos, draw_step_noise, sample_videos
from ldo.models import lora
from ldo.run.state import Run, in_batches

log = logging.getLogger(__name__)


def sample_own_clips(run: Run) -> list[Clip]:
    """``data.clips`` samples of the base model, prompt after prompt, written once to ``<run>/self`` and read back.

    Processes share the batches; a run that was killed continues after the last clip written.
    """
    folder = run.folder / "self"
    if gather_objects(folder.is_dir(), run.processes)[0]:
        return run.read_own(folder)
    count = run.recipe.data.clips
    if run.processes.first:
        log.info("self mode: sampling %d clips from the base model", count)
    # The folder gets its name when it is whole; until then a kill leaves a part that is continued.
    part = folder.with_name("self.part")
    lines = [run.prompts[index % len(run.prompts)] for index in range(count)]
    _sample_missing(run, part, [line.text for line in lines])
    barrier(run.processes)
    if run.processes.first:
        rows = [{"file_name": _name(index), "text": line.text, **line.extra} for index, line in enumerate(lines)]
        write_json_lines(part / "metadata.jsonl", rows)
        part.rename(folder)
    barrier(run.processes)
    return run.read_own(folder)


def _name(index: int) -> str:
    return f"{index:05d}.mp4"


def _sample_missing(run: Run, part: Path, captions: list[str]) -> None:
    """Sample this process's batches into ``part``, but for those that are there already."""
    recipe, processes = run.recipe, run.processes
    size = recipe.rl.micro_batch or SELF_CLIPS
    with lora.swapped(run.parameters, lora.zeros(run.parameters)):
        for number, rows in enumerate(in_batches(run, "self", len(captions), size)):
            written = range(rows.start, rows.stop)
            if number % processes.size != processes.rank or all((part / _name(index)).exists() for index in written):
                continue
            # a last short batch is filled up, so that all batches have one shape
            batch = [index % len(captions) for index in range(rows.start, rows.start + size)]
            videos = _best_videos(run, batch, [captions[index] for index in batch])
            for index, frames in zip(written, videos, strict=False):
                # under a hidden name until it is whole: a name that is there means a clip that is done
                hidden = part / f".{_name(index)}"
                write_video(hidden, to_images(frames.numpy()), recipe.data.fps)
                hidden.replace(part / _name(index))


def _best_videos(run: Run, clips: list[int], captions: list[str]) -> Tensor:
    """A video [n, T, 3, H, W] for each clip number: of ``data.best_of`` samples the one with the highest reward."""
    recipe = run.recipe
    best, highest = _sampled_videos(run, clips, captions, 0), None
    for candidate in range(1, recipe.data.best_of):
        if highest is None:
            highest = _rewards(run, best)
        videos = _sampled_videos(run, clips, captions, candidate)
        rewards = _rewards(run, videos)
        better = rewards > highest
        best[better] = videos[better]
        highest = torch.maximum(highest, rewards)
    return best


def _rewards(run: Run, videos: Tensor) -> Tensor:
    frames = videos.to(run.processes.device)
    return score_clips(run.world_model, frames, run.recipe.critic, run.recipe.data.fps).reward.cpu()


def _sampled_videos(run: Run, clips: list[int], captions: list[str], candidate: int) -> Tensor:
    """Videos [n, T, 3, H, W] in [0, 1] on the CPU, each a function of the seed, its clip's number and ``candidate``."""
    recipe, device = run.recipe, run.processes.device
    data, size = recipe.data, len(clips)
    shape = run.generator.geometry.latents(data.frames, data.height, data.width)
    times = tuple(run.generator.times(recipe.evaluate.steps, shape))
    # As the evaluation samples: the clips should be what the base shows at its best.
    sampling_plan = SamplingPlan(times, (), "flow", 0.0, recipe.evaluate.guidance)
    # The first candidate is what there is without a choice.
    purposes = [("self", index, candidate) if candidate else ("self", index) for index in clips]
    noise = torch.cat([torch.randn((1, *shape), generator=torch_rng(run.seed, *purpose)) for purpose in purposes])
    no_step_noise = draw_step_noise(noise.shape, 0, torch_rng(run.seed, "self"))
    sampled = sample_videos(
        run.generator, noise.to(device), run.texts(captions), run.texts([""]), sampling_plan, no_step_noise, size
    )
    return decode_videos(run.generator, sampled.final_N, size).cpu()
