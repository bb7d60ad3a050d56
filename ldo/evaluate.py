"""Sample every arm of a run with the stock pipeline and measure it: ``python -m ldo.evaluate RUN``.

Arms: base, sft, aligned, ldo; each is the base folder plus an exported LoRA, loaded as any user would, with the
pipeline's own scheduler, and the same prompts and seeds for all. Metrics come with 95% intervals from a paired
bootstrap over prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldo import critic, data, generator, lora, switches
from ldo.checkpoint import write_text
from ldo.config import Recipe, RecipeError, read
from ldo.distributed import World, barrier, gather_objects, join
from ldo.progress import Bar
from ldo.rng import numpy_rng, torch_rng
from ldo.run import DTYPES, options, quiet
from ldo.sandbox import dataset as sandbox
from ldo.sandbox.measure import measure
from ldo.world_model import WorldModel

log = logging.getLogger(__name__)
ARMS = ("base", "sft", "aligned", "ldo")
METRICS = ("violation_rate", "existence", "law_residual", "teleport_rate", "motion_ratio", "reward_skill", "reward_plain")
BOOTSTRAP = 2000


def prompt_lines(recipe: Recipe) -> list[data.PromptLine]:
    """The evaluation prompts: for the sandbox, scenes that no training stage has drawn."""
    if recipe.evaluate.prompts != "sandbox":
        lines = data.read_prompts(Path(recipe.evaluate.prompts), "evaluate.prompts")
        if len(lines) < recipe.evaluate.count:
            raise RecipeError(f"evaluate.count is {recipe.evaluate.count}, but {recipe.evaluate.prompts} holds {len(lines)} prompts; lower it")
        return lines[: recipe.evaluate.count]
    path = Path(recipe.out) / "sandbox-data" / f"prompts-test-{recipe.evaluate.count}-{recipe.seed}.jsonl"
    sandbox.write_prompts(path, recipe.evaluate.count, recipe.seed, "test")
    return data.read_prompts(path)


def rest_lines(recipe: Recipe) -> list[data.PromptLine]:
    """Sandbox prompts of scenes at rest, which no training stage rewards: one batch of them, reported apart."""
    if recipe.evaluate.prompts != "sandbox":
        return []
    count = max(recipe.evaluate.batch // recipe.evaluate.seeds, 1)
    path = Path(recipe.out) / "sandbox-data" / f"prompts-rest-{count}-{recipe.seed}.jsonl"
    sandbox.write_prompts(path, count, recipe.seed, "test", rest=True)
    return data.read_prompts(path)


def sample(pipeline: Any, recipe: Recipe, lines: list[data.PromptLine], name: str, world: World) -> Iterator[tuple[list[int], Tensor]]:
    """This process's share of the videos by the stock pipeline: their numbers and frames [n, T, 3, H, W] in [0, 1], a batch at a time.

    Seeds of a prompt have numbers side by side. All batches have one shape, so a video does not depend on the number of processes.
    """
    e, d = recipe.evaluate, recipe.data
    arguments = generator.adapter(recipe.model.family)(pipeline, options(recipe)).call_arguments(e.guidance)
    jobs = [(i, s) for i in range(len(lines)) for s in range(e.seeds)]
    mine = range(world.rank * e.batch, len(jobs), world.size * e.batch)
    with Bar(name, len(mine) * e.batch, active=world.first) as bar:
        for start in mine:
            part = jobs[start : start + e.batch]
            result = pipeline(
                prompt=[lines[i].text for i, _ in part],
                height=d.height,
                width=d.width,
                num_frames=d.frames,
                num_inference_steps=e.steps,
                generator=[torch_rng(recipe.seed, "evaluate", i, s) for i, s in part],
                output_type="pt",
                **arguments,
            )
            yield list(range(start, start + len(part))), result.frames.float().cpu()
            bar.advance(by=len(part))


def measure_batch(numbers: list[int], videos: Tensor, lines: list[data.PromptLine], recipe: Recipe, judge: WorldModel) -> list[dict]:
    """One record a video: prompt, seed, exact metrics (sandbox prompts), rewards."""
    scores = critic.score(judge, videos.to(judge.mean.device), recipe.critic, recipe.data.fps)
    records = []
    for k, video, skill, plain in zip(numbers, videos, scores.skill.tolist(), scores.plain.tolist(), strict=True):
        i, seed = divmod(k, recipe.evaluate.seeds)
        record = {"prompt": i, "seed": seed, "text": lines[i].text, "reward_skill": skill, "reward_plain": plain}
        prompt = sandbox.prompt_of(lines[i].text, lines[i].extra)
        if prompt is not None:
            found = asdict(measure(video.numpy(), prompt))
            record |= {"kind": prompt.kind, "path_true": prompt.path_length, "existence": 1 - found["missing"], **found}
        records.append(record)
    return records


# ---------------------------------------------------------------------------------------------- statistics


def _values(records: list[dict]) -> dict[str, np.ndarray]:
    """Per video, what each metric averages; motion_ratio is a ratio of two sums."""
    out = {k: np.array([r[k] for r in records]) for k in ("reward_skill", "reward_plain")}
    if "existence" in records[0]:
        out |= {k: np.array([r[k] for r in records]) for k in ("existence", "law_residual", "teleport_rate")}
        out["violation_rate"] = np.array([float(bool(r["violations"])) for r in records])
        out["path"], out["path_true"] = (np.array([r[k] for r in records]) for k in ("path_length", "path_true"))
    return out


def _summary(values: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    out = {k: float(values[k][rows].mean()) for k in METRICS if k in values}
    if "path" in values:
        out["motion_ratio"] = float(values["path"][rows].sum() / values["path_true"][rows].sum())
    return out


def statistics(arms: dict[str, list[dict]], seeds: int, seed: int) -> tuple[dict, dict]:
    """Per arm {metric: {mean, low, high}}, and the same of each arm's difference from the base.

    The bootstrap draws prompts with replacement and, within each, seeds; all arms see the same draws (paired).
    """
    values = {name: _values(records) for name, records in arms.items()}
    count = len(next(iter(arms.values()))) // seeds
    rng = numpy_rng(seed, "bootstrap")
    draws = rng.integers(count, size=(BOOTSTRAP, count, 1)) * seeds + rng.integers(seeds, size=(BOOTSTRAP, count, seeds))
    everything = np.arange(count * seeds)
    centre = {name: _summary(v, everything) for name, v in values.items()}
    boots = {name: [_summary(v, d.ravel()) for d in draws] for name, v in values.items()}

    def interval(samples: list[float], mean: float) -> dict[str, float]:
        low, high = np.quantile(samples, [0.025, 0.975])
        return {"mean": mean, "low": float(low), "high": float(high)}

    metrics = {n: {k: interval([b[k] for b in boots[n]], c) for k, c in centre[n].items()} for n in arms}
    paired = {
        n: {k: interval([b[k] - a[k] for b, a in zip(boots[n], boots["base"], strict=True)], c - centre["base"][k]) for k, c in centre[n].items()}
        for n in arms
        if n != "base" and "base" in arms
    }
    return metrics, paired


# ---------------------------------------------------------------------------------------------- the run


def arm_records(
    pipeline: Any, recipe: Recipe, lines: list[data.PromptLine], name: str, judge: WorldModel, world: World, keep: Path | None = None
) -> list[dict]:
    """The records of all of an arm's videos, sampled and measured by all processes together; ``keep`` is where videos are written."""
    found = []
    for numbers, videos in sample(pipeline, recipe, lines, name, world):
        for k, video in zip(numbers, videos, strict=True):
            if keep:
                i, seed = divmod(k, recipe.evaluate.seeds)
                data.write_video(keep / f"{i:04d}-{seed}.mp4", sandbox.to_images(video.numpy()), recipe.data.fps)
        found += zip(numbers, measure_batch(numbers, videos, lines, recipe, judge), strict=True)
    everyone = [pair for part in gather_objects(found, world) for pair in part]
    return [record for _, record in sorted(everyone, key=lambda pair: pair[0])]


def evaluate(recipe: Recipe, model_path: str, world_model_path: str, world: World) -> dict:
    """Sample and measure every arm that the run has; arms already measured are kept. Writes ``eval/`` in the run's folder."""
    quiet()
    folder = recipe.run / "eval"
    if world.first:  # writes the sandbox's prompts, which the others then read
        prompt_lines(recipe), rest_lines(recipe)
    barrier(world)
    lines, rest = prompt_lines(recipe), rest_lines(recipe)
    arms = ["base", *(a for a in ARMS[1:] if (recipe.run / "lora" / a).is_dir())]
    device, judge = world.device, None
    records, at_rest = {}, {}
    for arm in arms:
        path = folder / f"{arm}.json"
        if not gather_objects(path.exists(), world)[0]:
            from diffusers import DiffusionPipeline

            judge = judge or WorldModel.load(world_model_path, DTYPES[recipe.world_model.dtype]).to(device)
            pipeline = DiffusionPipeline.from_pretrained(model_path, dtype=DTYPES[recipe.model.dtype]).to(device)
            pipeline.set_progress_bar_config(disable=True)
            switches.ease_vae(pipeline.vae, recipe.model.vae_tiling, recipe.model.vae_slicing)
            if arm != "base":
                lora.load_into(pipeline, recipe.run / "lora" / arm)
            moving = arm_records(pipeline, recipe, lines, f"eval {arm}", judge, world, folder / arm)
            still = arm_records(pipeline, recipe, rest, f"rest {arm}", judge, world) if rest else []
            if world.first:
                write_text(path, json.dumps({"moving": moving, "rest": still}))
            barrier(world)
        found = json.loads(path.read_text())
        records[arm] = found["moving"]
        if found["rest"]:
            at_rest[arm] = sum(bool(r["violations"]) for r in found["rest"]) / len(found["rest"])
    metrics, paired = statistics(records, recipe.evaluate.seeds, recipe.seed)
    result = {"metrics": metrics, "paired": paired, "n_videos": {a: len(r) for a, r in records.items()}, "at_rest": at_rest}
    if world.first:
        write_text(folder / "summary.json", json.dumps(result, indent=1))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.evaluate", description="Sample and measure every arm of a run.")
    parser.add_argument("run", help="folder of a run, e.g. runs/sandbox")
    args = parser.parse_args(argv)
    from ldo.check import check

    try:
        path = Path(args.run) / "recipe.yaml"
        if not path.is_file():
            raise RecipeError(f"{args.run} is not the folder of a run: it has no recipe.yaml")
        checked = check(read(path))
        result = evaluate(checked.recipe, checked.model, checked.world_model, join(checked.recipe.device))
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    for arm, metrics in result["metrics"].items():
        print(f"{arm:8}", "  ".join(f"{k} {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for k, v in metrics.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
