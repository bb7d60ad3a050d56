"""Charts as inline SVG, and short videos as strips of frames: nothing to fetch, nothing to install."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 190, 46, 24, 10
COLOURS = ("#3b6fb6", "#d1603d", "#4c9a64", "#8a63b0")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, some four to five."""
    raw = (high - low) / 4 or 1.0
    size = 10 ** np.floor(np.log10(raw))
    nice = next(m * size for m in (1, 2, 5, 10) if m * size >= raw)
    return list(np.arange(np.ceil(low / nice) * nice, high + nice * 1e-6, nice))


def line_chart(title: str, series: dict[str, list[tuple[float, float]]], note: str = "") -> str:
    """A chart of named lines, each a list of (x, y); empty series are left out."""
    series = {k: v for k, v in series.items() if v}
    if not series:
        return ""
    xs, ys = zip(*[p for v in series.values() for p in v], strict=True)
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(ys), max(ys)
    pad = (y1 - y0) * 0.06 or abs(y0) * 0.1 or 1.0
    y0, y1 = y0 - pad, y1 + pad

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 8)

    def py(y: float) -> float:
        return TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x0, x1):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:.4g}</text>')
    legend = []
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        legend.append(f'<span><i style="background:{colour}"></i>{escape(name)}</span>')
    key = f'<div class="key">{"".join(legend)}</div>' if len(series) > 1 else ""
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f"<figure><figcaption>{escape(title)}{small}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>{key}</figure>'
    )


def histogram(title: str, values: list[float], note: str = "") -> str:
    """Counts of values in up to 12 bins of equal width."""
    if not values:
        return ""
    counts, edges = np.histogram(values, bins=min(12, max(4, len(values) // 4)))
    width, tall = (WIDTH - LEFT - 8) / len(counts), HEIGHT - TOP - BOTTOM
    parts = []
    for y in sorted({int(t) for t in ticks(0, int(counts.max()))}):
        at = TOP + tall * (1 - y / counts.max())
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{y}</text>')
    for k, count in enumerate(counts):
        high = tall * count / counts.max()
        parts.append(
            f'<rect x="{LEFT + k * width + 1:.1f}" y="{TOP + tall - high:.1f}" width="{width - 2:.1f}" height="{high:.1f}" fill="{COLOURS[0]}"/>'
        )
    for k in (0, len(counts) // 2, len(counts)):
        parts.append(f'<text x="{LEFT + k * width:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{edges[k]:.3g}</text>')
    small = f"<small>{escape(note)}</small>" if note else ""
    return (
        f"<figure><figcaption>{escape(title)}{small}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def smooth(points: list[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Running mean over ``span`` points."""
    y = np.array([p[1] for p in points])
    return [(points[i][0], float(y[max(i - span + 1, 0) : i + 1].mean())) for i in range(len(points))]


def path_chart(title: str, paths: list, note: str) -> str:
    """2-D paths, blue at their start and red at their end."""
    flat = np.array([p for path in paths for p in path])
    low, size = flat.min(0), np.ptp(flat, axis=0).max() or 1.0
    parts = []
    for path in paths:
        xy = 12 + (np.array(path) - low) / size * 236
        for k in range(len(xy) - 1):
            share = k / max(len(xy) - 2, 1)
            colour = f"rgb({int(50 + 180 * share)},{int(95 - 30 * share)},{int(215 - 165 * share)})"
            (a, b), (c, d) = xy[k], xy[k + 1]
            parts.append(f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="{colour}" stroke-width="1.8" stroke-linecap="round"/>')
    return (
        f"<figure><figcaption>{escape(title)}<small>{escape(note)}</small></figcaption>"
        f'<svg viewBox="0 0 260 260" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def strip(frames_THWC: np.ndarray, lossy: bool = False) -> str:
    """Frames side by side as a data URL: a PNG, or where ``lossy`` the smaller JPEG."""
    from PIL import Image

    t, h, w, _ = frames_THWC.shape
    buffer, image = io.BytesIO(), Image.fromarray(frames_THWC.transpose(1, 0, 2, 3).reshape(h, t * w, 3))
    kind = "jpeg" if lossy else "png"
    image.save(buffer, kind, optimize=True)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
