"""LTX-Video text-to-video: a flow-matching transformer on packed latents, and a causal VAE.

The VAE compresses time 8x and space 32x. The transformer knows the frame rate (``data.fps``) through its positions. The
sampler's shift grows with the number of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldo.models.generator.base import Adapter, scheduler_times
from ldo.models.generator.protocol import Text


class LTX(Adapter):
    """Adapter around a stock ``LTXPipeline``."""

    family = "ltx"
    text_length = 128
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Text:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device
        )
        return Text({"embeds": embeds, "mask": mask})

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        means = self.vae.latents_mean.view(1, -1, 1, 1, 1).to(like.device, torch.float32)
        deviations = self.vae.latents_std.view(1, -1, 1, 1, 1).to(like.device, torch.float32)
        return means, deviations

    def normalise(self, z: Tensor) -> Tensor:
        means, deviations = self._statistics(z)
        return (z - means) * self.vae.config.scaling_factor / deviations

    def restore(self, latents: Tensor) -> Tensor:
        means, deviations = self._statistics(latents)
        return latents * deviations / self.vae.config.scaling_factor + means

    def decode(self, z: Tensor) -> Tensor:
        time = None
        # newer VAEs denoise as they decode; the stock pipeline gives them time 0 unless asked otherwise
        if self.vae.config.timestep_conditioning:
            time = torch.zeros(len(z), device=z.device, dtype=z.dtype)
        return self.vae.decode(z, time, return_dict=False)[0]

    def _mu(self, shape: tuple[int, ...]) -> float:
        """Log of the shift: linear in the number of tokens, through two points of the scheduler's configuration."""
        config = self.pipeline.scheduler.config
        fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        smallest, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return smallest + (math.prod(shape[-3:]) - fewest) * (largest - smallest) / (most - fewest)

    def shift(self, shape: tuple[int, ...]) -> float:
        if self.pipeline.scheduler.config.use_dynamic_shifting:
            return math.exp(self._mu(shape))
        return super().shift(shape)

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        # evenly spaced before the shift, as the stock pipeline passes them
        sigmas = np.linspace(1.0, 1 / steps, steps)
        return scheduler_times(self.pipeline.scheduler, steps, sigmas=sigmas, mu=self._mu(shape))

    def predict(self, name: str, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        transformer = self.transformers[name]
        _, _, frames, height, width = x.shape
        # latents go in and come out as tokens [B, t h w, C]
        answer = transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(transformer.dtype),
            encoder_hidden_states=text.tensors["embeds"].to(transformer.dtype),
            timestep=t_B.float() * 1000,
            encoder_attention_mask=text.tensors["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.geometry.time / self.options.fps, self.geometry.space, self.geometry.space),
            return_dict=False,
        )[0]
        return answer.float().transpose(1, 2).unflatten(2, (frames, height, width))

    def call_arguments(self, guidance: float) -> dict[str, Any]:
        return super().call_arguments(guidance) | {"frame_rate": self.options.fps}
