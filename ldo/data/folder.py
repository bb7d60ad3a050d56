"""A folder of videos with captions, every file probed before anything else loads."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from ldo.core.config import DataConfig
from ldo.core.errors import RecipeError
from ldo.core.files import write_json_lines
from ldo.data.buckets import Size, choose_bucket
from ldo.data.captions import Caption, read_captions
from ldo.data.file_facts import content_hash, file_facts, file_lock
from ldo.data.video import VideoInfo, probe_video

log = logging.getLogger(__name__)
PROBE = 1  # version of what a probe finds


@dataclass(frozen=True)
class Clip:
    """A video file with its caption and whatever else its metadata says.

    ``frames`` is how many it gives at the recipe's rate, ``size`` the bucket that it falls into, ``windows`` how many
    clips of that size are cut from it, ``content`` the SHA-256 of the file.
    """

    path: Path
    text: str
    frames: int = 0
    fps: float = 0.0
    extra: dict = field(default_factory=dict)
    size: Size = ()
    windows: int = 1
    content: str = ""


def read_folder(folder: Path, config: DataConfig, store: Path, report: Path | None = None) -> list[Clip]:
    """All usable clips of a folder, each with its bucket; every file is decoded once from end to end.

    What a probe finds is kept in the folder ``store`` until the file changes. Where clips cannot be used, ``report``
    gets a JSON line for each clip: its bucket, or why it cannot be used. RecipeError where there are no captioned
    clips, or where clips cannot be used and ``config.bad_clips`` is "error".
    """
    if not folder.is_dir():
        raise RecipeError(
            f"data.videos: folder {folder} does not exist; give a folder of videos with captions, or sandbox"
        )
    captions = read_captions(folder, config.caption)
    if not captions:
        raise RecipeError(
            f"data.videos: {folder} holds no captioned videos; put metadata.jsonl in it, or NAME.txt next to each "
            "NAME.mp4"
        )
    files = sorted({caption.path for caption in captions if caption.path.is_file()})
    probes = file_facts(files, store / f"probe-{PROBE}.jsonl", _probe, "probe")
    facts = dict(zip(files, probes, strict=True))
    clips, rows, problems = [], [], []
    for caption in captions:
        # a file can be missing where the metadata names it
        found = facts.get(caption.path, {"bad": "it does not exist"})
        try:
            clip = _placed(caption, found, config)
        except ValueError as error:
            problems.append(f"{caption.path.name}: {error}")
            rows.append({"file": str(caption.path), "bad": str(error)})
            continue
        clips.append(clip)
        rows.append({"file": str(clip.path), "size": clip.size, "windows": clip.windows, "frames": clip.frames})
    if problems:
        if report:
            _write_report(report, rows, store)
        _refuse(folder, config, problems, report, len(captions))
    return clips


def _write_report(report: Path, rows: list[dict], store: Path) -> None:
    """A line for each clip, those that cannot be used first."""
    ordered = sorted(rows, key=lambda row: "bad" not in row)
    # every process of a run writes this report, the same one
    with file_lock(store / "report.lock"):
        write_json_lines(report, ordered)


def _refuse(folder: Path, config: DataConfig, problems: list[str], report: Path | None, total: int) -> None:
    """RecipeError unless the clips that cannot be used may be left out and others remain."""
    summary = problems[0]
    if len(problems) > 1:
        summary += f" (and {len(problems) - 1} more)"
    if report:
        summary += f", listed in {report}"
    if config.bad_clips == "error":
        raise RecipeError(
            f"data.videos: {folder}: {summary}; fix or remove them, or leave them out with data.bad_clips=skip"
        )
    if len(problems) == total:
        raise RecipeError(f"data.videos: {folder}: no clip can be used; {summary}; fix them")
    log.warning("clips: %d of %d cannot be used and are left out: %s", len(problems), total, summary)


def _probe(path: Path) -> dict:
    """What a probe says of a file, as JSON: {"content", "info"} or {"bad"}."""
    try:
        info = probe_video(path)
        return {"content": content_hash(path), "info": vars(info)}
    except (ValueError, OSError) as error:
        return {"bad": str(error)}


def _placed(caption: Caption, facts: dict, config: DataConfig) -> Clip:
    """A clip in its bucket; ValueError if it cannot be used."""
    if "bad" in facts:
        raise ValueError(facts["bad"])
    info = VideoInfo(**facts["info"])
    buckets = config.buckets or [(config.frames, config.height, config.width)]
    size = choose_bucket(info, config.fps, buckets)
    count = info.count(config.fps)
    return Clip(
        path=caption.path,
        text=caption.text,
        frames=count,
        fps=info.fps,
        extra=caption.extra,
        size=size,
        windows=count // size[0] if config.windows == "all" else 1,
        content=facts["content"],
    )
