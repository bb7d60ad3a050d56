"""Captions and prompts as people write them: JSON lines, CSV tables, text files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ldo.core.errors import RecipeError
from ldo.data.video import VIDEO_SUFFIXES


@dataclass(frozen=True)
class Caption:
    """A video file, its caption and whatever else its metadata says."""

    path: Path
    text: str
    extra: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PromptLine:
    """A prompt and whatever else its line says."""

    text: str
    extra: dict = field(default_factory=dict)


def read_captions(folder: Path, column: str) -> list[Caption]:
    """The captions of a folder: ``metadata.jsonl``, ``metadata.csv``, or ``NAME.txt`` next to ``NAME.mp4``.

    ``column`` names the captions' column; empty takes "text", or "caption" where there is no "text". RecipeError where
    a table is wrong or a caption has no video.
    """
    tables = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if not tables:
        return _captions_next_to_clips(folder)
    if len(tables) > 1:
        raise RecipeError(f"{folder} holds both metadata.jsonl and metadata.csv; keep one of them")
    table = tables[0]
    captions = []
    records = _json_lines(table) if table.suffix == ".jsonl" else _csv_lines(table)
    for number, record in records:
        text_column = column or ("text" if "text" in record else "caption")
        if not isinstance(record.get("file_name"), str) or not isinstance(record.get(text_column), str):
            raise RecipeError(f'{table}, line {number}: "file_name" and "{column or "text"}" are needed, both text')
        extra = {name: value for name, value in record.items() if name not in ("file_name", text_column)}
        captions.append(Caption(folder / record["file_name"], record[text_column], extra))
    return captions


def read_prompts(path: Path, where: str = "data.prompts") -> list[PromptLine]:
    """Prompts from a text file (one a line) or JSON lines with "text". RecipeError if there are none."""
    if not path.is_file():
        raise RecipeError(f"{where}: file {path} does not exist; give a file with one prompt a line, or sandbox")
    prompts = []
    if path.suffix == ".jsonl":
        for number, record in _json_lines(path):
            if not isinstance(record.get("text"), str) or not record["text"].strip():
                raise RecipeError(f'{path}, line {number}: "text" is needed')
            prompts.append(
                PromptLine(record["text"], {name: value for name, value in record.items() if name != "text"})
            )
    else:
        lines = (line.strip() for line in _read_text(path).split("\n"))
        prompts = [PromptLine(line) for line in lines if line]
    if not prompts:
        raise RecipeError(f"{where}: {path} holds no prompts; write one a line")
    return prompts


def _captions_next_to_clips(folder: Path) -> list[Caption]:
    captions = sorted(path for path in folder.iterdir() if path.suffix == ".txt")
    videos = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES}
    for caption in captions:
        if caption.stem not in videos:
            raise RecipeError(f"{caption} is a caption without a clip; add {caption.stem}.mp4 or remove it")
    return [Caption(videos[caption.stem], _read_text(caption).strip()) for caption in captions]


def _read_text(path: Path) -> str:
    try:
        # a byte order mark, as Windows programs write it, is not part of the first caption
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8") from None


def _csv_lines(path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    for record in reader:
        # cells beyond the header: a comma in a caption without quotes
        if None in record:
            raise RecipeError(
                f"{path}, line {reader.line_num} has more cells than the header; put captions with commas in quotes"
            )
        yield reader.line_num, record


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    # not splitlines, which also splits at separators that JSON text may hold
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise RecipeError(f"{path}, line {number} is not a JSON object")
            yield number, record
