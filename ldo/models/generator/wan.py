"""Wan 2.1 and 2.2 text-to-video: a flow-matching transformer and a causal VAE with 4x time compression.

Wan 2.2 comes in two forms that differ from 2.1: the A14B pairs two transformers, of which ``transformer`` serves the
noisy times from ``boundary_ratio`` up and ``transformer_2`` the rest; the 5B's transformer takes a time for every
token, and its VAE halves space once more.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ldo.models import flow
from ldo.models.generator.base import Adapter, scheduler_times
from ldo.models.generator.protocol import Options, Text

_COMFY = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


class Wan(Adapter):
    """Adapter around a stock ``WanPipeline``."""

    family = "wan"
    text_length = 512
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, pipeline: Any, options: Options):
        super().__init__(pipeline, options)
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(self.vae.config.latents_mean).view(shape)
        self._inverse_std = 1.0 / torch.tensor(self.vae.config.latents_std).view(shape)

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self._mean.to(z.device)) * self._inverse_std.to(z.device)

    def restore(self, latents: Tensor) -> Tensor:
        return latents / self._inverse_std.to(latents.device) + self._mean.to(latents.device)

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        scheduler = self.pipeline.scheduler
        if getattr(scheduler.config, "use_flow_sigmas", False):
            return flow.schedule(steps, self.shift(shape))
        return scheduler_times(scheduler, steps)

    def route(self, t_B: Tensor) -> dict[str, Tensor | None]:
        boundary = self.pipeline.config.boundary_ratio
        if boundary is None:
            return {"transformer": None}
        high = t_B >= boundary
        # fetched once: every look at a number on a GPU waits for it
        experts = set(high.tolist())
        if len(experts) == 1:
            return {"transformer" if experts.pop() else "transformer_2": None}
        return {"transformer": high.nonzero()[:, 0], "transformer_2": (~high).nonzero()[:, 0]}

    def predict(self, name: str, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        transformer = self.transformers[name]
        # the hidden state enters in the model's dtype; the timestep stays fp32, as in the stock pipeline
        timestep = t_B.float() * 1000
        if self.pipeline.config.expand_timesteps:
            frames, height, width = self.geometry.tokens(x.shape)
            timestep = timestep[:, None].expand(-1, frames * height * width)
        answer = transformer(
            hidden_states=x.to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=text.tensors["embeds"].to(transformer.dtype),
            return_dict=False,
        )[0]
        return answer.float()

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.blocks)

    def comfy_names(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, value in lora.items():
            block, layer, matrix = re.fullmatch(r"blocks\.(\d+)\.(.+)\.lora_([AB])\.weight", name).groups()
            side = "down" if matrix == "A" else "up"
            renamed[f"diffusion_model.blocks.{block}.{_COMFY[layer]}.lora_{side}.weight"] = value
        return renamed
