"""A run: its folder, its models and its data, loaded once and handed to every stage."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldo import data, generator, lora
from ldo.check import Checked
from ldo.config import Recipe
from ldo.distributed import World, barrier
from ldo.generator import Generator, Options, Text
from ldo.progress import batches
from ldo.sandbox import dataset as sandbox
from ldo.world_model import WorldModel

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Run:
    """What the stages work on. ``parameters`` are the adapter's, by their exported names; ``fresh`` their first values."""

    recipe: Recipe
    world: World
    generator: Generator
    judge: WorldModel
    parameters: dict[str, nn.Parameter]
    fresh: dict[str, Tensor]
    prompts: list[data.PromptLine]
    model_path: str
    clips: list[data.Clip] | None = None
    prepared: Any = None  # stage 1's encoded clips, made on first use

    @property
    def folder(self) -> Path:
        return self.recipe.run

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @cached_property
    def texts(self) -> Texts:
        return Texts(self)

    def checkpoint(self, stage: str) -> Path:
        return self.folder / "checkpoints" / f"{stage}.pt"

    def lora_folder(self, stage: str) -> Path:
        return self.folder / "lora" / stage

    def export(self, stage: str, values: dict[str, Tensor]) -> None:
        """Write an adapter for the stock pipeline and for ComfyUI."""
        if self.world.first:
            adapter = self.recipe.lora
            comfy = {name: self.generator.comfy_names(lora.of(values, name)) for name in self.generator.transformers}
            lora.export(self.lora_folder(stage), values, adapter.rank, adapter.alpha, self.generator.lora_targets, comfy)
        barrier(self.world)

    def frames_of(self, clips: list[data.Clip]) -> Tensor:
        d = self.recipe.data
        return torch.stack([data.load_frames(c, d.frames, d.height, d.width, d.fps) for c in clips])


class Texts:
    """Prompt embeddings, made once each and kept on the CPU."""

    def __init__(self, run: Run):
        self._run, self._known = run, {}

    def __call__(self, prompts: list[str]) -> Text:
        """Embeddings on the run's device."""
        new = sorted(set(prompts) - set(self._known))
        for i in range(0, len(new), 32):
            made = self._run.generator.encode_text(new[i : i + 32]).to("cpu")
            self._known |= dict(zip(new[i : i + 32], made.split(1), strict=True))
        return Text.cat([self._known[p] for p in prompts]).to(self._run.world.device)


def quiet() -> None:
    """Silence the libraries' own loading bars."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def options(recipe: Recipe) -> Options:
    """What the recipe tells a generator beyond its weights."""
    return Options(recipe.model.text_length, recipe.data.fps, recipe.model.guidance)


def load(checked: Checked, world: World) -> Run:
    """Load the models and put a fresh adapter on the generator."""
    quiet()
    recipe = checked.recipe
    prompts = checked.prompts
    if prompts is None:
        path = Path(recipe.out) / "sandbox-data" / f"prompts-{recipe.data.prompt_count}-{recipe.seed}.jsonl"
        if world.first:
            sandbox.write_prompts(path, recipe.data.prompt_count, recipe.seed)
        barrier(world)
        prompts = data.read_prompts(path)
    model = generator.load(recipe.model.family, checked.model, DTYPES[recipe.model.dtype], options(recipe))
    model.pipeline.to(world.device)
    judge = WorldModel.load(checked.world_model, DTYPES[recipe.world_model.dtype]).to(world.device)
    if recipe.model.gradient_checkpointing:
        for transformer in model.transformers.values():
            transformer.enable_gradient_checkpointing()
    parameters = lora.add(model.transformers, recipe.lora.rank, recipe.lora.alpha, model.lora_targets, recipe.seed)
    count = sum(p.numel() for p in parameters.values())
    log.info("generator: %s, LoRA rank %d on %d layers, %.2f M weights", checked.model, recipe.lora.rank, len(parameters) // 2, count / 1e6)
    return Run(recipe, world, model, judge, parameters, lora.snapshot(parameters), prompts, checked.model, checked.clips)


def sandbox_clips(run: Run) -> list[data.Clip]:
    """The sandbox's clips, written on first use and read back like any user's folder."""
    d = run.recipe.data
    folder = Path(run.recipe.out) / "sandbox-data" / f"clips-{d.clips}-{d.height}-{run.seed}"
    if run.world.first:
        log.info("clips: writing %d sandbox clips to %s", d.clips, folder)
        sandbox.write_clips(folder, d.clips, run.seed, size=d.height, fps=d.fps)
    barrier(run.world)
    return data.read_folder(folder, d.frames, d.fps)


def in_batches(run: Run, name: str, count: int, size: int = 32):
    """Slices of a long preparation, with a bar on the first rank."""
    return batches(name, count, size, active=run.world.first)
