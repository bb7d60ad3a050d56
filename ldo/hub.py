"""Hugging Face datasets with a video column, written once into a folder of clips with captions.

Named in ``data.videos`` as ``hf:owner/name`` or ``hf:owner/name:split``, as a ``.parquet`` file, a folder of them, or a
folder written by ``Dataset.save_to_disk``. Needs the ``datasets`` library (``pip install 'ldo[datasets]'``), and no
decoder of its own: videos are taken as files.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ldo import cache
from ldo.checkpoint import write_text
from ldo.config import RecipeError
from ldo.progress import each


def is_dataset(videos: str) -> bool:
    """Does ``data.videos`` name a Hugging Face dataset rather than a folder of clips?"""
    return videos.startswith("hf:") or bool(_parquet(Path(videos))) or _saved(Path(videos))


def _saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _parquet(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return [str(path)]
    return [str(p) for p in sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])] if path.is_dir() else []


def clips_folder(videos: str, caption: str, store: Path) -> Path:
    """The dataset as a folder of clips under ``store``, with ``metadata.jsonl``; made on first use, files named by content.

    ``caption`` names the column of captions; empty takes "text", else "caption". RecipeError says what is missing.
    """
    try:
        import datasets
    except ImportError:
        raise RecipeError(f"data.videos: {videos} is a Hugging Face dataset, which needs: pip install 'ldo[datasets]'") from None
    table = _load(datasets, videos)
    columns = table.features
    video = next((name for name, kind in columns.items() if isinstance(kind, datasets.Video)), None)
    if video is None:
        raise RecipeError(f"data.videos: {videos} has no video column, only {', '.join(columns)}; its videos must be inside the dataset")
    caption = caption or next((name for name in ("text", "caption") if name in columns), "")
    if caption not in columns:
        raise RecipeError(f"data.caption: {videos} has no column {caption or 'text or caption'}; name one of {', '.join(columns)}")
    table = table.select_columns([video, caption]).cast_column(video, datasets.Video(decode=False))
    folder = store / "datasets" / hashlib.sha256(f"{videos} {video} {caption} {table._fingerprint}".encode()).hexdigest()[:16]
    with cache.locked(store / "datasets.lock"):
        if not (folder / "metadata.jsonl").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            rows = [{"file_name": _file(row[video], folder, videos), "text": row[caption]} for row in each("dataset", table, len(table))]
            write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _load(datasets: Any, videos: str) -> Any:
    path = Path(videos)
    try:
        if videos.startswith("hf:"):
            name, _, split = videos.removeprefix("hf:").partition(":")
            return datasets.load_dataset(name, split=split or "train")
        if files := _parquet(path):
            return datasets.load_dataset("parquet", data_files=files, split="train")
        found = datasets.load_from_disk(videos)
    except Exception as error:  # whatever a library, a network or a server may raise
        raise RecipeError(f"data.videos: {videos} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise RecipeError(f"data.videos: {videos} has no split train, only {', '.join(found)}; give the folder of one of them")
        found = found["train"]
    return found


def _file(video: dict[str, Any] | None, folder: Path, videos: str) -> str:
    """The name of a video within ``folder``: its bytes are written there; a file that is elsewhere already is named where it is."""
    if not video or (video["bytes"] is None and not (video["path"] and Path(video["path"]).is_file())):
        raise RecipeError(f"data.videos: {videos} holds a row without a video, {video and video['path']}; filter such rows out")
    if video["bytes"] is None:
        return str(Path(video["path"]).resolve())
    name = hashlib.sha256(video["bytes"]).hexdigest()[:32] + (Path(video["path"] or "").suffix or ".mp4")
    if not (folder / name).is_file():
        part = folder / f"{name}.part"
        part.write_bytes(video["bytes"])
        os.replace(part, folder / name)
    return name
