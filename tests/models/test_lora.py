"""The adapter: deterministic, swapped bit-exactly, and exported so that the stock pipeline reproduces it exactly."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from ldo.models import lora
from ldo.models.generator.families import family_adapter, load_generator
from ldo.models.generator.folder import read_geometry
from ldo.models.generator.protocol import Options
from tests.helpers import models
from tests.helpers.families import comfy


def output(transformer):
    latents = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    timesteps, text = torch.tensor([300.0, 900.0]), torch.ones(2, 16, 16)
    with torch.no_grad():
        return transformer(latents, timesteps, text, return_dict=False)[0]


def test_fresh_adapter_changes_nothing_and_is_a_function_of_the_seed(wan, wan_folder):
    before = output(wan.transformer)
    # whatever the state, the adapter neither depends on it nor moves it
    torch.manual_seed(123)
    state = torch.get_rng_state()
    parameters = lora.add(wan.transformers, 4, 8.0, wan.lora_targets, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(wan.transformer), before)
    again = lora.add(load_generator("wan", wan_folder).transformers, 4, 8.0, wan.lora_targets, seed=0)
    assert all(torch.equal(parameters[name], again[name]) for name in again)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in parameters.values())
    # A and B, 10 layers a block
    assert len(parameters) == 2 * 10 * 2
    assert sum(parameter.requires_grad for parameter in wan.transformer.parameters()) == len(parameters)


def test_swapping_is_bit_exact_even_through_an_error(wan):
    parameters = models.adapter(wan)
    values, before = lora.snapshot(parameters), output(wan.transformer)
    with lora.swapped(parameters, lora.zeros(parameters)):
        assert not torch.allclose(output(wan.transformer), before, atol=1e-3)
    assert torch.equal(output(wan.transformer), before)
    with pytest.raises(RuntimeError), lora.swapped(parameters, lora.zeros(parameters)):
        raise RuntimeError
    assert all(torch.equal(parameter, values[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 3.0), (6, 10.0)])
def test_stock_pipeline_reproduces_the_trained_model_exactly(wan, wan_folder, tmp_path, rank, alpha):
    parameters = models.adapter(wan, rank, alpha)
    expected = output(wan.transformer)
    values = lora.snapshot(parameters)
    lora.export(tmp_path, values, rank, alpha, wan.lora_targets, comfy(wan, values))
    stock = WanPipeline.from_pretrained(wan_folder)
    # without the file it is another model
    assert not torch.allclose(output(stock.transformer), expected, atol=1e-2)
    stock.load_lora_weights(tmp_path)
    assert (output(stock.transformer) - expected).abs().max() == 0.0


@pytest.mark.parametrize("form", ["wan", "cogvideox-5b", "hunyuan", "ltx"])
def test_in_bf16_the_stock_pipeline_computes_what_training_did(form, tmp_path):
    """It keeps the adapter in the base's precision; training rounds the fp32 weights to it in every pass."""
    folder = models.FAMILIES[form](tmp_path / form)
    family, options = read_geometry(folder)[0], Options(text_length=16)
    generator = load_generator(family, folder, torch.bfloat16, options)
    parameters = models.adapter(generator, 4, 8.0)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    latents, times = torch.randn(2, generator.geometry.channels, 3, 4, 4), torch.tensor([0.3, 0.8])
    text, values = generator.encode_text(["a red ball rolls", "a blue ball"]), lora.snapshot(parameters)
    lora.export(tmp_path / "out", values, 4, 8.0, generator.lora_targets, comfy(generator, values))
    stock = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    lora.load_into(stock, tmp_path / "out")
    with torch.no_grad():
        velocity = family_adapter(family)(stock, options).velocity(latents, times, text)
        assert torch.equal(velocity, generator.velocity(latents, times, text))
        with lora.swapped(parameters, lora.zeros(parameters)):
            assert not torch.allclose(velocity, generator.velocity(latents, times, text), atol=1e-2)


def test_comfy_file_round_trips(wan, wan_folder, tmp_path):
    """ComfyUI's names with .alpha tensors, which diffusers reads too: exactly for alpha / rank a power of two."""
    parameters = models.adapter(wan, 4, 8.0)
    values = lora.snapshot(parameters)
    lora.export(tmp_path, values, 4, 8.0, wan.lora_targets, comfy(wan, values))
    tensors = load_file(tmp_path / lora.COMFY["transformer"])
    assert "diffusion_model.blocks.0.self_attn.q.lora_down.weight" in tensors
    assert "diffusion_model.blocks.1.ffn.2.lora_up.weight" in tensors
    # two blocks of ten layers
    alphas = [value for name, value in tensors.items() if name.endswith(".alpha")]
    assert len(alphas) == 20 and all(float(alpha) == 8.0 for alpha in alphas)
    stock = WanPipeline.from_pretrained(wan_folder)
    stock.load_lora_weights(tmp_path, weight_name=lora.COMFY["transformer"])
    assert (output(stock.transformer) - output(wan.transformer)).abs().max() == 0.0


def test_export_is_reproducible_to_the_byte(wan, tmp_path):
    values = lora.snapshot(models.adapter(wan))
    for name in "ab":
        lora.export(tmp_path / name, values, 4, 8.0, wan.lora_targets, comfy(wan, values))
    first, second = (tmp_path / name / lora.WEIGHTS["transformer"] for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == 4 and config["transformer.lora_alpha"] == 8.0
