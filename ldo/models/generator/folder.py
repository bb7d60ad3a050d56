"""Family of a checkpoint folder and sizes of its latents and tokens, read from JSON files before any weight loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PIPELINES = {
    "WanPipeline": "wan",
    "CogVideoXPipeline": "cogvideox",
    "HunyuanVideoPipeline": "hunyuan",
    "LTXPipeline": "ltx",
}
FAMILIES = tuple(PIPELINES.values())


@dataclass(frozen=True)
class Geometry:
    """Factors between pixels, latents and tokens.

    ``time`` and ``space`` of the VAE, ``patch`` (t, h, w) of the transformer.
    """

    time: int
    space: int
    patch: tuple[int, int, int]
    channels: int
    blocks: int
    width: int

    def problem(self, frames: int, height: int, width: int) -> str | None:
        """Why clips of this size cannot be used, with the fix; None if they can."""
        if (frames - 1) % self.time:
            nearest = max(round((frames - 1) / self.time), 1) * self.time + 1
            return f"{frames} frames; the VAE takes {self.time}K+1: use {nearest}"
        for side, value, patch in (("height", height, self.patch[1]), ("width", width, self.patch[2])):
            divisor = self.space * patch
            if value <= 0 or value % divisor:
                nearest = max(round(value / divisor), 1) * divisor
                return f"{side} {value}; it must be a multiple of {divisor}: use {nearest}"
        return None

    def latents(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (C, T, H, W) of one clip's latents."""
        return self.channels, (frames - 1) // self.time + 1, height // self.space, width // self.space

    def tokens(self, latent: tuple[int, ...]) -> tuple[int, int, int]:
        """Grid (t, h, w) of the transformer's tokens for latents ending in (T, H, W)."""
        frames, height, width = latent[-3:]
        return frames // self.patch[0], height // self.patch[1], width // self.patch[2]


def patch_of(transformer: dict) -> tuple[int, int, int]:
    """Latents (t, h, w) of one token of a transformer."""
    patch = transformer.get("patch_size", 1)
    # Wan has a triple; the others have a side and, if at all, a length in time next to it
    if isinstance(patch, list | tuple):
        return tuple(patch)
    return transformer.get("patch_size_t") or 1, patch, patch


def geometry_from_configs(family: str, vae: dict, transformer: dict) -> Geometry:
    """The geometry that two configurations (``config.json`` as a dict) describe.

    ValueError for one that is not supported.
    """
    blocks = transformer["num_layers"] + transformer.get("num_single_layers", 0)
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    patch = patch_of(transformer)
    if patch[0] != 1:
        raise ValueError(
            f"its transformer's tokens span {patch[0]} latent frames (CogVideoX 1.5 does so); only tokens of one "
            "latent frame can be aligned"
        )
    if family == "wan":
        time, space = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    elif family == "cogvideox":
        time, space = vae.get("temporal_compression_ratio", 4), 2 ** (len(vae["block_out_channels"]) - 1)
    elif family == "hunyuan":
        time, space = vae.get("temporal_compression_ratio", 4), vae.get("spatial_compression_ratio", 8)
    else:
        # older configurations of LTX-Video do not state the ratios, which follow from its blocks
        halvings = sum(vae["spatio_temporal_scaling"])
        time = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**halvings
        space = vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**halvings
    return Geometry(time, space, patch, transformer["in_channels"], blocks, width)


def read_json(path: Path) -> dict:
    """A configuration file; ValueError where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); is the folder a complete checkpoint?") from None


def read_geometry(path: Path) -> tuple[str, Geometry]:
    """Family and geometry of a diffusers pipeline folder; ValueError says what is wrong with it."""
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline folder: it has no model_index.json")
    index = read_json(path / "model_index.json")
    configs = {"model_index": index}
    # only of a pipeline that is supported: another may have no such parts, and its class is what to complain about
    if index.get("_class_name") in PIPELINES:
        for part in ("vae", "transformer"):
            configs[part] = read_json(path / part / "config.json")
    return geometry_of(path, configs)


def geometry_of(path: Path | str, parts: dict[str, dict]) -> tuple[str, Geometry]:
    """Family and geometry of a pipeline with these configurations (model_index, vae, transformer).

    ``path`` is named in errors.
    """
    name = parts["model_index"].get("_class_name") if "model_index" in parts else "model without a pipeline"
    if name not in PIPELINES:
        raise ValueError(f"{path} holds a {name}; supported: {', '.join(PIPELINES)}")
    try:
        return PIPELINES[name], geometry_from_configs(PIPELINES[name], parts["vae"], parts["transformer"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{path}: its configuration lacks {error}") from None
