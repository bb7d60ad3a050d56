"""The sandbox world obeys its laws, its captions and splits fit its scenes, and its pixels agree with geometry."""

import re
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from ldo.core.rng import numpy_rng
from ldo.sandbox import simulate as world
from ldo.sandbox.scenes import HELD_OUT_COLOURS, SCENE_KINDS, SPLITS, sample_scene
from ldo.sandbox.simulate import BLOCK, FLOOR, FRAMES, GRAVITY, NAMES, OCCLUDER, PALETTE, Scene, render, simulate, track

MOVING = [kind for kind in SCENE_KINDS if kind != "stack"]
# Only bounces have soft walls, and only some kinds of scene have a held-out colour.
KINDS_OF_SPLIT = {"soft": ["bounce"], "combination": [kind for kind in SCENE_KINDS if kind in HELD_OUT_COLOURS]}
DRAWS = [(split, kind) for split in SPLITS for kind in KINDS_OF_SPLIT.get(split, SCENE_KINDS)]


@cache
def scenes(split, kind, count=10):
    generators = [numpy_rng(0, f"test {split} {kind}", index) for index in range(count)]
    return [sample_scene(generator, split, kind=kind) for generator in generators]


def one_ball(kind, position, velocity, radius=0.1, colour=0, restitution=1.0):
    positions, velocities = np.array([position], float), np.array([velocity], float)
    return Scene(kind, (colour,), np.array([radius]), positions, velocities, restitution)


@pytest.mark.parametrize("kind", MOVING)
def test_elastic_dynamics_keep_energy(kind):
    for scene in scenes("train", kind):
        path, velocities, _ = simulate(scene)
        # Minus, since y points down; mass is proportional to the squared radius.
        energy = (scene.radii**2 * ((velocities**2).sum(-1) / 2 - scene.gravity * path[..., 1])).sum(1)
        np.testing.assert_allclose(energy, energy[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["collision_1d", "collision_2d"])
def test_collisions_keep_momentum(kind):
    collided = 0
    for scene in scenes("train", kind):
        _, velocities, events = simulate(scene)
        momentum = (scene.radii[:, None] ** 2 * velocities).sum(1)
        for frame in range(1, FRAMES):
            contacts = [event for event in events if frame - 1 < event.time <= frame]
            # Walls change the momentum, so a step with such a contact says nothing.
            if all(event.other >= 0 for event in contacts):
                np.testing.assert_allclose(momentum[frame], momentum[frame - 1], rtol=0, atol=1e-15)
                collided += len(contacts)
    # Where nothing collides, momentum is kept anyway.
    assert collided >= 10


def test_head_on_collision_is_the_textbook_one():
    """Balls of masses a and b, velocities v and w: the first leaves with u = ((a - b) v + 2 b w) / (a + b)."""
    radii, before = np.array([0.10, 0.13]), np.array([0.04, -0.01])
    positions, velocities = np.array([[0.2, 0.5], [0.6, 0.5]]), np.stack([before, 0 * before], 1)
    scene = Scene("collision_1d", (0, 1), radii, positions, velocities)
    _, speeds, events = simulate(scene, 6)
    a, b = radii**2
    v, w = before
    after = [((a - b) * v + 2 * b * w) / (a + b), ((b - a) * w + 2 * a * v) / (a + b)]
    np.testing.assert_allclose(speeds[-1, :, 0], after, rtol=1e-12)
    # Centres 0.4 apart that touch at 0.23 and approach at 0.05.
    assert [event.time for event in events] == pytest.approx([(0.4 - 0.23) / 0.05])


def test_ballistic_path_is_a_parabola():
    times = np.arange(FRAMES)[:, None, None]
    fall = np.array([0.0, GRAVITY])
    for scene in scenes("train", "ballistic"):
        path, velocities, events = simulate(scene)
        assert not events
        expected = scene.positions + scene.velocities * times + fall * times**2 / 2
        np.testing.assert_allclose(path, expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(velocities, scene.velocities + fall * times, rtol=0, atol=1e-13)


def test_walls_fold_a_straight_path():
    radius, start, velocity = 0.1, np.array([0.3, 0.7]), np.array([0.31, -0.47])
    path, _, _ = simulate(one_ball("uniform", start, velocity, radius), 40)
    # The centre turns around one radius before each wall, so that its path is a triangle wave.
    room = 1 - 2 * radius
    free = (start + velocity * np.arange(40)[:, None] - radius) / room
    np.testing.assert_allclose(path[:, 0], radius + room * (1 - np.abs(free % 2 - 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MOVING)
def test_elastic_dynamics_run_backward(kind):
    for scene in scenes("train", kind):
        path, velocities, _ = simulate(scene)
        back, _, _ = simulate(replace(scene, positions=path[-1], velocities=-velocities[-1]))
        np.testing.assert_allclose(back[::-1], path, rtol=0, atol=1e-10)


@pytest.mark.parametrize("split, kind", DRAWS)
def test_balls_stay_in_the_box_and_apart(split, kind):
    for scene in scenes(split, kind):
        path, radii = track(scene).positions, scene.radii
        assert (path > radii[:, None] - 1e-9).all()
        assert (path < np.array([1, scene.bottom]) - radii[:, None] + 1e-9).all()
        for first, second in combinations(range(len(radii)), 2):
            distance = np.linalg.norm(path[:, first] - path[:, second], axis=-1)
            assert (distance > radii[first] + radii[second] - 1e-9).all()


def test_soft_walls_take_their_share_of_the_normal_velocity():
    measured = 0
    for scene in scenes("soft", "bounce"):
        _, velocities, events = simulate(scene)
        bounce = next(event for event in events if event.floor)
        frame, ball = int(bounce.time), bounce.ball
        # Another contact between the same two frames would change the velocity as well.
        if sum(frame <= event.time <= frame + 1 for event in events) == 1:
            start, end = velocities[frame, ball], velocities[frame + 1, ball]
            # From the frames to the moment of the contact, by free fall.
            before = start[1] + GRAVITY * (bounce.time - frame)
            after = end[1] - GRAVITY * (frame + 1 - bounce.time)
            assert after == pytest.approx(-0.6 * before, rel=1e-9)
            assert end[0] == start[0]
            measured += 1
    assert measured >= 5


@pytest.mark.parametrize("restitution", [0.25, 0.6])
def test_dropped_ball_comes_to_rest_on_the_floor(restitution):
    path, _, _ = simulate(one_ball("bounce", (0.5, 0.7), (0, 0), restitution=restitution), 60)
    np.testing.assert_allclose(path[-20:, 0], [[0.5, FLOOR - 0.1]] * 20, rtol=0, atol=1e-3)


def test_stack_rests_and_its_balls_touch():
    for scene in scenes("train", "stack"):
        path, radii = track(scene).positions, scene.radii
        assert (path == scene.positions).all()
        assert (path[0, :, 1] + radii).max() == pytest.approx(FLOOR)
        for ball in range(1, len(radii)):
            assert np.linalg.norm(path[0, 0] - path[0, ball]) == pytest.approx(radii[0] + radii[ball])


def test_scene_is_a_function_of_the_generator():
    first, again, other = (sample_scene(numpy_rng(0, "draw", index)) for index in (0, 0, 1))
    # By their text, since arrays cannot be compared with ==.
    assert repr(first) == repr(again)
    assert repr(first) != repr(other)
    np.testing.assert_array_equal(track(first).positions, track(again).positions)


@pytest.mark.parametrize("split, kind", DRAWS)
def test_caption_names_colours_softness_and_sides(split, kind):
    soft = split == "soft"
    for scene in scenes(split, kind):
        words = re.findall(r"\w+", scene.caption)
        colours = [NAMES[colour] for colour in scene.colours]
        assert sorted(word for word in words if word in NAMES) == sorted(colours)
        # Balls are told apart by their colours.
        assert len(set(colours)) == len(colours)
        assert len(colours) == len(scene.radii)
        assert ("soft" in words) == soft
        assert scene.restitution == (0.6 if soft else 1.0)
        if kind in ("ballistic", "occluder"):
            sides = re.findall(r"to the (left|right)", scene.caption)
            assert sides == ["right" if across > 0 else "left" for across in scene.velocities[:, 0]]


@pytest.mark.parametrize("kind", SCENE_KINDS)
def test_caption_says_in_which_ninth_of_the_box_each_ball_starts(kind):
    names = {(0, 1): "top", (2, 1): "bottom", (1, 0): "left", (1, 2): "right", (1, 1): "centre"}
    names |= {(0, 0): "top left", (0, 2): "top right", (2, 0): "bottom left", (2, 2): "bottom right"}
    places = "|".join(sorted(names.values(), key=len, reverse=True))
    for scene in scenes("train", kind):
        said = re.findall(rf"ball at the ({places})\b", scene.caption)
        assert said == [names[int(3 * y), int(3 * x)] for x, y in scene.positions]


def test_every_caption_fits_the_text_encoder():
    from ldo.sandbox.build.base import LENGTH

    for split, kind in DRAWS:
        # One token is the end of the prompt.
        assert max(len(scene.caption.split()) for scene in scenes(split, kind)) < LENGTH


@pytest.mark.parametrize("split, kind", [(split, kind) for split, kind in DRAWS if kind in HELD_OUT_COLOURS])
def test_held_out_colours_lead_only_in_combination(split, kind):
    is_held_out = {NAMES[scene.colours[0]] == HELD_OUT_COLOURS[kind] for scene in scenes(split, kind)}
    assert is_held_out == {split == "combination"}


@pytest.mark.parametrize(
    "split, kinds", [("combination", set(HELD_OUT_COLOURS)), ("soft", {"bounce"}), ("train", set(SCENE_KINDS))]
)
def test_kinds_of_a_split(split, kinds):
    # Many draws: the rarest kind is 6 percent of the mix.
    assert {sample_scene(numpy_rng(1, split, index), split).kind for index in range(120)} == kinds


@pytest.mark.parametrize("kind", SCENE_KINDS)
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
    # One ball moves by 0.5 in the first step, the other one by 0.1 in the second.
    positions = np.array([[[0, 0], [0, 0]], [[0.3, 0.4], [0, 0]], [[0.3, 0.4], [0, 0.1]]])
    clip = replace(track(scenes("train", "collision_1d")[0]), positions=positions)
    assert clip.path_length == pytest.approx(0.6)


@pytest.mark.parametrize("kind", SCENE_KINDS)
@pytest.mark.parametrize("size", [32, 48])
def test_pixels_are_in_range(kind, size):
    frames = render(track(scenes("train", kind)[0]), size)
    assert frames.shape == (FRAMES, 3, size, size)
    assert frames.dtype == np.float32
    assert frames.min() >= 0
    assert frames.max() <= 1


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("radius", [0.07, 0.10, 0.135])
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.513, 0.377), (0.29, 0.618)])
def test_ball_has_its_place_area_and_colour(size, radius, centre):
    scene = one_ball("uniform", centre, (0, 0), radius, colour=2)
    image, bare = render(track(scene, 1), size)[0], world.background(scene, size).transpose(2, 0, 1)
    # A pixel is a mixture of ball and background, from which the ball's share follows.
    cover = ((image - bare) / (PALETTE[2][:, None, None] - bare)).mean(0)
    axis = (np.arange(size) + 0.5) / size
    assert cover.sum() == pytest.approx(np.pi * radius**2 * size**2, rel=0.02)
    centroid = (cover * axis).sum() / cover.sum(), (cover.T * axis).sum() / cover.sum()
    # A tenth of a pixel.
    assert centroid == pytest.approx(centre, abs=0.1 / size)
    np.testing.assert_allclose(image[:, int(centre[1] * size), int(centre[0] * size)], PALETTE[2], rtol=1e-6)


def test_floor_is_drawn_only_under_gravity():
    side = world.background(one_ball("bounce", (0.5, 0.5), (0, 0)), 32)
    table = world.background(one_ball("uniform", (0.5, 0.5), (0, 0)), 32)
    np.testing.assert_allclose(side[30:], np.broadcast_to(world.GROUND, (2, 32, 3)))
    np.testing.assert_allclose(side[:30], np.broadcast_to(world.SIDE, (30, 32, 3)))
    np.testing.assert_allclose(table, np.broadcast_to(world.TABLE, (32, 32, 3)))


def test_block_hides_what_is_behind_it():
    hidden_frames = 0
    for scene in scenes("train", "occluder"):
        clip = track(scene)
        gone = replace(clip, present=np.zeros_like(clip.present))
        seen, without = render(clip), render(gone)
        left, right = clip.positions[..., 0] - scene.radii, clip.positions[..., 0] + scene.radii
        hidden = ((left > OCCLUDER[0]) & (right < OCCLUDER[1])).all(1)
        # By more than a pixel: less than that is almost nothing after anti-aliasing.
        shown = ((left < OCCLUDER[0] - 1 / 32) | (right > OCCLUDER[1] + 1 / 32)).any(1)
        assert (seen[hidden] == without[hidden]).all()
        assert (np.abs(seen - without).max((1, 2, 3))[shown] > 0.1).all()
        block = np.broadcast_to(BLOCK[:, None, None], (FRAMES, 3, 32, 10))
        np.testing.assert_allclose(seen[:, :, :, 11:21], block, rtol=1e-6)
        hidden_frames += hidden.sum()
    assert hidden_frames >= 10
