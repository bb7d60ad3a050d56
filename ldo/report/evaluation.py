"""What an evaluation found, as data for the page: the table of metrics, the verdict, videos side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldo.data.video import read_video
from ldo.report.charts import strip
from ldo.sandbox.records import broken_laws

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
    "visible_violation_rate": Metric(
        "visible violation rate", "share of videos that break a law so that one can see it; less is better", -1
    ),
    "severity": Metric("severity", "how broken a video is, on a log scale over all laws; 0 is perfect", -1),
    "violation_rate": Metric(
        "strict violation rate", "share of videos worse in any law than 99% of sound ones; less is better", -1
    ),
    "existence": Metric("existence", "share of frames that show every prompted ball exactly once and whole", 1),
    "law_residual": Metric("law residual", "worst |a − g| / g of free flight, 0–10; less is better", -1),
    "teleport_rate": Metric("teleport rate", "share of steps that jump; less is better", -1),
    "appearance_error": Metric(
        "appearance error", "difference from clean discs drawn where the balls are seen; less is better", -1
    ),
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
    """The rate that leads, its change, the means of ldo and base, and the other metrics that clearly changed."""

    rate: str
    change: Change
    ldo: dict[str, float]
    base: dict[str, float]
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
    """Videos of several arms for the same prompts, each of ``frames`` frames.

    ``ranked``: the prompts are spread over the ranking by what LDO changed; else they are the first ones.
    """

    arms: list[str]
    frames: int
    ranked: bool
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
    if "ldo" not in stages:
        return None
    changes = _changes(stages["ldo"])
    # Runs of earlier versions have the strict rate only, and videos that no exact law applies to have neither.
    rate = next((name for name in ("visible_violation_rate", "violation_rate") if name in changes), None)
    if rate is None:
        return None
    other_changes = []
    # In the order of the run's own summary.
    for metric_name in stages["ldo"]["minus_base"]:
        if metric_name in changes and metric_name != rate and changes[metric_name].clear:
            other_changes.append((METRIC_ROWS[metric_name].label, changes[metric_name]))
    return Verdict(rate, changes[rate], _means(stages["ldo"]), _means(stages["base"]), other_changes)


def _means(stage: dict) -> dict[str, float]:
    return {metric_name: value["mean"] for metric_name, value in stage["metrics"].items() if value is not None}


def side_by_side(run: Path, arms: list[str]) -> SideBySide | None:
    """Some prompts' videos of the arms that were evaluated; None where exact metrics do not apply."""
    arms = [arm for arm in arms if (run / "eval" / arm).is_dir()]
    records = {arm: json.loads((run / "eval" / f"{arm}.json").read_text())["moving"] for arm in arms}
    # Only records of sandbox scenes have a kind; for other videos no exact law is known.
    if not arms or "kind" not in records[arms[0]][0]:
        return None
    first_seed = {arm: {record["prompt"]: record for record in records[arm] if record["seed"] == 0} for arm in arms}
    ranked = "ldo" in arms and "severity" in records["ldo"][0]
    prompts = _spread(first_seed) if ranked else sorted(first_seed[arms[0]])[:SHOWN_PROMPTS]
    rows = []
    frames = 0
    for prompt in prompts:
        videos = []
        for arm in arms:
            images, _ = read_video(run / "eval" / arm / f"{prompt:04d}-0.mp4")
            frames = len(images)
            videos.append(_shown_video(first_seed[arm][prompt], strip(images)))
        rows.append(ShownPrompt(first_seed[arms[0]][prompt]["text"], videos))
    tally = None
    if "ldo" in arms and "base" in arms:
        tally = _tally(records["base"], records["ldo"])
    return SideBySide(arms, frames, ranked, rows, tally)


def _spread(first_seed: dict[str, dict[int, dict]]) -> list[int]:
    """Prompts at even distances in the ranking by LDO's change of severity, from most repaired to most worsened."""
    base, ldo = first_seed["base"], first_seed["ldo"]
    ranking = sorted(base, key=lambda prompt: (ldo[prompt]["severity"] - base[prompt]["severity"], prompt))
    shown = min(SHOWN_PROMPTS, len(ranking))
    return [ranking[round(place)] for place in np.linspace(0, len(ranking) - 1, shown)]


def _shown_video(record: dict, image: str) -> ShownVideo:
    broken = broken_laws(record)
    return ShownVideo(image, record["first"] if broken else None, [VIOLATION_WORDS.get(name, name) for name in broken])


def _tally(base: list[dict], ldo: list[dict]) -> Tally:
    # Record by record, since every arm has the same prompts and seeds in the same order.
    pairs = [(broken_laws(before), broken_laws(after)) for before, after in zip(base, ldo, strict=True)]
    fixed = sum(bool(before) and not after for before, after in pairs)
    broken = sum(bool(after) and not before for before, after in pairs)
    return Tally(len(pairs), fixed, broken)
