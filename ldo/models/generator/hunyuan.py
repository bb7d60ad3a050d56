"""HunyuanVideo text-to-video: a flow-matching transformer of double- and single-stream blocks, distilled for guidance.

The transformer takes a guidance scale (``model.guidance``) as an input instead of being run twice. Classifier-free
guidance on top of that is what the stock pipeline calls ``true_cfg_scale``. The LoRA leaves the text stream as it is.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldo.models.generator.base import Adapter, scheduler_times
from ldo.models.generator.protocol import Text

_FUSED = ("attn.to_q", "attn.to_k", "attn.to_v")
# ComfyUI's layers of a block, and the layers of diffusers that each of them joins
_SINGLE_PARTS = {"linear1": (*_FUSED, "proj_mlp"), "linear2": ("proj_out",)}
_DOUBLE_PARTS = {
    "img_attn_qkv": _FUSED,
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
}
_LAYER = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)\.lora_([AB])\.weight")


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
        embeds, pooled, mask = self.pipeline.encode_prompt(
            prompts, max_sequence_length=self.text_length, device=self.device
        )
        return Text({"embeds": embeds, "pooled": pooled, "mask": mask})

    def times(self, steps: int, shape: tuple[int, ...]) -> list[float]:
        return scheduler_times(self.pipeline.scheduler, steps, sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])

    def predict(self, name: str, x: Tensor, t_B: Tensor, text: Text) -> Tensor:
        transformer = self.transformers[name]
        dtype, conditioning = transformer.dtype, text.tensors
        answer = transformer(
            hidden_states=x.to(dtype),
            timestep=t_B.float() * 1000,
            encoder_hidden_states=conditioning["embeds"].to(dtype),
            encoder_attention_mask=conditioning["mask"].to(dtype),
            pooled_projections=conditioning["pooled"].to(dtype),
            guidance=torch.full((len(x),), self.options.guidance, dtype=dtype, device=x.device) * 1000,
            return_dict=False,
        )[0]
        return answer.float()

    @staticmethod
    def blocks(transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def call_arguments(self, guidance: float) -> dict[str, Any]:
        # the pipeline applies true_cfg_scale only where it is given a negative prompt
        return {
            "guidance_scale": self.options.guidance,
            "true_cfg_scale": guidance,
            "negative_prompt": "",
            "max_sequence_length": self.text_length,
        }

    def comfy_names(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        """ComfyUI keeps the original layers, which hold q, k, v (and a single block's MLP) in one.

        Their LoRA is the direct sum of the layers'. A sum of n layers has n times the rank, so that alpha must grow as
        much; ``lora.export`` sees to that.
        """
        # by block, layer and matrix (A or B)
        blocks: dict[tuple[str | None, str], dict[str, dict[str, Tensor]]] = {}
        for name, value in lora.items():
            single, block, layer, matrix = _LAYER.fullmatch(name).groups()
            blocks.setdefault((single, block), {}).setdefault(layer, {})[matrix] = value
        renamed = {}
        for (single, block), layers in blocks.items():
            where = f"diffusion_model.{'single' if single else 'double'}_blocks.{block}"
            for name, joined in (_SINGLE_PARTS if single else _DOUBLE_PARTS).items():
                downs = [layers[layer]["A"] for layer in joined]
                ups = [layers[layer]["B"] for layer in joined]
                renamed[f"{where}.{name}.lora_down.weight"] = torch.cat(downs)
                # block-diagonal, since each of the joined layers adds only to its own rows
                renamed[f"{where}.{name}.lora_up.weight"] = torch.block_diag(*ups)
        return renamed
