"""Checkpoints of a stage: one file, written whole or not at all, holding all that the next step depends on.

Random numbers are functions of (seed, purpose, step), so no generator state is kept: n + m steps give the same bits
as n steps, a kill, a resume and m steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (nested dicts and lists of tensors and numbers) atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path: Path) -> dict[str, Any] | None:
    """The state in ``path``, on the CPU; None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
