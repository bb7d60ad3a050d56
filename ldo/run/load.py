"""Loading a run: models, adapter, prompts, and what the recipe switches on."""

from __future__ import annotations

import logging

import torch

from ldo.core.config import Recipe
from ldo.core.distributed import Processes, barrier
from ldo.core.progress import quiet_libraries
from ldo.data.captions import PromptLine, read_prompts
from ldo.data.folder import Clip
from ldo.models import lora
from ldo.models.attention import set_generator_attention, set_world_model_attention
from ldo.models.efficiency import compile_blocks, place_models, reduce_vae_memory, store_in_fp8
from ldo.models.generator.families import load_generator
from ldo.models.generator.protocol import Generator, Options
from ldo.models.world_model import WorldModel
from ldo.run.state import Run
from ldo.run.validate import ValidatedRecipe
from ldo.sandbox.dataset import data_folder, write_clips, write_prompts

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_run(validated: ValidatedRecipe, processes: Processes) -> Run:
    """Load the models and put a fresh adapter on the generator."""
    quiet_libraries()
    recipe = validated.recipe
    # One process writes, all read: every rank must see the same lines.
    prompts = validated.prompts or _sandbox_prompts(recipe, processes)
    options = generator_options(recipe)
    generator = load_generator(recipe.model.family, validated.model, DTYPES[recipe.model.dtype], options)
    world_model = WorldModel.load(validated.world_model, DTYPES[recipe.world_model.dtype])
    rank, alpha = recipe.lora.rank, recipe.lora.alpha
    # The adapter before the switches: fp8 and compilation must know which layers are wrapped, offloading which weights
    # to leave.
    parameters = lora.add(generator.transformers, rank, alpha, generator.lora_targets, recipe.seed)
    configure_models(recipe, generator, world_model, processes.device)
    millions = sum(parameter.numel() for parameter in parameters.values()) / 1e6
    # a layer has two parameters, A and B
    layers = len(parameters) // 2
    log.info("generator: %s, LoRA rank %d on %d layers, %.2f M weights", validated.model, rank, layers, millions)
    return Run(
        recipe=recipe,
        processes=processes,
        generator=generator,
        world_model=world_model,
        parameters=parameters,
        fresh=lora.snapshot(parameters),
        prompts=prompts,
        model_path=validated.model,
        clips=validated.clips,
        world_model_path=validated.world_model,
    )


def generator_options(recipe: Recipe) -> Options:
    """What the recipe sets for a generator besides its weights."""
    return Options(recipe.model.text_length, recipe.data.fps, recipe.model.guidance)


def configure_models(recipe: Recipe, generator: Generator, world_model: WorldModel, device: torch.device) -> None:
    """Bring the models, adapter included, to ``device`` and apply the recipe's attention, memory and speed switches."""
    options, dtype = recipe.model, DTYPES[recipe.model.dtype]
    # before the move: the device then never holds the wide weights
    if options.fp8:
        count = sum(store_in_fp8(transformer, dtype) for transformer in generator.transformers.values())
        log.info("fp8: %d weights of the generator are stored in 8 bits", count)
    reduce_vae_memory(generator.pipeline.vae, options.vae_tiling, options.vae_slicing)
    place_models(generator, world_model, options.offload, device)
    for transformer in generator.transformers.values():
        if options.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        log.info("attention: generator %s", set_generator_attention(transformer, options.attention, dtype, device))
    judge, judge_dtype = recipe.world_model, DTYPES[recipe.world_model.dtype]
    effect = set_world_model_attention(world_model.model, judge.attention, judge_dtype, device)
    log.info("attention: world model %s", effect)
    if options.compile:
        log.info("compile: %d blocks, when they first run", compile_blocks(generator))


# ---------------------------------------------------------------------------------------------- the sandbox's data


def _sandbox_prompts(recipe: Recipe, processes: Processes) -> list[PromptLine]:
    """The sandbox's prompts, written on first use."""
    count = recipe.data.prompt_count
    path = data_folder(recipe.out) / f"prompts-{count}-{recipe.seed}.jsonl"
    if processes.first:
        write_prompts(path, count, recipe.seed)
    barrier(processes)
    return read_prompts(path)


def sandbox_clips(run: Run) -> list[Clip]:
    """The sandbox's clips, written on first use and read back like any user's folder."""
    data = run.recipe.data
    folder = data_folder(run.recipe.out) / f"clips-{data.clips}-{data.height}-{run.seed}"
    if run.processes.first:
        log.info("clips: writing %d sandbox clips to %s", data.clips, folder)
        write_clips(folder, data.clips, run.seed, size=data.height, fps=data.fps)
    barrier(run.processes)
    return run.read_own(folder)
