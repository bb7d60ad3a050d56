"""Memory and speed switches: each is seen to act, both stages run under it, and what must not change does not."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldo import check
from ldo.core.config import ModelConfig, Recipe
from ldo.models import efficiency, lora
from ldo.models.efficiency import compile_blocks, place_models
from ldo.models.generator.families import load_generator
from ldo.models.generator.folder import read_geometry
from ldo.models.generator.protocol import Options
from ldo.models.world_model import WorldModel
from ldo.run.load import configure_models
from tests.helpers import models, recipes
from tests.helpers.short_run import SHORT, train_both_stages

# ---------------------------------------------------------------------------------------------- all at once


def test_recipes_that_make_no_sense_are_refused_before_anything_loads(tmp_path, wan_folder, vjepa_folder, capsys):
    path = str(recipes.write(tmp_path, wan_folder, vjepa_folder))
    for change, words in {
        "model.offload=[cpu]": "model.offload is 'cpu'; choose one of text, vae, world_model",
        "model.fp8=true": "set model.gradient_checkpointing=true, or model.fp8=false",
        "model.fp8=8": "model.fp8 is 8; true or false is expected",
    }.items():
        assert check.main([path, change]) == 2
        assert words in capsys.readouterr().err
    assert check.main([path, "model.offload=[text,vae]", "model.fp8=true", "model.gradient_checkpointing=true"]) == 0


def test_both_stages_run_with_everything_that_saves_memory(open_run, caplog):
    caplog.set_level(logging.INFO)
    run = open_run(
        **SHORT,
        model__fp8=True,
        model__gradient_checkpointing=True,
        model__vae_tiling=True,
        model__vae_slicing=True,
        model__dtype="bfloat16",
        model__offload=["text", "vae", "world_model"],
    )
    assert {value.dtype for value in train_both_stages(run).values()} == {torch.float32}
    weights = run.generator.transformer.parameters()
    small = sum(weight.dtype == torch.float8_e4m3fn for weight in weights)
    assert small > 0 and f"fp8: {small} weights of the generator are stored in 8 bits" in caplog.messages


@pytest.mark.parametrize("form", models.FAMILIES)
def test_everything_at_once_in_every_family(form, tmp_path, vjepa_folder, frames, caplog):
    caplog.set_level(logging.INFO)
    folder = models.FAMILIES[form](tmp_path / form)
    generator = load_generator(read_geometry(folder)[0], folder, torch.bfloat16, Options(text_length=16))
    parameters = lora.add(generator.transformers, 4, 8.0, generator.lora_targets, seed=0)
    config = ModelConfig(
        dtype="bfloat16",
        attention="sdpa_math",
        fp8=True,
        gradient_checkpointing=True,
        vae_tiling=True,
        vae_slicing=True,
        offload=("text", "vae", "world_model"),
    )
    configure_models(Recipe(model=config), generator, WorldModel.load(vjepa_folder), torch.device("cpu"))
    reports = [message for message in caplog.messages if "attention: generator sdpa_math" in message]
    assert len(reports) == len(generator.transformers)
    latents = generator.encode_video(frames)
    # times on both sides of the boundary, where there are two experts
    times = torch.tensor([0.1, 0.99])
    velocity = generator.velocity(latents, times, generator.encode_text(["a red ball rolls", "a blue ball"]))
    velocity.square().mean().backward()
    assert velocity.shape == latents.shape and generator.decode_video(velocity.detach()).shape == frames.shape
    for parameter in parameters.values():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter.grad).all()
    for prefix in generator.transformers:
        gradients = [parameter.grad for name, parameter in parameters.items() if name.startswith(f"{prefix}.")]
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


# ---------------------------------------------------------------------------------------------- offload


# stands in for an accelerator: like a device, it is what ``to`` takes
AWAY = torch.float64


def tiny_module():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


class Pipeline:
    """Five modules; every call answers which of them are on the accelerator."""

    def __init__(self):
        self.components = {
            "text_encoder": tiny_module(),
            "text_encoder_2": tiny_module(),
            "tokenizer": None,
            "vae": tiny_module(),
            "transformer": tiny_module(),
        }
        self.pipeline = self
        self.vae = self.components["vae"]
        self.transformers = {"transformer": self.components["transformer"]}
        self.judge = nn.Module()
        self.judge.model = tiny_module()
        for owner in (self.judge, self.judge.model):
            owner.register_buffer("mean", torch.zeros(1))
        for method in ("encode_text", "encode_video", "decode_video", "velocity"):
            setattr(self, method, self.where)
        self.judge.encode = self.judge.forecast = self.where

    def where(self):
        """Which parts are on the accelerator."""
        modules = {
            "text": [self.components["text_encoder"], self.components["text_encoder_2"]],
            "vae": [self.components["vae"]],
            "transformer": [self.components["transformer"]],
            "world_model": [self.judge.model],
        }
        present = set()
        for name, parts in modules.items():
            places = set()
            for part in parts:
                places |= {tensor.dtype for tensor in (*part.parameters(), *part.buffers())}
            # a part is either here or there as a whole
            (place,) = places
            if place == AWAY:
                present.add(name)
        return present


def test_parts_visit_one_at_a_time_and_go_home_before_the_transformer_runs():
    pipeline = Pipeline()
    before = {name: value.clone() for name, value in pipeline.vae.state_dict().items()}
    place_models(pipeline, pipeline.judge, ("text", "vae", "world_model"), AWAY)
    assert pipeline.where() == {"transformer"} and pipeline.judge.mean.dtype == AWAY
    assert pipeline.encode_text() == {"transformer", "text"}
    assert pipeline.velocity() == {"transformer"}
    assert pipeline.decode_video() == pipeline.encode_video() == {"transformer", "vae"}
    assert pipeline.judge.encode() == pipeline.judge.forecast() == {"transformer", "world_model"}
    assert pipeline.velocity() == {"transformer"}
    assert all(torch.equal(value, before[name]) for name, value in pipeline.vae.state_dict().items())


def test_what_is_not_offloaded_stays():
    pipeline = Pipeline()
    place_models(pipeline, pipeline.judge, ("vae",), AWAY)
    others = {"transformer", "text", "world_model"}
    assert pipeline.where() == pipeline.judge.encode() == others
    assert pipeline.decode_video() == pipeline.where() == {*others, "vae"}
    assert pipeline.encode_text() == others
    pipeline = Pipeline()
    assert place_models(pipeline, pipeline.judge, (), AWAY) is None
    assert pipeline.where() == pipeline.velocity() == {*others, "vae"}


def test_offload_changes_no_number(open_run):
    plain = open_run(**SHORT)
    expected = train_both_stages(plain)
    # the second run has the same folder, and must not resume the first
    shutil.rmtree(plain.folder)
    offloaded = train_both_stages(open_run(**SHORT, model__offload=["text", "vae", "world_model"]))
    assert all(torch.equal(offloaded[name], value) for name, value in expected.items())


# ---------------------------------------------------------------------------------------------- the VAE


def test_tiling_and_slicing_of_the_vae(open_run, frames, caplog):
    plain = open_run().generator
    generator = open_run(**SHORT, model__vae_tiling=True, model__vae_slicing=True).generator
    assert any("tiles leave faint seams" in message for message in caplog.messages)
    # the real tiles are 256 pixels and more, larger than the sandbox's clips
    generator.vae.enable_tiling(16, 16, 12, 12)
    shapes = []
    hook = generator.vae.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    latents = generator.encode_video(frames)
    video = generator.decode_video(latents)
    hook.remove()
    # one clip at a time, 16 of 32 pixels
    assert {shape[0] for shape in shapes} == {1} and max(shape[-1] for shape in shapes) == 4
    # the seams show, and are faint
    assert 0 < (video - plain.decode_video(latents)).abs().max() < 0.5
    generator.vae.disable_tiling()
    assert torch.allclose(generator.decode_video(latents), plain.decode_video(latents), atol=1e-5)


# ---------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize(("family", "blocks"), [("wan", 2), ("cogvideox", 2), ("hunyuan", 4), ("ltx", 2)])
def test_all_blocks_are_compiled_in_every_family_and_expert(family, blocks):
    experts = {expert: models.transformer(family)[0] for expert in ("high", "low")}
    single = SimpleNamespace(transformers={"transformer": experts["high"]}, velocity=lambda: None)
    assert compile_blocks(single) == blocks
    assert compile_blocks(SimpleNamespace(transformers=experts, velocity=lambda: None)) == 2 * blocks


def test_compiled_blocks_are_tapped_and_sampling_shares_the_graph_of_training(wan, monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(efficiency, "COMPILER", backend)
    lora.add(wan.transformers, 4, 8.0, wan.lora_targets, seed=0)
    latents, times = torch.randn(2, 4, 5, 8, 8), torch.tensor([0.3, 0.7])
    text = wan.encode_text(["a red ball", "a blue ball"])
    with wan.tap(0) as tap:
        plain = wan.velocity(latents, times, text)
    hidden = tap.take().x_BND
    torch._dynamo.reset()
    assert compile_blocks(wan) == 2
    with torch.no_grad():
        sampled = wan.velocity(latents, times, text)
    assert not sampled.requires_grad and torch.equal(sampled, plain)
    compiled = len(graphs)
    assert compiled >= 1
    for _ in range(2):
        with wan.tap(0) as tap:
            velocity = wan.velocity(latents, times, text)
        assert velocity.requires_grad and torch.equal(velocity, plain) and torch.equal(tap.take().x_BND, hidden)
    assert len(graphs) == compiled
    # other tests must not find these graphs
    torch._dynamo.reset()


def test_a_compiled_policy_has_ratio_one(open_run, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(efficiency, "COMPILER", "eager")
    torch._dynamo.reset()
    run = open_run(**SHORT, model__compile=True, model__gradient_checkpointing=True)
    assert "compile: 2 blocks, when they first run" in caplog.messages
    # it raises where a ratio is not exactly 1 before the first step
    train_both_stages(run)
    torch._dynamo.reset()
