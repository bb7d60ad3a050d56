"""The tables of docs/sandbox.md.

They come from the package's thresholds, and from ``gate.json`` of a run, which is committed under docs/sandbox/.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.markdown import markdown

GATE = Path(__file__).resolve().parents[1] / "docs" / "sandbox" / "gate.json"
THRESHOLDS = Path(__file__).resolve().parents[1] / "ldo" / "sandbox" / "thresholds.json"


def _words(name: str) -> str:
    return name.replace("_", " ")


def metrics() -> str:
    """How far the exact metrics can be trusted: mean of each, on sound clips and on every corruption."""
    table = json.loads(THRESHOLDS.read_text())["table"]
    columns = list(next(iter(table.values())))
    rows = [[name, *(f"{values[column]:.3f}" for column in columns)] for name, values in table.items()]
    return markdown(["clips", *map(_words, columns)], rows)


def gate() -> str:
    """What the gate found."""
    found = json.loads(GATE.read_text())
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


TABLES: dict[str, Callable[[], str]] = {"sandbox-metrics": metrics, "sandbox-gate": gate}
