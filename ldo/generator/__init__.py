"""Video diffusion models behind one small protocol; one file per family."""

from __future__ import annotations

from pathlib import Path

import torch

from ldo.generator.folder import FAMILIES
from ldo.generator.protocol import Generator

__all__ = ["FAMILIES", "Generator", "load"]


def load(family: str, path: str | Path, dtype: torch.dtype = torch.float32, text_length: int = 512) -> Generator:
    """Load a generator from a diffusers folder or Hub name. ``family`` is one of ``FAMILIES``."""
    if family == "wan":
        from ldo.generator.wan import Wan

        return Wan.load(path, dtype, text_length)
    raise ValueError(f"unknown model family {family!r}; one of {', '.join(FAMILIES)}")
