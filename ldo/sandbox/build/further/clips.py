"""What the further training draws from: latents of the mix and embedded captions, all on the device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldo.models.generator.protocol import Generator
from ldo.sandbox import scenes
from ldo.sandbox.build.base import encode_clips
from ldo.sandbox.build.calibrate import fingerprint
from ldo.sandbox.build.pool import pool


@dataclass(frozen=True)
class LatentClips:
    """Clips as latents, with the embeddings of their captions.

    ``latents`` [n, 12, 5, 8, 8] are fp16. ``texts`` [captions + 1, L, 64] holds each different caption once, and the
    empty one last. ``caption`` [n] is the row of ``texts`` of each clip.
    """

    latents: Tensor
    texts: Tensor
    caption: Tensor


def load_latent_clips(cache: Path, model: Generator, count: int, device: str, seed: int = 0) -> LatentClips:
    """``count`` clips of the mix, rendered on all cores and encoded once; frames and latents are kept in ``cache``."""
    frames, captions = pool(cache, "mix", count, seed, workers=os.cpu_count() or 1)
    # Latents are those of one VAE: generators with different ones share the frames alone.
    path = cache / f"latents-{scenes.WORLD_VERSION}-{count}-{seed}-{fingerprint(model.vae)[:12]}.npy"
    if not path.exists():
        temporary = path.with_suffix(".part.npy")
        np.save(temporary, encode_clips(frames, model.vae, device, 50 if device == "cpu" else 500))
        temporary.rename(path)
    different = sorted(set(captions))
    embeddings = []
    for start in range(0, len(different), 64):
        embeddings.append(model.encode_text(different[start : start + 64]).tensors["embeds"])
    embeddings.append(model.encode_text([""]).tensors["embeds"])
    # There are far fewer captions than clips: each is embedded once, and clips point to it.
    row_of = {caption: row for row, caption in enumerate(different)}
    return LatentClips(
        torch.from_numpy(np.load(path)).to(device),
        torch.cat(embeddings).float().to(device),
        torch.tensor([row_of[caption] for caption in captions], device=device),
    )
