"""Means of each arm's metrics, and of their differences from the base, with intervals from a paired bootstrap."""

from __future__ import annotations

import numpy as np

from ldo.core.rng import numpy_rng
from ldo.sandbox.measure import EXACT_METRICS

EVALUATED = (
    "visible_violation_rate",
    "severity",
    "violation_rate",
    "existence",
    "law_residual",
    "teleport_rate",
    "appearance_error",
    "motion_ratio",
    "reward_skill",
    "reward_plain",
)
BOOTSTRAP = 2000  # resamples
INTERVAL = (0.025, 0.975)  # quantiles


def arm_statistics(arms: dict[str, list[dict]], seeds: int, seed: int) -> tuple[dict, dict]:
    """Per arm {metric: {mean, low, high}}, and the same of each arm's difference from the base.

    The bootstrap draws prompts with replacement and, within each, seeds; all arms see the same draws (paired).
    """
    values = {arm: _values(records) for arm, records in arms.items()}
    count = len(next(iter(arms.values()))) // seeds
    rng = numpy_rng(seed, "bootstrap")
    # Prompts first and seeds within them, because videos of one prompt are alike: a bootstrap over single videos would
    # give intervals that are too narrow.
    prompts = rng.integers(count, size=(BOOTSTRAP, count, 1))
    draws = prompts * seeds + rng.integers(seeds, size=(BOOTSTRAP, count, seeds))
    everything = np.arange(count * seeds)
    means = {arm: _means(of_arm, everything) for arm, of_arm in values.items()}
    resampled = {arm: [_means(of_arm, draw.ravel()) for draw in draws] for arm, of_arm in values.items()}

    metrics = {
        arm: {
            name: _interval(mean, [means_of_draw[name] for means_of_draw in resampled[arm]])
            for name, mean in means[arm].items()
        }
        for arm in arms
    }
    if "base" not in arms:
        return metrics, {}
    paired = {}
    for arm in arms:
        if arm == "base":
            continue
        # Differences of the same draw: much of the spread is that of the prompts and cancels.
        pairs = list(zip(resampled[arm], resampled["base"], strict=True))
        paired[arm] = {
            name: _interval(mean - means["base"][name], [own[name] - base[name] for own, base in pairs])
            for name, mean in means[arm].items()
        }
    return metrics, paired


def visible_shares(records: list[dict]) -> dict[str, float]:
    """Share of videos that are visibly wrong in each metric, and in ``any``; empty where no exact metrics are known."""
    if not records or "visible" not in records[0]:
        return {}
    wrong = [record["visible"] for record in records]
    shares = {metric: float(np.mean([metric in found for found in wrong])) for metric in EXACT_METRICS}
    return shares | {"any": float(np.mean([bool(found) for found in wrong]))}


def _interval(mean: float, resampled: list[float]) -> dict[str, float]:
    low, high = np.quantile(resampled, INTERVAL)
    return {"mean": mean, "low": float(low), "high": float(high)}


def _values(records: list[dict]) -> dict[str, np.ndarray]:
    """Per video, what each metric averages; motion_ratio is a ratio of two sums."""

    def column(key: str) -> np.ndarray:
        return np.array([record[key] for record in records])

    values = {key: column(key) for key in ("reward_skill", "reward_plain")}
    if "existence" in records[0]:
        values |= {key: column(key) for key in ("existence", "law_residual", "teleport_rate", "path_true")}
        values["path"] = column("path_length")
        values["violation_rate"] = np.array([float(bool(record["violations"])) for record in records])
    # Evaluations of earlier versions know strict violations only.
    if "severity" in records[0]:
        values["severity"] = column("severity")
        values["appearance_error"] = column("appearance_error")
        values["visible_violation_rate"] = np.array([float(bool(record["visible"])) for record in records])
    return values


def _means(values: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """Every metric over some videos."""
    means = {key: float(values[key][rows].mean()) for key in EVALUATED if key in values}
    if "path" in values:
        # A ratio of sums, not a mean of ratios: a prompt of little motion would otherwise outweigh all others.
        means["motion_ratio"] = float(values["path"][rows].sum() / values["path_true"][rows].sum())
    return means
