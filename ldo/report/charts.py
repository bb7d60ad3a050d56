"""Charts as inline SVG, and short videos as strips of frames: nothing to fetch, nothing to install.

The functions compute positions in SVG units; the markup is in ``templates/``.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ldo.report.render import render_template

CHART_WIDTH, CHART_HEIGHT = 420, 190
# margins around the plotted area
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 46, 8, 10, 24
PLOT_WIDTH = CHART_WIDTH - CHART_LEFT - CHART_RIGHT
PLOT_HEIGHT = CHART_HEIGHT - CHART_TOP - CHART_BOTTOM
# of the square chart of 2-D paths
PATH_SIDE, PATH_MARGIN = 260, 12
LINE_COLOURS = ("#3b6fb6", "#d1603d", "#4c9a64", "#8a63b0")


@dataclass(frozen=True)
class Axis:
    """A linear scale: ``low`` lies at ``start`` and ``high`` at ``start + length``, in SVG units."""

    low: float
    high: float
    start: float
    length: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * self.length


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    position: float
    label: str


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart; ``points`` is the attribute of an SVG polyline."""

    name: str
    colour: str
    points: str


def ticks(low: float, high: float) -> list[float]:
    """Four or five round numbers between ``low`` and ``high``."""
    smallest = (high - low) / 4 or 1.0
    magnitude = 10 ** np.floor(np.log10(smallest))
    spacing = next(multiple * magnitude for multiple in (1, 2, 5, 10) if multiple * magnitude >= smallest)
    # The millionth keeps a tick at ``high`` itself, which rounding could put just beyond.
    return list(np.arange(np.ceil(low / spacing) * spacing, high + spacing * 1e-6, spacing))


def polyline_points(places: list[tuple[float, float]]) -> str:
    """Positions as the ``points`` attribute of an SVG polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def line_chart(title: str, series: dict[str, list[tuple[float, float]]], note: str = "") -> Markup:
    """A chart of named lines, each a list of (x, y); empty series are left out."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return Markup("")
    across = [point[0] for points in series.values() for point in points]
    heights = [point[1] for points in series.values() for point in points]
    leftmost, rightmost = min(across), max(max(across), min(across) + 1)
    lowest, highest = min(heights), max(heights)
    # A constant series has no height of its own; it still needs room above and below.
    padding = (highest - lowest) * 0.06 or abs(lowest) * 0.1 or 1.0
    lowest, highest = lowest - padding, highest + padding
    horizontal = Axis(leftmost, rightmost, CHART_LEFT, PLOT_WIDTH)
    vertical = Axis(highest, lowest, CHART_TOP, PLOT_HEIGHT)  # SVG counts downwards
    lines = []
    for (name, points), colour in zip(series.items(), LINE_COLOURS, strict=False):
        places = [(horizontal(x), vertical(y)) for x, y in points]
        lines.append(ChartLine(name, colour, polyline_points(places)))
    return render_template(
        "line_chart.html",
        title=title,
        note=note,
        left=CHART_LEFT,
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
        rows=[Tick(vertical(value), f"{value:.4g}") for value in ticks(lowest, highest)],
        columns=[Tick(horizontal(value), f"{value:.4g}") for value in ticks(leftmost, rightmost)],
        lines=lines,
    )


def histogram(title: str, values: list[float], note: str = "") -> Markup:
    """Counts of values in up to 12 bins of equal width."""
    if not values:
        return Markup("")
    # Fewer bins for few values, which would otherwise scatter over empty ones.
    counts, edges = np.histogram(values, bins=min(12, max(4, len(values) // 4)))
    highest = int(counts.max())
    bin_width = PLOT_WIDTH / len(counts)
    bars = []
    for index, count in enumerate(counts):
        bar_height = PLOT_HEIGHT * count / highest
        bars.append((CHART_LEFT + index * bin_width + 1, CHART_TOP + PLOT_HEIGHT - bar_height, bar_height))
    rows = []
    for count in sorted({int(value) for value in ticks(0, highest)}):
        rows.append(Tick(CHART_TOP + PLOT_HEIGHT * (1 - count / highest), str(count)))
    columns = []
    for index in (0, len(counts) // 2, len(counts)):
        columns.append(Tick(CHART_LEFT + index * bin_width, f"{edges[index]:.3g}"))
    return render_template(
        "histogram.html",
        title=title,
        note=note,
        left=CHART_LEFT,
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
        rows=rows,
        columns=columns,
        bars=bars,
        bar_width=bin_width - 2,
        colour=LINE_COLOURS[0],
    )


def smooth(points: list[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Running mean over the last ``span`` points."""
    values = np.array([value for _, value in points])
    smoothed = []
    for index, (position, _) in enumerate(points):
        window = values[max(index - span + 1, 0) : index + 1]
        smoothed.append((position, float(window.mean())))
    return smoothed


def path_chart(title: str, paths: list, note: str) -> Markup:
    """2-D paths, blue at their start and red at their end."""
    everything = np.array([point for path in paths for point in path])
    lowest = everything.min(0)
    # One size for both directions, so that angles are true.
    size = np.ptp(everything, axis=0).max() or 1.0
    segments = []
    for path in paths:
        places = PATH_MARGIN + (np.array(path) - lowest) / size * (PATH_SIDE - 2 * PATH_MARGIN)
        for index in range(len(places) - 1):
            share = index / max(len(places) - 2, 1)
            colour = f"rgb({int(50 + 180 * share)},{int(95 - 30 * share)},{int(215 - 165 * share)})"
            segments.append((places[index], places[index + 1], colour))
    return render_template(
        "path_chart.html", title=title, note=note, width=PATH_SIDE, height=PATH_SIDE, segments=segments
    )


def strip(frames_THWC: np.ndarray, lossy: bool = False) -> str:
    """Frames next to each other in one image, as a data URL: a PNG, or if ``lossy`` the smaller JPEG."""
    from PIL import Image

    count, height, width, _ = frames_THWC.shape
    image = Image.fromarray(frames_THWC.transpose(1, 0, 2, 3).reshape(height, count * width, 3))
    image_format = "jpeg" if lossy else "png"
    buffer = io.BytesIO()
    image.save(buffer, image_format, optimize=True)
    return f"data:image/{image_format};base64," + base64.b64encode(buffer.getvalue()).decode()
