"""Hugging Face datasets with a video column, written once into a folder of clips with captions.

Named in ``data.videos`` as ``hf:owner/name`` or ``hf:owner/name:split``, as a ``.parquet`` file, a folder of them, or a
folder written by ``Dataset.save_to_disk``. Needs the ``datasets`` library (``pip install 'ldo[datasets]'``), and no
decoder of its own: videos are taken as files.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from ldo.core.errors import RecipeError
from ldo.core.files import write_json_lines
from ldo.core.progress import with_bar
from ldo.data.file_facts import file_lock


def is_dataset(videos: str) -> bool:
    """Does ``data.videos`` name a Hugging Face dataset rather than a folder of clips?"""
    return videos.startswith("hf:") or bool(_parquet(Path(videos))) or _saved(Path(videos))


def _saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _parquet(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return [str(path)]
    if not path.is_dir():
        return []
    # as a dataset repository is laid out when it is cloned: files at its top, or in data/
    return [str(file) for file in sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])]


def clips_folder(videos: str, caption: str, store: Path) -> Path:
    """The dataset as a folder of clips under ``store``, with ``metadata.jsonl``.

    It is written on first use, files named by their content. ``caption`` names the column of captions; empty takes
    "text", else "caption". RecipeError says what is missing.
    """
    try:
        import datasets
    except ImportError:
        raise RecipeError(
            f"data.videos: {videos} is a Hugging Face dataset, which needs: pip install 'ldo[datasets]'"
        ) from None
    dataset = _load(datasets, videos)
    columns = dataset.features
    video_column = next((column for column, feature in columns.items() if isinstance(feature, datasets.Video)), None)
    if video_column is None:
        raise RecipeError(
            f"data.videos: {videos} has no video column, only {', '.join(columns)}; its videos must be inside the "
            "dataset"
        )
    caption = caption or next((column for column in ("text", "caption") if column in columns), "")
    if caption not in columns:
        raise RecipeError(
            f"data.caption: {videos} has no column {caption or 'text or caption'}; name one of {', '.join(columns)}"
        )
    # undecoded: the files are taken as they are
    dataset = dataset.select_columns([video_column, caption]).cast_column(video_column, datasets.Video(decode=False))
    # datasets' fingerprint changes with the data and with every transformation of it
    source = f"{videos} {video_column} {caption} {dataset._fingerprint}"
    folder = store / "datasets" / hashlib.sha256(source.encode()).hexdigest()[:16]
    with file_lock(store / "datasets.lock"):
        if not (folder / "metadata.jsonl").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            records = [
                {"file_name": _file(record[video_column], folder, videos), "text": record[caption]}
                for record in with_bar("dataset", dataset, len(dataset))
            ]
            write_json_lines(folder / "metadata.jsonl", records)
    return folder


def _load(datasets: Any, videos: str) -> Any:
    path = Path(videos)
    try:
        if videos.startswith("hf:"):
            name, _, split = videos.removeprefix("hf:").partition(":")
            return datasets.load_dataset(name, split=split or "train")
        if files := _parquet(path):
            return datasets.load_dataset("parquet", data_files=files, split="train")
        dataset = datasets.load_from_disk(videos)
    # whatever a library, a network or a server may raise
    except Exception as error:
        raise RecipeError(
            f"data.videos: {videos} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise RecipeError(
                f"data.videos: {videos} has no split train, only {', '.join(dataset)}; give the folder of one of them"
            )
        dataset = dataset["train"]
    return dataset


def _file(video: dict[str, Any] | None, folder: Path, videos: str) -> str:
    """Write a video's bytes into ``folder`` and return the name of the file.

    A dataset may name a file instead of holding its bytes: then the name is that file's path, and nothing is written.
    """
    if not video or (video["bytes"] is None and not (video["path"] and Path(video["path"]).is_file())):
        raise RecipeError(
            f"data.videos: {videos} holds a row without a video, {video and video['path']}; filter such rows out"
        )
    if video["bytes"] is None:
        return str(Path(video["path"]).resolve())
    file_name = hashlib.sha256(video["bytes"]).hexdigest()[:32] + (Path(video["path"] or "").suffix or ".mp4")
    if not (folder / file_name).is_file():
        unfinished = folder / f"{file_name}.part"
        unfinished.write_bytes(video["bytes"])
        os.replace(unfinished, folder / file_name)
    return file_name
