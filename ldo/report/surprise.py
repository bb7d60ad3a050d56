"""The page of ``ldo.score``: every video with the curve of its surprise beneath it. One file, nothing fetched from the network."""

from __future__ import annotations

import base64
import mimetypes
import os
from html import escape
from pathlib import Path
from urllib.parse import quote

import yaml

from ldo.report.charts import COLOURS, histogram, ticks

CSS = Path(__file__).with_name("style.css").read_text()
MORE = """
article{margin:34px 0;padding-top:14px;border-top:1px solid var(--line)}
article h3{font-size:15px;margin:0 0 2px;overflow-wrap:anywhere}
article video{display:block;max-width:100%;max-height:320px;margin:8px 0;border-radius:6px;background:#000}
.curve{cursor:pointer}
.worst{stroke:var(--bad);stroke-dasharray:3 3}
svg text.mark{fill:var(--bad)}
.cursor{stroke:var(--ink);stroke-width:1.5}
"""
JS = """
for (const a of document.querySelectorAll('article')) {
  const v = a.querySelector('video'), svg = a.querySelector('svg'), c = svg.querySelector('.cursor');
  const [left, width, seconds] = [+svg.dataset.left, +svg.dataset.width, +svg.dataset.seconds];
  if (!v) continue;
  const draw = () => {
    const x = left + Math.min(v.currentTime / seconds, 1) * width;
    c.setAttribute('x1', x); c.setAttribute('x2', x); c.removeAttribute('visibility');
    if (!v.paused && !v.ended) requestAnimationFrame(draw);
  };
  for (const e of ['play', 'seeked', 'timeupdate']) v.addEventListener(e, draw);
  v.addEventListener('error', () => v.remove());
  if (v.error) v.remove();
  svg.addEventListener('click', e => {
    const box = svg.getBoundingClientRect(), x = (e.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    v.currentTime = Math.max(0, Math.min(1, (x - left) / width)) * seconds;
  });
}
document.querySelector('select').addEventListener('change', e => {
  const [key, sign] = e.target.value.split(' '), list = document.querySelector('main');
  const value = a => key === 'name' ? +a.dataset.name : sign * a.dataset[key];
  [...list.children].sort((a, b) => value(a) - value(b)).forEach(a => list.append(a));
});
"""
WIDTH, LEFT, TOP, PLOT = 920, 44, 16, 120  # of a curve, in SVG units
EMBEDDED = 8 * 2**20  # bytes of the largest video that is put into the page
LINES = {"forward": "given the frames before", "backward": "given the frames after", "persistence": "if nothing changed"}


def _curve(row: dict) -> str:
    curves, seconds = row["curves"], row["seconds"]
    width = WIDTH - LEFT - 8
    top = max(v for k in LINES for v in curves.get(k, []) if v is not None) * 1.06 or 1.0

    def px(x: float) -> float:
        return LEFT + min(x / seconds, 1) * width

    def py(y: float) -> float:
        return TOP + (1 - y / top) * PLOT

    parts = []
    for y in ticks(0, top):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + width}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 3.5:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in ticks(0, seconds):
        parts.append(f'<text x="{px(x):.1f}" y="{TOP + PLOT + 13}" text-anchor="middle">{x:.4g} s</text>')
    key = []
    for (name, words), colour in zip(LINES.items(), COLOURS, strict=False):
        if name not in curves:
            continue
        for run in _runs(curves[name]):
            points = " ".join(f"{px(curves['seconds'][i]):.1f},{py(curves[name][i]):.1f}" for i in run)
            faint = "" if name == "forward" else ' opacity="0.6"'
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{1.2 if faint else 2}"{faint}/>')
        key.append(f'<span><i style="background:{colour}"></i>{words}</span>')
    film = TOP + PLOT + 20
    height = width * row["height"] / row["width"] / row["thumbnails"]
    bottom = film + height
    worst = px(row["worst_second"])
    side = "end" if worst > LEFT + width * 0.8 else "start"
    parts.append(f'<image x="{LEFT}" y="{film}" width="{width}" height="{height:.1f}" preserveAspectRatio="none" href="{row["strip"]}"/>')
    parts.append(f'<line class="worst" x1="{worst:.1f}" x2="{worst:.1f}" y1="{TOP - 4}" y2="{bottom:.1f}"/>')
    parts.append(f'<text class="mark" x="{worst:.1f}" y="{TOP - 6}" text-anchor="{side}">most surprising: {row["worst_second"]:.2f} s</text>')
    parts.append(f'<line class="cursor" visibility="hidden" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{bottom:.1f}"/>')
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {bottom + 4:.0f}" data-left="{LEFT}" data-width="{width}" data-seconds="{seconds:.6f}" '
        f'role="img" aria-label="surprise over time">{"".join(parts)}</svg><div class="key">{"".join(key)}</div>'
    )


def _runs(values: list) -> list[list[int]]:
    """Indices of values that are there, in unbroken runs."""
    runs: list[list[int]] = []
    for i, value in enumerate(values):
        if value is None:
            continue
        if i and values[i - 1] is not None:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _source(path: Path, out: Path, embed: bool) -> str:
    if embed and path.stat().st_size <= EMBEDDED:
        kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return quote(Path(os.path.relpath(path.resolve(), out.resolve())).as_posix())


def _article(number: int, row: dict, out: Path, embed: bool) -> str:
    path = Path(row["file"])
    figures = (
        f"reward <b>{row['reward']:.3f}</b> · skill {row['skill']:.3f} · plain {row['plain']:.3f} · motion {row['motion']:.4f} · "
        f"{row['frames']} frames at {row['fps']:.4g} fps (file: {row['source_fps']:.4g}) · {row['windows']} windows"
    )
    film = f'<video controls muted loop preload="metadata" src="{escape(_source(path, out, embed))}"></video>'
    if path.suffix.lower() == ".gif":
        film = ""
    return (
        f'<article data-name="{number}" data-reward="{row["reward"]:.8g}" data-worst="{row["worst_surprise"]:.8g}">'
        f"<h3>{escape(row['file'])}</h3><p>{figures}</p>{film}{_curve(row)}</article>"
    )


def page(rows: list[dict], settings: dict, out: Path, embed: bool = False) -> str:
    """The page as text: ``rows`` are the records of ``ldo.score``, ``out`` the folder it will lie in; least reward first."""
    fine = [row for row in rows if "problem" not in row]
    bad = [row for row in rows if "problem" in row]
    numbers = {id(row): i for i, row in enumerate(fine)}
    articles = [_article(numbers[id(row)], row, out, embed) for row in sorted(fine, key=lambda row: row["reward"])]
    charts = [
        histogram("Rewards", [row["reward"] for row in fine], "videos"),
        histogram("Most surprising moments", [row["worst_surprise"] for row in fine], "videos"),
    ]
    options = {
        "reward 1": "least reward first",
        "reward -1": "greatest reward first",
        "worst -1": "most surprising moment first",
        "name 1": "by name",
    }
    choose = "".join(f'<option value="{k}">{v}</option>' for k, v in options.items())
    lost = ""
    if bad:
        items = "".join(f"<li>{escape(row['file'])}: <span class=why>{escape(row['problem'])}</span></li>" for row in bad)
        lost = f"<h2>Left out</h2><ul>{items}</ul>"
    words = (
        "<p>A frozen V-JEPA 2 foretells each moment from the frames just before it; the curve shows how far it was off (and off backwards in time, "
        "from the frames just after). The reward compares whole windows with what “nothing changes” would have foretold; higher is better. "
        "A click on a curve goes there in the video. Videos that the browser cannot play show their frames alone.</p>"
    )
    body = [
        f"<h1>Surprise</h1><p class=verdict>{len(fine)} videos scored, {len(bad)} left out.</p>",
        words,
        f"<div class=charts>{''.join(charts)}</div><p><label>Order: <select>{choose}</select></label></p>",
        f"<main>{''.join(articles)}</main>{lost}",
        f"<h2>Settings</h2><pre>{escape(yaml.safe_dump(settings, sort_keys=False))}</pre>",
    ]
    meta = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    return f"<!doctype html><html lang=en>{meta}<title>Surprise</title><style>{CSS}{MORE}</style>{''.join(body)}<script>{JS}</script></html>"
