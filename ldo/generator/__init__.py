"""Video diffusion models behind one small protocol; one file per family."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from ldo.generator.folder import FAMILIES
from ldo.generator.protocol import Generator, Options, Text

__all__ = ["FAMILIES", "Generator", "Options", "Text", "adapter", "load"]
_CLASSES = {"wan": "Wan", "cogvideox": "CogVideoX", "hunyuan": "Hunyuan", "ltx": "LTX"}


def adapter(family: str) -> type:
    """The class of a family, one of ``FAMILIES``; its file is imported on first use."""
    if family not in _CLASSES:
        raise ValueError(f"unknown model family {family!r}; one of {', '.join(FAMILIES)}")
    return getattr(import_module(f"ldo.generator.{family}"), _CLASSES[family])


def load(family: str, path: str | Path, dtype: torch.dtype = torch.float32, options: Options | None = None) -> Generator:
    """Load a generator from a diffusers folder or Hub name. ``family`` is one of ``FAMILIES``."""
    return adapter(family).load(path, dtype, options or Options())
