"""What an evaluation found, as data for the page: the table of metrics, the verdict, videos side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ldo.data.video import read_video
from ldo.report.charts import strip

SHOWN_PROMPTS = 8
ARM_NOTES = {
    "base": "the pretrained generator",
    "sft": "control: fine-tuned on the same clips, no teacher",
    "aligned": "stage 1: aligned with the teacher's forecasts",
    "ldo": "stages 1 and 2: then steered by the critic",
}
VIOLATION_WORDS = {
    "missing": "a ball is missing or doubled",
    "law_residual": "free flight off its law",
    "impact_error": "wrong outcome of a contact",
    "penetration": "bodies overlap",
    "teleport_rate": "a ball jumps",
    "colour_error": "wrong colour",
    "stillness": "no motion",
}


@dataclass(frozen=True)
class Metric:
    """A row of the table. ``better`` is 1 where more is better, -1 where less is, 0 where neither is."""

    label: str
    note: str
    better: int


METRIC_ROWS = {
    "violation_rate": Metric("violation rate", "share of videos that break an exact law; less is better", -1),
    "existence": Metric("existence", "share of frames that show every prompted ball exactly once and whole", 1),
    "law_residual": Metric("law residual", "worst |a − g| / g of free flight, 0–10; less is better", -1),
    "teleport_rate": Metric("teleport rate", "share of steps that jump; less is better", -1),
    # Neither direction is better: videos that move more than the simulator's are wrong too.
    "motion_ratio": Metric(
        "motion ratio", "distance travelled relative to the simulator's for the same prompts; 1 is right", 0
    ),
    "reward_skill": Metric("skill reward", "how much better V-JEPA predicts it than stillness does; −2 to 2", 1),
    "reward_plain": Metric("plain reward", "minus V-JEPA's surprise", 1),
}


@dataclass(frozen=True)
class Change:
    """A metric's difference from the base with its 95% interval; ``better`` is its metric's."""

    mean: float
    low: float
    high: float
    better: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def colour(self) -> str:
        """CSS class: "good", "bad", or none where the change is not clear or neither direction is better."""
        if not self.clear or self.better == 0:
            return ""
        rises = self.mean > 0
        return "good" if rises == (self.better > 0) else "bad"


@dataclass(frozen=True)
class MetricCell:
    """An arm's mean of a metric with its 95% interval, and the change from the base, which the base itself lacks."""

    mean: float
    low: float
    high: float
    change: Change | None


@dataclass(frozen=True)
class MetricTable:
    """The table of metrics: the arms with their notes, the number of videos per arm, and a row of cells per metric."""

    arms: dict[str, str]
    videos: int
    rows: list[tuple[Metric, list[MetricCell | None]]]


@dataclass(frozen=True)
class Verdict:
    """The means of ldo and base, the change of the violation rate, and the other metrics that clearly changed."""

    ldo: dict[str, float]
    base: dict[str, float]
    change: Change
    moved: list[tuple[str, Change]]


@dataclass(frozen=True)
class ShownVideo:
    """A video as a strip of frames, the frame of its first violation, and all violations in words."""

    strip: str
    first_violation: int | None
    violations: list[str]


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt and a video of every arm."""

    caption: str
    videos: list[ShownVideo]


@dataclass(frozen=True)
class Tally:
    """Of ``pairs`` videos of base and ldo, how many only ldo has right, and how many only the base."""

    pairs: int
    fixed: int
    broken: int


@dataclass(frozen=True)
class SideBySide:
    """Videos of several arms for the same prompts, each of ``frames`` frames."""

    arms: list[str]
    frames: int
    rows: list[ShownPrompt]
    tally: Tally | None


def _changes(stage: dict) -> dict[str, Change]:
    """The stage's differences from the base in the metrics that the page shows."""
    differences = stage.get("minus_base") or {}
    changes = {}
    for metric_name, metric in METRIC_ROWS.items():
        if metric_name in differences:
            interval = differences[metric_name]
            changes[metric_name] = Change(interval["mean"], interval["low"], interval["high"], metric.better)
    return changes


def metric_table(stages: dict[str, dict]) -> MetricTable | None:
    """The table of report.json's stages by name; None before an evaluation."""
    if not stages:
        return None
    rows = []
    for metric_name, metric in METRIC_ROWS.items():
        cells = []
        for stage in stages.values():
            value = stage["metrics"].get(metric_name)
            change = _changes(stage).get(metric_name)
            # A run without exact laws, or an older one, lacks some metrics.
            cell = None if value is None else MetricCell(value["mean"], value["low"], value["high"], change)
            cells.append(cell)
        rows.append((metric, cells))
    videos = next(iter(stages.values()))["n_videos"]
    return MetricTable({name: ARM_NOTES.get(name, "") for name in stages}, videos, rows)


def find_verdict(stages: dict[str, dict]) -> Verdict | None:
    """What the evaluation shows about ldo; None as long as ldo is not evaluated."""
    if "ldo" not in stages or "violation_rate" not in stages["ldo"]["metrics"]:
        return None
    changes = _changes(stages["ldo"])
    other_changes = []
    # In the order of the run's own summary.
    for metric_name in stages["ldo"]["minus_base"]:
        if metric_name in changes and metric_name != "violation_rate" and changes[metric_name].clear:
            other_changes.append((METRIC_ROWS[metric_name].label, changes[metric_name]))
    return Verdict(_means(stages["ldo"]), _means(stages["base"]), changes["violation_rate"], other_changes)


def _means(stage: dict) -> dict[str, float]:
    return {metric_name: value["mean"] for metric_name, value in stage["metrics"].items() if value is not None}


def side_by_side(run: Path, arms: list[str]) -> SideBySide | None:
    """The first prompts' videos of the arms that were evaluated; None where exact metrics do not apply."""
    arms = [arm for arm in arms if (run / "eval" / arm).is_dir()]
    records = {arm: json.loads((run / "eval" / f"{arm}.json").read_text())["moving"] for arm in arms}
    # Only records of sandbox scenes have a kind; for other videos no exact law is known.
    if not arms or "kind" not in records[arms[0]][0]:
        return None
    first_seed = {arm: {record["prompt"]: record for record in records[arm] if record["seed"] == 0} for arm in arms}
    rows = []
    frames = 0
    for prompt in sorted(first_seed[arms[0]])[:SHOWN_PROMPTS]:
        videos = []
        for arm in arms:
            images, _ = read_video(run / "eval" / arm / f"{prompt:04d}-0.mp4")
            frames = len(images)
            videos.append(_shown_video(first_seed[arm][prompt], strip(images)))
        rows.append(ShownPrompt(first_seed[arms[0]][prompt]["text"], videos))
    tally = None
    if "ldo" in arms and "base" in arms:
        tally = _tally(records["base"], records["ldo"])
    return SideBySide(arms, frames, rows, tally)


def _shown_video(record: dict, image: str) -> ShownVideo:
    first_violation = record["first"] if record["violations"] else None
    return ShownVideo(image, first_violation, [VIOLATION_WORDS.get(name, name) for name in record["violations"]])


def _tally(base: list[dict], ldo: list[dict]) -> Tally:
    # Record by record, since every arm has the same prompts and seeds in the same order.
    pairs = list(zip(base, ldo, strict=True))
    fixed = sum(bool(before["violations"]) and not after["violations"] for before, after in pairs)
    broken = sum(bool(after["violations"]) and not before["violations"] for before, after in pairs)
    return Tally(len(pairs), fixed, broken)
