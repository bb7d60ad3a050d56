"""The sandbox's video VAE: an ``AutoencoderKLWan`` of half a million weights, 4x in time and 4x in space.

Its latents are tied to what can be said in numbers: the mean colour of every cell of 4 x 4 pixels in each of the four
frames that a latent stands for, as brightness and two differences of colour, each with its mean over the frames, its
trend, and two finer changes. A ball's place, its motion and its colour are then nearly linear in the latents. A
generator trained on free latents got paths right long before colours, and wobbled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn

from ldo.core.rng import torch_rng
from ldo.sandbox.build.loop import fit
from ldo.sandbox.build.pool import pool

CHANNELS = 12  # three colours of four frames
VAE_CONFIG = dict(
    base_dim=8,
    z_dim=CHANNELS,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    scale_factor_temporal=4,
    scale_factor_spatial=4,
    latents_mean=[0.0] * CHANNELS,
    latents_std=[1.0] * CHANNELS,
)

# The same number as BASE_CLIPS: both draw from one rendered pool.
VAE_CLIPS = 60_000
GAIN = 2.0  # of a latent over the mean colour that it carries
# The changes of four frames (discrete cosines: mean, trend, ...) and of three colours (brightness, two differences).
_ANGLES = np.pi * np.outer(np.arange(4), np.arange(4) + 0.5) / 4
_TIME = np.cos(_ANGLES) * np.array([0.5, *3 * [0.5**0.5]])[:, None]
_COLOUR = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
BASIS = np.kron(_TIME, _COLOUR)  # [12, 12], orthonormal, to be applied to (frame, colour)
# What two halvings of time make of four frames: means of pairs and half their differences, and the same of those.
_PAIRS = np.array([[1, 1, 1, 1], [-1, 1, -1, 1], [-1, -1, 1, 1], [1, -1, -1, 1]]) / 4
CONSTANT_CHANNEL = 256.0  # the encoder's constant channel: what is linear to one part in 20,000 beside it
# The generator sees each channel divided by a power of its deviation: fine changes get some of the weight that they
# lack (a wobble is a hundredth of the picture's variance), brightness less. All together have this deviation; ball and
# background then differ by about ten of the noise's.
POWER, SIGNAL = 0.5, 0.6
NOISE = 0.03  # at most, on the latents that the decoder learns from: what a generator leaves


def tied_latents(clips: Tensor) -> Tensor:
    """The latents [B, 12, 1 + K, H/4, W/4] that clips [B, 3, 1 + 4K, H, W] in [-1, 1] are to have.

    The first latent stands for the first frame alone, as if it stood still for four.
    """
    cells = F.avg_pool3d(clips, (1, 4, 4))
    first = cells[:, :, :1].repeat(1, 4, 1, 1, 1)
    # [B, 3, 4K, ...] to [B, (frame, colour), K, ...]
    groups = cells[:, :, 1:].unflatten(2, (-1, 4)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
    basis = torch.tensor(GAIN * BASIS, dtype=clips.dtype, device=clips.device)
    return torch.einsum("ij,bjthw->bithw", basis, torch.cat([first, groups], 2))


@torch.no_grad()
def build_encoder(encoder: nn.Module) -> None:
    """Set the weights of a Wan encoder (``VAE_CONFIG``) so that it gives the tied latents, to rounding.

    The tied latents are linear in the pixels, and so is an encoder whose residual branches are zero: convolutions
    average 2 x 2 pixels, and turn each two frames into their mean and half of their difference. Two things before the
    last convolution are not linear. The norm's length is that of one channel that is constant and large beside all
    others, and SiLU(x) - SiLU(-x) = x.
    """
    for weights in encoder.parameters():
        weights.zero_()
    last = encoder.conv_in.out_channels - 1  # the constant lies in the last channel
    encoder.conv_in.weight[:3, :, 2, 1, 1] = torch.eye(3)
    encoder.conv_in.bias[last] = CONSTANT_CHANNEL
    width = 3  # channels in use besides the constant
    for index, layer in enumerate(encoder.down_blocks):
        if isinstance(layer, WanResample):
            halve = layer.resample[1].weight
            for channel in (*range(width), last):
                halve[channel, channel, :2, :2] = 1 / 4
            # A step takes the frame before and its two own; the first frame of a clip skips it, as its own mean.
            merge = layer.time_conv.weight
            for channel in range(width):
                merge[channel, channel, 1:, 0, 0] = 1 / 2
                merge[width + channel, channel, 1:, 0, 0] = torch.tensor([-1 / 2, 1 / 2])
            merge[last, last, 2] = 1
            width *= 2
        elif index:
            # The first block keeps its width. The last makes room for all channels and their negatives.
            wide = layer.conv_shortcut.weight
            wide[:width, :width, 0, 0, 0] = torch.eye(width)
            if width == CHANNELS:
                wide[width : 2 * width, :width, 0, 0, 0] = -torch.eye(width)
            wide[-1, last] = 1
            last = len(wide) - 1
    encoder.norm_out.gamma.fill_(CONSTANT_CHANNEL / len(encoder.norm_out.gamma) ** 0.5)
    to_latents = torch.tensor(GAIN * BASIS @ np.kron(np.linalg.inv(_PAIRS), np.eye(3)))
    centre = encoder.conv_out.weight[:CHANNELS, :, 2, 1, 1]
    centre[:, :CHANNELS], centre[:, CHANNELS : 2 * CHANNELS] = to_latents, -to_latents
    encoder.conv_out.bias[CHANNELS:] = 2 * np.log(NOISE)  # the posterior's width, which nothing uses


def new_vae() -> AutoencoderKLWan:
    """A VAE whose encoder is built and whose decoder is untrained."""
    vae = AutoencoderKLWan(**VAE_CONFIG)
    build_encoder(vae.encoder)
    with torch.no_grad():
        vae.quant_conv.weight.copy_(torch.eye(2 * CHANNELS)[..., None, None, None])
        vae.quant_conv.bias.zero_()
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    return vae


def _draw_batch(frames: np.ndarray, rng: torch.Generator, size: int, length: int) -> Tensor:
    """Clips [B, 3, T, H, W] in [-1, 1], cut to ``length`` frames at a common random start."""
    # Sorted rows are read from the memory-mapped file in the order they lie in.
    chosen = torch.randint(len(frames), (size,), generator=rng).sort().values
    start = int(torch.randint(frames.shape[1] - length + 1, (), generator=rng))
    pixels = torch.from_numpy(frames[chosen.numpy()][:, start : start + length])
    return (pixels.float() / 127.5 - 1).transpose(1, 2)


def _distance_from_median(clips: Tensor, dim: int) -> Tensor:
    return (clips - clips.median(dim, keepdim=True).values).abs()


def _ball_weights(clips: Tensor) -> Tensor:
    """Weights [B, 1, T, H, W] from 1 to 9: high where a pixel is unlike its clip's median over time or its row's."""
    moved = _distance_from_median(clips, 2)
    # A ball at rest is its own median over time, but it is unlike the rest of its row.
    unlike = _distance_from_median(clips, 4)
    return 1 + 8 * torch.maximum(moved, 0.5 * unlike).amax(1, keepdim=True).clamp(0, 1)


def _losses(vae: AutoencoderKLWan, clips: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """How well the decoder draws clips from tied latents with a little noise, as a generator leaves it."""
    exact = tied_latents(clips)
    strength = NOISE * torch.rand((len(clips), 1, 1, 1, 1), generator=rng)
    noise = (strength * torch.randn(exact.shape, generator=rng)).to(clips.device)
    difference = vae.decode(exact + noise).sample - clips
    weight = _ball_weights(clips)
    return {"squared": (weight * difference.square()).mean(), "l1": (weight * difference.abs()).mean()}


def train_vae(work: Path, device: str, deadline: float, steps: int = 6000, batch: int = 6) -> None:
    """Train the decoder on the mix (L1 + squared error), on 9 frames and in every third step on all 17.

    Balls cover a twentieth of the picture, and the exact metrics look at nothing else: their pixels weigh up to nine
    times as much.
    """
    frames, _ = pool(work, "mix", VAE_CLIPS)
    torch.manual_seed(0)
    vae = new_vae().to(device)
    learning = [weights for weights in vae.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)

    def step(index: int) -> dict[str, float]:
        rng = torch_rng(0, "vae", index)
        # Short clips cost half as much, and train the same convolutions.
        length = 17 if index % 3 == 0 else 9
        losses = _losses(vae, _draw_batch(frames, rng, batch, length).to(device), rng)
        optimizer.zero_grad()
        (4 * losses["squared"] + losses["l1"]).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    fit(work / "vae.pt", {"vae": vae}, [optimizer], step, steps, deadline)


def load_vae(work: Path) -> AutoencoderKLWan:
    """The trained VAE, rounded to the half precision that it ships in.

    Its config holds the mean of its latents over 512 clips, and what the generator's are divided by.
    """
    vae = AutoencoderKLWan(**VAE_CONFIG).eval().requires_grad_(False)
    checkpoint = torch.load(work / "vae.pt", map_location="cpu", weights_only=True)
    vae.load_state_dict(checkpoint["modules"]["vae"])
    # Everything after the VAE is calibrated and trained on what the shipped weights give.
    vae.half().float()
    frames, _ = pool(work, "mix", VAE_CLIPS)
    with torch.no_grad():
        clips = (torch.from_numpy(np.array(frames[:512])).float() / 127.5 - 1).transpose(1, 2)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in clips.split(32)])
    mean, scale = latent_scale(latents)
    vae.register_to_config(latents_mean=mean, latents_std=scale)
    return vae


def latent_scale(latents: Tensor) -> tuple[list[float], list[float]]:
    """Mean and divisor of each channel of ``latents`` [B, C, T, H, W]."""
    deviation = latents.std((0, 2, 3, 4))
    wanted = deviation ** (1 - POWER)
    wanted *= SIGNAL / wanted.square().mean().sqrt()
    return latents.mean((0, 2, 3, 4)).tolist(), (deviation / wanted).tolist()
