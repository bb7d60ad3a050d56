"""Self mode: stage 1 on the base model's own videos of the prompts, since the method promises no new data."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ldo.core.batch_sizes import SELF_CLIPS
from ldo.core.distributed import barrier, gather_objects
from ldo.core.files import write_json_lines
from ldo.core.rng import torch_rng
from ldo.data.folder import Clip
from ldo.data.video import to_images, write_video
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
    data, size = recipe.data, recipe.rl.micro_batch or SELF_CLIPS
    shape = run.generator.geometry.latents(data.frames, data.height, data.width)
    times = tuple(run.generator.times(recipe.evaluate.steps, shape))
    # As the evaluation samples: the clips should be what the base shows at its best.
    sampling_plan = SamplingPlan(times, (), "flow", 0.0, recipe.evaluate.guidance)
    null_text = run.texts([""])
    with lora.swapped(run.parameters, lora.zeros(run.parameters)):
        for number, rows in enumerate(in_batches(run, "self", len(captions), size)):
            written = range(rows.start, rows.stop)
            if number % processes.size != processes.rank or all((part / _name(index)).exists() for index in written):
                continue
            # a last short batch is filled up, so that all batches have one shape
            batch = [index % len(captions) for index in range(rows.start, rows.start + size)]
            drawn = [torch.randn((1, *shape), generator=torch_rng(run.seed, "self", index)) for index in batch]
            noise = torch.cat(drawn).to(processes.device)
            no_step_noise = draw_step_noise(noise.shape, 0, torch_rng(run.seed, "self"))
            text = run.texts([captions[index] for index in batch])
            final = sample_videos(run.generator, noise, text, null_text, sampling_plan, no_step_noise, size).final_N
            videos = decode_videos(run.generator, final, size).cpu()
            for index, frames in zip(written, videos, strict=False):
                # under a hidden name until it is whole: a name that is there means a clip that is done
                hidden = part / f".{_name(index)}"
                write_video(hidden, to_images(frames.numpy()), data.fps)
                hidden.replace(part / _name(index))
