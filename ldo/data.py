"""Clips and prompts: reading a folder of videos with captions, probing every file before anything else loads.

A folder holds video files and their captions: in ``metadata.jsonl`` (``{"file_name": ..., "text": ...}`` a line; further
keys are kept), in ``metadata.csv`` with the same columns, or as ``NAME.txt`` beside ``NAME.mp4``.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldo import cache
from ldo.buckets import Size, batch_indices, choose
from ldo.checkpoint import write_text
from ldo.config import Data, RecipeError
from ldo.video import SUFFIXES, Info, probe, read_video, stream, write_video

__all__ = ["batch_indices", "read_video", "write_video"]
log = logging.getLogger(__name__)
PROBE = 1  # version of what a probe finds


@dataclass(frozen=True)
class Clip:
    """A video file, its caption and whatever else its metadata says; how many frames it gives at the recipe's rate.

    ``size`` is the bucket that it falls into, of which it gives ``windows`` pieces; ``content`` is the SHA-256 of the file.
    """

    path: Path
    text: str
    frames: int = 0
    fps: float = 0.0
    extra: dict = field(default_factory=dict)
    size: Size = ()
    windows: int = 1
    content: str = ""


@dataclass(frozen=True)
class PromptLine:
    """A prompt and whatever else its line says."""

    text: str
    extra: dict = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- folders


def read_folder(folder: Path, config: Data, store: Path, report: Path | None = None) -> list[Clip]:
    """All clips of a folder that can be used, each with its bucket; every file has been decoded once from end to end.

    What a probe finds is kept in the folder ``store`` until the file changes. ``report`` gets a JSON line a clip: its
    bucket, or why it cannot be used. RecipeError where there are no captioned clips, or where clips cannot be used and
    ``config.bad_clips`` is "error".
    """
    if not folder.is_dir():
        raise RecipeError(f"data.videos: folder {folder} does not exist; give a folder of videos with captions, or sandbox")
    listed = _captions(folder, config.caption)
    if not listed:
        raise RecipeError(f"data.videos: {folder} holds no captioned videos; put metadata.jsonl in it, or NAME.txt beside each NAME.mp4")
    there = sorted({c.path for c in listed if c.path.is_file()})
    found = dict(zip(there, cache.facts(there, store / f"probe-{PROBE}.jsonl", _look, "probe"), strict=True))
    clips, rows, bad = [], [], []
    for clip in listed:
        try:
            clips.append(_placed(clip, found.get(clip.path, {"bad": "it does not exist"}), config))
            rows.append({"file": str(clip.path), "size": clips[-1].size, "windows": clips[-1].windows, "frames": clips[-1].frames})
        except ValueError as error:
            bad.append(f"{clip.path.name}: {error}")
            rows.append({"file": str(clip.path), "bad": str(error)})
    if not bad:
        return clips
    words = bad[0] + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
    if report:
        with cache.locked(store / "report.lock"):  # every process comes by here
            write_text(report, "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: "bad" not in row)))
        words += f", listed in {report}"
    if config.bad_clips == "error":
        raise RecipeError(f"data.videos: {folder}: {words}; mend or remove, or go on without by data.bad_clips=skip")
    if not clips:
        raise RecipeError(f"data.videos: {folder}: no clip can be used; {words}; mend them")
    log.warning("clips: %d of %d cannot be used and are left out: %s", len(bad), len(listed), words)
    return clips


def _look(path: Path) -> dict:
    """What a probe says of a file, as JSON: {"content", "info"} or {"bad"}."""
    try:
        info = probe(path)
        return {"content": cache.content(path), "info": vars(info)}
    except (ValueError, OSError) as error:
        return {"bad": str(error)}


def _placed(clip: Clip, found: dict, config: Data) -> Clip:
    """``clip`` in its bucket; ValueError if it cannot be used."""
    if "bad" in found:
        raise ValueError(found["bad"])
    info = Info(**found["info"])
    size = choose(info, config.fps, config.buckets or [(config.frames, config.height, config.width)])
    count = info.count(config.fps)
    windows = count // size[0] if config.windows == "all" else 1
    return Clip(clip.path, clip.text, count, info.fps, clip.extra, size, windows, found["content"])


def _captions(folder: Path, column: str) -> list[Clip]:
    tables = [folder / f"metadata{s}" for s in (".jsonl", ".csv") if (folder / f"metadata{s}").is_file()]
    if not tables:
        texts = sorted(p for p in folder.iterdir() if p.suffix == ".txt")
        videos = {p.stem: p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES}
        lost = [p for p in texts if p.stem not in videos]
        if lost:
            raise RecipeError(f"{lost[0]} is a caption without a clip; add {lost[0].stem}.mp4 or remove it")
        return [Clip(videos[p.stem], _text(p).strip()) for p in texts]
    if len(tables) > 1:
        raise RecipeError(f"{folder} holds both metadata.jsonl and metadata.csv; keep one of them")
    index, clips = tables[0], []
    for number, row in _json_lines(index) if index.suffix == ".jsonl" else _csv_lines(index):
        key = column or ("text" if "text" in row else "caption")
        if not isinstance(row.get("file_name"), str) or not isinstance(row.get(key), str):
            raise RecipeError(f'{index}, line {number}: "file_name" and "{column or "text"}" are needed, both text')
        extra = {k: v for k, v in row.items() if k not in ("file_name", key)}
        clips.append(Clip(folder / row["file_name"], row[key], extra=extra))
    return clips


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _csv_lines(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    for row in reader:
        if None in row:
            raise RecipeError(f"{path}, line {reader.line_num} has more cells than the header; put captions with commas in quotes")
        yield reader.line_num, row


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise RecipeError(f"{path}, line {number} is not a JSON object")
            yield number, row


def read_prompts(path: Path, where: str = "data.prompts") -> list[PromptLine]:
    """Prompts from a text file (one a line) or JSON lines with "text". RecipeError if there are none."""
    if not path.is_file():
        raise RecipeError(f"{where}: file {path} does not exist; give a file with one prompt a line, or sandbox")
    if path.suffix == ".jsonl":
        lines = []
        for number, row in _json_lines(path):
            if not isinstance(row.get("text"), str) or not row["text"].strip():
                raise RecipeError(f'{path}, line {number}: "text" is needed')
            lines.append(PromptLine(row["text"], {k: v for k, v in row.items() if k != "text"}))
    else:
        lines = [PromptLine(line.strip()) for line in _text(path).split("\n") if line.strip()]
    if not lines:
        raise RecipeError(f"{where}: {path} holds no prompts; write one a line")
    return lines


# ---------------------------------------------------------------------------------------------- frames


def load_windows(path: Path, wanted: Collection[int], size: Size, fps: float, decoder: str = "pyav") -> Iterator[tuple[int, Tensor]]:
    """Some windows of a file, in order and in one pass: window w is frames w F .. (w + 1) F, F = ``size[0]``.

    Each is [F, 3, H, W] in [0, 1], scaled to cover ``size`` and centre-cropped. ValueError says why the file cannot be read.
    """
    frames, height, width = size
    last, held, count = max(wanted), [], 0
    for count, image in enumerate(stream(path, fps, decoder), 1):
        number = (count - 1) // frames
        if number in wanted:
            held.append(_fit(torch.from_numpy(image), height, width))
            if len(held) == frames:
                yield number, torch.stack(held).permute(0, 3, 1, 2)
                held = []
                if number == last:
                    return
    raise ValueError(f"it gives {count} frames at {fps:g} fps and {(last + 1) * frames} are needed")


def load_frames(clip: Clip, frames: int, height: int, width: int, fps: float, decoder: str = "pyav") -> Tensor:
    """The first ``frames`` frames [T, 3, H, W] in [0, 1], resampled to ``fps``, scaled and centre-cropped to size."""
    return next(load_windows(clip.path, {0}, (frames, height, width), fps, decoder))[1]


def _fit(image: Tensor, height: int, width: int) -> Tensor:
    """A uint8 picture [h, w, 3] as [height, width, 3] in [0, 1]."""
    x = image.float() / 255
    h, w = x.shape[:2]
    if (h, w) == (height, width):
        return x
    scale = max(height / h, width / w)
    size = (max(round(h * scale), height), max(round(w * scale), width))
    x = F.interpolate(x.permute(2, 0, 1)[None], size, mode="bilinear", antialias=True, align_corners=False)[0].permute(1, 2, 0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[top : top + height, left : left + width].clamp(0, 1)
