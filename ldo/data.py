"""Clips and prompts: reading a folder of videos with captions, probing every file before anything else loads.

A folder holds video files and their captions, either in ``metadata.jsonl`` (``{"file_name": ..., "text": ...}`` a
line; further keys are kept) or as ``NAME.txt`` beside ``NAME.mp4``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldo.config import RecipeError
from ldo.rng import numpy_rng

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")


@dataclass(frozen=True)
class Clip:
    """A video file, its caption and whatever else its metadata says."""

    path: Path
    text: str
    frames: int = 0
    fps: float = 0.0
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PromptLine:
    """A prompt and whatever else its line says."""

    text: str
    extra: dict = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------- video files


def write_video(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    """Write uint8 RGB frames without loss (H.264 in RGB): what is read back is what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1000), options={"qp": "0", "preset": "veryfast"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.codec_context.thread_count = 1
        for image in frames_THWC:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def read_video(path: Path, limit: int | None = None) -> tuple[np.ndarray, float]:
    """uint8 RGB frames [T, H, W, 3] and the frame rate; ValueError says why a file cannot be read."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            images = []
            for frame in container.decode(stream):
                images.append(frame.to_ndarray(format="rgb24"))
                if limit and len(images) == limit:
                    break
    except (av.FFmpegError, OSError) as error:
        raise ValueError(
            "it is empty" if path.exists() and not path.stat().st_size else f"it cannot be decoded ({error.strerror or error})"
        ) from None
    if not images:
        raise ValueError("it holds no frames")
    return np.stack(images), fps


def _resample(images: np.ndarray, from_fps: float, to_fps: float) -> np.ndarray:
    """Frames at another rate, each the nearest in time; unknown or equal rates change nothing."""
    if not from_fps or not to_fps or abs(from_fps / to_fps - 1) < 0.01:
        return images
    count = int((len(images) - 1) / from_fps * to_fps + 1e-6) + 1
    return images[np.minimum(np.round(np.arange(count) * from_fps / to_fps).astype(int), len(images) - 1)]


# ---------------------------------------------------------------------------------------------- folders


def read_folder(folder: Path, frames: int, fps: float) -> list[Clip]:
    """All clips of a folder, each decoded once to see that it can give ``frames`` frames at ``fps``.

    RecipeError names captions without clips and clips that cannot be used, with the reason.
    """
    if not folder.is_dir():
        raise RecipeError(f"data.videos: folder {folder} does not exist; give a folder of videos with captions, or sandbox")
    listed = _captions(folder)
    missing = [c.path for c in listed if not c.path.is_file()]
    if missing:
        raise RecipeError(
            f"{folder / 'metadata.jsonl'} names {len(missing)} clip(s) that do not exist, first {missing[0].name}; add the file or drop its line"
        )
    if not listed:
        raise RecipeError(f"data.videos: {folder} holds no captioned videos; put metadata.jsonl in it, or NAME.txt beside each NAME.mp4")
    clips, bad = [], []
    for clip in listed:
        try:
            images, rate = read_video(clip.path)
            count = len(_resample(images, rate, fps))
            if count < frames:
                raise ValueError(f"it gives {count} frames at {fps:g} fps and data.frames is {frames}")
            clips.append(Clip(clip.path, clip.text, count, rate, clip.extra))
        except ValueError as error:
            bad.append(f"{clip.path.name}: {error}")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise RecipeError(f"data.videos: {folder}: {bad[0]}{more}; mend or remove it")
    return clips


def _captions(folder: Path) -> list[Clip]:
    index = folder / "metadata.jsonl"
    if not index.is_file():
        texts = sorted(p for p in folder.iterdir() if p.suffix == ".txt")
        videos = {p.stem: p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES}
        lost = [p for p in texts if p.stem not in videos]
        if lost:
            raise RecipeError(f"{lost[0]} is a caption without a clip; add {lost[0].stem}.mp4 or remove it")
        return [Clip(videos[p.stem], _text(p).strip()) for p in texts]
    clips = []
    for row in _json_lines(index):
        if not isinstance(row[1].get("file_name"), str) or not isinstance(row[1].get("text"), str):
            raise RecipeError(f'{index}, line {row[0]}: "file_name" and "text" are needed, both text')
        extra = {k: v for k, v in row[1].items() if k not in ("file_name", "text")}
        clips.append(Clip(folder / row[1]["file_name"], row[1]["text"], extra=extra))
    return clips


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _json_lines(path: Path) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise RecipeError(f"{path}, line {number} is not a JSON object")
            rows.append((number, row))
    return rows


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


def load_frames(clip: Clip, frames: int, height: int, width: int, fps: float) -> Tensor:
    """The first ``frames`` frames [T, 3, H, W] in [0, 1], resampled to ``fps``, scaled and centre-cropped to size."""
    images, rate = read_video(clip.path)
    x = torch.from_numpy(_resample(images, rate, fps)[:frames]).permute(0, 3, 1, 2).float() / 255
    h, w = x.shape[-2:]
    if (h, w) == (height, width):
        return x
    scale = max(height / h, width / w)
    size = (max(round(h * scale), height), max(round(w * scale), width))
    x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[:, :, top : top + height, left : left + width].clamp(0, 1)


def batch_indices(seed: int, purpose: str, step: int, batch: int, count: int) -> np.ndarray:
    """Which items step ``step`` takes [batch]: epoch after epoch in fresh order, a function of (seed, step) alone."""
    first = step * batch
    out = []
    while len(out) < batch:
        epoch, at = divmod(first + len(out), count)
        out.extend(numpy_rng(seed, f"{purpose} order", epoch).permutation(count)[at : at + batch - len(out)])
    return np.array(out)
