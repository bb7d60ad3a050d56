"""Small clips through the pipelines of the families, as their stock code runs them and as the adapters do."""

import torch
from diffusers import DiffusionPipeline

from ldo.models import lora

FRAMES, SIDE = 17, 32
PROMPTS = ["a red ball rolls to the left", "a blue ball is thrown"]


def stock(folder):
    """The stock pipeline, without its progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(model, count=2, seed=0):
    """Noise in the shape of ``count`` clips' latents."""
    shape = model.geometry.latents(FRAMES, SIDE, SIDE)
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def packed(model, latents_BCTHW):
    """Latents as the stock pipeline's call takes them."""
    if model.family == "cogvideox":
        return latents_BCTHW.transpose(1, 2)
    if model.family == "ltx":
        return latents_BCTHW.flatten(2).transpose(1, 2)
    return latents_BCTHW


def velocities(model, times=(0.3, 0.95)):
    """Two velocities, at times of which two experts would take one each."""
    with torch.no_grad():
        return model.velocity(latents(model, 2), torch.tensor(times), model.encode_text(PROMPTS))


def generate(pipeline, model, noise, guidance=1.0, steps=8):
    """The stock pipeline's videos of both prompts."""
    return pipeline(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        num_inference_steps=steps,
        latents=packed(model, noise),
        output_type="pt",
        **model.call_arguments(guidance),
    ).frames


def comfy(model, values):
    """An adapter's values by transformer, under ComfyUI's names."""
    return {name: model.comfy_names(lora.of(values, name)) for name in model.transformers}
