"""From pixels to balls: positions, areas and what does not belong, without a guess where nothing is seen."""

from dataclasses import replace

import numpy as np
import pytest

from ldo.core.rng import numpy_rng
from ldo.sandbox import simulate
from ldo.sandbox.observe import Prompt, observe
from ldo.sandbox.scenes import sample_scene


def draw_clip(kind, index=0):
    return simulate.track(sample_scene(numpy_rng(2, "observe", index), kind=kind))


def observe_clip(clip):
    return observe(simulate.render(clip), Prompt.of(clip.scene))


def test_positions_radii_and_areas():
    for index in range(6):
        clip = draw_clip("bounce", index)
        observed = observe_clip(clip)
        # A fifth of a pixel.
        assert np.abs(observed.position - clip.positions).max() < 0.2 / 32
        np.testing.assert_allclose(observed.radius, clip.radii, rtol=0.03)
        assert (observed.pieces == 1).all()
        assert (observed.stray < 1).all()


def test_absent_ball_is_never_placed():
    clip = draw_clip("uniform")
    present = clip.present.copy()
    present[6:, 0] = False
    observed = observe_clip(replace(clip, present=present))
    assert np.isnan(observed.position[6:, 0]).all()
    assert not np.isnan(observed.position[:6]).any()
    assert (observed.area[6:, 0] < 1).all()


def test_ball_of_an_unprompted_colour_is_stray():
    clip = draw_clip("uniform")
    unprompted = next(colour for colour in range(len(simulate.PALETTE)) if colour not in clip.scene.colours)
    colours = clip.colours.copy()
    colours[8:, 0] = unprompted
    observed = observe_clip(replace(clip, colours=colours))
    # Not all of the ball: at its edge it is mixed with the background.
    assert (observed.stray[8:] > 0.5 * observed.full_area[0]).all()
    assert (observed.stray[:8] < 1).all()


def test_doubled_ball_has_two_pieces():
    clip = draw_clip("uniform")
    frames = simulate.render(clip)
    mirrored = frames[..., ::-1]
    backdrop = simulate.background(clip.scene, 32).transpose(2, 0, 1)
    both = np.where(np.abs(mirrored - backdrop).max(1, keepdims=True) > 0.02, mirrored, frames)
    observed = observe(both.astype(np.float32), Prompt.of(clip.scene))
    # Near the middle, ball and mirror image overlap and are one piece.
    apart = np.abs(clip.positions[:, 0, 0] - 0.5) > 1.5 * clip.radii[0]
    assert apart.any()
    assert (observed.pieces[apart, 0] == 2).all()


def test_hidden_ball_is_expected_to_be_hidden():
    for index in range(6):
        clip = draw_clip("occluder", index)
        observed = observe_clip(clip)
        left, right = clip.positions[..., 0] - clip.radii, clip.positions[..., 0] + clip.radii
        behind = (left > simulate.OCCLUDER[0]) & (right < simulate.OCCLUDER[1])
        assert behind.any()
        assert np.isnan(observed.position[behind]).all()
        # Not zero: one frame of timing error is allowed.
        assert (observed.expected[behind][:, 0] < 0.3).all()


def test_shape_is_checked():
    clip = draw_clip("uniform")
    # Channels last, as most image libraries have them.
    with pytest.raises(ValueError, match=r"expected square frames \[T, 3, S, S\], got \(17, 32, 32, 3\)"):
        observe(simulate.render(clip).transpose(0, 2, 3, 1), Prompt.of(clip.scene))
