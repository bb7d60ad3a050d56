"""A model's configurations without its weights: from a checkpoint folder, from the Hub's local cache, or as published.

``published/`` holds the configurations of well-known Hub repositories, each with the ``source`` it was taken from, so
that a recipe can be checked on a machine that has none of them. Tests build each model on the meta device and compare
its number of parameters with the published one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ldo.models.generator.folder import read_json

PUBLISHED = Path(__file__).resolve().parent / "published"
CONFIG_PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "scheduler")
# one repository under two names: it was renamed
_OTHER_NAMES = {"zai-org/CogVideoX-2b": "THUDM/CogVideoX-2b", "zai-org/CogVideoX-5b": "THUDM/CogVideoX-5b"}


def published_names() -> list[str]:
    """Hub repositories whose configurations are shipped."""
    return sorted(path.stem.replace("--", "/", 1) for path in PUBLISHED.glob("*.json"))


def model_configs(path: str | Path) -> dict[str, dict] | None:
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
    if name not in published_names():
        return None
    found = json.loads((PUBLISHED / f"{name.replace('/', '--')}.json").read_text())
    return {part: config for part, config in found.items() if part != "source"}


def _from_folder(folder: Path) -> dict[str, dict]:
    if not (folder / "model_index.json").is_file():
        return {"config": read_json(folder / "config.json")}
    configs = {"model_index": read_json(folder / "model_index.json")}
    for part in CONFIG_PARTS:
        name = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        if name.is_file():
            configs[part] = read_json(name)
    return configs


def _cached(name: str) -> Path | None:
    """The newest complete snapshot of a Hub repository in this machine's cache; nothing is downloaded."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    # a snapshot may hold a README and no more: of several the newest that holds a configuration counts
    complete = [
        path
        for path in snapshots.glob("*")
        if (path / "config.json").is_file() or (path / "transformer" / "config.json").is_file()
    ]
    return max(complete, key=lambda path: path.stat().st_mtime, default=None)
