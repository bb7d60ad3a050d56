"""Sections of the page that need more than a summary: videos side by side, the gate, feature paths."""

import json

import numpy as np
import pytest
import yaml

from ldo.core.config import Recipe, to_plain
from ldo.data.video import write_video
from ldo.report.run_report import write_report

FRAMES = 5


@pytest.fixture
def folder(tmp_path):
    """A run with two evaluated arms: the base breaks a law in its first video, ldo in its second."""
    run = tmp_path / "trial"
    write_arm(run, "base", [["teleport_rate"], []])
    write_arm(run, "ldo", [[], ["missing", "unheard of"]])
    (run / "recipe.yaml").write_text(yaml.safe_dump(to_plain(Recipe(name="trial"))))
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    metrics = {"violation_rate": interval, "motion_ratio": interval}
    summary = {
        "metrics": {"base": metrics, "ldo": metrics},
        "paired": {"ldo": {"violation_rate": {"mean": 0.0, "low": -0.1, "high": 0.1}}},
        "n_videos": {"base": 2, "ldo": 2},
    }
    (run / "eval" / "summary.json").write_text(json.dumps(summary))
    return run


def write_arm(run, arm, violations):
    """An arm's records and videos: prompts of one seed each, with their violations."""
    records = []
    for prompt, broken in enumerate(violations):
        write_video(run / "eval" / arm / f"{prompt:04d}-0.mp4", np.zeros((FRAMES, 16, 16, 3), np.uint8), 8.0)
        first = 3 if broken else None
        text = f"<prompt> {prompt}"
        record = {"prompt": prompt, "seed": 0, "kind": "bounce", "text": text, "violations": broken, "first": first}
        records.append(record)
    (run / "eval" / f"{arm}.json").write_text(json.dumps({"moving": records}))


def section(run, title):
    """The page's text between the heading ``title`` and the next one."""
    return write_report(run).read_text().partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0]


def test_videos_side_by_side(folder):
    html = section(folder, "Side by side")
    assert html.count('class="video"') == 4 == html.count("data:image/png;base64,")
    assert "&lt;prompt&gt; 1" in html and "<prompt>" not in html
    assert html.count("✓ sound") == 2
    assert "✗ a ball jumps" in html and "✗ a ball is missing or doubled, unheard of" in html
    # A video turns red at the frame of its first violation; a sound one never does.
    assert html.count(f"steps({FRAMES}) infinite,mark3 2.4s linear infinite") == 2
    assert html.count("@keyframes mark") == FRAMES
    assert "Of all 2 videos LDO fixes 1 and breaks 1" in " ".join(html.split())


def test_videos_without_exact_laws_are_not_shown(folder):
    for arm in ("base", "ldo"):
        (folder / "eval" / f"{arm}.json").write_text(json.dumps({"moving": [{"prompt": 0, "seed": 0}]}))
    assert section(folder, "Side by side") == ""


def test_the_gates_table(folder):
    bars = {"pairs": 8, "all_kinds": 0.9, "each_kind": 0.75, "spearman": 0.3}
    gate = {
        "kinds": {"teleport": 1.0, "vanish": 0.5},
        "all_kinds": 0.75,
        "controls": {"static": 1.0},
        "restitution_preference": 0.55,
        "spearman": 0.5,
        "bars": bars,
        "passed": False,
    }
    (folder / "gate.json").write_text(json.dumps(gate))
    html = section(folder, "Gate")
    assert '<b class="bad">failed</b>' in html and "8 pairs per kind" in html
    # vanish and the row over all kinds miss their bars; teleport, the control, restitution and Spearman do not.
    assert html.count("✗") == 2 and html.count("✓") == 4
    assert "<b>75.0%</b>" in html and "≥ 90%" in html and "≥ 0.30" in html


def test_feature_paths(folder):
    figure = {"V-JEPA": {"paths": [[[0, 0], [1, 1], [2, 0]]], "turning": 45.0}}
    (folder / "eval" / "figure.json").write_text(json.dumps(figure))
    html = section(folder, "A ball's path through feature space")
    assert html.count("<line ") == 2 and "turns by 45.0° per step" in html
