"""What a recipe may switch on to need less memory or to run faster. Each leaves the stages' code as it is.

    gradient_checkpointing   blocks are computed again in the backward
    fp8                      the base's weights are stored in 8 bits and widened layer by layer while they are used
    offload                  text encoder, VAE or world model wait on the CPU until they are called
    vae_tiling, vae_slicing  the VAE takes a clip in tiles, a batch one clip at a time
    compile                  the transformer's blocks are compiled, one graph for all that are alike

The adapter stays in fp32 under every one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import nn

from ldo.config import Model, RecipeError

log = logging.getLogger(__name__)
COMPILER = "inductor"


def check(model: Model) -> None:
    """RecipeError for switches that would undo each other."""
    if model.fp8 and not model.gradient_checkpointing:
        raise RecipeError(
            "model.fp8 saves nothing while every widened weight waits for the backward; set model.gradient_checkpointing=true, or model.fp8=false"
        )
    if model.fp8 and model.compile:
        raise RecipeError("model.compile is cut to pieces by the casts of model.fp8; set one of them to false")


def store_in_fp8(transformer: nn.Module, dtype: torch.dtype) -> int:
    """Store the blocks' weights as float8_e4m3fn and widen them to ``dtype`` for their forward; returns how many.

    To be called once the adapter is on. Norms, what is outside the blocks and the adapter stay as they are.
    """
    outside = tuple(f"^{n}$" for n, child in transformer.named_children() if not isinstance(child, nn.ModuleList))
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype, skip_modules_pattern=("norm", "lora_", *outside))
    return sum(p.dtype == torch.float8_e4m3fn for p in transformer.parameters())


def compile_blocks(generator: Any) -> int:
    """Compile every block of every transformer; returns how many.

    What is compiled is a block's ``forward``, so hooks on blocks (the tap) stay outside the graph. Sampling goes through the
    graph of training, gradients recorded and thrown away: a graph made for inference may round otherwise, and the policy
    ratio would not be 1.
    """
    count = 0
    for transformer in generator.transformers.values():
        for blocks in (c for c in transformer.children() if isinstance(c, nn.ModuleList)):
            for block in blocks:
                block.forward = torch.compile(block.forward, backend=COMPILER)
                count += 1
    velocity = generator.velocity

    @wraps(velocity)
    def same_graph(*args, **kwargs):
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            v = velocity(*args, **kwargs)
        return v if recorded else v.detach()

    generator.velocity = same_graph
    return count


class Guests:
    """Frozen modules that live on the CPU and visit ``device`` one part at a time.

    A part stays until another, or the transformer, is called. Its weights never change, so nothing is copied back.
    """

    def __init__(self, parts: dict[str, list[nn.Module]], device: torch.device):
        self.device, self.present = device, ""
        self._homes = {
            name: [(t, t.data) for module in modules for t in chain(module.parameters(), module.buffers())] for name, modules in parts.items()
        }

    def visit(self, name: str) -> None:
        """Bring part ``name`` and send home whoever else is there; a name that is no guest's only sends home."""
        if name == self.present:
            return
        for tensor, home in self._homes.get(self.present, ()):
            tensor.data = home
        for tensor, home in self._homes.get(name, ()):
            tensor.data = home.to(self.device)
        self.present = name

    def before(self, name: str, call: Callable) -> Callable:
        """``call``, preceded by the visit of ``name``."""

        @wraps(call)
        def called(*args, **kwargs):
            self.visit(name)
            return call(*args, **kwargs)

        return called


def place(generator: Any, judge: nn.Module, offload: tuple[str, ...], device: torch.device) -> Guests | None:
    """Move the models to ``device``, but for the parts in ``offload`` ("text", "vae", "world_model"), which become guests."""
    parts = {n: m for n, m in generator.pipeline.components.items() if isinstance(m, nn.Module)}
    groups = {
        "text": [m for n, m in parts.items() if n.startswith("text_encoder")],
        "vae": [generator.pipeline.vae],
        "world_model": [judge.model],
    }
    away = {name: groups[name] for name in offload}
    staying = {id(m) for modules in away.values() for m in modules}
    for module in (*parts.values(), *generator.transformers.values(), judge.model):
        if id(module) not in staying:
            module.to(device)
    for name, tensor in judge.named_buffers(recurse=False):  # callers ask these for the world model's device
        setattr(judge, name, tensor.to(device))
    if not away:
        return None
    guests = Guests(away, device)
    methods = {"text": (generator, "encode_text"), "": (generator, "velocity")}
    for name, (owner, method) in [
        *methods.items(),
        *(("vae", (generator, m)) for m in ("encode_video", "decode_video")),
        *(("world_model", (judge, m)) for m in ("encode", "forecast")),
    ]:
        setattr(owner, method, guests.before(name, getattr(owner, method)))
    return guests


def ease_vae(vae: nn.Module, tiling: bool, slicing: bool) -> None:
    """Switch the VAE's tiling and slicing on. Tiles are blended where they overlap, and their seams can be learnt."""
    if tiling:
        log.warning("vae_tiling: tiles leave faint seams in latents and videos, which stages learn from; use it only where memory does not suffice")
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
