"""Peak bytes of the passes that training is made of: the real modules, forward and backward, on meta tensors (``ldo.live``).

Each function is cached, and takes configurations as JSON for that reason. Inputs that the caller holds anyway are not
counted, what a pass makes of them is; weights are not, nor are the adapter's gradients.

Shapes: B videos of a pass, T frames, H x W pixels, latents (C, t, h, w).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ldo import critic, meta, switches, teacher
from ldo.generator.folder import patch_of
from ldo.live import Live, kernels, relation
from ldo.world_model import Tokens, WorldModel, window_starts


@dataclass(frozen=True)
class Step:
    """One pass of a transformer over ``batch`` videos. ``config`` is its configuration as JSON, so that passes can be cached."""

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


def _transformer(step: Step, layers: dict[str, int]) -> tuple[nn.Module, dict]:
    config = json.loads(step.config) | layers
    model = meta.build(config, step.dtype)
    if step.rank:
        meta.add_lora(model, step.rank, step.rank, step.targets)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)  # counted with the adapter
    if step.fp8:
        switches.store_in_fp8(model, step.dtype)
    if step.checkpointing:
        model.enable_gradient_checkpointing()
    return model, config


def _extrapolated(text: str, measure: Callable[[dict[str, int]], int]) -> int:
    """``measure`` at the true numbers of blocks, from two and three of each kind: every block after the second adds the same."""
    config = json.loads(text)
    counts = meta.family(config).counts
    if all(config[key] <= 3 for key in counts):
        return measure({})
    few = {key: min(config[key], 2) for key in counts}
    base = measure(few)
    more = (measure(few | {key: few[key] + 1}) - base if config[key] > few[key] else 0 for key in counts)
    return base + sum(m * (config[key] - few[key]) for key, m in zip(counts, more, strict=True))


@cache
def sizes(config: str, dtype: torch.dtype, cls: str | None = None, fp8: bool = False) -> tuple[int, int]:
    """Number of parameters and bytes of a model as loaded."""
    model = meta.build(json.loads(config), dtype, cls)
    count = meta.count(model)
    if fp8:
        switches.store_in_fp8(model, dtype)
    return count, meta.size(model)


@cache
def adapter_count(config: str, rank: int, targets: tuple[str, ...] | str) -> int:
    """Parameters of a LoRA; RecipeError for a target that no linear layer bears."""
    return _extrapolated(config, lambda layers: meta.add_lora(meta.build(json.loads(config) | layers, torch.bfloat16), rank, rank, targets))


def _call(model: nn.Module, config: dict, step: Step) -> Tensor:
    batch = step.batch * (2 if step.joined else 1)
    arguments = meta.family(config).call(config, batch, step.latent, step.text, step.dtype)
    if step.per_token:
        patch = config["patch_size"]
        tokens = step.latent[1] * (step.latent[2] // patch[1]) * (step.latent[3] // patch[2])
        arguments["timestep"] = arguments["timestep"].new_empty(batch, tokens)
    return model(**arguments, return_dict=False)[0].float()


@cache
def sampling_bytes(step: Step) -> int:
    """Peak of a forward pass without gradients, one more velocity held where guidance adds a second. Independent of depth."""
    config = json.loads(step.config)
    model, config = _transformer(step, {key: min(config[key], 2) for key in meta.family(config).counts})
    with torch.no_grad(), kernels(step.device), Live() as live:
        weights = live.adopt(model)  # 8-bit weights are replaced by wide ones and back
        kept = [_call(model, config, step) for _ in range(step.branches)]
        del kept
    return live.peak - weights


@dataclass(frozen=True)
class Alignment:
    """What the relation loss is made on: the teacher's recipe, its features' width and grid, and factors of time."""

    teacher: Any
    dim: int
    grid: tuple[int, int, int]
    vae_time: int
    tubelet: int


@cache
def training_bytes(step: Step, alignment: Alignment | None = None) -> int:
    """Peak of a forward and backward pass, with the relation loss on one block where there is an ``alignment``."""

    def measure(layers: dict[str, int]) -> int:
        model, config = _transformer(step, layers)
        blocks, caught = meta.blocks(model), []
        with kernels(step.device), Live() as live, mock.patch.object(teacher, "relation_loss", relation):
            weights = live.adopt(model)
            noise, x0 = (torch.empty(step.batch, *step.latent, device="meta") for _ in range(2))
            hook = None
            if alignment is not None:
                at = min(int(alignment.teacher.block * len(blocks)), len(blocks) - 1)
                hook = blocks[at].register_forward_hook(lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out))
            outputs = [_call(model, config, step) for _ in range(step.branches)]
            v = outputs[0] if step.branches == 1 else outputs[1] + 2.0 * (outputs[0] - outputs[1])
            loss = (v - (noise - x0).reshape(v.shape)).square().mean()
            if alignment is not None:
                hook.remove()
                loss = loss + 0.5 * _relation(alignment, caught[0], step, config)
            del outputs, v
            loss.backward()
        return live.peak - weights

    return _extrapolated(step.config, measure)


def _relation(alignment: Alignment, hidden: Tensor, step: Step, config: dict) -> Tensor:
    b, t, side = step.batch, *alignment.grid[:2]
    tokens = t * side * side
    patch = patch_of(config)
    grid = tuple(n // p for n, p in zip(step.latent[1:], patch, strict=True))
    target = teacher.Target(torch.empty(b, tokens, alignment.dim, device="meta"), torch.empty(b, tokens, device="meta"), alignment.grid, 0)
    with torch.device("meta"):
        aligner = teacher.Aligner(alignment.teacher, hidden.shape[-1], alignment.dim, alignment.vae_time, alignment.tubelet)
    video = hidden[:, : grid[0] * grid[1] * grid[2]]  # without text tokens, where a block's output holds both
    return aligner(Tokens(video, grid), target)


@cache
def vae_bytes(config: str, dtype: torch.dtype, size: tuple[int, int, int], latent: tuple[int, ...], encode: bool, tiling: bool = False) -> int:
    """Peak of encoding one video of ``size`` (T, H, W), frames in [0, 1] to latents, or of decoding one; a batch takes as much each."""
    vae = meta.build(json.loads(config), dtype)
    if tiling:
        vae.enable_tiling()
    x = torch.empty(1, 3, *size, device="meta")
    z = torch.empty(1, *latent, device="meta")
    with torch.no_grad(), kernels(), Live() as live:
        if encode:
            vae.encode((x * 2 - 1).to(dtype)).latent_dist.mode().float()
        else:
            extra = (torch.empty(1, device="meta", dtype=dtype),) if vae.config.get("timestep_conditioning") else ()
            (vae.decode(z.to(dtype), *extra, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
    return live.peak


@cache
def text_bytes(config: str, cls: str, dtype: torch.dtype, length: int) -> int:
    """Peak of embedding one prompt of ``length`` tokens; a batch takes as much each."""
    depth = json.loads(config)["num_layers" if "num_layers" in json.loads(config) else "num_hidden_layers"]

    def measure(layers: int) -> int:
        tree = json.loads(config) | {"num_layers": layers, "num_hidden_layers": layers}
        encoder = meta.build(tree, dtype, cls)
        tokens = torch.empty(1, length, dtype=torch.long, device="meta")
        with torch.no_grad(), kernels(), Live() as live:
            more = {} if cls in ("T5EncoderModel", "UMT5EncoderModel", "CLIPTextModel") else {"output_hidden_states": True}
            encoder(tokens, attention_mask=torch.ones_like(tokens), **more)
        return live.peak

    first = measure(min(depth, 2))
    return first if depth <= 2 else first + (measure(3) - first) * (depth - 2)


def _world(config: str, dtype: torch.dtype) -> WorldModel:
    """A shallow world model: without gradients memory does not depend on depth."""
    tree = json.loads(config)
    few = {key: min(tree.get(key, 2), 2) for key in ("num_hidden_layers", "pred_num_hidden_layers")}
    with Live():  # its constructor looks at a weight
        world = WorldModel(meta.build(tree | few, dtype))
    world.mean, world.std = world.mean.to("meta"), world.std.to("meta")
    return world


def _last(world: WorldModel, options: Any) -> int:
    """The last token of a window, which the predictor looks up."""
    return options.window // world.tubelet * world.side**2 - 1


@cache
def critic_bytes(config: str, dtype: torch.dtype, options: Any, size: tuple[int, int, int]) -> int:
    """Peak of scoring one video of ``size`` (T, H, W), all its windows at once; a batch takes as much each."""
    world = _world(config, dtype)
    x = torch.empty(1, size[0], 3, *size[1:], device="meta")[:, 1:]
    with torch.no_grad(), kernels(), Live(_last(world, options)) as live:
        ways = [x, x.flip(1)] if options.direction == "both" else [x]  # scored in turn, in equal memory
        windows = torch.cat([ways[-1][:, s : s + options.window] for s in window_starts(x.shape[1], options.window, options.stride)])
        seen = world.encode(windows).x_BND
        for context in options.contexts:
            known, foretold = world.forecast(windows, context)
            known.x_BND[:, -1:].repeat(1, foretold.x_BND.shape[1], 1)  # persistence
        del seen, windows, known, foretold
    return live.peak


@cache
def target_bytes(config: str, dtype: torch.dtype, options: Any, size: tuple[int, int, int]) -> int:
    """Peak of making the teacher's targets of one clip of ``size`` (T, H, W); a batch takes as much each."""
    world = _world(config, dtype)
    x = torch.empty(1, size[0], 3, *size[1:], device="meta")
    with kernels(), Live(_last(world, options)) as live:
        teacher.make_target(world, x, options)
    return live.peak


@cache
def guard_bytes(options: Any, size: tuple[int, int, int]) -> int:
    """Peak of the guards on one video of ``size`` (T, H, W) and its reference; a batch takes as much each."""
    x, reference = (torch.empty(1, size[0], 3, *size[1:], device="meta") for _ in range(2))
    with torch.no_grad(), Live() as live:
        critic.guards(x, reference, options)
    return live.peak
