"""A run's report: one self-contained report.html, and report.json next to it.

It only reads files, so it also works while the run continues.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import yaml

from ldo import __version__
from ldo.core.files import read_json_lines, write_text
from ldo.report.page import report_page

PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy")
# stages that write a line per step
LOGS = ("sft", "align", "reinforce")


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    return {
        "ldo": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in PACKAGES},
    }


def collect_report(run: Path) -> dict:
    """report.json's content: stages with metrics, gate, versions, configuration."""
    # As it was written, not as today's code would read it: keys may have changed since.
    config = yaml.safe_load((run / "recipe.yaml").read_text())
    summary = _json(run / "eval" / "summary.json") or {"metrics": {}, "paired": {}, "n_videos": {}}
    steps = _steps_by_arm(config)
    stages = []
    for name, metrics in summary["metrics"].items():
        stages.append(
            {
                "name": name,
                "steps": steps[name],
                "n_videos": summary["n_videos"][name],
                "metrics": metrics,
                "minus_base": summary["paired"].get(name),
                "visible": summary.get("visible", {}).get(name, {}),
            }
        )
    return {
        "stages": stages,
        "at_rest": summary.get("at_rest"),
        "gate": _json(run / "gate.json"),
        "versions": versions(),
        "config": config,
    }


def _steps_by_arm(config: dict) -> dict[str, int]:
    """Training steps behind each arm of the evaluation."""
    align_steps = config["align"]["steps"]
    # Stage 2 continues from stage 1 if the run has one.
    start = align_steps if "align" in config["stages"] else 0
    return {"base": 0, "sft": align_steps, "aligned": align_steps, "ldo": start + config["rl"]["updates"]}


def write_report(run: Path) -> Path:
    """Write report.json and report.html from what the run's folder holds so far; returns the path of report.html."""
    report = collect_report(run)
    write_text(run / "report.json", json.dumps(report, indent=1))
    logs = {name: read_json_lines(run / f"{name}.jsonl") for name in LOGS}
    write_text(run / "report.html", report_page(run, report, logs, _json(run / "eval" / "figure.json")))
    return run / "report.html"
