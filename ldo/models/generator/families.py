"""The families of video models, one file each: add a file and a line here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

from ldo.models.generator.folder import FAMILIES
from ldo.models.generator.protocol import Generator, Options

_CLASSES = {"wan": "Wan", "cogvideox": "CogVideoX", "hunyuan": "Hunyuan", "ltx": "LTX"}


def family_adapter(family: str) -> type:
    """The class of a family, one of ``FAMILIES``; its file is imported on first use."""
    if family not in _CLASSES:
        raise ValueError(f"unknown model family {family!r}; one of {', '.join(FAMILIES)}")
    return getattr(import_module(f"ldo.models.generator.{family}"), _CLASSES[family])


def load_generator(
    family: str, path: str | Path, dtype: torch.dtype = torch.float32, options: Options | None = None
) -> Generator:
    """Load a generator from a diffusers folder or Hub name. ``family`` is one of ``FAMILIES``."""
    return family_adapter(family).load(path, dtype, options or Options())
