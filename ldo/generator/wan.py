"""Wan 2.1 text-to-video: latents [B, C, T, H, W], a flow-matching transformer, a causal VAE with 4x time compression."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ldo.generator.folder import Geometry
from ldo.generator.protocol import Tap, tap_block

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


class Wan:
    """Adapter around a stock ``WanPipeline``."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, pipeline, text_length: int = 512):
        self.pipeline, self.text_length = pipeline, text_length
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        for part in (self.transformer, self.vae, pipeline.text_encoder):
            part.eval().requires_grad_(False)
        config, vae = self.transformer.config, self.vae.config
        self.geometry = Geometry(
            time=vae.scale_factor_temporal,
            space=vae.scale_factor_spatial,
            patch=tuple(config.patch_size),
            channels=config.in_channels,
            blocks=config.num_layers,
            width=config.num_attention_heads * config.attention_head_dim,
        )
        self.shift = float(getattr(pipeline.scheduler.config, "flow_shift", None) or getattr(pipeline.scheduler.config, "shift", 1.0))
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.latents_mean).view(shape)
        self._inverse_std = 1.0 / torch.tensor(vae.latents_std).view(shape)

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype, text_length: int) -> Wan:
        from diffusers import WanPipeline

        return cls(WanPipeline.from_pretrained(path, dtype=dtype), text_length)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        return self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device)[0]

    @torch.no_grad()
    def encode_video(self, frames_BTCHW: Tensor) -> Tensor:
        frames = frames_BTCHW.shape[1]
        if (frames - 1) % self.geometry.time:  # the VAE would silently return a wrong number of latents
            raise ValueError(f"wan: {frames} frames; its VAE takes {self.geometry.time}K+1")
        x = (frames_BTCHW.transpose(1, 2) * 2 - 1).to(self.vae.dtype)
        mode = self.vae.encode(x).latent_dist.mode().float()
        return (mode - self._mean.to(mode.device)) * self._inverse_std.to(mode.device)

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        z = latents.float() / self._inverse_std.to(latents.device) + self._mean.to(latents.device)
        y = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
        return (y / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def velocity(self, x: Tensor, t_B: Tensor, text: Tensor) -> Tensor:
        # The hidden state enters in the model's dtype; the timestep stays fp32, as in the stock pipeline.
        out = self.transformer(
            hidden_states=x.to(self.transformer.dtype),
            timestep=t_B.float() * 1000,
            encoder_hidden_states=text.to(self.transformer.dtype),
            return_dict=False,
        )[0]
        return out.float()

    @contextmanager
    def tap(self, block: int) -> Iterator[Tap]:
        grid: list[tuple[int, int, int]] = []
        # the grid is that of whatever latents enter the transformer
        entry = self.transformer.register_forward_pre_hook(
            lambda _m, _a, kw: grid.append(self.geometry.tokens(kw["hidden_states"].shape)), with_kwargs=True
        )
        tap, exit_ = tap_block(self.transformer.blocks[block], grid)
        try:
            yield tap
        finally:
            entry.remove()
            exit_.remove()

    def comfy_names(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for key, value in lora.items():
            block, layer, side = re.fullmatch(r"blocks\.(\d+)\.(.+)\.lora_([AB])\.weight", key).groups()
            out[f"diffusion_model.blocks.{block}.{_COMFY[layer]}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
        return out
