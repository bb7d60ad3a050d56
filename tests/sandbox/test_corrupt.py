"""Planted violations: each begins at its event frame, shows in the pixels, breaks what its name says, and applies only where it can."""

from functools import cache

import numpy as np
import pytest

from ldo.rng import numpy_rng
from ldo.sandbox import corrupt as violations
from ldo.sandbox.corrupt import KINDS, PLANTED, VIOLATION_SHARE, corrupt, mixed, plant
from ldo.sandbox.scenes import KINDS as SCENES
from ldo.sandbox.scenes import sample_scene
from ldo.sandbox.simulate import FRAMES, GRAVITY, OCCLUDER, render, simulate, track

MOVING = set(SCENES) - {"stack"}
APPLIES = {
    "teleport": set(SCENES),
    "vanish": set(SCENES),
    "freeze": MOVING,
    "float": {"ballistic", "bounce"},
    "colour": set(SCENES),
    "swap": {"occluder"},
    "interpenetrate": {"collision_1d", "collision_2d"},
    "restitution": {"bounce"},
    "jitter": set(SCENES),
    "shuffle": MOVING,
}


@cache
def scenes(scene_kind):
    return [sample_scene(numpy_rng(0, f"test {scene_kind}", i), kind=scene_kind) for i in range(6)]


@cache
def broken(kind):
    """Broken clips of one kind of violation, from every kind of scene."""
    clips = [corrupt(s, numpy_rng(0, f"test {kind}", i), kind) for name in SCENES for i, s in enumerate(scenes(name))]
    return [c for c in clips if c is not None]


def moved(clip):
    """The one ball that differs from the valid clip."""
    (i,) = np.flatnonzero((np.abs(clip.positions - track(clip.scene).positions) > 1e-9).any((0, 2)))
    return i


def test_the_table_of_this_test_is_complete():
    assert set(APPLIES) == set(KINDS) and set(PLANTED) < set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_violation_applies_only_where_there_is_something_to_break(kind):
    assert {c.scene.kind for c in broken(kind)} == APPLIES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_clip_is_valid_before_its_event_and_not_after(kind):
    for bad in broken(kind):
        good, k = track(bad.scene), bad.event
        assert bad.violation == kind and 1 <= k < FRAMES - 1
        parts = [(bad.positions, good.positions), (bad.colours, good.colours), (bad.present, good.present)]
        assert all((a[:k] == b[:k]).all() for a, b in parts)
        assert any((a[k] != b[k]).any() for a, b in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_violation_shows_in_the_pixels(kind):
    for bad in broken(kind):
        change = np.abs(render(bad) - render(track(bad.scene))).max((1, 2, 3))
        assert not change[: bad.event].any() and change[bad.event :].max() > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_broken_balls_stay_in_the_box(kind):
    for bad in broken(kind):
        r = bad.radii[:, None]
        assert (bad.positions > r - 1e-9).all() and (bad.positions < np.array([1, bad.scene.bottom]) - r + 1e-9).all()


def test_teleport_is_one_jump_of_one_ball():
    for bad in broken("teleport"):
        i, k, valid = moved(bad), bad.event, track(bad.scene).positions
        assert np.linalg.norm(bad.positions[k, i] - valid[k, i]) > 0.2


def test_vanished_ball_stays_away():
    for bad in broken("vanish"):
        gone = ~bad.present
        assert gone.sum() == FRAMES - bad.event and gone[bad.event :].all(0).sum() == 1


def test_frozen_clip_stands_still():
    for bad in broken("freeze"):
        assert (bad.positions[bad.event :] == bad.positions[bad.event - 1]).all()


def test_float_turns_gravity_upward():
    free_balls = 0
    for bad in broken("float"):
        path, speed, _ = simulate(bad.scene)
        k = bad.event
        free = path[k - 1] + speed[k - 1] - np.array([0, GRAVITY / 2])
        untouched = (free > bad.radii[:, None]).all(1) & (free < np.array([1, bad.scene.bottom]) - bad.radii[:, None]).all(1)
        np.testing.assert_allclose(bad.positions[k][untouched], free[untouched], rtol=0, atol=1e-12)
        free_balls += untouched.sum()
    assert free_balls >= 8


@pytest.mark.parametrize("kind", ["colour", "swap"])
def test_one_ball_takes_a_colour_that_the_scene_lacks(kind):
    for bad in broken(kind):
        changed = bad.colours != np.array(bad.scene.colours)
        assert changed.sum() == FRAMES - bad.event and changed[bad.event :].all(0).sum() == 1
        assert not set(bad.colours[changed]) & set(bad.scene.colours)
        x, r = bad.positions[changed, 0][0], bad.radii[changed[-1]][0]
        hidden = x - r > OCCLUDER[0] and x + r < OCCLUDER[1]
        assert hidden if kind == "swap" else not (bad.scene.occluded and hidden)


def test_interpenetrating_balls_overlap_deeply():
    for bad in broken("interpenetrate"):
        r, p = bad.radii, bad.positions
        depth = max((r[i] + r[j] - np.linalg.norm(p[:, i] - p[:, j], axis=-1)).max() / min(r[i], r[j]) for i in range(len(r)) for j in range(i))
        assert depth > 0.5


def test_wrong_restitution_changes_the_height_of_the_bounce():
    for bad in broken("restitution"):
        _, _, events = simulate(bad.scene)
        assert bad.event == int(min(e.time for e in events)) + 1
        assert np.abs(bad.positions - track(bad.scene).positions).max() > 0.1


def test_jitter_trembles_to_the_end():
    for bad in broken("jitter"):
        off = np.linalg.norm(bad.positions - track(bad.scene).positions, axis=-1)[bad.event :]
        assert 0.015 < off.mean() < 0.06


def test_shuffle_shows_the_same_frames():
    for bad in broken("shuffle"):
        key = [tuple(p.ravel()) for p in bad.positions]
        assert sorted(key) == sorted(tuple(p.ravel()) for p in track(bad.scene).positions)


@pytest.mark.parametrize("scene_kind", SCENES)
def test_planted_violations_are_those_that_apply(scene_kind):
    planted = {plant(s, numpy_rng(i, "plant", j)).violation for i in range(8) for j, s in enumerate(scenes(scene_kind))}
    assert planted == {k for k in PLANTED if scene_kind in APPLIES[k]}


def test_mix_breaks_its_share():
    clips = [mixed(numpy_rng(0, "mix", i)) for i in range(300)]
    share = np.mean([c.violation is not None for c in clips])
    assert share == pytest.approx(VIOLATION_SHARE, abs=0.08)  # three deviations
    assert all((c.event is None) == (c.violation is None) for c in clips)


def test_same_generator_breaks_in_the_same_way():
    scene = scenes("bounce")[0]
    for kind in APPLIES:
        a, b = (corrupt(scene, numpy_rng(3, kind), kind) for _ in range(2))
        assert (a is None) == (b is None) and (a is None or (a.event == b.event and np.array_equal(a.positions, b.positions)))


def test_unknown_violation_is_an_error():
    with pytest.raises(ValueError, match="unknown violation 'melt'; one of teleport, vanish"):
        corrupt(scenes("bounce")[0], numpy_rng(0, "x"), "melt")


def test_impossible_violation_is_none(monkeypatch):
    tries = []
    monkeypatch.setitem(violations.KINDS, "vanish", lambda *a: tries.append(a))
    assert corrupt(scenes("stack")[0], numpy_rng(0, "x"), "vanish") is None and len(tries) == 20
