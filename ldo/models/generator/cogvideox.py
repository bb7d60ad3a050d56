"""CogVideoX text-to-video: a variance-preserving diffusion with v-prediction on a discrete schedule, seen as a flow.

Its process z_k = a x_0 + s e, a = sqrt(alphas_cumprod[k]), s = sqrt(1 - a^2), and the flow x_t = (1 - t) x_0 + t e are
the same up to scale: x_t = z_k / (a + s) with t = s / (a + s). From the network's v = a e - s x_0 follow

    x_0 = a z - s v,  e = s z + a v,  e - x_0 = (s - a) z + (a + s) v

so an Euler step of the flow is the stock DDIM step, and every sampler of ``ldo.models.flow`` has its exact density here
too. Times are those of the 1000 discrete steps. The family trains the mean of (v - v*)^2, which is the squared error of
e - x_0 over (a + s)^2 = 1 / (t^2 + (1 - t)^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldo.models.generator.base import Adapter
from ldo.models.generator.protocol import Options, Text


class CogVideoX(Adapter):
    """Adapter around a stock ``CogVideoXPipeline``."""

    family = "cogvideox"
    text_length = 226
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, pipeline: Any, options: Options):
        super().__init__(pipeline, options)
        config = pipeline.scheduler.config
        if config.prediction_type != "v_prediction":
            raise ValueError(f"cogvideox: its scheduler says {config.prediction_type}; a v_prediction model is needed")
        # without rotary positions its table of positions starts after this many tokens of text
        if not self.transformer.config.use_rotary_positional_embeddings:
            self.text_length = self.transformer.config.max_text_seq_length
        alpha = pipeline.scheduler.alphas_cumprod.double()
        # in double precision, which ``discrete`` needs
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        self._table = s / (a + s)  # t of each discrete step, rising
        # tables on the device, made once: a copy would wait for the GPU at every pass
        self._kept: dict[tuple, Any] = {}

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return [*(float(self._table[timestep]) for timestep in scheduler.timesteps), 0.0]

    def training_times(self, u_B: Tensor, shape: tuple[int, ...], shift: float = 0.0) -> Tensor:
        # every discrete step equally often, which is how the family is pretrained
        return self._table.to(u_B.device)[(u_B * len(self._table)).long()].to(u_B.dtype)

    def shift(self, shape: tuple[int, ...]) -> float:
        raise NotImplementedError("cogvideox has a noise schedule of its own, not a flow shift")

    def flow_loss(self, v: Tensor, target: Tensor, t_B: Tensor) -> Tensor:
        t = t_B.view(-1, *[1] * (v.ndim - 1))
        return ((v - target).square() * (t.square() + (1 - t).square())).mean()

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def discrete(self, t_B: Tensor) -> Tensor:
        """The discrete step nearest to each time [B]."""
        table = self._once(("times", t_B.device), lambda: self._table.to(t_B.device))
        # in double precision: neighbouring times of the 1000 are closer than fp32 can tell near t = 1
        above = torch.searchsorted(table, t_B.double()).clamp(1, len(table) - 1)
        return above - (t_B - table[above - 1] < table[above] - t_B).long()

    def predict(self, name: str, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        transformer = self.transformers[name]
        t = t_B.float().view(-1, *[1] * (x.ndim - 1))
        scale = (t.square() + (1 - t).square()).rsqrt()  # a + s
        a, s = (1 - t) * scale, t * scale
        z = scale * x
        rotary = None
        if transformer.config.use_rotary_positional_embeddings:
            height, width = (side * self.geometry.space for side in x.shape[-2:])
            shape = (height, width, x.shape[2], x.device)
            rotary = self._once(shape, lambda: self.pipeline._prepare_rotary_positional_embeddings(*shape))
        answer = transformer(
            hidden_states=z.transpose(1, 2).to(transformer.dtype),
            encoder_hidden_states=text.tensors["embeds"].to(transformer.dtype),
            timestep=self.discrete(t_B),
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return (s - a) * z + scale * answer.float().transpose(1, 2)
