"""HunyuanVideo text-to-video: a flow-matching transformer of double- and single-stream blocks, distilled for guidance.

The transformer is told a guidance scale (``model.guidance``) instead of being run twice; classifier-free guidance on
top of that is what the stock pipeline calls ``true_cfg_scale``. Its text stream is left alone by the LoRA.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldo.generator.base import Adapter, scheduler_times
from ldo.generator.protocol import Text

_DOUBLE = {"attn.to_out.0": "img_attn_proj", "ff.net.0.proj": "img_mlp.fc1", "ff.net.2": "img_mlp.fc2"}
_FUSED = ("attn.to_q", "attn.to_k", "attn.to_v")


class Hunyuan(Adapter):
    """Adapter around a stock ``HunyuanVideoPipeline``."""

    family = "hunyuan"
    text_length = 256
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.to_[qkv]|attn\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    )

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Text:
        embeds, pooled, mask = self.pipeline.encode_prompt(prompts, max_sequence_length=self.text_length, device=self.device)
        return Text({"embeds": embeds, "pooled": pooled, "mask": mask})

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        return scheduler_times(self.pipeline.scheduler, steps, sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])

    def predict(self, name: str, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        transformer = self.transformers[name]
        dtype, told = transformer.dtype, text.tensors
        out = transformer(
            hidden_states=x.to(dtype),
            timestep=t_B.float() * 1000,
            encoder_hidden_states=told["embeds"].to(dtype),
            encoder_attention_mask=told["mask"].to(dtype),
            pooled_projections=told["pooled"].to(dtype),
            guidance=torch.full((len(x),), self.options.guidance, dtype=dtype, device=x.device) * 1000,
            return_dict=False,
        )[0]
        return out.float()

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def call_arguments(self, guidance: float) -> dict[str, Any]:
        return {
            "guidance_scale": self.options.guidance,
            "true_cfg_scale": guidance,
            "negative_prompt": "",
            "max_sequence_length": self.text_length,
        }

    def comfy_names(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        """ComfyUI keeps the original layers, which hold q, k, v (and a single block's MLP) in one: their LoRA is the blocks' direct sum.

        A sum of n layers has n times the rank, so that alpha must grow as much; ``lora.export`` sees to that.
        """
        out, blocks = {}, {}
        for key, value in lora.items():
            kind, block, layer, side = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)\.lora_([AB])\.weight", key).groups()
            blocks.setdefault((kind, block), {}).setdefault(layer, {})[side] = value
        for (kind, block), layers in blocks.items():
            where = f"diffusion_model.{'single' if kind else 'double'}_blocks.{block}"
            parts = {"linear1": (*_FUSED, "proj_mlp"), "linear2": ("proj_out",)} if kind else {"img_attn_qkv": _FUSED}
            parts |= {} if kind else {name: (layer,) for layer, name in _DOUBLE.items()}
            for name, joined in parts.items():
                out[f"{where}.{name}.lora_down.weight"] = torch.cat([layers[n]["A"] for n in joined])
                out[f"{where}.{name}.lora_up.weight"] = torch.block_diag(*(layers[n]["B"] for n in joined))
        return out
