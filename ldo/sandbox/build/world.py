"""The sandbox's world model: a ``VJEPA2Model`` of two million weights that has seen valid clips only.

Phase 1 trains encoder and predictor together: a predictor with an exponential-average target encoder, held off
collapse by a linear decoder from encoder tokens to pixels. Phase 2 freezes the averaged encoder, uses it for context
and target alike, and trains a larger predictor from scratch, with tokens that change weighted five to one and collisions
shown three times as often.
Half of the clips run backward in time, so that neither direction is new to it; half have passed the VAE in phase 2,
so that it does not take the decoder's fingerprint for a violation.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from ldo.rng import torch_rng
from ldo.sandbox.build.loop import fit
from ldo.sandbox.build.pool import SIZE, pool
from ldo.world_model import WorldModel, layer_norm

CLIPS = 50_000
RECONSTRUCTED = 20_000  # of them, also as the VAE gives them back
CHANGED = 0.3  # a token has changed when it differs from the last one seen there by so much on average
CONFIG = dict(
    patch_size=8,
    crop_size=SIZE,
    frames_per_clip=16,
    tubelet_size=2,
    hidden_size=128,
    num_attention_heads=4,
    num_hidden_layers=4,
    mlp_ratio=4,
    pred_num_attention_heads=4,
    pred_num_mask_tokens=2,
    num_pooler_layers=1,
)


def _model(pred_hidden_size: int, pred_num_hidden_layers: int) -> VJEPA2Model:
    return VJEPA2Model(VJEPA2Config(**CONFIG, pred_hidden_size=pred_hidden_size, pred_num_hidden_layers=pred_num_hidden_layers))


def _batch(frames, rng: torch.Generator, size: int, share: Tensor | None = None) -> Tensor:
    """A batch of 16-frame clips [B, 16, 3, H, W] in [0, 1]: first frame 0 or 1, mirrored and reversed half the time.

    Clips are drawn evenly, or in proportion to ``share``.
    """
    share = torch.ones(len(frames)) if share is None else share[: len(frames)]
    chosen = torch.multinomial(share, size, replacement=True, generator=rng).sort().values
    start = int(torch.randint(2, (), generator=rng))
    x = torch.from_numpy(frames[chosen.numpy()][:, start : start + 16]).float() / 255
    mirror, backward = torch.rand(2, size, 1, 1, 1, 1, generator=rng) < 0.5
    x = torch.where(mirror, x.flip(-1), x)
    return torch.where(backward, x.flip(1), x)


def _weather(x: Tensor, rng: torch.Generator) -> Tensor:
    """A little blur and noise, different for every clip."""
    b = len(x)
    soft = F.avg_pool2d(F.pad(x.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(x)
    x = torch.lerp(x, soft, 0.4 * torch.rand(b, 1, 1, 1, 1, generator=rng))
    return (x + 0.03 * torch.rand(b, 1, 1, 1, 1, generator=rng) * torch.randn(x.shape, generator=rng)).clamp(0, 1)


def train_encoder(work: Path, device: str, deadline: float, steps: int = 4400, batch: int = 32) -> None:
    """Phase 1: forecast the averaged encoder's normed features from 2-12 frames, and decode pixels linearly."""
    torch.manual_seed(1)
    model = _model(96, 4).to(device)
    target = copy.deepcopy(model.encoder).requires_grad_(False)
    decoder = nn.Linear(128, 2 * 3 * 64).to(device)
    world = WorldModel(copy.deepcopy(model)).to(device)  # only for its prepare()
    frames, _ = pool(work, "valid", CLIPS)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.04)
    model.train()

    def step(i: int) -> dict[str, float]:
        rng = torch_rng(1, "encoder", i)
        x = world.prepare(_weather(_batch(frames, rng, batch), rng).to(device))
        context = int(torch.randint(1, 7, (), generator=rng)) * 2
        seen = model.encoder(x[:, :context]).last_hidden_state
        with torch.no_grad():
            goal = layer_norm(target(x).last_hidden_state)
        known, total = seen.shape[1], goal.shape[1]
        index = torch.arange(total, device=device).expand(batch, total)
        foretold = model.predictor(seen, [index[:, :known]], [index[:, known:]]).last_hidden_state
        error = (foretold - goal[:, known:]).abs().mean()
        patches = x.view(batch, 8, 2, 3, 4, 8, 4, 8).permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(batch, total, -1)
        # the pixels are in units of ImageNet deviations: a factor of 0.05 makes this the mean square in [0, 1]
        pixels = 0.05 * (decoder(model.encoder(x).last_hidden_state) - patches).square().mean()
        optimizer.zero_grad()
        (error + 20 * pixels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = 0.99 + 0.009 * min(1.0, i / 1000)
        with torch.no_grad():
            for a, b in zip(target.parameters(), model.encoder.parameters(), strict=True):
                a.lerp_(b, 1 - keep)
        return {"error": error.item(), "pixels": pixels.item(), "spread": goal.std(1).mean().item()}

    modules = {"model": model, "target": target, "decoder": decoder}
    fit(work / "world-encoder.pt", modules, [optimizer], step, steps, deadline)


def train_predictor(work: Path, device: str, deadline: float, vae: nn.Module, steps: int = 3000, batch: int = 32) -> None:
    """Phase 2: a predictor of 128 x 6 alone, on the frozen encoder, from 4, 8 and 12 frames in turn."""
    torch.manual_seed(2)
    model = _model(128, 6)
    saved = torch.load(work / "world-encoder.pt", map_location="cpu", weights_only=True)["modules"]["target"]
    model.encoder.load_state_dict(saved)
    world = WorldModel(model).to(device)
    model.predictor.requires_grad_(True)
    raw, captions = pool(work, "valid", CLIPS)
    share = torch.tensor([3.0 if "collide" in c else 1.0 for c in captions])  # the hardest to foretell
    seen_through = reconstructed(work, vae, raw[:RECONSTRUCTED], device)
    optimizer = torch.optim.AdamW(model.predictor.parameters(), lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98))

    def step(i: int) -> dict[str, float]:
        rng = torch_rng(2, "predictor", i)
        half = batch // 2
        x = torch.cat([_batch(raw, rng, half, share), _batch(seen_through, rng, batch - half, share)]).to(device)
        context = (4, 8, 12)[i % 3]
        with torch.no_grad():
            goal = world.encode(x).x_BND
        seen, foretold = world.forecast(x, context, normalize=False)
        known, area = seen.x_BND.shape[1], world.side**2
        goal = goal[:, known:]
        last = seen.x_BND[:, -area:].repeat(1, foretold.grid[0], 1)
        changed = (goal - last).abs().mean(-1) > CHANGED
        error = (foretold.x_BND - goal).abs().mean(-1)
        weight = 1 + 4 * changed.float()
        optimizer.zero_grad()
        ((weight * error).sum() / weight.sum()).backward()
        nn.utils.clip_grad_norm_(model.predictor.parameters(), 1.0)
        optimizer.step()
        return {"error": error.mean().item(), "persistence": (goal - last).abs().mean().item()}

    fit(work / "world-predictor.pt", {"model": model}, [optimizer], step, steps, deadline)


def reconstructed(work: Path, vae: nn.Module, raw, device: str):
    """The valid pool as the VAE gives it back, made once."""
    import numpy as np
    from rich.progress import track as progress

    path = work / f"pool-valid-{len(raw)}-vae.npy"
    if not path.exists():
        part = path.with_suffix(".part")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, raw.shape)
        vae = vae.to(device)
        with torch.no_grad():
            for i in progress(range(0, len(raw), 50), "clips through the VAE"):
                x = (torch.from_numpy(raw[i : i + 50]).to(device).float() / 127.5 - 1).transpose(1, 2)
                y = vae.decode(vae.encode(x).latent_dist.mean).sample.transpose(1, 2)
                out[i : i + 50] = ((y + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
        out.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")


def load(work: Path) -> VJEPA2Model:
    """The world model as trained so far."""
    model = _model(128, 6)
    model.load_state_dict(torch.load(work / "world-predictor.pt", map_location="cpu", weights_only=True)["modules"]["model"])
    return model.eval().requires_grad_(False)
