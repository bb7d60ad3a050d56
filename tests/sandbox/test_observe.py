"""From pixels to balls: positions, areas and what does not belong, without a guess where nothing is seen."""

from dataclasses import replace

import numpy as np
import pytest

from ldo.rng import numpy_rng
from ldo.sandbox import simulate
from ldo.sandbox.observe import Prompt, observe
from ldo.sandbox.scenes import sample_scene


def clip(kind, index=0):
    return simulate.track(sample_scene(numpy_rng(2, "observe", index), kind=kind))


def test_positions_radii_and_areas():
    for i in range(6):
        c = clip("bounce", i)
        seen = observe(simulate.render(c), Prompt.of(c.scene))
        assert np.abs(seen.position - c.positions).max() < 0.2 / 32
        np.testing.assert_allclose(seen.radius, c.radii, rtol=0.03)
        assert (seen.pieces == 1).all() and (seen.stray < 1).all()


def test_absent_ball_is_never_placed():
    c = clip("uniform")
    present = c.present.copy()
    present[6:, 0] = False
    seen = observe(simulate.render(replace(c, present=present)), Prompt.of(c.scene))
    assert np.isnan(seen.position[6:, 0]).all() and not np.isnan(seen.position[:6]).any()
    assert (seen.area[6:, 0] < 1).all()


def test_ball_of_an_unprompted_colour_is_stray():
    c = clip("uniform")
    other = next(i for i in range(len(simulate.PALETTE)) if i not in c.scene.colours)
    colours = c.colours.copy()
    colours[8:, 0] = other
    seen = observe(simulate.render(replace(c, colours=colours)), Prompt.of(c.scene))
    assert (seen.stray[8:] > 0.5 * seen.full_area[0]).all() and (seen.stray[:8] < 1).all()


def test_doubled_ball_has_two_pieces():
    c = clip("uniform")
    frames = simulate.render(c)
    mirrored = frames[..., ::-1]
    backdrop = simulate.background(c.scene, 32).transpose(2, 0, 1)
    both = np.where(np.abs(mirrored - backdrop).max(1, keepdims=True) > 0.02, mirrored, frames)
    seen = observe(both.astype(np.float32), Prompt.of(c.scene))
    apart = np.abs(c.positions[:, 0, 0] - 0.5) > 1.5 * c.radii[0]
    assert apart.any() and (seen.pieces[apart, 0] == 2).all()


def test_hidden_ball_is_expected_to_be_hidden():
    for i in range(6):
        c = clip("occluder", i)
        seen = observe(simulate.render(c), Prompt.of(c.scene))
        left, right = c.positions[..., 0] - c.radii, c.positions[..., 0] + c.radii
        behind = (left > simulate.OCCLUDER[0]) & (right < simulate.OCCLUDER[1])
        assert behind.any() and np.isnan(seen.position[behind]).all()
        assert (seen.expected[behind][:, 0] < 0.3).all()


def test_shape_is_checked():
    c = clip("uniform")
    with pytest.raises(ValueError, match=r"expected square frames \[T, 3, S, S\], got \(17, 32, 32, 3\)"):
        observe(simulate.render(c).transpose(0, 2, 3, 1), Prompt.of(c.scene))
