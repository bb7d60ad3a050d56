"""The page: verdict, metrics, videos side by side, gate, curves, feature paths, configuration."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import yaml

from ldo.data import read_video
from ldo.report.charts import line_chart, path_chart, smooth, strip

SHOWN = 8  # prompts shown side by side
ARMS = {
    "base": "the pretrained generator",
    "sft": "control: fine-tuned on the same clips, no teacher",
    "aligned": "stage 1: aligned with the teacher's forecasts",
    "ldo": "stages 1 and 2: then steered by the critic",
}
LABELS = {
    "violation_rate": ("violation rate", "share of videos that break an exact law; less is better"),
    "existence": ("existence", "share of frames in which every prompted ball is there once and whole"),
    "law_residual": ("law residual", "worst |a − g| / g of free flight, 0–10; less is better"),
    "teleport_rate": ("teleport rate", "share of steps that jump; less is better"),
    "motion_ratio": ("motion ratio", "way travelled over the simulator's for the same prompts; 1 is right"),
    "reward_skill": ("skill reward", "how much better V-JEPA foretells it than stillness; −2 to 2"),
    "reward_plain": ("plain reward", "minus V-JEPA's surprise"),
}
REASONS = {
    "missing": "a ball is missing or doubled",
    "law_residual": "free flight off its law",
    "impact_error": "wrong outcome of a contact",
    "penetration": "bodies overlap",
    "teleport_rate": "a ball jumps",
    "colour_error": "wrong colour",
    "stillness": "no motion",
}

BETTER = {"violation_rate": -1, "existence": 1, "law_residual": -1, "teleport_rate": -1, "motion_ratio": 0, "reward_skill": 1, "reward_plain": 1}

CSS = Path(__file__).with_name("style.css").read_text()


def _clear(change: dict) -> bool:
    """Does the interval of a difference leave out zero?"""
    return change["low"] > 0 or change["high"] < 0


def _colour(key: str, change: dict) -> str:
    return {1: "good", -1: "bad"}.get(BETTER[key] * (1 if change["mean"] > 0 else -1), "")


def _cell(key: str, stage: dict) -> str:
    value, change = stage["metrics"].get(key), (stage.get("minus_base") or {}).get(key)
    if value is None:
        return "<td>–</td>"
    text = f"{value['mean']:.3f}<small>{value['low']:.3f} … {value['high']:.3f}</small>"
    if change is not None:
        kind = _colour(key, change) if _clear(change) else ""
        text += f"<small class='{kind}'>{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]</small>"
    return f"<td>{text}</td>"


def _verdict(stages: dict[str, dict]) -> str:
    if "ldo" not in stages or "violation_rate" not in stages["ldo"]["metrics"]:
        return "The run has not come to its evaluation yet." if not stages else "Metrics of the arms so far are below."
    base, ldo = stages["base"]["metrics"], stages["ldo"]["metrics"]
    change = stages["ldo"]["minus_base"]["violation_rate"]
    if change["high"] < 0:
        words = "<b class=good>fewer</b> videos break physics, beyond the 95% interval"
    elif change["low"] > 0:
        words = "<b class=bad>more</b> videos break physics, beyond the 95% interval"
    else:
        words = "the change is <b>within the 95% interval</b>: no effect is shown"
    moved = {k: c for k, c in stages["ldo"]["minus_base"].items() if k in BETTER and k != "violation_rate" and _clear(c)}
    parts = ", ".join(f"{LABELS[k][0]} <b class='{_colour(k, c)}'>{c['mean']:+.3f}</b> [{c['low']:+.3f}, {c['high']:+.3f}]" for k, c in moved.items())
    also = f"Of the other metrics these moved beyond their interval: {parts}. " if parts else "No other metric moved beyond its interval. "
    return (
        f"LDO: {ldo['violation_rate']['mean']:.1%} of videos violate an exact law, base: {base['violation_rate']['mean']:.1%}. "
        f"Paired difference {change['mean'] * 100:+.1f} points [{change['low'] * 100:+.1f}, {change['high'] * 100:+.1f}]: {words}. "
        f"{also}Motion ratio {ldo['motion_ratio']['mean']:.2f} (base {base['motion_ratio']['mean']:.2f})."
    )


def _metrics(stages: dict[str, dict]) -> str:
    if not stages:
        return ""
    head = "".join(f"<th>{s}</th>" for s in stages)
    rows = []
    for key, (label, note) in LABELS.items():
        cells = "".join(_cell(key, s) for s in stages.values())
        rows.append(f"<tr><td>{label}<small>{note}</small></td>{cells}</tr>")
    count = next(iter(stages.values()))["n_videos"]
    arms = " · ".join(f"<b>{s}</b> {ARMS.get(s, '')}" for s in stages)
    return (
        f"<h2>Metrics</h2><p>{count} videos an arm, the same prompts and seeds, sampled by the stock pipeline. Below each mean its 95% interval, "
        f"and the difference from the base with its own (bootstrap, paired over prompts and seeds; coloured where it leaves out zero).<br>{arms}</p>"
        f"<div class='scroll metrics'><table><tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _videos(run: Path, stages: dict[str, dict]) -> str:
    arms = [s for s in stages if (run / "eval" / s).is_dir()]
    records = {a: json.loads((run / "eval" / f"{a}.json").read_text())["moving"] for a in arms}
    if not arms or "kind" not in records[arms[0]][0]:
        return ""
    prompts = sorted({r["prompt"] for r in records[arms[0]]})[:SHOWN]
    cells = ["<span></span>", *(f"<b>{a}</b>" for a in arms)]
    frames = 0
    for p in prompts:
        cells.append(f"<span class=caption>{escape(next(r['text'] for r in records[arms[0]] if r['prompt'] == p))}</span>")
        for a in arms:
            record = next(r for r in records[a] if r["prompt"] == p and r["seed"] == 0)
            images, _ = read_video(run / "eval" / a / f"{p:04d}-0.mp4")
            frames = len(images)
            first = record["first"] if record["violations"] else None
            motion = f"play 2.4s steps({frames}) infinite" + (f",mark{first} 2.4s linear infinite" if first is not None else "")
            why = ", ".join(REASONS.get(v, v) for v in record["violations"])
            note = f"<span class=why>✗ {escape(why)}</span>" if why else "<span class=fine>✓ sound</span>"
            style = f"background-image:url({strip(images)});background-size:{128 * frames}px 128px;animation:{motion}"
            cells.append(f'<div><div class=video style="{style}"></div>{note}</div>')
    marks = ""
    for k in range(frames):
        off, on = f"{k / frames:.2%}", f"{k / frames + 1e-4:.2%}"
        marks += f"@keyframes mark{k}{{0%,{off}{{outline-color:transparent}}{on},100%{{outline-color:var(--bad)}}}}"
    style = f"<style>@keyframes play{{to{{background-position:-{128 * frames}px 0}}}}{marks}</style>"
    tally = []
    if "ldo" in arms and "base" in arms:
        pairs = list(zip(records["base"], records["ldo"], strict=True))
        mended = sum(bool(a["violations"]) and not b["violations"] for a, b in pairs)
        broken = sum(bool(b["violations"]) and not a["violations"] for a, b in pairs)
        tally.append(f"Of all {len(pairs)} videos LDO mends {mended} and breaks {broken} that the base had right.")
    return (
        f"<h2>Side by side</h2><p>The first {len(prompts)} evaluation prompts, first seed, not selected. A red frame appears where the exact metrics "
        f"first find something wrong. {' '.join(tally)}</p>{style}"
        f'<div class=videos style="grid-template-columns:minmax(110px,260px) repeat({len(arms)},128px)">{"".join(cells)}</div>'
    )


def _gate(gate: dict | None) -> str:
    if gate is None:
        return "<h2>Gate</h2><p>Not run.</p>"
    bars = gate["bars"]

    def row(name: str, value: str, need: str, fine: bool) -> str:
        return f"<tr><td>{name}</td><td>{value}</td><td>{need}</td><td class={'good' if fine else 'bad'}>{'✓' if fine else '✗'}</td></tr>"

    rows = [row(escape(k), f"{v:.1%}", f"≥ {bars['each_kind']:.0%}", v >= bars["each_kind"]) for k, v in gate["kinds"].items()]
    rows.append(row("<b>all kinds</b>", f"<b>{gate['all_kinds']:.1%}</b>", f"≥ {bars['all_kinds']:.0%}", gate["all_kinds"] >= bars["all_kinds"]))
    rows += [row(f"control: {escape(k)}", f"{v:.1%}", f"≥ {bars['each_kind']:.0%}", v >= bars["each_kind"]) for k, v in gate["controls"].items()]
    fair = gate["restitution_preference"]
    rows.append(row("restitution 1.0 preferred to 0.6", f"{fair:.1%}", "40–60%", abs(fair - 0.5) <= 0.1))
    if "spearman" in gate:
        rows.append(
            row(
                "Spearman with exact metrics, own samples",
                f"{gate['spearman']:.2f}",
                f"≥ {bars['spearman']:.2f}",
                gate["spearman"] >= bars["spearman"],
            )
        )
    words = "<b class=good>passed</b>" if gate["passed"] else "<b class=bad>failed</b>"
    return (
        f"<h2>Gate</h2><p>Before it may judge, the critic must rank sound clips above broken ones from the same start: it {words}. "
        f"{bars['pairs']} pairs a kind.</p><table><tr><th></th><th>ranked rightly</th><th>needed</th><th></th></tr>{''.join(rows)}</table>"
    )


def _curves(logs: dict[str, list[dict]]) -> str:
    def series(stage: str, key: str) -> list[tuple[float, float]]:
        return [(r["step"], r[key]) for r in logs[stage] if key in r]

    def pair(key: str) -> dict:
        return {"with teacher": series("align", key), "sft control": series("sft", key)}

    charts = [
        line_chart("Stage 1: held-out flow loss", pair("held_out_flow_0.5"), "fixed noise, t = 0.5"),
        line_chart("Stage 1: held-out alignment loss", {"align": series("align", "held_out_pda")}, "distance to the teacher's geometry"),
        line_chart("Stage 2: skill reward", {"reward": smooth(series("reinforce", "reward_skill"), 5)}, "mean of 5 updates"),
        line_chart("Stage 2: violation rate of rollouts", {"violations": series("reinforce", "violation_rate")}, "exact, never trained on"),
        line_chart("Stage 2: motion", {"motion": smooth(series("reinforce", "motion_ratio"), 5)}, "over the stage-1 model's, mean of 5"),
        line_chart("Stage 2: plain reward", {"plain": smooth(series("reinforce", "reward_plain"), 5)}, "minus surprise, mean of 5 updates"),
        line_chart("Stage 2: divergence from the reference", {"kl": series("reinforce", "kl")}, "mean over dimensions"),
        line_chart("Stage 2: groups without variance", {"groups": series("reinforce", "zero_variance_groups")}, "dropped from the update"),
    ]
    charts = [c for c in charts if c]
    return f"<h2>Training</h2><div class=charts>{''.join(charts)}</div>" if charts else ""


def _paths(figure: dict | None) -> str:
    if not figure:
        return ""
    charts = "".join(path_chart(n, p["paths"], f"turns by {p['turning']:.1f}° a step") for n, p in figure.items())
    return (
        "<h2>A ball's way through feature space</h2><p>Features at the moving ball's true position, followed through time from blue to red, in 2-D "
        "(t-SNE); V-JEPA's tokens, and the generator's aligned block. The number is the mean turning angle between steps in the full feature space: "
        f"less is smoother, 90° is a random walk.</p><div class=charts>{charts}</div>"
    )


def page(run: Path, report: dict, logs: dict[str, list[dict]], figure: dict | None) -> str:
    """The whole page as text."""
    stages = {s["name"]: dict(s) for s in report["stages"]}
    config = yaml.safe_dump(report["config"], sort_keys=False)
    rest = report["at_rest"]
    still = ""
    if rest:
        still = (
            "<p>Scenes at rest, left out of training and of the table: " + ", ".join(f"{a} violates in {v:.1%}" for a, v in rest.items()) + ".</p>"
        )
    body = [
        f"<h1>LDO: {escape(run.name)}</h1><p class=verdict>{_verdict(stages)}</p>",
        _metrics(stages) + still,
        _videos(run, stages),
        _gate(report["gate"]),
        _curves(logs),
        _paths(figure),
        f"<h2>Configuration</h2><pre>{escape(config)}</pre><p>{escape(', '.join(f'{k} {v}' for k, v in report['versions'].items()))}</p>",
    ]
    meta = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    return f"<!doctype html><html lang=en>{meta}<title>LDO: {escape(run.name)}</title><style>{CSS}</style>{''.join(body)}</html>"
