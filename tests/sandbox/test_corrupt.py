"""Planted violations begin at their event frame, show in the pixels, and break what their name says."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest

from ldo.core.rng import numpy_rng
from ldo.sandbox.corrupt import (
    DEPARTURE,
    PLANTED,
    SHOWN,
    STOP,
    VIOLATION_SHARE,
    VIOLATIONS,
    corrupt,
    mixed,
    plant,
)
from ldo.sandbox.scenes import SCENE_KINDS as SCENES
from ldo.sandbox.scenes import sample_scene
from ldo.sandbox.simulate import FRAMES, GRAVITY, OCCLUDER, render, simulate, track

MOVING = set(SCENES) - {"stack"}
APPLIES = {
    "teleport": set(SCENES),
    "vanish": set(SCENES),
    "freeze": MOVING - {"uniform"},  # these roll too slowly for a stop to show
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
    return [sample_scene(numpy_rng(0, f"test {scene_kind}", index), kind=scene_kind) for index in range(12)]


@cache
def broken(kind):
    """Broken clips of one kind of violation, from every kind of scene."""
    clips = []
    for scene_kind in SCENES:
        for index, scene in enumerate(scenes(scene_kind)):
            clip = corrupt(scene, numpy_rng(0, f"test {kind}", index), kind)
            if clip is not None:
                clips.append(clip)
    return clips


def moved_ball(clip):
    """The one ball that differs from the valid clip."""
    (ball,) = np.flatnonzero((np.abs(clip.positions - track(clip.scene).positions) > 1e-9).any((0, 2)))
    return ball


def test_the_table_of_this_test_is_complete():
    assert set(APPLIES) == set(VIOLATIONS)
    assert set(PLANTED) < set(VIOLATIONS)


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_violation_applies_only_where_there_is_something_to_break(kind):
    assert {clip.scene.kind for clip in broken(kind)} == APPLIES[kind]


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_clip_is_valid_before_its_event_and_not_after(kind):
    for clip in broken(kind):
        valid, event = track(clip.scene), clip.event
        assert clip.violation == kind
        assert 1 <= event < FRAMES - 1
        pairs = [(clip.positions, valid.positions), (clip.colours, valid.colours), (clip.present, valid.present)]
        assert all((found[:event] == expected[:event]).all() for found, expected in pairs)
        assert any((found[event] != expected[event]).any() for found, expected in pairs)


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_violation_shows_in_the_pixels(kind):
    for clip in broken(kind):
        change = np.abs(render(clip) - render(track(clip.scene))).max((1, 2, 3))
        assert not change[: clip.event].any()
        # At some time after the event and not at once: a swap happens behind the block.
        assert change[clip.event :].max() > 0.2


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_broken_balls_stay_in_the_box(kind):
    for clip in broken(kind):
        radii = clip.radii[:, None]
        assert (clip.positions > radii - 1e-9).all()
        assert (clip.positions < np.array([1, clip.scene.bottom]) - radii + 1e-9).all()


def test_teleport_is_one_jump_of_one_ball():
    for clip in broken("teleport"):
        ball, event, valid = moved_ball(clip), clip.event, track(clip.scene).positions
        assert np.linalg.norm(clip.positions[event, ball] - valid[event, ball]) > 0.2


def test_vanished_ball_stays_away():
    for clip in broken("vanish"):
        gone = ~clip.present
        # As many absences as frames are left, all of one ball.
        assert gone.sum() == FRAMES - clip.event
        assert gone[clip.event :].all(0).sum() == 1


def test_frozen_clip_stands_still():
    for clip in broken("freeze"):
        assert (clip.positions[clip.event :] == clip.positions[clip.event - 1]).all()
        before = np.linalg.norm(np.diff(clip.positions[clip.event - 2 : clip.event], axis=0), axis=-1)
        assert before.max() > STOP


@pytest.mark.parametrize("kind", ["freeze", "float", "restitution", "shuffle"])
def test_broken_paths_leave_the_valid_ones_by_two_radii(kind):
    for clip in broken(kind):
        distance = np.linalg.norm(clip.positions - track(clip.scene).positions, axis=-1).max(1)
        assert (distance > DEPARTURE).sum() >= SHOWN


def test_float_turns_gravity_upward():
    free_balls = 0
    for clip in broken("float"):
        path, speed, _ = simulate(clip.scene)
        event, radii = clip.event, clip.radii[:, None]
        free_flight = path[event - 1] + speed[event - 1] - np.array([0, GRAVITY / 2])
        # A ball that would leave the box within the frame bounces instead, which the line above leaves out.
        below_top = (free_flight > radii).all(1)
        above_bottom = (free_flight < np.array([1, clip.scene.bottom]) - radii).all(1)
        untouched = below_top & above_bottom
        np.testing.assert_allclose(clip.positions[event][untouched], free_flight[untouched], rtol=0, atol=1e-12)
        free_balls += untouched.sum()
    # Without any free ball, nothing would have been compared.
    assert free_balls >= 8


@pytest.mark.parametrize("kind", ["colour", "swap"])
def test_one_ball_takes_a_colour_that_the_scene_lacks(kind):
    for clip in broken(kind):
        changed = clip.colours != np.array(clip.scene.colours)
        assert changed.sum() == FRAMES - clip.event
        assert changed[clip.event :].all(0).sum() == 1
        assert not set(clip.colours[changed]) & set(clip.scene.colours)
        horizontal, radius = clip.positions[changed, 0][0], clip.radii[changed[-1]][0]
        hidden = horizontal - radius > OCCLUDER[0] and horizontal + radius < OCCLUDER[1]
        # Behind the block a change of colour is a swap; in the open it is a ball that changes in plain sight.
        assert hidden if kind == "swap" else not (clip.scene.occluded and hidden)


def test_interpenetrating_balls_overlap_deeply():
    for clip in broken("interpenetrate"):
        depths = []
        for first, second in combinations(range(len(clip.radii)), 2):
            radii = clip.radii[[first, second]]
            distance = np.linalg.norm(clip.positions[:, first] - clip.positions[:, second], axis=-1)
            depths.append((radii.sum() - distance).max() / radii.min())
        assert max(depths) > 0.5


def test_wrong_restitution_changes_the_height_of_the_bounce():
    for clip in broken("restitution"):
        _, _, events = simulate(clip.scene)
        # The first frame after the first contact, in the valid clip too.
        assert clip.event == int(min(event.time for event in events)) + 1
        assert np.abs(clip.positions - track(clip.scene).positions).max() > 0.1


def test_jitter_trembles_by_half_a_radius_or_more_to_the_end():
    distances = []
    for clip in broken("jitter"):
        distance = np.linalg.norm(clip.positions - track(clip.scene).positions, axis=-1)[clip.event :] / clip.radii
        distances += distance.ravel().tolist()
    assert max(distances) <= 1
    # A ball at a wall or on the floor is kept inside.
    assert np.mean(np.array(distances) >= 0.5) > 0.8


def test_shuffle_shows_the_same_frames():
    for clip in broken("shuffle"):
        shuffled = [tuple(positions.ravel()) for positions in clip.positions]
        valid = [tuple(positions.ravel()) for positions in track(clip.scene).positions]
        assert sorted(shuffled) == sorted(valid)


@pytest.mark.parametrize("scene_kind", SCENES)
def test_planted_violations_are_those_that_apply(scene_kind):
    planted = set()
    # Eight draws for each of twelve scenes, so that every kind that applies comes up.
    for seed in range(8):
        for index, scene in enumerate(scenes(scene_kind)):
            planted.add(plant(scene, numpy_rng(seed, "plant", index)).violation)
    assert planted == {kind for kind in PLANTED if scene_kind in APPLIES[kind]}


def test_mix_breaks_its_share():
    clips = [mixed(numpy_rng(0, "mix", index)) for index in range(300)]
    share = np.mean([clip.violation is not None for clip in clips])
    # Three standard deviations at 300 clips.
    assert share == pytest.approx(VIOLATION_SHARE, abs=0.08)
    assert all((clip.event is None) == (clip.violation is None) for clip in clips)


def test_same_generator_breaks_in_the_same_way():
    scene = scenes("bounce")[0]
    for kind in APPLIES:
        first = corrupt(scene, numpy_rng(3, kind), kind)
        second = corrupt(scene, numpy_rng(3, kind), kind)
        # Some kinds do not apply to a bounce, and must not apply twice either.
        if first is None:
            assert second is None
            continue
        assert second is not None
        assert first.event == second.event
        assert np.array_equal(first.positions, second.positions)


def test_unknown_violation_is_an_error():
    with pytest.raises(ValueError, match="unknown violation 'melt'; one of teleport, vanish"):
        corrupt(scenes("bounce")[0], numpy_rng(0, "x"), "melt")


def test_impossible_violation_is_none(monkeypatch):
    tries = []
    # A violation that never succeeds: append returns None.
    monkeypatch.setitem(VIOLATIONS, "vanish", lambda *arguments: tries.append(arguments))
    assert corrupt(scenes("stack")[0], numpy_rng(0, "x"), "vanish") is None
    assert len(tries) == 20
