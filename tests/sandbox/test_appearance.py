"""Appearance is about how balls look, not about what they do."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ldo.core.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.appearance import appearance_error
from ldo.sandbox.observe import Prompt


@pytest.fixture(scope="module", params=["uniform", "bounce", "collision_1d", "occluder"])
def scene(request):
    return scenes.sample_scene(numpy_rng(0, "appearance"), kind=request.param)


def error(track, frames=None):
    return appearance_error(simulate.render(track) if frames is None else frames, Prompt.of(track.scene))


def test_rendered_clips_are_nearly_perfect_also_where_physics_is_broken(scene):
    assert error(simulate.track(scene)) < 0.02
    jumping = corrupt.corrupt(scene, numpy_rng(0, "jump"), "jitter")
    assert error(jumping) < 0.02


def test_blur_tint_and_dirt_count(scene):
    track = simulate.track(scene)
    frames = simulate.render(track)
    clean = error(track)
    blurred = ndimage.gaussian_filter(frames, (0, 0, 1.0, 1.0))
    assert error(track, blurred) > clean + 0.05
    dull = 0.5 * frames + 0.5 * frames.mean((2, 3), keepdims=True)
    assert error(track, dull) > clean + 0.05
    dirty = np.clip(frames + 0.1 * numpy_rng(0, "dirt").random(frames.shape), 0, 1)
    assert error(track, dirty) > clean + 0.05


def test_a_ball_that_is_never_seen_cannot_be_measured(scene):
    track = simulate.track(scene)
    assert error(track, simulate.render(replace(track, present=np.zeros_like(track.present)))) == 1
