"""Scoring many videos into a folder; a run that was stopped continues.

scores.csv    a line per video; for one that could not be scored, the reason
curves.json   the curves
index.html    the videos with their curves, for a browser
results.jsonl what is done so far: the same command, started again, continues from there
"""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldo.core.config import CriticConfig, Section, flat_items, to_plain
from ldo.core.errors import RecipeError
from ldo.core.files import read_json_lines, write_json_lines, write_text
from ldo.core.progress import Bar
from ldo.data.file_facts import file_stamp
from ldo.data.video import VIDEO_SUFFIXES
from ldo.report.surprise import score_page

if TYPE_CHECKING:
    from ldo.models.world_model import WorldModel

PRETRAINED_FPS = 4.0  # what V-JEPA 2 saw in pretraining
COLUMNS = (
    "file",
    "seconds",
    "source_fps",
    "fps",
    "frames",
    "width",
    "height",
    "windows",
    "reward",
    "skill",
    "plain",
    "surprise",
    "worst_second",
    "worst_surprise",
    "motion",
    "problem",
)


class ScoreSettings(Section):
    """Everything that the scores depend on. ``fps`` 0 takes each file's own rate."""

    world_model: str
    critic: CriticConfig
    fps: float
    dtype: str


def find_videos(places: Sequence[str]) -> list[Path]:
    """The videos that folders (searched recursively), files and patterns name, sorted.

    RecipeError where one of them names none.
    """
    found: set[Path] = set()
    for place in places:
        path = Path(place).expanduser()
        videos = _videos_at(path)
        if not videos:
            problem = f"{place} does not exist"
            if path.is_dir():
                problem = f"folder {place} holds no videos ({', '.join(VIDEO_SUFFIXES)})"
            raise RecipeError(f"{problem}; give a folder of videos, files, or a pattern in quotes")
        found.update(videos)
    return sorted(found)


def _videos_at(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()]
    # Before patterns, because a file's name may hold brackets.
    if path.is_file():
        return [path]
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    return [match for match in matches if match.is_file()]


def check_windows(config: CriticConfig, tubelet: int, frames: int) -> None:
    """RecipeError where the critic's windows do not suit a world model.

    ``tubelet`` are the frames of one of its tokens, ``frames`` those of the clips it was trained on.
    """
    if config.window > frames or config.window % tubelet:
        raise RecipeError(
            f"--window is {config.window}; this world model takes a multiple of {tubelet} of at most {frames} frames"
        )
    unusable = [context for context in config.contexts if not 0 < context < config.window or context % tubelet]
    if unusable or not config.contexts:
        raise RecipeError(
            f"--contexts is {list(config.contexts)}; give multiples of {tubelet} below the window of {config.window}, "
            "e.g. 4,8"
        )


def claim_scores(out: Path, settings: ScoreSettings) -> list[dict]:
    """Claim the output folder for these settings; returns the records that an earlier start has left there.

    RecipeError if it was started with other settings.
    """
    path = out / "settings.json"
    current = to_plain(settings)
    if path.exists():
        previous = dict(flat_items(json.loads(path.read_text())))
        changed = [setting for setting, value in flat_items(current) if previous.get(setting) != value]
        if changed:
            raise RecipeError(
                f"{out} was made with {changed[0]}={previous.get(changed[0], 'unset')}; "
                "give another --out, or remove that folder"
            )
    else:
        write_text(path, json.dumps(current, indent=1))
    records = read_json_lines(out / "results.jsonl")
    # Written back without a last line that a kill has cut short, so that the next record starts a line of its own.
    write_json_lines(out / "results.jsonl", records)
    return records


def score_videos(
    world_model: WorldModel,
    videos: Sequence[Path],
    out: Path,
    settings: ScoreSettings,
    batch: int = 4,
    embed: bool = False,
) -> list[dict]:
    """Score videos into the folder ``out`` and return their records, in the order of ``videos``.

    Those that failed hold "problem".
    """
    # Imported here, so that mistakes in the command line are reported before PyTorch loads.
    from ldo.stages import score_video as one_video

    finished = {record["key"]: record for record in claim_scores(out, settings)}
    records = []
    try:
        with Bar("score", len(videos)) as progress, open(out / "results.jsonl", "a") as file:
            for path in videos:
                identity = file_stamp(path)
                record = finished.get(identity)
                if record is None:
                    try:
                        record = one_video.score_video(world_model, path, settings.critic, settings.fps, batch)
                    except ValueError as error:
                        record = {"problem": str(error)}
                    record = {"key": identity, **record}
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                records.append(record | {"file": str(path)})
                progress.advance(path.name)
    finally:
        # Also when someone stops it: the files then hold what is done.
        write_outputs(out, records, settings, embed)
    return records


def write_outputs(out: Path, records: list[dict], settings: ScoreSettings, embed: bool = False) -> None:
    """Write scores.csv, curves.json and index.html of the records."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _csv_value(value) for name, value in record.items()})
    write_text(out / "scores.csv", table.getvalue())
    curves = {record["file"]: record["curves"] for record in records if "curves" in record}
    write_text(out / "curves.json", json.dumps({"settings": to_plain(settings), "videos": curves}))
    write_text(out / "index.html", score_page(records, to_plain(settings), out, embed))


def _csv_value(value: object) -> object:
    return f"{value:.8g}" if isinstance(value, float) else value
