"""The sandbox's video VAE: an ``AutoencoderKLWan`` of half a million weights, 4x in time and 4x in space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from ldo.rng import torch_rng
from ldo.sandbox.build.loop import fit
from ldo.sandbox.build.pool import pool

CONFIG = dict(
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

CLIPS = 100_000
GAIN = 2.0  # of a latent over the mean colour that it carries


def _batch(frames, rng: torch.Generator, size: int, length: int) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1], cut to ``length`` frames at a common random start."""
    chosen = torch.randint(len(frames), (size,), generator=rng).sort().values
    start = int(torch.randint(frames.shape[1] - length + 1, (), generator=rng))
    x = torch.from_numpy(frames[chosen.numpy()][:, start : start + length])
    return (x.float() / 127.5 - 1).transpose(1, 2)


def _cells(x: Tensor) -> Tensor:
    """Mean colour [B, 3, 5, 8, 8] of the pixels [B, 3, 17, 32, 32] that each latent stands for."""
    first, rest = F.avg_pool3d(x[:, :, :1], (1, 4, 4)), F.avg_pool3d(x[:, :, 1:], 4)
    return torch.cat([first, rest], 2)


def _balls(x: Tensor) -> Tensor:
    """Weights [B, 1, T, H, W], 1 to 9: high where a pixel differs from its clip's median over time, or from its row's."""
    moved, unlike = ((x - x.median(dim, keepdim=True).values).abs() for dim in (2, 4))
    return 1 + 8 * torch.maximum(moved, 0.5 * unlike).amax(1, keepdim=True).clamp(0, 1)


def _losses(vae: AutoencoderKLWan, x: Tensor, noise: torch.Generator, weight: Tensor | float, colour: float = 0.0) -> dict[str, Tensor]:
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise).to(x.device)
    error = vae._decode(z, return_dict=False)[0] - x
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    losses = {"squared": (weight * error.square()).mean(), "l1": (weight * error.abs()).mean(), "kl": kl}
    if colour:
        losses["colour"] = colour * (posterior.mean[:, :3] / GAIN - _cells(x)).square().mean()
    return losses


def _step(vae: AutoencoderKLWan, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> dict[str, float]:
    optimizer.zero_grad()
    (4 * losses["squared"] + losses["l1"] + 1e-4 * losses["kl"] + losses.get("colour", 0.0)).backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return {k: v.item() for k, v in losses.items()}


def train(work: Path, device: str, deadline: float, steps: int = 6000, fine: int = 4000, colour: int = 2200, batch: int = 8) -> None:
    """Reconstruct the mix (L1 + squared error, a light KL) on 9 frames, then on all 17, in three phases.

    Balls cover a twentieth of the picture, and the exact metrics look at nothing else: from the second phase on their
    pixels weigh up to nine times as much. The third ties three latent channels to the mean colour of their cell. Left
    alone, latents after the first tell green from blue with a twentieth of the energy that tells a ball from none,
    and a generator trained on them gets the paths right long before the colours.
    """
    frames, _ = pool(work, "mix", CLIPS)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**CONFIG).to(device)

    def coarse(i: int) -> dict[str, float]:
        rng = torch_rng(0, "vae", i)
        x = _batch(frames, rng, batch, 9 if i < steps * 2 // 3 else 17).to(device)
        return _step(vae, optimizer, _losses(vae, x, rng, 1.0))

    def finer(i: int, phase: str = "fine", colour: float = 0.0) -> dict[str, float]:
        rng = torch_rng(0, f"vae {phase}", i)
        x = _batch(frames, rng, batch, 17).to(device)
        return _step(vae, optimizer, _losses(vae, x, rng, _balls(x), colour))

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    fit(work / "vae.pt", {"vae": vae}, [optimizer], coarse, steps, deadline)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-4, betas=(0.9, 0.98))
    fit(work / "vae-fine.pt", {"vae": vae}, [optimizer], finer, fine, deadline)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98))
    fit(work / "vae-colour.pt", {"vae": vae}, [optimizer], lambda i: finer(i, "colour", 2.0), colour, deadline)


def load(work: Path) -> AutoencoderKLWan:
    """The trained VAE rounded to the half precision it ships in; its latents' mean and deviation, of 512 clips, in its config."""
    vae = AutoencoderKLWan(**CONFIG).eval().requires_grad_(False)
    vae.load_state_dict(torch.load(work / "vae-colour.pt", map_location="cpu", weights_only=True)["modules"]["vae"])
    vae.half().float()
    frames, _ = pool(work, "mix", CLIPS)
    with torch.no_grad():
        x = (torch.from_numpy(np.array(frames[:512])).float() / 127.5 - 1).transpose(1, 2)
        z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(32)])
    dims = (0, 2, 3, 4)
    vae.register_to_config(latents_mean=z.mean(dims).tolist(), latents_std=z.std(dims).tolist())
    return vae
