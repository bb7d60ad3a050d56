"""What the stages use of the sandbox: exact metrics of its prompts, matched pairs and controls, moving balls."""

from dataclasses import asdict

import numpy as np
import pytest

from ldo.core.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.exact import exact_metrics
from ldo.sandbox.matched_pairs import CONTROLS, PAIR_KINDS, draw_bounces, draw_controls, draw_pairs
from ldo.sandbox.measure import measure, severity
from ldo.sandbox.moving_balls import draw_moving_balls


@pytest.fixture(scope="module")
def scene():
    return scenes.sample_scene(numpy_rng(0, "exact"), kind="uniform")


def metrics_of(scene):
    track = simulate.track(scene)
    extra = {"kind": scene.kind, "colours": list(scene.colours), "path_length": track.path_length}
    return exact_metrics(scene.caption, extra)


def test_a_prompt_from_elsewhere_has_no_exact_metrics():
    assert exact_metrics("a cat", {}) is None
    assert exact_metrics("a cat", {"kind": "uniform"}) is None


def test_a_record_holds_what_measure_finds(scene):
    frames = simulate.render(simulate.track(scene))
    exact = metrics_of(scene)
    metrics = measure(frames, exact.prompt)
    record = exact.record(frames)
    assert {key: record[key] for key in asdict(metrics)} == asdict(metrics)
    assert record["kind"] == "uniform"
    assert record["existence"] == 1 - metrics.missing
    assert record["path_true"] == simulate.track(scene).path_length
    assert exact.caption == scene.caption


def test_a_broken_clip_violates_and_a_sound_one_does_not(scene):
    exact = metrics_of(scene)
    sound = simulate.render(simulate.track(scene))
    broken = simulate.render(corrupt.corrupt(scene, numpy_rng(0, "exact break"), "vanish"))
    assert not exact.violates(sound)
    assert exact.violates(broken)
    assert exact.severity(broken) > exact.severity(sound)
    assert exact.severity(broken) == severity(measure(broken, exact.prompt), "uniform")


def test_pairs_share_their_start():
    pairs = draw_pairs(32, 2, seed=1)
    assert set(pairs.broken) == set(PAIR_KINDS)
    for clips in pairs.broken.values():
        assert len(clips) >= 2
        for clip in clips:
            valid = pairs.valid[clip.valid]
            # Equal beginnings: a critic must tell the clips apart by their dynamics and not by the scene.
            np.testing.assert_array_equal(clip.frames[:3], valid[:3])
            assert (clip.frames != valid).any()


def test_controls_keep_the_frames_and_lose_their_order():
    valid = draw_pairs(32, 1, seed=2).valid[:2]
    controls = draw_controls(valid, seed=2)
    assert set(controls) == set(CONTROLS)
    assert all((clip == clip[:1]).all() for clip in controls["static"])
    # The sum over a frame stands in for the frame: it can be sorted, and different frames hardly ever share it.
    for clip, shuffled in zip(valid, controls["shuffled"], strict=True):
        assert sorted(frame.sum() for frame in clip) == sorted(frame.sum() for frame in shuffled)


def test_bounces_differ_only_in_restitution():
    hard, soft = draw_bounces(32, 2, seed=0)
    assert len(hard) == len(soft) == 2
    for hard_clip, soft_clip in zip(hard, soft, strict=True):
        np.testing.assert_array_equal(hard_clip[0], soft_clip[0])
        assert (hard_clip != soft_clip).any()


def test_moving_balls_are_where_their_positions_say():
    balls = draw_moving_balls(3, seed=0, frames=17, size=32)
    assert balls.frames.shape == (3, 17, 3, 32, 32)
    assert balls.positions.shape == (3, 17, 2)
    assert len(balls.captions) == 3
    assert (balls.positions >= 0).all()
    assert (balls.positions <= 1).all()
    # Every ball is brighter than what is behind it, so a bright pixel shows that there is a ball.
    for clip, path in zip(balls.frames, balls.positions, strict=True):
        # In the middle of the clip, when the ball has left its first position.
        column, row = (path[8] * 32).astype(int)
        assert clip[8, :, row, column].max() > 0.4
