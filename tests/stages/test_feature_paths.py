"""The picture of a ball's path through feature space."""

import json

import numpy as np
import pytest
import torch

from ldo.models.world_model import Tokens
from ldo.stages import feature_paths as figure
from ldo.stages.feature_paths import write_feature_paths


def test_features_are_read_at_the_point():
    grid = torch.arange(12.0).view(1, 2 * 2 * 3, 1)  # value = token number, grid (2, 2, 3)
    centres = torch.tensor([[[0.5, 0.25], [1 / 6, 0.75]]])  # x, y of two tokens
    features = figure._features_at(Tokens(grid, (2, 2, 3)), centres)
    assert features.flatten().tolist() == pytest.approx([1.0, 9.0], abs=1e-5)


def test_written_once_with_measures_of_every_panel_and_some_pictures(open_run, monkeypatch):
    monkeypatch.setattr(figure, "PATH_CLIPS", 6)
    monkeypatch.setattr(figure, "PATH_BATCH", 4)
    monkeypatch.setattr(figure, "SHOWN_PATHS", 4)
    run = open_run()
    run.export("aligned", run.fresh)
    write_feature_paths(run)
    path = run.folder / "eval" / "figure.json"
    found = json.loads(path.read_text())
    levels = [f"{name}, t = {level}" for name in ("base", "aligned") for level in figure.NOISE_LEVELS]
    assert set(found) == {"V-JEPA", "V-JEPA's forecast", *levels}
    assert all(panel["clips"] == 6 for panel in found.values())
    # A fresh adapter changes nothing, and both arms see the same noise.
    for level in figure.NOISE_LEVELS:
        assert found[f"base, t = {level}"]["turning"] == pytest.approx(found[f"aligned, t = {level}"]["turning"])
    assert {name for name, panel in found.items() if "paths" in panel} == {
        "V-JEPA",
        "base, t = 0.5",
        "aligned, t = 0.5",
    }
    assert np.array(found["V-JEPA"]["paths"]).shape == (4, 8, 2)
    path.write_text("{}")
    write_feature_paths(run)
    assert path.read_text() == "{}"


def test_pictured_clips_are_those_around_the_median(monkeypatch):
    monkeypatch.setattr(figure, "SHOWN_PATHS", 3)
    assert sorted(figure._nearest_to_median(np.array([9.0, 1.0, 5.0, 4.0, 8.0, 6.0, 2.0]))) == [2, 3, 5]
    # All of them where there are no more.
    assert sorted(figure._nearest_to_median(np.array([2.0, 1.0]))) == [0, 1]
