"""The LoRA in ComfyUI's file: every layer's update is the adapter's, in every family."""

import pytest
import torch
from safetensors.torch import load_file

from ldo.models import lora
from ldo.models.generator.families import family_adapter
from tests.helpers import models
from tests.helpers.families import comfy, stock, velocities

RANK, ALPHA = 4, 8.0


def test_comfy_file_holds_the_same_update(model, tmp_path):
    """Every layer's alpha / rank x up x down, from only ComfyUI's file, equals the adapter's."""
    values = lora.snapshot(models.adapter(model, RANK, ALPHA))
    lora.export(tmp_path, values, RANK, ALPHA, model.lora_targets, comfy(model, values))
    for name in model.transformers:
        updates = adapter_updates(lora.of(values, name))
        joined = 0
        for key, update in comfy_updates(load_file(tmp_path / lora.COMFY[name])).items():
            layers = layers_of(key, updates)
            joined += len(layers)
            assert torch.allclose(update, torch.cat([updates[layer] for layer in layers]), atol=1e-6)
        # none is missing, none twice
        assert joined == len(updates)


# diffusers knows ComfyUI's names of these families, and loads one file into one transformer
@pytest.mark.parametrize("folder", ["wan", "wan2.2-5b", "ltx"], indirect=True)
def test_diffusers_reads_the_comfy_file_where_it_knows_the_names(model, folder, tmp_path):
    values = lora.snapshot(models.adapter(model, RANK, ALPHA))
    lora.export(tmp_path, values, RANK, ALPHA, model.lora_targets, comfy(model, values))
    pipeline = stock(folder)
    tensors = load_file(tmp_path / lora.COMFY["transformer"])
    if model.family == "ltx":
        tensors = without_alphas(tensors)
    pipeline.load_lora_weights(tensors)
    fresh = family_adapter(model.family)(pipeline, model.options)
    assert (velocities(fresh) - velocities(model)).abs().max() < 1e-5


def adapter_updates(values):
    """What each layer's adapter adds to its weight."""
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in values})
    return {
        layer: ALPHA / RANK * values[f"{layer}.lora_B.weight"] @ values[f"{layer}.lora_A.weight"] for layer in layers
    }


def comfy_updates(tensors):
    """What ComfyUI adds to each of its layers' weights."""
    updates = {}
    for name, alpha in tensors.items():
        if name.endswith(".alpha"):
            key = name.removesuffix(".alpha")
            down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
            updates[key] = float(alpha) / len(down) * up @ down
    return updates


def without_alphas(tensors):
    """Names of diffusers and alphas put into the weights: its reader for LTX-Video knows none."""
    renamed = {}
    for name, value in tensors.items():
        if "lora_up" in name:
            renamed[name.replace("lora_up", "lora_B")] = value * ALPHA / RANK
        elif "lora_down" in name:
            renamed[name.replace("lora_down", "lora_A")] = value
    return renamed


def layers_of(key: str, updates: dict) -> list[str]:
    """The layers of diffusers' transformer that one of ComfyUI's holds, in its order.

    Written independently of the code that it checks.
    """
    key = key.removeprefix("diffusion_model.")
    projections = ["attn.to_q", "attn.to_k", "attn.to_v"]
    stream, _, path = key.partition("_blocks.")
    if stream in ("double", "single"):
        block, _, layer = path.partition(".")
        parts = {
            "img_attn_qkv": projections,
            "img_attn_proj": ["attn.to_out.0"],
            "img_mlp.fc1": ["ff.net.0.proj"],
            "img_mlp.fc2": ["ff.net.2"],
            "linear1": [*projections, "proj_mlp"],
            "linear2": ["proj_out"],
        }[layer]
        prefix = "transformer_blocks" if stream == "double" else "single_transformer_blocks"
        return [f"{prefix}.{block}.{part}" for part in parts]
    for theirs, ours in (
        ("self_attn", "attn1"),
        ("cross_attn", "attn2"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
    ):
        key = key.replace(theirs, ours)
    # Wan's attention layers end in one letter
    if "attn" in key and key.split(".")[-1] in "qkvo":
        attention, letter = key.rsplit(".", 1)
        key = f"{attention}.to_out.0" if letter == "o" else f"{attention}.to_{letter}"
    assert key in updates
    return [key]
