"""The tables of docs/sandbox.md, from the reports that are committed under docs/sandbox/.

``train.json``, ``long.json`` and ``self.json`` are report.json of runs of the shipped recipes, ``probe.json`` is what
``python -m ldo.sandbox.probe`` writes, ``quality.json`` what ``python -m ldo.sandbox.build.quality`` writes. Thresholds
come from the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.markdown import markdown

REPORTS = Path(__file__).resolve().parents[1] / "docs" / "sandbox"
THRESHOLDS = Path(__file__).resolve().parents[1] / "ldo" / "sandbox" / "thresholds.json"
ROWS = {
    "visible_violation_rate": "visible violation rate",
    "severity": "severity",
    "violation_rate": "strict violation rate",
    "existence": "existence",
    "law_residual": "law residual",
    "teleport_rate": "teleport rate",
    "appearance_error": "appearance error",
    "motion_ratio": "motion ratio",
    "reward_skill": "reward skill",
    "reward_plain": "reward plain",
}
NOTHING = markdown(["not measured yet"], [])


def _read(name: str) -> dict | None:
    path = REPORTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(found: dict[str, float], sign: str = "") -> str:
    return f"{found['mean']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def metrics() -> str:
    """How far the exact metrics can be trusted: mean of each, on sound clips and on every corruption."""
    table = json.loads(THRESHOLDS.read_text())["table"]
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{values[column]:.3f}" for column in columns)] for name, values in table.items()]
    return markdown(["clips", *map(_words, columns)], rows)


def gate() -> str:
    """The gate of the run ``train``."""
    report = _read("train")
    if report is None:
        return NOTHING
    found = report["gate"]
    bars = found["bars"]
    rows = [[kind, f"{share:.1%}", f"{bars['each_kind']:.0%}"] for kind, share in found["kinds"].items()]
    rows.append(["**all kinds**", f"**{found['all_kinds']:.1%}**", f"{bars['all_kinds']:.0%}"])
    for name, share in found["controls"].items():
        rows.append([f"control: {name}", f"{share:.1%}", f"{bars['each_kind']:.0%}"])
    rows.append(["restitution 1.0 preferred to 0.6", f"{found['restitution_preference']:.1%}", "40–60%"])
    rows.append(
        [
            "Spearman with minus severity, own samples",
            f"{found['spearman']:.2f}",
            f"{bars['spearman']:.2f}",
        ]
    )
    return markdown(["matched pairs ranked correctly", "found", "needed"], rows)


def arms(name: str) -> str:
    """Every metric of a run's arms, and of its last arm's difference from the base."""
    report = _read(name)
    if report is None:
        return NOTHING
    stages = report["stages"]
    last = stages[-1]
    rows = []
    for key, label in ROWS.items():
        if key in last["metrics"]:
            cells = [_interval(stage["metrics"][key]) for stage in stages]
            rows.append([label, *cells, _interval(last["minus_base"][key], "+")])
    names = [stage["name"] for stage in stages]
    return markdown(["", *names, f"{names[-1]} minus base"], rows)


def broken(name: str) -> str:
    """Share of each arm's videos that is visibly wrong in each metric."""
    report = _read(name)
    if report is None:
        return NOTHING
    stages = report["stages"]
    rows = [
        [_words(metric), *(f"{stage['visible'][metric]:.2f}" for stage in stages)] for metric in stages[0]["visible"]
    ]
    return markdown(["visibly wrong in", *(stage["name"] for stage in stages)], rows)


def probes() -> str:
    """What a linear probe reads from each model's features."""
    found = _read("probe")
    if found is None:
        return NOTHING
    rows = []
    for name, panel in found["panels"].items():
        position, velocity = panel["position"], panel["velocity"]
        rows.append([name, f"{position['r2']:.3f}", f"{position['error']:.3f}", f"{velocity['r2']:.3f}"])
    return markdown(["features", "position R²", "position error, box widths", "velocity R²"], rows)


def quality() -> str:
    """How precise the shipped generator is."""
    found = _read("quality")
    if found is None:
        return NOTHING
    rows = []
    for name, model in found["models"].items():
        precision = model["samples_precision"]
        losses = ", ".join(f"{loss:.3f}" for loss in model["flow_loss"].values())
        rows.append(
            [
                name,
                losses,
                f"{model['samples_visible']['any']:.3f}",
                f"{precision['as_strong_as_planted']:.2f}",
                f"{precision['law_residual_median']:.2f}",
                f"{precision['existence_1_balls']:.3f}",
                f"{precision['existence_2_balls']:.3f}",
            ]
        )
    return markdown(
        [
            "generator",
            "flow loss at t = 0.2, 0.45, 0.7, 0.9",
            "visibly wrong",
            "of these, as wrong as planted",
            "law residual, median",
            "existence, one ball",
            "two balls",
        ],
        rows,
    )


TABLES: dict[str, Callable[[], str]] = {
    "sandbox-metrics": metrics,
    "sandbox-gate": gate,
    "sandbox-train": lambda: arms("train"),
    "sandbox-train-broken": lambda: broken("train"),
    "sandbox-long": lambda: arms("long"),
    "sandbox-long-broken": lambda: broken("long"),
    "sandbox-self": lambda: arms("self"),
    "sandbox-probe": probes,
    "sandbox-quality": quality,
}
