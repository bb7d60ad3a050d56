"""Peak bytes of the passes that training is made of: the real modules run, forward and backward, on meta tensors.

``ldo.memory.live_bytes`` counts. Each function is cached and takes configurations as JSON for that reason. Not counted
are inputs that the caller holds anyway, weights, and the adapter's gradients; what a pass makes of them is counted.

When a tensor dies decides the peak, so the ``del`` statements here are part of the model.

Shapes: B videos of a pass, T frames, H x W pixels, latents (C, t, h, w).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ldo.memory.live_bytes import FusedKernels, LiveBytes, relation_stand_in
from ldo.memory.meta_models import (
    add_meta_lora,
    build_meta,
    count_bytes,
    count_parameters,
    transformer_blocks,
    transformer_family,
)
from ldo.method import teacher
from ldo.method.alignment import AlignmentLoss
from ldo.method.guards import guard_penalties
from ldo.models.efficiency import store_in_fp8
from ldo.models.generator.folder import patch_of
from ldo.models.world_model import Tokens, WorldModel, window_starts

# Text encoders whose last hidden state is all that a pipeline takes.
LAST_STATE_ENCODERS = ("T5EncoderModel", "UMT5EncoderModel", "CLIPTextModel")


@dataclass(frozen=True)
class TransformerPass:
    """One pass of a transformer over ``batch`` videos.

    ``config`` is its configuration as JSON, so that passes can be cached.
    """

    config: str
    dtype: torch.dtype
    batch: int
    latent: tuple[int, ...]
    text: int
    rank: int = 0
    targets: tuple[str, ...] | str = ()
    checkpointing: bool = False
    branches: int = 1  # forward passes whose graphs live together: 2 under guidance
    joined: bool = False  # both branches in one batch
    per_token: bool = False  # a time for every token, as Wan 2.2 5B takes it
    fp8: bool = False
    device: str = "cuda"


def _transformer(step: TransformerPass, layers: dict[str, int]) -> tuple[nn.Module, dict]:
    config = json.loads(step.config) | layers
    model = build_meta(config, step.dtype)
    if step.rank:
        add_meta_lora(model, step.rank, step.rank, step.targets)
        for parameter in model.parameters():
            # The gradients are counted with the adapter, so they must be there before the pass.
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    if step.fp8:
        store_in_fp8(model, step.dtype)
    if step.checkpointing:
        model.enable_gradient_checkpointing(FusedKernels(step.device).checkpointed)
    return model, config


def _extrapolated(text: str, measure: Callable[[dict[str, int]], int]) -> int:
    """``measure`` at the true numbers of blocks, extrapolated from two and three of each kind.

    ``measure`` takes the numbers of blocks by configuration key.
    """
    config = json.loads(text)
    counts = transformer_family(config).counts
    if all(config[count_key] <= 3 for count_key in counts):
        return measure({})
    # Every block after the second adds the same, which the tests compare with all blocks measured.
    shallow = {count_key: min(config[count_key], 2) for count_key in counts}
    shallow_total = measure(shallow)
    full_total = shallow_total
    for count_key in counts:
        if config[count_key] > shallow[count_key]:
            one_more = measure(shallow | {count_key: shallow[count_key] + 1}) - shallow_total
            full_total += one_more * (config[count_key] - shallow[count_key])
    return full_total


@cache
def sizes(config: str, dtype: torch.dtype, cls: str | None = None, fp8: bool = False) -> tuple[int, int]:
    """Number of parameters and bytes of a model as loaded."""
    model = build_meta(json.loads(config), dtype, cls)
    count = count_parameters(model)
    if fp8:
        store_in_fp8(model, dtype)
    return count, count_bytes(model)


@cache
def adapter_count(config: str, rank: int, targets: tuple[str, ...] | str) -> int:
    """Parameters of a LoRA; RecipeError for a target that no linear layer is called."""

    def measure(layers: dict[str, int]) -> int:
        model = build_meta(json.loads(config) | layers, torch.bfloat16)
        return add_meta_lora(model, rank, rank, targets)

    return _extrapolated(config, measure)


def _call(model: nn.Module, config: dict, step: TransformerPass) -> Tensor:
    batch = step.batch * (2 if step.joined else 1)
    arguments = transformer_family(config).call(config, batch, step.latent, step.text, step.dtype)
    if step.per_token:
        patch = config["patch_size"]
        tokens = step.latent[1] * (step.latent[2] // patch[1]) * (step.latent[3] // patch[2])
        arguments["timestep"] = arguments["timestep"].new_empty(batch, tokens)
    return model(**arguments, return_dict=False)[0].float()


@cache
def sampling_bytes(step: TransformerPass) -> int:
    """Peak of a forward pass without gradients; where guidance adds a second pass, the first velocity is held."""
    config = json.loads(step.config)
    # Without gradients nothing is kept from block to block, so depth does not matter.
    shallow = {count_key: min(config[count_key], 2) for count_key in transformer_family(config).counts}
    model, config = _transformer(step, shallow)
    with torch.no_grad(), FusedKernels(step.device), LiveBytes() as counter:
        # Weights in 8 bits are replaced by wide ones and back, which must show.
        weights = counter.adopt(model)
        velocities = [_call(model, config, step) for _ in range(step.branches)]
        del velocities
    return counter.peak - weights


@dataclass(frozen=True)
class Alignment:
    """What the relation loss compares: ``dim`` and ``grid`` are the width and the (T, H, W) tokens of teacher features.

    ``vae_time`` and ``tubelet`` are the frames of a latent and of a teacher's token.
    """

    teacher: Any
    dim: int
    grid: tuple[int, int, int]
    vae_time: int
    tubelet: int


@cache
def training_bytes(step: TransformerPass, alignment: Alignment | None = None) -> int:
    """Peak of a forward and backward pass, with the relation loss on one block where there is an ``alignment``."""

    def measure(layers: dict[str, int]) -> int:
        model, config = _transformer(step, layers)
        blocks = transformer_blocks(model)
        block_outputs = []

        def catch(_module: nn.Module, _inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            block_outputs.append(output[0] if isinstance(output, tuple) else output)

        with FusedKernels(step.device), LiveBytes() as counter:
            weights = counter.adopt(model)
            noise = torch.empty(step.batch, *step.latent, device="meta")
            clean = torch.empty(step.batch, *step.latent, device="meta")
            block_hook = None
            if alignment is not None:
                aligned = min(int(alignment.teacher.block * len(blocks)), len(blocks) - 1)
                block_hook = blocks[aligned].register_forward_hook(catch)
            outputs = [_call(model, config, step) for _ in range(step.branches)]
            # Any scale of guidance takes the same memory.
            velocity = outputs[0] if step.branches == 1 else outputs[1] + 2.0 * (outputs[0] - outputs[1])
            loss = (velocity - (noise - clean).reshape(velocity.shape)).square().mean()
            if alignment is not None:
                block_hook.remove()
                loss = loss + 0.5 * _relation(alignment, block_outputs[0], step, config)
            del outputs, velocity
            loss.backward()
        return counter.peak - weights

    return _extrapolated(step.config, measure)


def _relation(alignment: Alignment, hidden: Tensor, step: TransformerPass, config: dict) -> Tensor:
    """The relation loss between a block's output and a target of the teacher."""
    tokens = math.prod(alignment.grid)
    features = torch.empty(step.batch, tokens, alignment.dim, device="meta")
    token_weights = torch.empty(step.batch, tokens, device="meta")
    target = teacher.Target(features, token_weights, alignment.grid, 0)
    with torch.device("meta"):
        aligner = AlignmentLoss(
            alignment.teacher,
            hidden.shape[-1],
            alignment.dim,
            alignment.vae_time,
            alignment.tubelet,
            relation=relation_stand_in,
        )
    grid = tuple(size // side for size, side in zip(step.latent[1:], patch_of(config), strict=True))
    # Some families' blocks put out text tokens after those of the video.
    video = hidden[:, : math.prod(grid)]
    return aligner(Tokens(video, grid), target)


@cache
def vae_bytes(
    config: str,
    dtype: torch.dtype,
    size: tuple[int, int, int],
    latent: tuple[int, ...],
    encode: bool,
    tiling: bool = False,
) -> int:
    """Peak of encoding one video of ``size`` (T, H, W), frames in [0, 1] to latents, or of decoding one.

    A batch takes as much for each video.
    """
    vae = build_meta(json.loads(config), dtype)
    if tiling:
        vae.enable_tiling()
    frames = torch.empty(1, 3, *size, device="meta")
    latents = torch.empty(1, *latent, device="meta")
    with torch.no_grad(), FusedKernels(), LiveBytes() as counter:
        if encode:
            vae.encode((frames * 2 - 1).to(dtype)).latent_dist.mode().float()
        else:
            # Such a decoder takes the noise level that the latents still have.
            conditioned = vae.config.get("timestep_conditioning")
            noise_level = (torch.empty(1, device="meta", dtype=dtype),) if conditioned else ()
            (vae.decode(latents.to(dtype), *noise_level, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
    return counter.peak


@cache
def text_bytes(config: str, cls: str, dtype: torch.dtype, length: int) -> int:
    """Peak of embedding one prompt of ``length`` tokens; a batch takes as much for each."""
    settings = json.loads(config)
    depth = settings["num_layers" if "num_layers" in settings else "num_hidden_layers"]
    # From other text models the pipeline takes a hidden state before the last, so that all are kept.
    options = {} if cls in LAST_STATE_ENCODERS else {"output_hidden_states": True}

    def measure(layers: int) -> int:
        encoder = build_meta(settings | {"num_layers": layers, "num_hidden_layers": layers}, dtype, cls)
        tokens = torch.empty(1, length, dtype=torch.long, device="meta")
        with torch.no_grad(), FusedKernels(), LiveBytes() as counter:
            encoder(tokens, attention_mask=torch.ones_like(tokens), **options)
        return counter.peak

    shallow_peak = measure(min(depth, 2))
    if depth <= 2:
        return shallow_peak
    return shallow_peak + (measure(3) - shallow_peak) * (depth - 2)


def _world(config: str, dtype: torch.dtype) -> WorldModel:
    """A shallow world model: without gradients memory does not depend on depth."""
    settings = json.loads(config)
    shallow = {}
    for count_key in ("num_hidden_layers", "pred_num_hidden_layers"):
        shallow[count_key] = min(settings.get(count_key, 2), 2)
    # Its constructor asks for the truth of a weight, which a tensor without data has only within the context.
    with LiveBytes():
        world = WorldModel(build_meta(settings | shallow, dtype))
    world.mean = world.mean.to("meta")
    world.std = world.std.to("meta")
    return world


def _video(size: tuple[int, int, int]) -> Tensor:
    """One video of ``size`` (T, H, W) as frames [1, T, 3, H, W] without data."""
    frames, height, width = size
    return torch.empty(1, frames, 3, height, width, device="meta")


def _last(world_model: WorldModel, options: Any) -> int:
    """The last token of a window, which the predictor looks up."""
    return options.window // world_model.tubelet * world_model.side**2 - 1


@cache
def critic_bytes(config: str, dtype: torch.dtype, options: Any, size: tuple[int, int, int]) -> int:
    """Peak of scoring one video of ``size`` (T, H, W), all its windows at once; a batch takes as much for each."""
    world = _world(config, dtype)
    frames = _video(size)[:, 1:]
    with torch.no_grad(), FusedKernels(), LiveBytes(_last(world, options)) as counter:
        # The directions are scored one after the other in equal memory, so that the last stands for both.
        directions = [frames, frames.flip(1)] if options.direction == "both" else [frames]
        starts = window_starts(frames.shape[1], options.window, options.stride)
        windows = torch.cat([directions[-1][:, start : start + options.window] for start in starts])
        encoded = world.encode(windows).x_BND
        for context in options.contexts:
            seen, forecast = world.forecast(windows, context)
            # The persistence, which repeats the last tubelet.
            seen.x_BND[:, -1:].repeat(1, forecast.x_BND.shape[1], 1)
        del encoded, windows, seen, forecast
    return counter.peak


@cache
def target_bytes(config: str, dtype: torch.dtype, options: Any, size: tuple[int, int, int]) -> int:
    """Peak of making the teacher's targets of one clip of ``size`` (T, H, W); a batch takes as much for each."""
    world = _world(config, dtype)
    frames = _video(size)
    with FusedKernels(), LiveBytes(_last(world, options)) as counter:
        teacher.make_target(world, frames, options)
    return counter.peak


@cache
def guard_bytes(options: Any, size: tuple[int, int, int]) -> int:
    """Peak of the guards on one video of ``size`` (T, H, W) and its reference; a batch takes as much for each."""
    frames, reference = _video(size), _video(size)
    with torch.no_grad(), LiveBytes() as counter:
        guard_penalties(frames, reference, options)
    return counter.peak
