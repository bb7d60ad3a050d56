"""The Wan adapter against the stock pipeline: text, latents, velocity, the tapped block and its grid."""

import re
from itertools import pairwise

import pytest
import torch

from ldo import flow, generator
from ldo.generator.folder import read_geometry
from ldo.rollout import Plan, decode, kicks, sample


def test_geometry_from_json_equals_that_of_the_loaded_model(wan, wan_folder):
    family, geometry = read_geometry(wan_folder)
    assert family == "wan" and geometry == wan.geometry
    assert geometry.latents(17, 32, 32) == (4, 5, 8, 8) and geometry.tokens((5, 8, 8)) == (5, 4, 4)


@pytest.mark.parametrize(
    ("size", "words"),
    [((17, 32, 32), None), ((16, 32, 32), "use 17"), ((18, 32, 32), "4K\\+1"), ((17, 30, 32), "height 30"), ((17, 32, 33), "width 33")],
)
def test_geometry_says_what_does_not_fit(wan, size, words):
    problem = wan.geometry.problem(*size)
    assert problem is None if words is None else re.search(words, problem)


def test_text_is_the_pipelines(wan):
    prompts = ["a red ball rolls", "a blue ball is thrown to the left"]
    with torch.no_grad():
        expected, _ = wan.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=16)
    assert torch.equal(wan.encode_text(prompts).tensors["embeds"], expected)
    assert (expected[0, 5:] == 0).all()  # past the prompt's end the pipeline leaves zeros, unmasked


def test_latents_are_normalised_and_come_back(wan, frames):
    z = wan.encode_video(frames)
    assert z.shape == (2, 4, 5, 8, 8)
    raw = wan.vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (wan.vae.config.latents_mean, wan.vae.config.latents_std))
    assert torch.allclose(z, (raw - mean) / std, atol=1e-5)
    out = wan.decode_video(z)
    assert out.shape == frames.shape and out.min() >= 0 and out.max() <= 1
    expected = (wan.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-5)


def test_wrong_length_is_refused_where_the_vae_would_not(wan):
    video = torch.rand(1, 15, 3, 32, 32)
    assert wan.vae.encode(video.transpose(1, 2)).latent_dist.mode().shape[2] != 14 / 4 + 1  # silently wrong
    with pytest.raises(ValueError, match="4K\\+1"):
        wan.encode_video(video)


def test_rollout_without_noise_is_the_stock_pipeline_with_an_euler_step(wan):
    """The same latents come out of WanPipeline with a first-order scheduler on the same times."""
    from diffusers import UniPCMultistepScheduler

    noise = torch.randn(4, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red ball rolls to the left"] * 4
    config = {**wan.pipeline.scheduler.config, "solver_order": 1, "lower_order_final": True, "disable_corrector": list(range(9))}
    wan.pipeline.scheduler = UniPCMultistepScheduler.from_config(config)
    wan.pipeline.set_progress_bar_config(disable=True)
    size = dict(height=32, width=32, num_frames=17, max_sequence_length=16)
    stock = wan.pipeline(prompts, **size, num_inference_steps=8, guidance_scale=2.5, latents=noise, output_type="pt").frames
    exact = wan.velocity  # the pipeline rounds the model's time down to whole thousandths
    wan.velocity = lambda x, t, text: exact(x, (t * 1000).floor() / 1000, text)
    plan = Plan(tuple(wan.times(8, noise.shape[1:])), (), "flow", 0.0, 2.5)
    text, null = wan.encode_text(prompts), wan.encode_text([""])
    own = sample(wan, noise, text, null, plan, kicks(noise.shape, 0, torch.Generator()), 4).final_N
    assert (decode(wan, own, 4) - stock).abs().max() < 1e-4


def test_tap_gives_the_block_and_its_grid(wan):
    x, t = torch.randn(2, 4, 5, 8, 8), torch.tensor([0.3, 0.9])
    text = wan.encode_text(["a red ball", "a blue ball"])
    with wan.tap(0) as tap:
        wan.velocity(x, t, text)
    tokens = tap.take()
    assert tokens.grid == (5, 4, 4) and tokens.x_BND.shape == (2, 80, 32)
    planted = x.clone()
    planted[:, :, 3, 4:6, 2:4] += 5  # latent frame 3, token row 2, token column 1
    moved = []
    hook = wan.transformer.patch_embedding.register_forward_hook(lambda m, a, out: moved.append(out.flatten(2).transpose(1, 2)))
    wan.velocity(x, t, text)
    wan.velocity(planted, t, text)
    hook.remove()
    change = (moved[1] - moved[0]).norm(dim=-1)
    assert (change.argmax(1) == 3 * 16 + 2 * 4 + 1).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_carries_gradient_and_is_taken_once(wan, checkpointing):
    if checkpointing:
        wan.transformer.enable_gradient_checkpointing()
        wan.transformer.train()
    wan.transformer.requires_grad_(True)
    with wan.tap(0) as tap:
        v = wan.velocity(torch.randn(2, 4, 5, 8, 8), torch.tensor([0.5, 0.5]), wan.encode_text(["a red ball", "a"]))
        first = tap.take().x_BND
        v.sum().backward(retain_graph=True)  # checkpointing recomputes the block here
    assert tap.take().x_BND is first
    wan.transformer.zero_grad()
    first.square().sum().backward()
    assert wan.transformer.blocks[0].ffn.net[2].weight.grad.abs().sum() > 0
    assert wan.transformer.blocks[1].ffn.net[2].weight.grad is None


def test_velocity_points_from_video_to_noise(wan):
    """v = e - x0: a model trained to answer exactly that would be told apart from its negative by the schedule."""
    x0, noise = torch.randn(2, 4, 5, 8, 8), torch.randn(2, 4, 5, 8, 8)
    x, t = noise, flow.schedule(5, 3.0)
    for a, b in pairwise(t):
        x, _ = flow.transition(x, noise - x0, a, b)
    assert torch.allclose(x, x0, atol=1e-4)


def test_unknown_family(wan_folder):
    with pytest.raises(ValueError, match="unknown model family"):
        generator.load("sora", wan_folder)


def test_folders_that_are_no_pipelines(tmp_path, vjepa_folder):
    with pytest.raises(ValueError, match="model_index"):
        read_geometry(vjepa_folder)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
        read_geometry(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="cannot be read"):
        read_geometry(tmp_path)
