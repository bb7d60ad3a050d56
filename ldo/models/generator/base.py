"""What all families share: a stock pipeline with its parts frozen, the tap, and the flow that they are seen as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldo.models import flow
from ldo.models.generator.folder import PIPELINES, geometry_from_configs
from ldo.models.generator.protocol import Options, Tap, Text


class Adapter:
    """A stock diffusers pipeline as a ``Generator``.

    A family adds what its transformer, VAE and text encoders ask for.
    """

    family: str
    text_length: int  # the family's own
    lora_targets: Sequence[str] | str

    def __init__(self, pipeline: Any, options: Options):
        self.pipeline, self.options = pipeline, options
        self.text_length = options.text_length or self.text_length
        # a tokenizer and a scheduler are components too, and some pipelines have empty ones
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        for part in parts.values():
            part.eval().requires_grad_(False)
        self.transformers = {name: parts[name] for name in ("transformer", "transformer_2") if name in parts}
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.geometry = geometry_from_configs(self.family, dict(self.vae.config), dict(self.transformer.config))
        self._tap: Tap | None = None

    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype, options: Options) -> Adapter:
        """Load a diffusers folder or Hub name."""
        import diffusers

        (name,) = [pipeline for pipeline, family in PIPELINES.items() if family == cls.family]
        return cls(getattr(diffusers, name).from_pretrained(path, dtype=dtype), options)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    # ---------------------------------------------------------------------- to be added by a family

    def predict(self, name: str, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        """v = e - x_0 from one transformer, fp32."""
        raise NotImplementedError

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        raise NotImplementedError

    # ---------------------------------------------------------------------- to be replaced where a family differs

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Text:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_length, device=self.device
        )
        return Text({"embeds": embeds})

    def normalise(self, z: Tensor) -> Tensor:
        """The VAE's latents as the transformer takes them."""
        return z * self.vae.config.scaling_factor

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of ``normalise``."""
        return latents / self.vae.config.scaling_factor

    def call_arguments(self, guidance: float) -> dict[str, Any]:
        return {"guidance_scale": guidance, "max_sequence_length": self.text_length}

    def comfy_names(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        return comfy_keys(lora)

    def route(self, t_B: Tensor) -> dict[str, Tensor | None]:
        """Which samples each transformer takes; None for all."""
        return {"transformer": None}

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        """The blocks that can be tapped, in order."""
        return list(transformer.transformer_blocks)

    # ------------------------------------------------------------------------------------------ the VAE

    @torch.no_grad()
    def encode_video(self, frames_BTCHW: Tensor) -> Tensor:
        frames = frames_BTCHW.shape[1]
        # some VAEs would silently return a wrong number of latents
        if (frames - 1) % self.geometry.time:
            raise ValueError(f"{self.family}: {frames} frames; its VAE takes {self.geometry.time}K+1")
        pixels = (frames_BTCHW.transpose(1, 2) * 2 - 1).to(self.vae.dtype)
        # the mode and not a sample: a clip has the same latent every time it is encoded
        return self.normalise(self.vae.encode(pixels).latent_dist.mode().float())

    @torch.no_grad()
    def decode_video(self, latents: Tensor) -> Tensor:
        pixels = self.decode(self.restore(latents.float()).to(self.vae.dtype)).float()
        return (pixels / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def decode(self, z: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [-1, 1] of the VAE's own latents."""
        return self.vae.decode(z, return_dict=False)[0]

    # ------------------------------------------------------------------------------------------ the flow

    def training_times(self, u_B: Tensor, shape: tuple[int, ...], shift: float = 0.0) -> Tensor:
        return flow.training_times(u_B, shift or self.shift(shape))

    def shift(self, shape: tuple[int, ...]) -> float:
        """The sampler's flow shift."""
        # schedulers disagree on the name
        config = self.pipeline.scheduler.config
        return float(getattr(config, "flow_shift", None) or getattr(config, "shift", 1.0))

    def flow_loss(self, v: Tensor, target: Tensor, t_B: Tensor) -> Tensor:
        return (v - target).square().mean()

    def velocity(self, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        routes = self.route(t_B)
        if self._tap is not None:
            self._tap.grid = self.geometry.tokens(x.shape)
            self._tap.rows = {name: rows for name, rows in routes.items() if rows is not None}
        if len(routes) == 1:
            return self.predict(next(iter(routes)), x, t_B, text)
        parts = [self.predict(name, x[rows], t_B[rows], text[rows]) for name, rows in routes.items()]
        # back to the order of the batch, which the experts took apart
        order = torch.cat(list(routes.values())).argsort()
        return torch.cat(parts)[order]

    @contextmanager
    def tap(self, block: int) -> Iterator[Tap]:
        # ``velocity`` notes the grid and the experts' rows in it, the hooks below the tokens
        self._tap = tap = Tap()

        def hook(name: str):
            def catch(_module, _inputs, output):
                # setdefault: a block that is computed again in the backward must not replace what was caught
                tap.parts.setdefault(name, output[0] if isinstance(output, tuple) else output)

            return catch

        handles = [
            self.blocks(transformer)[block].register_forward_hook(hook(name))
            for name, transformer in self.transformers.items()
        ]
        try:
            yield tap
        finally:
            self._tap = None
            for handle in handles:
                handle.remove()


def comfy_keys(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """``a.b.lora_A.weight`` as ``diffusion_model.a.b.lora_down.weight``.

    For a model whose layers ComfyUI names as diffusers does.
    """
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for name, value in lora.items():
        layer, side, _ = name.rsplit(".", 2)
        renamed[f"diffusion_model.{layer}.{sides[side]}.weight"] = value
    return renamed


def scheduler_times(scheduler: Any, steps: int, **arguments: Any) -> list[float]:
    """Times of a flow-matching scheduler, asked of a copy: t_0 > ... > t_steps = 0."""
    # asking for times changes a scheduler's state, and the pipeline's own must stay as it is
    separate = type(scheduler).from_config(scheduler.config)
    separate.set_timesteps(**({"num_inference_steps": steps} | arguments))
    return [float(sigma) for sigma in separate.sigmas]
