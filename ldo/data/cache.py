"""A cache of tensors on disk, named by what they were made from; safe under many processes and kill -9.

An entry is one safetensors file whose name is the SHA-256 of its *key*: everything that its values depend on. So
nothing is ever stale: what changes gets another name. Entries are written under a name of their own, synced and moved
into place. A reader finds a whole entry or none; of two writers of one entry the later wins, with the same values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldo.core.errors import RecipeError

KEPT_PROMPTS = 256  # prompts whose embeddings stay in memory once read, of those asked for last
DAY = 86400.0  # seconds


def entry_path(folder: Path, kind: str, key: dict[str, Any]) -> Path:
    """Where the entry of ``key`` (JSON values) lies; ``kind`` is its sub-folder and part of the key."""
    name = hashlib.sha256(json.dumps({"kind": kind, **key}, sort_keys=True).encode()).hexdigest()
    return folder / kind / name[:2] / f"{name}.safetensors"


def write_entry(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write an entry, whole or not at all. RecipeError where the folder takes no files."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # a name of its own: two processes may write one entry at a time
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.{uuid.uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(save(tensors, {"entry": path.stem, "crc": str(_checksum(tensors))}))
            # before the name: after a crash of the machine a whole name must not hold half a file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise RecipeError(
            f"data.cache: {path.parent} cannot be written ({error.strerror}); free space there, or set data.cache"
        ) from None


def has_entry(path: Path) -> bool:
    """Is there an entry of the right name and length? Its values are not read."""
    try:
        # safe_open refuses a file whose length is not what its header says
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("entry") == path.stem
    except (OSError, SafetensorError):
        return False


def read_entry(path: Path) -> dict[str, Tensor] | None:
    """An entry's tensors; None where there is none, or one that is cut short, not ours, or damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("entry") != path.stem:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):
        return None
    # a disk can return other bytes than it was given; training would continue on a wrong latent unnoticed
    return tensors if metadata["crc"] == str(_checksum(tensors)) else None


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over names and bytes."""
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left behind more than a day ago."""
    for leftover in folder.rglob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > DAY:
                leftover.unlink()
