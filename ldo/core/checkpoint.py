"""Checkpoints of a stage: one file, written whole or not at all, holding all that the next step depends on.

Random numbers are functions of (seed, purpose, step), so no generator state is kept: n + m steps give the same bits
as n steps, a kill, a resume and m steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (nested dicts and lists of tensors and numbers) atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        # without this, a crash of the machine could leave the new name with none of its bytes
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state in ``path``, on the CPU; None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
