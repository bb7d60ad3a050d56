"""What a checkpoint folder says of itself, read from its JSON files before any weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("wan",)
_PIPELINES = {"WanPipeline": "wan"}


@dataclass(frozen=True)
class Geometry:
    """Factors between pixels, latents and tokens: ``time`` and ``space`` of the VAE, ``patch`` (t, h, w) of the transformer."""

    time: int
    space: int
    patch: tuple[int, int, int]
    channels: int
    blocks: int
    width: int

    def problem(self, frames: int, height: int, width: int) -> str | None:
        """Why clips of this size cannot be used, with the mend; None if they can."""
        if (frames - 1) % self.time:
            k = max(round((frames - 1) / self.time), 1)
            return f"{frames} frames; the VAE takes {self.time}K+1: use {k * self.time + 1}"
        for name, value, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            unit = self.space * patch
            if value <= 0 or value % unit:
                return f"{name} {value}; it must be a multiple of {unit}: use {max(round(value / unit), 1) * unit}"
        return None

    def latents(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (C, T, H, W) of one clip's latents."""
        return self.channels, (frames - 1) // self.time + 1, height // self.space, width // self.space

    def tokens(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """Grid (t, h, w) of the transformer's tokens for latents ending in (T, H, W)."""
        t, h, w = latent[-3:]
        return t // self.patch[0], h // self.patch[1], w // self.patch[2]


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); is the folder a complete checkpoint?") from None


def read_geometry(path: Path) -> tuple[str, Geometry]:
    """Family and geometry of a diffusers pipeline folder; ValueError says what is wrong with it."""
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline folder: it has no model_index.json")
    name = _json(path / "model_index.json").get("_class_name")
    if name not in _PIPELINES:
        raise ValueError(f"{path} holds a {name}; supported: {', '.join(_PIPELINES)}")
    vae, transformer = _json(path / "vae" / "config.json"), _json(path / "transformer" / "config.json")
    geometry = Geometry(
        time=vae.get("scale_factor_temporal", 4),
        space=vae.get("scale_factor_spatial", 8),
        patch=tuple(transformer["patch_size"]),
        channels=transformer["in_channels"],
        blocks=transformer["num_layers"],
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
    )
    return _PIPELINES[name], geometry
