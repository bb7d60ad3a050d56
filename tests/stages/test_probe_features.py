"""The probes of a run: what they read is known, and every panel is there."""

import json

import numpy as np
import pytest

from ldo.core.errors import RecipeError
from ldo.sandbox.moving_balls import draw_moving_balls
from ldo.stages import probe_features as probes


def test_every_panel_has_both_probes(open_run, monkeypatch):
    monkeypatch.setattr(probes, "PATH_BATCH", 8)
    run = open_run()
    run.export("aligned", run.fresh)
    found = probes.probe_features(run, 12)
    assert json.loads(json.dumps(found)) == found
    generator = {f"{name}, t = {level}" for name in ("base", "aligned") for level in probes.NOISE_LEVELS}
    assert set(found["panels"]) == {probes.WORLD, probes.FORECAST, probes.LAST_SEEN} | generator
    for panel in found["panels"].values():
        assert panel["position"]["r2"] <= 1
        assert panel["velocity"]["error"] > 0
    # A fresh adapter changes nothing, and both arms see the same noise and the same projection.
    for level in probes.NOISE_LEVELS:
        assert found["panels"][f"base, t = {level}"] == found["panels"][f"aligned, t = {level}"]
    assert "| base, t = 0.2 |" in probes.probe_table(found)


def test_too_few_clips_are_refused_before_anything_is_drawn(open_run):
    with pytest.raises(RecipeError, match="--clips 9 are too few for 5 folds; give at least 10"):
        probes.probe_features(open_run(), 9)


def test_motion_is_that_of_the_frames_of_a_token():
    steady = np.arange(16.0)[None, :, None] * np.array([0.01, -0.02])
    position, velocity = probes._motion(steady, 4)
    assert position.shape == velocity.shape == (1, 4, 2)
    assert position[0, 0] == pytest.approx([0.015, -0.03])
    assert velocity.reshape(-1, 2) == pytest.approx(np.tile([0.01, -0.02], (4, 1)))


def test_balls_that_are_alone():
    alone = draw_moving_balls(12, 0, 17, 32, alone=True)
    assert len(alone.captions) == 12
    assert all(caption.count("ball") == 1 for caption in alone.captions)
    assert any(caption.count("ball") > 1 for caption in draw_moving_balls(12, 0, 17, 32).captions)
