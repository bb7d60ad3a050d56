"""The sandbox's world model: a ``VJEPA2Model`` of two million weights that has seen only valid clips.

Phase 1 trains encoder and predictor together against an exponential average of the encoder. A linear decoder from
encoder tokens to pixels keeps them from collapsing. Phase 2 freezes the averaged encoder, uses it for context and
target alike, and trains a larger predictor from scratch. Tokens that change weigh five times as much, and collisions
are shown three times as often. Half of the clips run backward in time, so that neither direction is new to the model.
In phase 2, half of them have passed the VAE, so that the model does not take the decoder's fingerprint for a violation.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track as progress
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from ldo.core.rng import torch_rng
from ldo.models.world_model import WorldModel, layer_norm
from ldo.sandbox import scenes
from ldo.sandbox.build.loop import fit
from ldo.sandbox.build.pool import SIZE, pool

WORLD_CLIPS = 50_000
RECONSTRUCTED = 20_000  # of them, also as the VAE gives them back
CHANGED = 0.3  # a token has changed when its features differ from the last ones seen there by this much on average
WORLD_MODEL_CONFIG = dict(
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


def _new_model(pred_hidden_size: int, pred_num_hidden_layers: int) -> VJEPA2Model:
    predictor = dict(pred_hidden_size=pred_hidden_size, pred_num_hidden_layers=pred_num_hidden_layers)
    return VJEPA2Model(VJEPA2Config(**WORLD_MODEL_CONFIG, **predictor))


def _draw_batch(frames: np.ndarray, rng: torch.Generator, size: int, shares: Tensor | None = None) -> Tensor:
    """A batch of 16-frame clips [B, 16, 3, H, W] in [0, 1]: first frame 0 or 1, mirrored and reversed half the time.

    Clips are drawn evenly, or in proportion to ``shares``.
    """
    shares = torch.ones(len(frames)) if shares is None else shares[: len(frames)]
    # Sorted rows are read from the memory-mapped file in the order they lie in.
    chosen = torch.multinomial(shares, size, replacement=True, generator=rng).sort().values
    start = int(torch.randint(2, (), generator=rng))
    clips = torch.from_numpy(frames[chosen.numpy()][:, start : start + 16]).float() / 255
    mirrored, backward = torch.rand(2, size, 1, 1, 1, 1, generator=rng) < 0.5
    clips = torch.where(mirrored, clips.flip(-1), clips)
    return torch.where(backward, clips.flip(1), clips)


def _blur_and_noise(clips: Tensor, rng: torch.Generator) -> Tensor:
    """A little blur and noise, of another strength for every clip."""
    count = len(clips)
    padded = F.pad(clips.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, 1).view_as(clips)
    clips = torch.lerp(clips, blurred, 0.4 * torch.rand(count, 1, 1, 1, 1, generator=rng))
    strength = 0.03 * torch.rand(count, 1, 1, 1, 1, generator=rng)
    return (clips + strength * torch.randn(clips.shape, generator=rng)).clamp(0, 1)


def _patches(clips: Tensor) -> Tensor:
    """Pixels [B, 128, 2 * 3 * 64] of each token's tubelet: 2 frames of 8 x 8 pixels, in the encoder's order."""
    tubelets = clips.view(len(clips), 8, 2, 3, 4, 8, 4, 8).permute(0, 1, 4, 6, 2, 3, 5, 7)
    return tubelets.reshape(len(clips), 8 * 4 * 4, -1)


def train_encoder(work: Path, device: str, deadline: float, steps: int = 4400, batch: int = 32) -> None:
    """Phase 1: predict the averaged encoder's normed features from 2-12 frames, and decode pixels linearly."""
    torch.manual_seed(1)
    model = _new_model(96, 4).to(device)
    averaged_encoder = copy.deepcopy(model.encoder).requires_grad_(False)
    decoder = nn.Linear(128, 2 * 3 * 64).to(device)
    # A copy, only for its prepare(): WorldModel freezes the weights that it wraps.
    world_model = WorldModel(copy.deepcopy(model)).to(device)
    frames, _ = pool(work, "valid", WORLD_CLIPS)
    parameters = [*model.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.04)
    model.train()

    def step(index: int) -> dict[str, float]:
        rng = torch_rng(1, "encoder", index)
        # Generated videos are never as clean as rendered ones.
        clips = world_model.prepare(_blur_and_noise(_draw_batch(frames, rng, batch), rng).to(device))
        # Whole tubelets of two frames: 2 to 12 of the 16 frames.
        context = int(torch.randint(1, 7, (), generator=rng)) * 2
        context_features = model.encoder(clips[:, :context]).last_hidden_state
        with torch.no_grad():
            target_features = layer_norm(averaged_encoder(clips).last_hidden_state)
        known_count, token_count = context_features.shape[1], target_features.shape[1]
        positions = torch.arange(token_count, device=device).expand(batch, token_count)
        predicted = model.predictor(
            context_features, [positions[:, :known_count]], [positions[:, known_count:]]
        ).last_hidden_state
        prediction_error = (predicted - target_features[:, known_count:]).abs().mean()
        # Pixels are in units of ImageNet deviations here; the factor of 0.05 makes this the mean square in [0, 1].
        decoded = decoder(model.encoder(clips).last_hidden_state)
        pixel_error = 0.05 * (decoded - _patches(clips)).square().mean()
        optimizer.zero_grad()
        (prediction_error + 20 * pixel_error).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # The average follows fast at first, while the encoder it follows is still close to noise.
        kept_share = 0.99 + 0.009 * min(1.0, index / 1000)
        with torch.no_grad():
            for average, parameter in zip(averaged_encoder.parameters(), model.encoder.parameters(), strict=True):
                average.lerp_(parameter, 1 - kept_share)
        # A spread that falls to zero is the sign of a collapse.
        return {
            "error": prediction_error.item(),
            "pixels": pixel_error.item(),
            "spread": target_features.std(1).mean().item(),
        }

    modules = {"model": model, "target": averaged_encoder, "decoder": decoder}
    fit(work / "world-encoder.pt", modules, [optimizer], step, steps, deadline)


def train_predictor(
    work: Path, device: str, deadline: float, vae: nn.Module, steps: int = 3000, batch: int = 32
) -> None:
    """Phase 2: a new predictor of width 128 and 6 layers on the frozen encoder, from 4, 8 and 12 frames in turn."""
    torch.manual_seed(2)
    model = _new_model(128, 6)
    # The averaged encoder: its features are what phase 1 learnt to predict.
    checkpoint = torch.load(work / "world-encoder.pt", map_location="cpu", weights_only=True)
    model.encoder.load_state_dict(checkpoint["modules"]["target"])
    world_model = WorldModel(model).to(device)
    model.predictor.requires_grad_(True)
    rendered, captions = pool(work, "valid", WORLD_CLIPS)
    # Collisions are the hardest to predict.
    shares = torch.tensor([3.0 if "collide" in caption else 1.0 for caption in captions])
    decoded = reconstructed(work, vae, rendered[:RECONSTRUCTED], device)
    optimizer = torch.optim.AdamW(model.predictor.parameters(), lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98))

    def step(index: int) -> dict[str, float]:
        rng = torch_rng(2, "predictor", index)
        half_batch = batch // 2
        from_rendered = _draw_batch(rendered, rng, half_batch, shares)
        from_decoded = _draw_batch(decoded, rng, batch - half_batch, shares)
        clips = torch.cat([from_rendered, from_decoded]).to(device)
        context = (4, 8, 12)[index % 3]
        with torch.no_grad():
            target_features = world_model.encode(clips).x_BND
        context_features, predicted = world_model.forecast(clips, context, normalize=False)
        known_count, tokens_per_frame = context_features.x_BND.shape[1], world_model.side**2
        target_features = target_features[:, known_count:]
        # What a model would predict for which nothing ever moves: the last features seen at each place.
        last_features = context_features.x_BND[:, -tokens_per_frame:].repeat(1, predicted.grid[0], 1)
        changed = (target_features - last_features).abs().mean(-1) > CHANGED
        token_error = (predicted.x_BND - target_features).abs().mean(-1)
        # Most tokens show background that stays as it is. Without weights, repeating it would be most of the task.
        token_weight = 1 + 4 * changed.float()
        optimizer.zero_grad()
        ((token_weight * token_error).sum() / token_weight.sum()).backward()
        nn.utils.clip_grad_norm_(model.predictor.parameters(), 1.0)
        optimizer.step()
        return {
            "error": token_error.mean().item(),
            "persistence": (target_features - last_features).abs().mean().item(),
        }

    fit(work / "world-predictor.pt", {"model": model}, [optimizer], step, steps, deadline)


def reconstructed(work: Path, vae: nn.Module, rendered: np.ndarray, device: str) -> np.ndarray:
    """The clips of ``rendered`` [n, T, 3, H, W] uint8 as the VAE gives them back, memory-mapped; made once."""
    path = work / f"pool-valid-{scenes.WORLD_VERSION}-{len(rendered)}-vae.npy"
    if not path.exists():
        temporary = path.with_suffix(".part")
        decoded = np.lib.format.open_memmap(temporary, "w+", np.uint8, rendered.shape)
        vae = vae.to(device)
        with torch.no_grad():
            for start in progress(range(0, len(rendered), 50), "clips through the VAE"):
                clips = torch.from_numpy(np.array(rendered[start : start + 50])).to(device).float()
                latents = vae.encode((clips / 127.5 - 1).transpose(1, 2)).latent_dist.mean
                pixels = (vae.decode(latents).sample.transpose(1, 2) + 1) * 127.5
                decoded[start : start + 50] = pixels.round().clamp(0, 255).byte().cpu().numpy()
        decoded.flush()
        temporary.rename(path)
    return np.load(path, mmap_mode="r")


def load_world_model(work: Path) -> VJEPA2Model:
    """The world model as trained so far."""
    model = _new_model(128, 6)
    checkpoint = torch.load(work / "world-predictor.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(checkpoint["modules"]["model"])
    return model.eval().requires_grad_(False)
