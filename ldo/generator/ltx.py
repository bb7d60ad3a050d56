"""LTX-Video text-to-video: a flow-matching transformer on packed latents, a causal VAE with 8x time and 32x space compression.

The transformer is told the frame rate through its positions (``data.fps``). The sampler's shift grows with the number
of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldo.generator.base import Adapter, scheduler_times
from ldo.generator.protocol import Text


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
        mean, std = (v.view(1, -1, 1, 1, 1).to(like.device, torch.float32) for v in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std

    def normalise(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return (z - mean) * self.vae.config.scaling_factor / std

    def restore(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def decode(self, z: Tensor) -> Tensor:
        # newer VAEs denoise as they decode; the stock pipeline tells them time 0 unless asked otherwise
        time = torch.zeros(len(z), device=z.device, dtype=z.dtype) if self.vae.config.timestep_conditioning else None
        return self.vae.decode(z, time, return_dict=False)[0]

    def _mu(self, shape: tuple[int, ...]) -> float:
        """Log of the shift: linear in the number of tokens, through two points that the scheduler names."""
        config = self.pipeline.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return base + (math.prod(shape[-3:]) - low) * (top - base) / (high - low)

    def shift(self, shape: tuple[int, ...]) -> float:
        return math.exp(self._mu(shape)) if self.pipeline.scheduler.config.use_dynamic_shifting else super().shift(shape)

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        return scheduler_times(self.pipeline.scheduler, steps, sigmas=np.linspace(1.0, 1 / steps, steps), mu=self._mu(shape))

    def predict(self, name: str, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        transformer = self.transformers[name]
        _, _, t, h, w = x.shape
        out = transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(transformer.dtype),  # [B, t h w, C]
            encoder_hidden_states=text.tensors["embeds"].to(transformer.dtype),
            timestep=t_B.float() * 1000,
            encoder_attention_mask=text.tensors["mask"],
            num_frames=t,
            height=h,
            width=w,
            rope_interpolation_scale=(self.geometry.time / self.options.fps, self.geometry.space, self.geometry.space),
            return_dict=False,
        )[0]
        return out.float().transpose(1, 2).unflatten(2, (t, h, w))

    def call_arguments(self, guidance: float) -> dict[str, Any]:
        return super().call_arguments(guidance) | {"frame_rate": self.options.fps}
