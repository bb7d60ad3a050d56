"""The picture of a ball's path through feature space."""

import json

import numpy as np
import pytest
import torch

from ldo.models.world_model import Tokens
from ldo.stages import feature_paths as figure
from ldo.stages.feature_paths import write_feature_paths


def test_turning_angle():
    line = np.linspace(0, 1, 6)[None, :, None] * np.ones(3)
    assert figure.turning(line) == pytest.approx(0, abs=0.1)
    back = np.array([0.0, 1, 0, 1])[None, :, None] * np.ones(3)
    assert figure.turning(back) == pytest.approx(180, abs=0.1)
    corner = np.array([[[0.0, 0], [1, 0], [1, 1]]])
    assert figure.turning(corner) == pytest.approx(90, abs=0.1)


def test_features_are_read_at_the_point():
    grid = torch.arange(12.0).view(1, 2 * 2 * 3, 1)  # value = token number, grid (2, 2, 3)
    centres = torch.tensor([[[0.5, 0.25], [1 / 6, 0.75]]])  # x, y of two tokens
    features = figure._features_at(Tokens(grid, (2, 2, 3)), centres)
    assert features.flatten().tolist() == pytest.approx([1.0, 9.0], abs=1e-5)


def test_written_once_with_a_panel_each(open_run, monkeypatch):
    monkeypatch.setattr(figure, "PATH_CLIPS", 6)
    run = open_run()
    run.export("aligned", run.fresh)
    write_feature_paths(run)
    path = run.folder / "eval" / "figure.json"
    found = json.loads(path.read_text())
    assert set(found) == {"V-JEPA", "base", "aligned"}
    assert found["base"]["turning"] == pytest.approx(found["aligned"]["turning"])  # a fresh adapter changes nothing
    assert np.array(found["V-JEPA"]["paths"]).shape == (6, 8, 2)
    path.write_text("{}")
    write_feature_paths(run)
    assert path.read_text() == "{}"
