"""A run: its folder, its models and its data, loaded once and handed to every stage."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ldo import attention, cache, data, generator, lora, switches
from ldo.check import Checked
from ldo.config import Recipe
from ldo.distributed import World, barrier
from ldo.generator import Generator, Options, Text
from ldo.progress import batches
from ldo.sandbox import dataset as sandbox
from ldo.world_model import WorldModel

log = logging.getLogger(__name__)
# files of a model folder that decide what a part of it makes
PARTS = {"vae": ("vae/*",), "text": ("text_encoder*/*", "tokenizer*/*"), "world": ("*.json", "*.safetensors", "*.bin")}
TEXT = 1  # version of the code that embeds prompts
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
    world_model_path: str = ""
    _identities: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.recipe.run

    @property
    def seed(self) -> int:
        return self.recipe.seed

    @cached_property
    def texts(self) -> Texts:
        return Texts(self)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Libraries whose code encodes."""
        return {name: version(name) for name in ("torch", "diffusers", "transformers")}

    def identity(self, part: str) -> str:
        """SHA-256 of the files that a part of the models is made of: "vae", "text" or "world"."""
        if part not in self._identities:
            path = Path(self.world_model_path if part == "world" else self.model_path)
            if not path.is_dir():  # a Hub name, downloaded by now
                path = Path(snapshot_download(str(path), local_files_only=True))
            self._identities[part] = cache.model_identity(path, PARTS[part], self.recipe.cache)
        return self._identities[part]

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

    def read_own(self, folder: Path) -> list[data.Clip]:
        """Clips that were written here, in the one size of the recipe; every one must be sound."""
        d = self.recipe.data
        return data.read_folder(folder, replace(d, buckets=(), caption="", windows="first", bad_clips="error"), self.recipe.cache)

    def frames_of(self, clips: list[data.Clip]) -> Tensor:
        d = self.recipe.data
        return torch.stack([data.load_frames(c, d.frames, d.height, d.width, d.fps, d.decoder) for c in clips])


class Texts:
    """Prompt embeddings, made once each and kept on the CPU, or on disk and, of those asked for last, on the CPU too."""

    def __init__(self, run: Run):
        self._run, self._known = run, {}
        self._read = lru_cache(cache.KEPT)(self._stored)

    def _entry(self, prompt: str) -> Path:
        m = self._run.recipe.model
        key = {"prompt": prompt, "model": self._run.identity("text"), "family": m.family, "dtype": m.dtype, "length": m.text_length}
        return cache.entry(self._run.recipe.cache, "text", {**key, "code": TEXT, **self._run.versions})

    def store(self, prompts: list[str]) -> None:
        """See that prompts are on disk; each is embedded alone, so that it does not depend on its neighbours."""
        for prompt in prompts:
            if not cache.present(self._entry(prompt)):
                cache.write(self._entry(prompt), self._run.generator.encode_text([prompt]).tensors)

    def _stored(self, prompt: str) -> Text:
        found = cache.read(self._entry(prompt))
        if found is None:
            self._entry(prompt).unlink(missing_ok=True)
            self.store([prompt])
            found = cache.read(self._entry(prompt))
        return Text(found)

    def __call__(self, prompts: list[str]) -> Text:
        """Embeddings on the run's device."""
        if self._run.recipe.on_disk:
            return Text.cat([self._read(p) for p in prompts]).to(self._run.world.device)
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


def configure(recipe: Recipe, model: Generator, judge: WorldModel, device: torch.device) -> None:
    """Bring the models, adapter included, to ``device`` and apply the recipe's attention, memory and speed switches."""
    m, dtype = recipe.model, DTYPES[recipe.model.dtype]
    if m.fp8:  # before the move: the device then never holds the wide weights
        count = sum(switches.store_in_fp8(t, dtype) for t in model.transformers.values())
        log.info("fp8: %d weights of the generator are stored in 8 bits", count)
    switches.ease_vae(model.pipeline.vae, m.vae_tiling, m.vae_slicing)
    switches.place(model, judge, m.offload, device)
    for transformer in model.transformers.values():
        if m.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        log.info("attention: generator %s", attention.set_generator(transformer, m.attention, dtype, device))
    log.info(
        "attention: world model %s", attention.set_world_model(judge.model, recipe.world_model.attention, DTYPES[recipe.world_model.dtype], device)
    )
    if m.compile:
        log.info("compile: %d blocks, when they first run", switches.compile_blocks(model))


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
    judge = WorldModel.load(checked.world_model, DTYPES[recipe.world_model.dtype])
    parameters = lora.add(model.transformers, recipe.lora.rank, recipe.lora.alpha, model.lora_targets, recipe.seed)
    configure(recipe, model, judge, world.device)
    count = sum(p.numel() for p in parameters.values())
    log.info("generator: %s, LoRA rank %d on %d layers, %.2f M weights", checked.model, recipe.lora.rank, len(parameters) // 2, count / 1e6)
    fresh = lora.snapshot(parameters)
    return Run(recipe, world, model, judge, parameters, fresh, prompts, checked.model, checked.clips, world_model_path=checked.world_model)


def sandbox_clips(run: Run) -> list[data.Clip]:
    """The sandbox's clips, written on first use and read back like any user's folder."""
    d = run.recipe.data
    folder = Path(run.recipe.out) / "sandbox-data" / f"clips-{d.clips}-{d.height}-{run.seed}"
    if run.world.first:
        log.info("clips: writing %d sandbox clips to %s", d.clips, folder)
        sandbox.write_clips(folder, d.clips, run.seed, size=d.height, fps=d.fps)
    barrier(run.world)
    return run.read_own(folder)


def in_batches(run: Run, name: str, count: int, size: int = 32):
    """Slices of a long preparation, with a bar on the first rank."""
    return batches(name, count, size, active=run.world.first)
