"""Sample every arm of a run with the stock pipeline and measure it.

Arms: base, sft, aligned, ldo; each is the base folder plus an exported LoRA, loaded as any user would, with the
pipeline's own scheduler, and the same prompts and seeds for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ldo.core.config import Recipe
from ldo.core.distributed import Processes, barrier, gather_objects
from ldo.core.errors import RecipeError
from ldo.core.files import write_text
from ldo.core.progress import Bar, quiet_libraries
from ldo.core.rng import torch_rng
from ldo.data.captions import PromptLine, read_prompts
from ldo.data.video import to_images, write_video
from ldo.method.critic import score_clips
from ldo.models import lora
from ldo.models.efficiency import reduce_vae_memory
from ldo.models.generator.families import family_adapter
from ldo.models.world_model import WorldModel
from ldo.run.load import DTYPES, generator_options
from ldo.sandbox.dataset import data_folder, write_prompts
from ldo.sandbox.exact import exact_metrics
from ldo.sandbox.records import broken_laws
from ldo.stages.arm_statistics import arm_statistics, visible_shares

ARMS = ("base", "sft", "aligned", "ldo")


def evaluate_arms(recipe: Recipe, model_path: str, world_model_path: str, processes: Processes) -> dict:
    """Sample and measure every arm that the run has; arms already measured are kept. Writes ``eval/`` in its folder."""
    quiet_libraries()
    folder = recipe.run / "eval"
    if processes.first:
        # writes the sandbox's prompts, which the others then read
        prompt_lines(recipe)
        rest_lines(recipe)
    barrier(processes)
    lines, rest = prompt_lines(recipe), rest_lines(recipe)
    arms = ["base", *(arm for arm in ARMS[1:] if (recipe.run / "lora" / arm).is_dir())]
    world_model = None
    records, at_rest = {}, {}
    for arm in arms:
        path = folder / f"{arm}.json"
        # The first process's answer counts for all: another might look after the file was written.
        if not gather_objects(path.exists(), processes)[0]:
            if world_model is None:
                world_model = WorldModel.load(world_model_path, DTYPES[recipe.world_model.dtype])
                world_model = world_model.to(processes.device)
            # A fresh pipeline for each arm, through load_lora_weights: what is measured is what a user will get from
            # the files.
            pipeline = _load_arm(recipe, model_path, arm, processes)
            moving = arm_records(pipeline, recipe, lines, f"eval {arm}", world_model, processes, folder / arm)
            still = arm_records(pipeline, recipe, rest, f"rest {arm}", world_model, processes) if rest else []
            if processes.first:
                write_text(path, json.dumps({"moving": moving, "rest": still}))
            barrier(processes)
        found = json.loads(path.read_text())
        records[arm] = found["moving"]
        if found["rest"]:
            at_rest[arm] = sum(bool(broken_laws(record)) for record in found["rest"]) / len(found["rest"])
    metrics, paired = arm_statistics(records, recipe.evaluate.seeds, recipe.seed)
    counts = {arm: len(videos) for arm, videos in records.items()}
    visible = {arm: visible_shares(videos) for arm, videos in records.items()}
    result = {"metrics": metrics, "paired": paired, "n_videos": counts, "at_rest": at_rest, "visible": visible}
    if processes.first:
        write_text(folder / "summary.json", json.dumps(result, indent=1))
    return result


def _load_arm(recipe: Recipe, model_path: str, arm: str, processes: Processes) -> Any:
    """The stock pipeline with an arm's LoRA, as any user would load it."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model_path, dtype=DTYPES[recipe.model.dtype]).to(processes.device)
    pipeline.set_progress_bar_config(disable=True)
    reduce_vae_memory(pipeline.vae, recipe.model.vae_tiling, recipe.model.vae_slicing)
    if arm != "base":
        lora.load_into(pipeline, recipe.run / "lora" / arm)
    return pipeline


# ---------------------------------------------------------------------------------------------- prompts


def prompt_lines(recipe: Recipe) -> list[PromptLine]:
    """The evaluation prompts: for the sandbox, scenes that no training stage has seen."""
    evaluate = recipe.evaluate
    if evaluate.prompts != "sandbox":
        lines = read_prompts(Path(evaluate.prompts), "evaluate.prompts")
        if len(lines) < evaluate.count:
            raise RecipeError(
                f"evaluate.count is {evaluate.count}, but {evaluate.prompts} holds {len(lines)} prompts; lower it"
            )
        return lines[: evaluate.count]
    path = data_folder(recipe.out) / f"prompts-test-{evaluate.count}-{recipe.seed}.jsonl"
    write_prompts(path, evaluate.count, recipe.seed, "test")
    return read_prompts(path)


def rest_lines(recipe: Recipe) -> list[PromptLine]:
    """Sandbox prompts of scenes at rest, which no training stage rewards: one batch of them, reported apart."""
    if recipe.evaluate.prompts != "sandbox":
        return []
    count = max(recipe.evaluate.batch // recipe.evaluate.seeds, 1)
    path = data_folder(recipe.out) / f"prompts-rest-{count}-{recipe.seed}.jsonl"
    write_prompts(path, count, recipe.seed, "test", rest=True)
    return read_prompts(path)


# ---------------------------------------------------------------------------------------------- videos


def arm_records(
    pipeline: Any,
    recipe: Recipe,
    lines: list[PromptLine],
    name: str,
    world_model: WorldModel,
    processes: Processes,
    keep: Path | None = None,
) -> list[dict]:
    """The records of all of an arm's videos, sampled and measured by all processes together.

    ``keep`` is the folder that videos are written to, as ``<prompt>-<seed>.mp4``.
    """
    found = []
    for numbers, videos in sample_arm(pipeline, recipe, lines, name, processes):
        if keep:
            for number, video in zip(numbers, videos, strict=True):
                prompt, seed = divmod(number, recipe.evaluate.seeds)
                write_video(keep / f"{prompt:04d}-{seed}.mp4", to_images(video.numpy()), recipe.data.fps)
        records = measure_batch(numbers, videos, lines, recipe, world_model)
        found += zip(numbers, records, strict=True)
    # Numbers travel with their records, so that the order is that of one process.
    everyone = [pair for part in gather_objects(found, processes) for pair in part]
    return [record for _, record in sorted(everyone, key=lambda pair: pair[0])]


def sample_arm(
    pipeline: Any, recipe: Recipe, lines: list[PromptLine], name: str, processes: Processes
) -> Iterator[tuple[list[int], Tensor]]:
    """This process's share of an arm's videos, a batch at a time: their numbers and frames [n, T, 3, H, W] in [0, 1].

    The seeds of a prompt have consecutive numbers. All batches have one shape, so a video does not depend on the number
    of processes.
    """
    evaluate, data = recipe.evaluate, recipe.data
    adapter = family_adapter(recipe.model.family)(pipeline, generator_options(recipe))
    arguments = adapter.call_arguments(evaluate.guidance)
    jobs = [(prompt, seed) for prompt in range(len(lines)) for seed in range(evaluate.seeds)]
    # Whole batches are dealt out: a video's rounding depends on the batch it is sampled in.
    starts = range(processes.rank * evaluate.batch, len(jobs), processes.size * evaluate.batch)
    with Bar(name, len(starts) * evaluate.batch, active=processes.first) as progress_bar:
        for start in starts:
            batch = jobs[start : start + evaluate.batch]
            result = pipeline(
                prompt=[lines[prompt].text for prompt, _ in batch],
                height=data.height,
                width=data.width,
                num_frames=data.frames,
                num_inference_steps=evaluate.steps,
                generator=[torch_rng(recipe.seed, "evaluate", prompt, seed) for prompt, seed in batch],
                output_type="pt",
                **arguments,
            )
            yield list(range(start, start + len(batch))), result.frames.float().cpu()
            progress_bar.advance(by=len(batch))


def measure_batch(
    numbers: list[int], videos: Tensor, lines: list[PromptLine], recipe: Recipe, world_model: WorldModel
) -> list[dict]:
    """One record for each video: prompt, seed, rewards, and exact metrics where its prompt has them."""
    scores = score_clips(world_model, videos.to(world_model.mean.device), recipe.critic, recipe.data.fps)
    rewards = zip(scores.skill.tolist(), scores.plain.tolist(), strict=True)
    records = []
    for number, video, (skill, plain) in zip(numbers, videos, rewards, strict=True):
        prompt, seed = divmod(number, recipe.evaluate.seeds)
        line = lines[prompt]
        record = {"prompt": prompt, "seed": seed, "text": line.text, "reward_skill": skill, "reward_plain": plain}
        exact = exact_metrics(line.text, line.extra)
        if exact is not None:
            record |= exact.record(video.numpy())
        records.append(record)
    return records
