"""The Wan adapter against the stock pipeline: text, latents, velocity, the tapped block and its grid."""

import re
from itertools import pairwise

import pytest
import torch

from ldo.method.rollout import SamplingPlan, decode_videos, draw_step_noise, sample_videos
from ldo.models import flow
from ldo.models.generator.families import load_generator
from ldo.models.generator.folder import read_geometry


def test_geometry_from_json_equals_that_of_the_loaded_model(wan, wan_folder):
    family, geometry = read_geometry(wan_folder)
    assert family == "wan" and geometry == wan.geometry
    assert geometry.latents(17, 32, 32) == (4, 5, 8, 8) and geometry.tokens((5, 8, 8)) == (5, 4, 4)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((17, 32, 32), None),
        ((16, 32, 32), "use 17"),
        ((18, 32, 32), "4K\\+1"),
        ((17, 30, 32), "height 30"),
        ((17, 32, 33), "width 33"),
    ],
)
def test_geometry_says_what_does_not_fit(wan, size, words):
    problem = wan.geometry.problem(*size)
    assert problem is None if words is None else re.search(words, problem)


def test_text_is_the_pipelines(wan):
    prompts = ["a red ball rolls", "a blue ball is thrown to the left"]
    with torch.no_grad():
        expected, _ = wan.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=16)
    assert torch.equal(wan.encode_text(prompts).tensors["embeds"], expected)
    # past the prompt's end the pipeline leaves zeros, unmasked
    assert (expected[0, 5:] == 0).all()


def test_latents_are_normalised_and_come_back(wan, frames):
    latents = wan.encode_video(frames)
    assert latents.shape == (2, 4, 5, 8, 8)
    raw = wan.vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode()
    mean = torch.tensor(wan.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    deviation = torch.tensor(wan.vae.config.latents_std).view(1, -1, 1, 1, 1)
    assert torch.allclose(latents, (raw - mean) / deviation, atol=1e-5)
    decoded = wan.decode_video(latents)
    assert decoded.shape == frames.shape and decoded.min() >= 0 and decoded.max() <= 1
    expected = (wan.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert torch.allclose(decoded, expected, atol=1e-5)


def test_wrong_length_is_refused_where_the_vae_would_not(wan):
    video = torch.rand(1, 15, 3, 32, 32)
    # the VAE silently makes another number of latents
    assert wan.vae.encode(video.transpose(1, 2)).latent_dist.mode().shape[2] != 14 / 4 + 1
    with pytest.raises(ValueError, match="4K\\+1"):
        wan.encode_video(video)


def test_rollout_without_noise_is_the_stock_pipeline_with_an_euler_step(wan):
    """The same latents come out of WanPipeline with a first-order scheduler on the same times."""
    from diffusers import UniPCMultistepScheduler

    noise = torch.randn(4, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red ball rolls to the left"] * 4
    first_order = {"solver_order": 1, "lower_order_final": True, "disable_corrector": list(range(9))}
    config = {**wan.pipeline.scheduler.config, **first_order}
    wan.pipeline.scheduler = UniPCMultistepScheduler.from_config(config)
    wan.pipeline.set_progress_bar_config(disable=True)
    size = dict(height=32, width=32, num_frames=17, max_sequence_length=16)
    stock = wan.pipeline(
        prompts, **size, num_inference_steps=8, guidance_scale=2.5, latents=noise, output_type="pt"
    ).frames
    # the pipeline rounds the model's time down to whole thousandths
    exact = wan.velocity
    wan.velocity = lambda x, t, text: exact(x, (t * 1000).floor() / 1000, text)
    plan = SamplingPlan(tuple(wan.times(8, noise.shape[1:])), (), "flow", 0.0, 2.5)
    text, null_text = wan.encode_text(prompts), wan.encode_text([""])
    no_noise = draw_step_noise(noise.shape, 0, torch.Generator())
    sampled = sample_videos(wan, noise, text, null_text, plan, no_noise, 4).final_N
    assert (decode_videos(wan, sampled, 4) - stock).abs().max() < 1e-4


def test_tap_gives_the_block_and_its_grid(wan):
    latents, times = torch.randn(2, 4, 5, 8, 8), torch.tensor([0.3, 0.9])
    text = wan.encode_text(["a red ball", "a blue ball"])
    with wan.tap(0) as tap:
        wan.velocity(latents, times, text)
    tokens = tap.take()
    assert tokens.grid == (5, 4, 4) and tokens.x_BND.shape == (2, 80, 32)
    planted = latents.clone()
    # latent frame 3, token row 2, token column 1
    planted[:, :, 3, 4:6, 2:4] += 5
    embedded = []
    # the embedding and not a block's output, over which attention would spread the change
    hook = wan.transformer.patch_embedding.register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output.flatten(2).transpose(1, 2))
    )
    wan.velocity(latents, times, text)
    wan.velocity(planted, times, text)
    hook.remove()
    change = (embedded[1] - embedded[0]).norm(dim=-1)
    assert (change.argmax(1) == 3 * 16 + 2 * 4 + 1).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tap_carries_gradient_and_is_taken_once(wan, checkpointing):
    if checkpointing:
        wan.transformer.enable_gradient_checkpointing()
        wan.transformer.train()
    wan.transformer.requires_grad_(True)
    with wan.tap(0) as tap:
        text = wan.encode_text(["a red ball", "a"])
        velocity = wan.velocity(torch.randn(2, 4, 5, 8, 8), torch.tensor([0.5, 0.5]), text)
        tapped = tap.take().x_BND
        # checkpointing recomputes the block here
        velocity.sum().backward(retain_graph=True)
    assert tap.take().x_BND is tapped
    wan.transformer.zero_grad()
    tapped.square().sum().backward()
    assert wan.transformer.blocks[0].ffn.net[2].weight.grad.abs().sum() > 0
    assert wan.transformer.blocks[1].ffn.net[2].weight.grad is None


def test_velocity_points_from_video_to_noise(wan):
    """v = e - x0, not its negative: with that answer the schedule leads from noise to the video."""
    video, noise = torch.randn(2, 4, 5, 8, 8), torch.randn(2, 4, 5, 8, 8)
    state, times = noise, flow.schedule(5, 3.0)
    for time, next_time in pairwise(times):
        state, _ = flow.transition(state, noise - video, time, next_time)
    assert torch.allclose(state, video, atol=1e-4)


def test_unknown_family(wan_folder):
    with pytest.raises(ValueError, match="unknown model family"):
        load_generator("sora", wan_folder)


def test_folders_that_are_no_pipelines(tmp_path, vjepa_folder):
    with pytest.raises(ValueError, match="model_index"):
        read_geometry(vjepa_folder)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline"):
        read_geometry(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(ValueError, match="cannot be read"):
        read_geometry(tmp_path)
