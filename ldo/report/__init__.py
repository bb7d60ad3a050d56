"""A run's report: one self-contained report.html, and report.json beside it. Reads files alone, so it works during a run."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import yaml

from ldo import __version__
from ldo.checkpoint import write_text
from ldo.metrics import read
from ldo.report.page import page

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")
LOGS = ("sft", "align", "reinforce")


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"ldo": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


def collect(run: Path) -> dict:
    """report.json's content: stages with metrics, gate, versions, configuration."""
    config = yaml.safe_load((run / "recipe.yaml").read_text())
    summary = _json(run / "eval" / "summary.json") or {"metrics": {}, "paired": {}, "n_videos": {}}
    align, updates = config["align"]["steps"], config["rl"]["updates"]
    steps = {"base": 0, "sft": align, "aligned": align, "ldo": (align if "align" in config["stages"] else 0) + updates}
    stages = [
        {"name": name, "steps": steps[name], "n_videos": summary["n_videos"][name], "metrics": metrics, "minus_base": summary["paired"].get(name)}
        for name, metrics in summary["metrics"].items()
    ]
    return {
        "stages": stages,
        "at_rest": summary.get("at_rest"),
        "gate": _json(run / "gate.json"),
        "versions": versions(),
        "config": config,
    }


def write(run: Path) -> Path:
    """Write report.json and report.html from whatever the run's folder holds by now; returns the latter's path."""
    report = collect(run)
    write_text(run / "report.json", json.dumps(report, indent=1))
    logs = {name: read(run / f"{name}.jsonl") for name in LOGS}
    write_text(run / "report.html", page(run, report, logs, _json(run / "eval" / "figure.json")))
    return run / "report.html"
