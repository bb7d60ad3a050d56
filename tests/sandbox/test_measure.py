"""The exact metrics: about zero on the simulator's own clips, high on every planted violation, blind to nothing they name."""

from functools import cache

import numpy as np
import pytest

from ldo.rng import numpy_rng
from ldo.sandbox import corrupt, simulate
from ldo.sandbox.measure import CAP, METRICS, measure, severity, thresholds, trajectory_error
from ldo.sandbox.observe import Prompt
from ldo.sandbox.scenes import KINDS, sample_scene

CLIPS = 12
# what a perfect clip may measure: pixels tell a centroid to a few hundredths of a pixel
EXACT = {"missing": 0.0, "law_residual": 0.05, "penetration": 0.05, "teleport_rate": 0.0, "colour_error": 0.06, "stillness": 0.0}
BESIDE_THE_BLOCK = 0.3  # law residual where a ball is half hidden in some frames


@cache
def sound(kind):
    return [simulate.track(sample_scene(numpy_rng(5, f"measure {kind}", i), kind=kind)) for i in range(CLIPS)]


def measured(clip):
    return measure(simulate.render(clip), Prompt.of(clip.scene))


@cache
def broken(violation):
    out, index = [], 0
    while len(out) < CLIPS:
        rng = numpy_rng(5, f"measure {violation}", index)
        index += 1
        clip = corrupt.corrupt(sample_scene(rng), rng, violation)
        out += [clip] if clip is not None else []
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_ground_truth_measures_about_zero(kind):
    for clip in sound(kind):
        found = measured(clip)
        limits = EXACT | {"law_residual": BESIDE_THE_BLOCK} if kind == "occluder" else EXACT
        assert {k: v for k, limit in limits.items() if (v := getattr(found, k)) > limit} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_contacts_of_ground_truth_come_out_as_foretold(kind):
    """A chain of contacts multiplies the error of the state before it, so a few clips measure more than nothing."""
    errors = [measured(clip).impact_error for clip in sound(kind)]
    assert np.median(errors) < 0.05 and np.mean(np.array(errors) > 0.3) <= 1 / 12


def test_ground_truth_hardly_ever_violates():
    found = [measured(clip) for kind in KINDS for clip in sound(kind)]
    assert np.mean([bool(m.violations) for m in found]) <= 0.03
    assert all(m.first is None for m in found if not m.violations)


@pytest.mark.parametrize("kind", KINDS)
def test_observed_tracks_are_the_true_ones(kind):
    for clip in sound(kind):
        position, velocity = trajectory_error(simulate.render(clip), clip)
        assert position < 0.15 / 32 and velocity < 0.2 / 32  # box widths; a pixel is 1/32


@pytest.mark.parametrize("kind", KINDS)
def test_path_length_is_the_way_travelled(kind):
    """Also past the block: from where a ball goes in to where it comes out. One that ends hidden was not seen to go on."""
    ways = [(measured(clip).path_length, clip.path_length) for clip in sound(kind)]
    if kind == "occluder":
        assert all(0.45 * true < found < 1.02 * true for found, true in ways) and np.mean([f / t for f, t in ways]) > 0.85
    else:
        assert all(found == pytest.approx(true, rel=0.02, abs=0.01) for found, true in ways)


@pytest.mark.parametrize("violation", corrupt.KINDS)
def test_every_planted_violation_is_found(violation):
    found = [bool(measured(clip).violations) for clip in broken(violation)]
    assert np.mean(found) >= 11 / 12


@pytest.mark.parametrize("violation", ["teleport", "vanish", "colour", "swap"])
def test_first_wrong_frame_is_near_the_event(violation):
    """A ball is seen to be wrong when it comes out from behind the block, not before; a fit of free flight sees ahead by its length."""
    gaps = [measured(c).first - c.event for c in broken(violation) if c.scene.kind != "occluder" and measured(c).first is not None]
    assert all(-7 <= g <= 2 for g in gaps)


@pytest.mark.parametrize(
    ("violation", "metric"),
    [
        ("vanish", "missing"),
        ("float", "law_residual"),
        ("interpenetrate", "penetration"),
        ("colour", "colour_error"),
        ("restitution", "impact_error"),
        ("teleport", "teleport_rate"),
    ],
)
def test_each_violation_shows_in_the_metric_that_names_it(violation, metric):
    assert np.mean([metric in measured(c).violations for c in broken(violation)]) > 0.5


def test_empty_clip_violates_by_all_that_cannot_be_measured():
    clip = sound("ballistic")[0]
    empty = np.repeat(simulate.background(clip.scene, 32).transpose(2, 0, 1)[None].astype(np.float32), len(clip.positions), 0)
    found = measure(empty, Prompt.of(clip.scene))
    assert found.missing == 1 and found.law_residual == CAP and found.colour_error == CAP and found.stillness == 1


def test_a_still_clip_of_a_moving_scene_violates():
    frames = simulate.render(sound("uniform")[0])
    found = measure(np.repeat(frames[:1], len(frames), 0), Prompt.of(sound("uniform")[0].scene))
    assert found.stillness == 1 and "stillness" in found.violations


def test_severity_orders_sound_and_broken():
    fine = np.mean([severity(measured(c), "bounce") for c in sound("bounce")])
    bad = np.mean([severity(measured(c), c.scene.kind) for c in broken("vanish")])
    assert bad > 2 * fine and bad > fine + 1.5


def test_frozen_thresholds_hold_what_they_promise():
    """The file is made by the build, on clips other than those that set the thresholds."""
    found = thresholds()
    assert found["clips"] >= 500 and found["quantile"] >= 0.99 and set(found["detected"]) == set(corrupt.KINDS)
    assert set(found["thresholds"]) == set(KINDS) and all(set(v) == set(METRICS) for v in found["thresholds"].values())
    assert found["false_alarms"] <= 0.05
    assert min(found["detected"].values()) >= 0.95


def test_thresholds_were_made_with_the_shipped_vae():
    from diffusers import AutoencoderKLWan

    from ldo.sandbox.build.calibrate import fingerprint
    from ldo.sandbox.dataset import GENERATOR

    assert fingerprint(AutoencoderKLWan.from_pretrained(GENERATOR, subfolder="vae")) == thresholds()["vae"]
