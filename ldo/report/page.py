"""The page of a run: verdict, metrics, videos side by side, gate, curves, feature paths, configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from markupsafe import Markup

from ldo.core.config import FAIR_PREFERENCE
from ldo.report.charts import line_chart, path_chart, smooth
from ldo.report.evaluation import find_verdict, metric_table, side_by_side
from ldo.report.render import render_template

# Updates in the running means of stage 2's curves, which jump because every rollout has prompts of its own.
SMOOTHED = 5


@dataclass(frozen=True)
class GateRow:
    """One test of the gate; ``overall`` marks the row over all kinds."""

    name: str
    value: str
    needed: str
    passed: bool
    overall: bool = False


@dataclass(frozen=True)
class GateTable:
    """The gate's tests, and how many pairs each kind of violation has."""

    passed: bool
    pairs: int
    rows: list[GateRow]


def tabulate_gate(gate: dict | None) -> GateTable | None:
    """The table of gate.json's content; None where the gate has not run."""
    if gate is None:
        return None
    bars = gate["bars"]

    def share_row(name: str, share: float, bar: str, overall: bool = False) -> GateRow:
        return GateRow(name, f"{share:.1%}", f"≥ {bars[bar]:.0%}", share >= bars[bar], overall)

    rows = [share_row(violation, share, "each_kind") for violation, share in gate["kinds"].items()]
    rows.append(share_row("all kinds", gate["all_kinds"], "all_kinds", overall=True))
    rows += [share_row(f"control: {name}", share, "each_kind") for name, share in gate["controls"].items()]
    # Both restitutions are lawful, so a sound critic has no preference.
    preference = gate["restitution_preference"]
    indifferent = abs(preference - 0.5) <= FAIR_PREFERENCE
    rows.append(GateRow("restitution 1.0 preferred to 0.6", f"{preference:.1%}", "40–60%", indifferent))
    if "spearman" in gate:
        correlation, bar = gate["spearman"], bars["spearman"]
        rows.append(
            GateRow(
                "Spearman with exact metrics, own samples", f"{correlation:.2f}", f"≥ {bar:.2f}", correlation >= bar
            )
        )
    return GateTable(gate["passed"], bars["pairs"], rows)


def training_charts(logs: dict[str, list[dict]]) -> list[Markup]:
    """Charts of the stages' logs, without those that have no values yet."""

    def series(stage: str, key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in logs[stage] if key in line]

    def smoothed(key: str) -> list[tuple[float, float]]:
        return smooth(series("reinforce", key), SMOOTHED)

    held_out = "held_out_flow_0.5"
    charts = [
        line_chart(
            "Stage 1: held-out flow loss",
            {"with teacher": series("align", held_out), "sft control": series("sft", held_out)},
            "fixed noise, t = 0.5",
        ),
        line_chart(
            "Stage 1: held-out alignment loss",
            {"align": series("align", "held_out_pda")},
            "distance to the teacher's geometry",
        ),
        line_chart("Stage 2: skill reward", {"reward": smoothed("reward_skill")}, f"mean of {SMOOTHED} updates"),
        line_chart(
            "Stage 2: visible violation rate of rollouts",
            {"violations": series("reinforce", "violation_rate")},
            "exact, never trained on",
        ),
        line_chart(
            "Stage 2: motion",
            {"motion": smoothed("motion_ratio")},
            f"relative to the stage-1 model's, mean of {SMOOTHED}",
        ),
        line_chart(
            "Stage 2: plain reward", {"plain": smoothed("reward_plain")}, f"minus surprise, mean of {SMOOTHED} updates"
        ),
        line_chart("Stage 2: divergence from the reference", {"kl": series("reinforce", "kl")}, "mean over dimensions"),
        line_chart(
            "Stage 2: groups without variance",
            {"groups": series("reinforce", "zero_variance_groups")},
            "dropped from the update",
        ),
    ]
    # A stage that has not begun has no values, and its charts are empty.
    return [chart for chart in charts if chart]


def path_charts(figure: dict | None) -> list[Markup]:
    """A chart per pictured entry of figure.json: some balls' paths through a feature space."""
    charts = []
    for name, panel in (figure or {}).items():
        if "paths" in panel:
            charts.append(path_chart(name, panel["paths"], f"turns by {panel['turning']:.1f}° per step"))
    return charts


def report_page(run: Path, report: dict, logs: dict[str, list[dict]], figure: dict | None) -> str:
    """The whole page as HTML.

    ``report`` is the content of report.json, ``figure`` that of figure.json; ``logs`` are each stage's logged steps.
    """
    stages = {stage["name"]: stage for stage in report["stages"]}
    return str(
        render_template(
            "run.html",
            name=run.name,
            verdict=find_verdict(stages),
            table=metric_table(stages),
            at_rest=report["at_rest"],
            videos=side_by_side(run, list(stages)),
            gate=tabulate_gate(report["gate"]),
            curves=training_charts(logs),
            paths=path_charts(figure),
            # Runs of earlier versions have no time correlation.
            path_measures={name: panel for name, panel in (figure or {}).items() if "time_correlation" in panel},
            config=yaml.safe_dump(report["config"], sort_keys=False),
            versions=report["versions"],
        )
    )
