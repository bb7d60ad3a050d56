"""What a recipe may switch on to need less memory or to run faster. Each leaves the stages' code as it is.

    gradient_checkpointing   blocks are computed again in the backward
    fp8                      the base's weights are stored in 8 bits and widened layer by layer while they are used
    offload                  text encoder, VAE or world model wait on the CPU until they are called
    vae_tiling, vae_slicing  the VAE takes a clip in tiles, a batch one clip at a time
    compile                  the transformer's blocks are compiled, one graph for all that are alike

The adapter stays in fp32 under all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
COMPILER = "inductor"


def store_in_fp8(transformer: nn.Module, dtype: torch.dtype) -> int:
    """Store the blocks' weights as float8_e4m3fn and widen them to ``dtype`` for their forward; returns how many.

    Call it once the adapter is on. Norms, what is outside the blocks and the adapter stay as they are.
    """
    outside = [name for name, child in transformer.named_children() if not isinstance(child, nn.ModuleList)]
    # norms and what embeds or projects out are few weights, and the first to show 8 bits
    skipped = ("norm", "lora_", *(f"^{name}$" for name in outside))
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, dtype, skip_modules_pattern=skipped)
    return sum(parameter.dtype == torch.float8_e4m3fn for parameter in transformer.parameters())


def compile_blocks(generator: Any) -> int:
    """Compile every block of every transformer; returns how many.

    What is compiled is a block's ``forward``, so hooks on blocks (the tap) stay outside the graph. Sampling goes
    through the graph of training, gradients recorded and thrown away: a graph made for inference may round otherwise,
    and the policy ratio would not be 1.
    """
    count = 0
    for transformer in generator.transformers.values():
        for child in transformer.children():
            for block in child if isinstance(child, nn.ModuleList) else ():
                block.forward = torch.compile(block.forward, backend=COMPILER)
                count += 1
    compute_velocity = generator.velocity

    @wraps(compute_velocity)
    def through_training_graph(*args, **kwargs):
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            velocity = compute_velocity(*args, **kwargs)
        return velocity if recorded else velocity.detach()

    generator.velocity = through_training_graph
    return count


class OffloadedParts:
    """Frozen modules that live on the CPU and visit ``device`` one part at a time.

    A part stays until another, or the transformer, is called. Its weights never change, so nothing is copied back.
    """

    def __init__(self, parts: dict[str, list[nn.Module]], device: torch.device):
        self.device, self.present = device, ""
        self._homes = {name: _tensors_at_home(modules) for name, modules in parts.items()}

    def visit(self, name: str) -> None:
        """Bring part ``name`` and send home whichever else is there; any other name only sends home."""
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


def _tensors_at_home(modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Every weight and buffer with its data on the CPU, to which it returns."""
    tensors = [tensor for module in modules for tensor in chain(module.parameters(), module.buffers())]
    return [(tensor, tensor.data) for tensor in tensors]


def place_models(
    generator: Any, world_model: nn.Module, offload: tuple[str, ...], device: torch.device
) -> OffloadedParts | None:
    """Move the models to ``device``, but for the parts in ``offload`` ("text", "vae", "world_model").

    Those visit ``device`` when they are called. Returns what moves them, or None where nothing is offloaded.
    """
    components = generator.pipeline.components.items()
    parts = {name: component for name, component in components if isinstance(component, nn.Module)}
    groups = {
        "text": [part for name, part in parts.items() if name.startswith("text_encoder")],
        "vae": [generator.pipeline.vae],
        "world_model": [world_model.model],
    }
    away = {name: groups[name] for name in offload}
    # modules are compared by identity: a text encoder may be shared by two components
    staying_home = {id(module) for modules in away.values() for module in modules}
    for module in (*parts.values(), *generator.transformers.values(), world_model.model):
        if id(module) not in staying_home:
            module.to(device)
    # the world model's own buffers always move: callers ask these for its device
    for name, tensor in world_model.named_buffers(recurse=False):
        setattr(world_model, name, tensor.to(device))
    if not away:
        return None
    offloaded = OffloadedParts(away, device)
    calls = [
        ("text", generator, "encode_text"),
        ("vae", generator, "encode_video"),
        ("vae", generator, "decode_video"),
        ("world_model", world_model, "encode"),
        ("world_model", world_model, "forecast"),
        # the transformer is no part, so its call only sends the others home
        ("", generator, "velocity"),
    ]
    for name, owner, method in calls:
        setattr(owner, method, offloaded.before(name, getattr(owner, method)))
    return offloaded


def reduce_vae_memory(vae: nn.Module, tiling: bool, slicing: bool) -> None:
    """Switch the VAE's tiling and slicing on. Tiles are blended where they overlap; training can pick up the seams."""
    if tiling:
        log.warning(
            "vae_tiling: tiles leave faint seams in latents and videos, which stages learn from; use it only where "
            "memory does not suffice"
        )
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
