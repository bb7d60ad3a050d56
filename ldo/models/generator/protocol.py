"""The protocol between the trainer and a video model, and the two small things that pass through it: Text and Tap.

Every family is seen as a flow: x_t = (1 - t) x_0 + t e with t from 1 (noise) to 0 (video) and v = e - x_0, whatever its
network was trained to predict. Latents are [B, C, T, H, W]; a family that packs them does so just before its
transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldo.core.distributed import to_device
from ldo.models.generator.folder import Geometry
from ldo.models.world_model import Tokens


@dataclass(frozen=True)
class Options:
    """What a recipe says of the generator beyond its weights."""

    text_length: int = 0  # tokens of the prompt; 0 takes the family's own
    fps: float = 8.0  # frame rate of the clips, for a family that takes it as an input (LTX)
    guidance: float = 6.0  # guidance scale that a guidance-distilled transformer takes as an input (HunyuanVideo)


@dataclass(frozen=True)
class Text:
    """Embeddings of B prompts: named tensors, each with the batch first (embeddings, masks, pooled vectors)."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor | list[int]) -> Text:
        """Some prompts, by slice or index."""
        return Text({name: tensor[rows] for name, tensor in self.tensors.items()})

    def repeat(self, times: int) -> Text:
        """Each prompt ``times`` times, side by side."""
        return Text({name: tensor.repeat_interleave(times, 0) for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> Text:
        """A single prompt as a batch, without copying."""
        return Text({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()})

    def split(self, size: int) -> Iterator[Text]:
        """Batches of ``size`` prompts."""
        return (self[index : index + size] for index in range(0, len(self), size))

    def to(self, device: torch.device | str) -> Text:
        """The embeddings on a device."""
        return Text({name: to_device(tensor, torch.device(device)) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """One batch of several."""
        return Text({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@dataclass
class Tap:
    """Catches one block's output once; a recomputation under gradient checkpointing does not overwrite it.

    Where two experts share a batch, each leaves the rows it was given.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)  # expert -> its tokens
    rows: dict[str, Tensor] = field(default_factory=dict)  # expert -> which samples they are; empty where one took all
    grid: tuple[int, int, int] = (0, 0, 0)

    def take(self) -> Tokens:
        assert self.parts, "no forward pass ran inside the tap's context"
        if len(self.parts) == 1:
            return Tokens(next(iter(self.parts.values())), self.grid)
        # the experts' tokens one after the other, back into the order of the batch
        order = torch.cat([self.rows[expert] for expert in self.parts]).argsort()
        return Tokens(torch.cat(list(self.parts.values()))[order], self.grid)


class Generator(Protocol):
    """What the trainer needs of a video model. Frames are [B, T, 3, H, W] in [0, 1]; latents and velocities fp32."""

    pipeline: Any  # the stock diffusers pipeline
    geometry: Geometry
    transformers: dict[str, nn.Module]  # what is trained, through LoRA, by the names of the pipeline's components
    lora_targets: Sequence[str] | str  # names of the linear layers that carry it, or one pattern of their full names

    def encode_text(self, prompts: list[str]) -> Text:
        """Embeddings exactly as the stock pipeline makes them."""

    def encode_video(self, frames_BTCHW: Tensor) -> Tensor:
        """Normalised latents [B, C, T, H, W], the posterior's mode."""

    def decode_video(self, latents: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] in [0, 1]."""

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        """The stock sampler's times t_0 > ... > t_steps = 0 for latents of ``shape`` (C, T, H, W)."""

    def training_times(self, u_B: Tensor, shape: tuple[int, ...], shift: float = 0.0) -> Tensor:
        """Uniform numbers in [0, 1) to training times, as dense as the family trains.

        ``shift`` 0 takes the sampler's.
        """

    def velocity(self, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        """v = e - x_0 at x_t, times t in [0, 1], one per sample; fp32."""

    def flow_loss(self, v: Tensor, target: Tensor, t_B: Tensor) -> Tensor:
        """The family's own training loss of a velocity ``v`` against e - x_0; scalar."""

    def tap(self, block: int) -> AbstractContextManager[Tap]:
        """Within the context, the next forward pass leaves the hidden state after ``block`` in the Tap."""

    def call_arguments(self, guidance: float) -> dict[str, Any]:
        """What the stock pipeline's call takes beyond prompt, size, steps and generator."""

    def comfy_names(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transformer's LoRA under the names that ComfyUI reads, without alphas."""
