"""What a model says of itself, without its weights: from a checkpoint folder, from the Hub's local cache, or as published.

``published/`` holds the configurations of well-known Hub repositories, each with the ``source`` it was taken from, so that a
recipe can be judged on a machine that has none of them. Tests build every one on the meta device and compare its
number of parameters with the published one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ldo.generator.folder import read_json

HERE = Path(__file__).resolve().parent / "published"
PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "scheduler")
_OTHER_NAMES = {"zai-org/CogVideoX-2b": "THUDM/CogVideoX-2b", "zai-org/CogVideoX-5b": "THUDM/CogVideoX-5b"}  # one repository, renamed


def names() -> list[str]:
    """Hub repositories whose configurations are shipped."""
    return sorted(p.stem.replace("--", "/", 1) for p in HERE.glob("*.json"))


def configs(path: str | Path) -> dict[str, dict] | None:
    """The JSON files of a model by their part, or None if nothing here knows it.

    A pipeline gives model_index, transformer, vae, scheduler, text_encoder and, where it has them, transformer_2 and
    text_encoder_2; a single model, such as a V-JEPA 2, gives config. ``path`` is a folder or a Hub name (owner/name).
    ValueError where a folder's file cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _cached(str(path))
    if folder is not None:
        return _from_folder(folder)
    name = _OTHER_NAMES.get(str(path), str(path))
    if name not in names():
        return None
    found = json.loads((HERE / f"{name.replace('/', '--')}.json").read_text())
    return {k: v for k, v in found.items() if k != "source"}


def _from_folder(folder: Path) -> dict[str, dict]:
    if not (folder / "model_index.json").is_file():
        return {"config": read_json(folder / "config.json")}
    out = {"model_index": read_json(folder / "model_index.json")}
    for part in PARTS:
        name = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if name.is_file():
            out[part] = read_json(name)
    return out


def _cached(name: str) -> Path | None:
    """The newest complete snapshot of a Hub repository in this machine's cache; nothing is downloaded."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [s for s in snapshots.glob("*") if (s / "config.json").is_file() or (s / "transformer" / "config.json").is_file()]
    return max(found, key=lambda s: s.stat().st_mtime, default=None)
