"""The page of ``ldo.score``: every video with the curve of its surprise below it.

It is one file and fetches nothing from the network.
"""

from __future__ import annotations

import base64
import mimetypes
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml

from ldo.report.charts import LINE_COLOURS, Axis, Tick, histogram, polyline_points, ticks
from ldo.report.render import render_template

# width of a curve and its margins, in SVG units
CURVE_WIDTH, CURVE_LEFT, CURVE_RIGHT, CURVE_TOP = 920, 44, 8, 16
CURVE_PLOT_WIDTH, CURVE_PLOT_HEIGHT = CURVE_WIDTH - CURVE_LEFT - CURVE_RIGHT, 120
# bytes of the largest video that is put into the page
LARGEST_EMBEDDED = 8 * 2**20
SURPRISE_LINES = {
    "forward": "given the frames before",
    "backward": "given the frames after",
    "persistence": "if nothing changed",
}
ORDERS = {
    "reward 1": "lowest reward first",
    "reward -1": "highest reward first",
    "worst -1": "most surprising moment first",
    "name 1": "by name",
}


@dataclass(frozen=True)
class SurpriseLine:
    """A line of a curve: one polyline for each stretch of time that has values."""

    words: str
    colour: str
    faint: bool
    pieces: list[str]


@dataclass(frozen=True)
class SurpriseCurve:
    """The curve of a video with its strip of thumbnails below, in SVG units from the upper left corner."""

    rows: list[Tick]
    columns: list[Tick]
    column_labels: int
    lines: list[SurpriseLine]
    strip_top: int
    strip_height: float
    worst: float
    worst_anchor: str

    @property
    def bottom(self) -> float:
        return self.strip_top + self.strip_height


@dataclass(frozen=True)
class ScoredVideo:
    """A record with its curve, its place in the order of names, and the video's address, if a browser can play it."""

    number: int
    row: dict
    curve: SurpriseCurve
    source: str | None


def surprise_curve(record: dict) -> SurpriseCurve:
    """The curve of a record of ``ldo.score``."""
    curves, seconds = record["curves"], record["seconds"]
    values = [value for name in SURPRISE_LINES for value in curves.get(name, []) if value is not None]
    highest = max(values) * 1.06 or 1.0
    horizontal = Axis(0, seconds, CURVE_LEFT, CURVE_PLOT_WIDTH)
    vertical = Axis(highest, 0, CURVE_TOP, CURVE_PLOT_HEIGHT)  # SVG counts downwards
    # The last tubelet may be cut short by the video's end; its middle then lies beyond it.
    moments = [horizontal(min(moment, seconds)) for moment in curves["seconds"]]
    lines = []
    for (name, words), colour in zip(SURPRISE_LINES.items(), LINE_COLOURS, strict=False):
        if name not in curves:
            continue
        pieces = []
        for indices in _unbroken(curves[name]):
            pieces.append(polyline_points([(moments[index], vertical(curves[name][index])) for index in indices]))
        lines.append(SurpriseLine(words, colour, name != "forward", pieces))
    worst = horizontal(min(record["worst_second"], seconds))
    # Near the right edge the label would be cut off, so there it lies to the left of its line.
    near_edge = worst > CURVE_LEFT + CURVE_PLOT_WIDTH * 0.8
    return SurpriseCurve(
        rows=[Tick(vertical(value), f"{value:.3g}") for value in ticks(0, highest)],
        columns=[Tick(horizontal(moment), f"{moment:.4g} s") for moment in ticks(0, seconds)],
        column_labels=CURVE_TOP + CURVE_PLOT_HEIGHT + 13,
        lines=lines,
        strip_top=CURVE_TOP + CURVE_PLOT_HEIGHT + 20,
        strip_height=CURVE_PLOT_WIDTH * record["height"] / record["width"] / record["thumbnails"],
        worst=worst,
        worst_anchor="end" if near_edge else "start",
    )


def _unbroken(values: list) -> list[list[int]]:
    """Indices of the values that are not None, in unbroken runs."""
    runs: list[list[int]] = []
    for index, value in enumerate(values):
        if value is None:
            continue
        if index and values[index - 1] is not None:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _source(path: Path, out: Path, embed: bool) -> str | None:
    """The video's address in the page: a data URL if it is to be embedded and small enough, else a relative path."""
    # A browser's video element plays no GIF; its strip of thumbnails has to do.
    if path.suffix.lower() == ".gif":
        return None
    if embed and path.stat().st_size <= LARGEST_EMBEDDED:
        media_type = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return quote(Path(os.path.relpath(path.resolve(), out.resolve())).as_posix())


def score_page(records: list[dict], settings: dict, out: Path, embed: bool = False) -> str:
    """The page as HTML, lowest reward first.

    ``records`` are those of ``ldo.score``, ``out`` is the folder that the page will be written to.
    """
    scored_records = [record for record in records if "problem" not in record]
    videos = []
    for number, record in enumerate(scored_records):
        videos.append(ScoredVideo(number, record, surprise_curve(record), _source(Path(record["file"]), out, embed)))
    charts = [
        histogram("Rewards", [record["reward"] for record in scored_records], "videos"),
        histogram("Most surprising moments", [record["worst_surprise"] for record in scored_records], "videos"),
    ]
    return str(
        render_template(
            "score.html",
            videos=sorted(videos, key=lambda video: video.row["reward"]),
            problems=[record for record in records if "problem" in record],
            charts=charts,
            orders=ORDERS,
            settings=yaml.safe_dump(settings, sort_keys=False),
            width=CURVE_WIDTH,
            left=CURVE_LEFT,
            top=CURVE_TOP,
            plot_width=CURVE_PLOT_WIDTH,
        )
    )
