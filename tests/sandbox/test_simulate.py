"""The sandbox world against the laws it claims to obey, its captions and splits against its scenes, its pixels against geometry."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ldo.rng import numpy_rng
from ldo.sandbox import simulate as world
from ldo.sandbox.scenes import HELD_OUT, KINDS, SPLITS, sample_scene
from ldo.sandbox.simulate import BLOCK, FLOOR, FRAMES, GRAVITY, NAMES, OCCLUDER, PALETTE, Scene, render, simulate, track

MOVING = [k for k in KINDS if k != "stack"]
DRAWS = [(s, k) for s in SPLITS for k in KINDS if not (s == "soft" and k != "bounce") and not (s == "combination" and k not in HELD_OUT)]


@cache
def scenes(split, kind, count=10):
    return [sample_scene(numpy_rng(0, f"test {split} {kind}", i), split, kind=kind) for i in range(count)]


def one_ball(kind, position, velocity, radius=0.1, colour=0, restitution=1.0):
    return Scene(kind, (colour,), np.array([radius]), np.array([position], float), np.array([velocity], float), restitution)


@pytest.mark.parametrize("kind", MOVING)
def test_elastic_dynamics_keep_energy(kind):
    for scene in scenes("train", kind):
        p, v, _ = simulate(scene)
        energy = (scene.radii**2 * ((v**2).sum(-1) / 2 - scene.gravity * p[..., 1])).sum(1)
        np.testing.assert_allclose(energy, energy[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["collision_1d", "collision_2d"])
def test_collisions_keep_momentum(kind):
    collided = 0
    for scene in scenes("train", kind):
        _, v, events = simulate(scene)
        momentum = (scene.radii[:, None] ** 2 * v).sum(1)
        for frame in range(1, FRAMES):
            contacts = [e for e in events if frame - 1 < e.time <= frame]
            if all(e.j >= 0 for e in contacts):
                np.testing.assert_allclose(momentum[frame], momentum[frame - 1], rtol=0, atol=1e-15)
                collided += len(contacts)
    assert collided >= 10


def test_head_on_collision_is_the_textbook_one():
    r, v = np.array([0.10, 0.13]), np.array([0.04, -0.01])
    scene = Scene("collision_1d", (0, 1), r, np.array([[0.2, 0.5], [0.6, 0.5]]), np.stack([v, 0 * v], 1))
    _, speeds, events = simulate(scene, 6)
    a, b = r**2
    after = [((a - b) * v[0] + 2 * b * v[1]) / (a + b), ((b - a) * v[1] + 2 * a * v[0]) / (a + b)]
    np.testing.assert_allclose(speeds[-1, :, 0], after, rtol=1e-12)
    assert [e.time for e in events] == pytest.approx([(0.4 - 0.23) / 0.05])


def test_ballistic_path_is_a_parabola():
    t = np.arange(FRAMES)[:, None, None]
    for scene in scenes("train", "ballistic"):
        p, v, events = simulate(scene)
        fall = np.array([0.0, GRAVITY])
        assert not events
        np.testing.assert_allclose(p, scene.positions + scene.velocities * t + fall * t**2 / 2, rtol=0, atol=1e-13)
        np.testing.assert_allclose(v, scene.velocities + fall * t, rtol=0, atol=1e-13)


def test_walls_fold_a_straight_path():
    r, start, velocity = 0.1, np.array([0.3, 0.7]), np.array([0.31, -0.47])
    p, _, _ = simulate(one_ball("uniform", start, velocity, r), 40)
    free = (start + velocity * np.arange(40)[:, None] - r) / (1 - 2 * r)
    np.testing.assert_allclose(p[:, 0], r + (1 - 2 * r) * (1 - np.abs(free % 2 - 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MOVING)
def test_elastic_dynamics_run_backward(kind):
    for scene in scenes("train", kind):
        p, v, _ = simulate(scene)
        back, _, _ = simulate(replace(scene, positions=p[-1], velocities=-v[-1]))
        np.testing.assert_allclose(back[::-1], p, rtol=0, atol=1e-10)


@pytest.mark.parametrize("split, kind", DRAWS)
def test_balls_stay_in_the_box_and_apart(split, kind):
    for scene in scenes(split, kind):
        p, r = track(scene).positions, scene.radii
        assert (p > r[:, None] - 1e-9).all() and (p < np.array([1, scene.bottom]) - r[:, None] + 1e-9).all()
        for i in range(len(r)):
            for j in range(i):
                assert (np.linalg.norm(p[:, i] - p[:, j], axis=-1) > r[i] + r[j] - 1e-9).all()


def test_soft_walls_take_their_share_of_the_normal_velocity():
    measured = 0
    for scene in scenes("soft", "bounce"):
        _, v, events = simulate(scene)
        first = next(e for e in events if e.floor)
        k = int(first.time)
        if sum(k <= e.time <= k + 1 for e in events) == 1:
            before, after = v[k, first.i, 1] + GRAVITY * (first.time - k), v[k + 1, first.i, 1] - GRAVITY * (k + 1 - first.time)
            assert after == pytest.approx(-0.6 * before, rel=1e-9) and v[k + 1, first.i, 0] == v[k, first.i, 0]
            measured += 1
    assert measured >= 5


@pytest.mark.parametrize("restitution", [0.25, 0.6])
def test_dropped_ball_comes_to_rest_on_the_floor(restitution):
    p, _, _ = simulate(one_ball("bounce", (0.5, 0.7), (0, 0), restitution=restitution), 60)
    np.testing.assert_allclose(p[-20:, 0], [[0.5, FLOOR - 0.1]] * 20, rtol=0, atol=1e-3)


def test_stack_rests_and_its_balls_touch():
    for scene in scenes("train", "stack"):
        p, r = track(scene).positions, scene.radii
        assert (p == scene.positions).all() and (p[0, :, 1] + r).max() == pytest.approx(FLOOR)
        for i in range(1, len(r)):
            assert np.linalg.norm(p[0, 0] - p[0, i]) == pytest.approx(r[0] + r[i])


def test_scene_is_a_function_of_the_generator():
    a, b, c = (sample_scene(numpy_rng(0, "draw", i)) for i in (0, 0, 1))
    assert repr(a) == repr(b) != repr(c)
    np.testing.assert_array_equal(track(a).positions, track(b).positions)


@pytest.mark.parametrize("split, kind", DRAWS)
def test_caption_tells_colours_softness_and_sides(split, kind):
    for scene in scenes(split, kind):
        words = re.findall(r"\w+", scene.caption)
        assert sorted(w for w in words if w in NAMES) == sorted(NAMES[c] for c in scene.colours)
        assert len(set(scene.colours)) == len(scene.colours) == len(scene.radii)
        assert ("soft" in words) == (split == "soft") and scene.restitution == (0.6 if split == "soft" else 1.0)
        if kind in ("ballistic", "occluder"):
            sides = [w for w in words if w in ("left", "right")]
            assert sides == ["right" if u > 0 else "left" for u in scene.velocities[:, 0]]


@pytest.mark.parametrize("split, kind", [d for d in DRAWS if d[1] in HELD_OUT])
def test_held_out_colours_lead_only_in_combination(split, kind):
    held = {NAMES[s.colours[0]] == HELD_OUT[kind] for s in scenes(split, kind)}
    assert held == {split == "combination"}


@pytest.mark.parametrize("split, kinds", [("combination", set(HELD_OUT)), ("soft", {"bounce"}), ("train", set(KINDS))])
def test_kinds_of_a_split(split, kinds):
    assert {sample_scene(numpy_rng(1, split, i), split).kind for i in range(120)} == kinds


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_distribution_radii_lie_outside(kind):
    low, high = (0.085, 0.10) if kind == "occluder" else (0.095, 0.135)
    for scene in scenes("ood", kind):
        assert ((scene.radii < low) | (scene.radii > high)).all()
    for scene in scenes("train", kind) + scenes("test", kind):
        assert ((scene.radii >= low) & (scene.radii <= high)).all()


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="unknown sandbox split 'val'; one of train, test, ood, combination, soft"):
        sample_scene(numpy_rng(0, "x"), "val")


def test_path_length_sums_over_balls():
    p = np.array([[[0, 0], [0, 0]], [[0.3, 0.4], [0, 0]], [[0.3, 0.4], [0, 0.1]]])
    assert replace(track(scenes("train", "collision_1d")[0]), positions=p).path_length == pytest.approx(0.6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 48])
def test_pixels_are_in_range(kind, size):
    frames = render(track(scenes("train", kind)[0]), size)
    assert frames.shape == (FRAMES, 3, size, size) and frames.dtype == np.float32
    assert frames.min() >= 0 and frames.max() <= 1


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("radius", [0.07, 0.10, 0.135])
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.513, 0.377), (0.29, 0.618)])
def test_ball_has_its_place_area_and_colour(size, radius, centre):
    scene = one_ball("uniform", centre, (0, 0), radius, colour=2)
    image, bare = render(track(scene, 1), size)[0], world.background(scene, size).transpose(2, 0, 1)
    cover = ((image - bare) / (PALETTE[2][:, None, None] - bare)).mean(0)
    axis = (np.arange(size) + 0.5) / size
    assert cover.sum() == pytest.approx(np.pi * radius**2 * size**2, rel=0.02)
    assert ((cover * axis).sum() / cover.sum(), (cover.T * axis).sum() / cover.sum()) == pytest.approx(centre, abs=0.1 / size)
    np.testing.assert_allclose(image[:, int(centre[1] * size), int(centre[0] * size)], PALETTE[2], rtol=1e-6)


def test_floor_is_drawn_under_gravity_alone():
    side, table = (world.background(one_ball(k, (0.5, 0.5), (0, 0)), 32) for k in ("bounce", "uniform"))
    np.testing.assert_allclose(side[30:], np.broadcast_to(world.GROUND, (2, 32, 3)))
    np.testing.assert_allclose(side[:30], np.broadcast_to(world.SIDE, (30, 32, 3)))
    np.testing.assert_allclose(table, np.broadcast_to(world.TABLE, (32, 32, 3)))


def test_block_hides_what_is_behind_it():
    hidden_frames = 0
    for scene in scenes("train", "occluder"):
        clip = track(scene)
        gone = replace(clip, present=np.zeros_like(clip.present))
        seen, without = render(clip), render(gone)
        x, r = clip.positions[..., 0], scene.radii
        hidden = ((x - r > OCCLUDER[0]) & (x + r < OCCLUDER[1])).all(1)
        shown = ((x - r < OCCLUDER[0] - 1 / 32) | (x + r > OCCLUDER[1] + 1 / 32)).any(1)
        assert (seen[hidden] == without[hidden]).all()
        assert (np.abs(seen - without).max((1, 2, 3))[shown] > 0.1).all()
        np.testing.assert_allclose(seen[:, :, :, 11:21], np.broadcast_to(BLOCK[:, None, None], (FRAMES, 3, 32, 10)), rtol=1e-6)
        hidden_frames += hidden.sum()
    assert hidden_frames >= 10
