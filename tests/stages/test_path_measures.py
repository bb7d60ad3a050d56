"""Measures of paths in feature space, on paths whose answer is known."""

import numpy as np
import pytest

from ldo.stages.path_measures import probe, time_correlations, turning_angles


def test_turning_angle():
    line = np.linspace(0, 1, 6)[None, :, None] * np.ones(3)
    assert turning_angles(line) == pytest.approx([0], abs=0.1)
    back = np.array([0.0, 1, 0, 1])[None, :, None] * np.ones(3)
    assert turning_angles(back) == pytest.approx([180], abs=0.1)
    corner = np.array([[[0.0, 0], [1, 0], [1, 1]]])
    assert turning_angles(corner) == pytest.approx([90], abs=0.1)


def test_time_correlation_is_one_on_a_straight_path_and_low_on_one_that_returns():
    line = np.arange(8.0)[None, :, None] * np.ones(3)
    there_and_back = np.concatenate([line[:, :4], line[:, 3::-1]], 1)
    still = np.zeros((1, 8, 3))
    found = time_correlations(np.concatenate([line, there_and_back, still]))
    assert found[0] == pytest.approx(1)
    assert found[1] < 0.2
    assert found[2] == 0


def test_probe_finds_a_linear_map_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5, 12))
    linear = rng.normal(size=(12, 2))
    targets = features @ linear + 3.0
    read = probe(features, targets)
    assert read["r2"] > 0.999
    assert read["error"] < 0.1
    # Features that know nothing are worth no more than the mean.
    nothing = probe(features, rng.normal(size=(60, 5, 2)))
    assert -0.3 < nothing["r2"] < 0.1
    assert nothing["error"] == pytest.approx(np.sqrt(2), rel=0.2)


def test_probe_judges_by_clips_it_was_not_fitted_to():
    """More features than rows fit anything; on other clips that is worth nothing."""
    rng = np.random.default_rng(1)
    assert probe(rng.normal(size=(10, 2, 64)), rng.normal(size=(10, 2, 2)))["r2"] < 0.3
