"""The sandbox's video VAE: an ``AutoencoderKLWan`` of half a million weights, 4x in time and 4x in space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from ldo.core.rng import torch_rng
from ldo.sandbox.build.loop import fit
from ldo.sandbox.build.pool import pool

VAE_CONFIG = dict(
    base_dim=8,
    z_dim=8,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    scale_factor_temporal=4,
    scale_factor_spatial=4,
    latents_mean=[0.0] * 8,
    latents_std=[1.0] * 8,
)

# The same number as BASE_CLIPS: both draw from one rendered pool.
VAE_CLIPS = 100_000
GAIN = 2.0  # of a latent over the mean colour that it carries


def _draw_batch(frames: np.ndarray, rng: torch.Generator, size: int, length: int) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1], cut to ``length`` frames at a common random start."""
    # Sorted rows are read from the memory-mapped file in the order they lie in.
    chosen = torch.randint(len(frames), (size,), generator=rng).sort().values
    start = int(torch.randint(frames.shape[1] - length + 1, (), generator=rng))
    pixels = torch.from_numpy(frames[chosen.numpy()][:, start : start + length])
    return (pixels.float() / 127.5 - 1).transpose(1, 2)


def _mean_colours(clips: Tensor) -> Tensor:
    """Mean colour [B, 3, 5, 8, 8] of the pixels of ``clips`` [B, 3, 17, 32, 32] that each latent stands for."""
    # A causal video VAE encodes the first frame by itself, and then four frames at a time.
    first = F.avg_pool3d(clips[:, :, :1], (1, 4, 4))
    others = F.avg_pool3d(clips[:, :, 1:], 4)
    return torch.cat([first, others], 2)


def _distance_from_median(clips: Tensor, dim: int) -> Tensor:
    return (clips - clips.median(dim, keepdim=True).values).abs()


def _ball_weights(clips: Tensor) -> Tensor:
    """Weights [B, 1, T, H, W] from 1 to 9: high where a pixel is unlike its clip's median over time or its row's."""
    moved = _distance_from_median(clips, 2)
    # A ball at rest is its own median over time, but it is unlike the rest of its row.
    unlike = _distance_from_median(clips, 4)
    return 1 + 8 * torch.maximum(moved, 0.5 * unlike).amax(1, keepdim=True).clamp(0, 1)


def _losses(
    vae: AutoencoderKLWan, clips: Tensor, rng: torch.Generator, weight: Tensor | float, colour: float = 0.0
) -> dict[str, Tensor]:
    """Losses of a reconstruction from sampled latents; ``colour`` weighs the tie of three channels to mean colours."""
    posterior = vae.encode(clips).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=rng).to(clips.device)
    latents = posterior.mean + posterior.std * noise
    difference = vae.decode(latents).sample - clips
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    losses = {
        "squared": (weight * difference.square()).mean(),
        "l1": (weight * difference.abs()).mean(),
        "kl": divergence,
    }
    if colour:
        losses["colour"] = colour * (posterior.mean[:, :3] / GAIN - _mean_colours(clips)).square().mean()
    return losses


def _take_step(vae: AutoencoderKLWan, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> dict[str, float]:
    optimizer.zero_grad()
    (4 * losses["squared"] + losses["l1"] + 1e-4 * losses["kl"] + losses.get("colour", 0.0)).backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def train_vae(
    work: Path, device: str, deadline: float, steps: int = 6000, fine: int = 4000, colour: int = 2200, batch: int = 8
) -> None:
    """Reconstruct the mix (L1 + squared error, a light KL) on 9 frames, then on all 17, in three phases.

    Balls cover a twentieth of the picture, and the exact metrics look at nothing else. From the second phase on, the
    balls' pixels weigh up to nine times as much. The third phase ties three latent channels to the mean colour of
    their cell. Without it, green and blue differ in the latents after the first by a twentieth of the energy by which
    ball and background differ, and a generator trained on them gets the paths right long before the colours.
    """
    frames, _ = pool(work, "mix", VAE_CLIPS)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**VAE_CONFIG).to(device)
    coarse_optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    fine_optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-4, betas=(0.9, 0.98))
    colour_optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98))

    def coarse_step(index: int) -> dict[str, float]:
        rng = torch_rng(0, "vae", index)
        # Short clips first: such a step costs half as much, and trains the same convolutions.
        length = 9 if index < steps * 2 // 3 else 17
        clips = _draw_batch(frames, rng, batch, length).to(device)
        return _take_step(vae, coarse_optimizer, _losses(vae, clips, rng, 1.0))

    def fine_step(index: int) -> dict[str, float]:
        rng = torch_rng(0, "vae fine", index)
        clips = _draw_batch(frames, rng, batch, 17).to(device)
        return _take_step(vae, fine_optimizer, _losses(vae, clips, rng, _ball_weights(clips)))

    def colour_step(index: int) -> dict[str, float]:
        rng = torch_rng(0, "vae colour", index)
        clips = _draw_batch(frames, rng, batch, 17).to(device)
        return _take_step(vae, colour_optimizer, _losses(vae, clips, rng, _ball_weights(clips), colour=2.0))

    # Each phase loads its own file if there is one, so a build that resumes passes over the phases that are done.
    fit(work / "vae.pt", {"vae": vae}, [coarse_optimizer], coarse_step, steps, deadline)
    fit(work / "vae-fine.pt", {"vae": vae}, [fine_optimizer], fine_step, fine, deadline)
    fit(work / "vae-colour.pt", {"vae": vae}, [colour_optimizer], colour_step, colour, deadline)


def load_vae(work: Path) -> AutoencoderKLWan:
    """The trained VAE, rounded to the half precision that it ships in.

    Its config holds the mean and the standard deviation of its latents, taken over 512 clips.
    """
    vae = AutoencoderKLWan(**VAE_CONFIG).eval().requires_grad_(False)
    checkpoint = torch.load(work / "vae-colour.pt", map_location="cpu", weights_only=True)
    vae.load_state_dict(checkpoint["modules"]["vae"])
    # Everything after the VAE is calibrated and trained on what the shipped weights give.
    vae.half().float()
    frames, _ = pool(work, "mix", VAE_CLIPS)
    with torch.no_grad():
        clips = (torch.from_numpy(np.array(frames[:512])).float() / 127.5 - 1).transpose(1, 2)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in clips.split(32)])
    all_but_channels = (0, 2, 3, 4)
    vae.register_to_config(
        latents_mean=latents.mean(all_but_channels).tolist(), latents_std=latents.std(all_but_channels).tolist()
    )
    return vae
