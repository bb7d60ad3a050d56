"""The protocol between the trainer and a video model, and the tap that catches a block's hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldo.generator.folder import Geometry
from ldo.world_model import Tokens


class Generator(Protocol):
    """What the trainer needs of a video model. Frames are [B, T, 3, H, W] in [0, 1]; latents and velocities fp32."""

    geometry: Geometry
    transformer: nn.Module  # what is trained, through LoRA
    lora_targets: Sequence[str]  # names of the linear layers that carry it
    shift: float  # the sampler's flow shift

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Embeddings [B, L, E] exactly as the stock pipeline makes them."""

    def encode_video(self, frames_BTCHW: Tensor) -> Tensor:
        """Normalised latents, the posterior's mode."""

    def decode_video(self, latents: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] in [0, 1]."""

    def velocity(self, x: Tensor, t_B: Tensor, text: Tensor) -> Tensor:
        """v = e - x_0 at x_t, times t in [0, 1], one per sample; fp32."""

    def tap(self, block: int) -> AbstractContextManager[Tap]:
        """Within the context, the next forward pass leaves the hidden state after ``block`` in the Tap."""

    def comfy_names(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        """The LoRA under the names that ComfyUI reads."""


@dataclass
class Tap:
    """Catches one block's output once; a recomputation under gradient checkpointing does not overwrite it."""

    tokens: Tokens | None = None

    def take(self) -> Tokens:
        assert self.tokens is not None, "no forward pass ran inside the tap's context"
        return self.tokens


def tap_block(block: nn.Module, grid: list[tuple[int, int, int]]) -> tuple[Tap, RemovableHandle]:
    """Hook ``block``; returns the Tap and the hook's handle. ``grid[0]`` is the (t, h, w) of its tokens by then."""
    tap = Tap()

    def hook(_module, _inputs, output):
        if tap.tokens is None:
            tap.tokens = Tokens(output[0] if isinstance(output, tuple) else output, grid[0])

    return tap, block.register_forward_hook(hook)
