"""The strict thresholds of the exact metrics: they depend only on the VAE, and are frozen before any other training.

They are the 99th percentile of each metric over valid clips of one kind of scene that went through the VAE. What is
worse than that is not the VAE's doing. They and the visible thresholds, which are constants of ``measure``, are checked
on other clips: false alarms on valid ones, and detection of every corruption.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from rich.progress import track as progress

from ldo.core.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.corrupt import VIOLATIONS
from ldo.sandbox.measure import EXACT_METRICS, Measured, measure
from ldo.sandbox.observe import Prompt
from ldo.sandbox.scenes import SCENE_KINDS

CALIBRATION_CLIPS = 700  # of each kind of scene
QUANTILE = 0.99
CHECKED = 1000  # valid clips that false alarms are counted on
BROKEN = 200  # clips of each corruption


def through_vae(vae: AutoencoderKLWan, clips: list[np.ndarray]) -> list[np.ndarray]:
    """Clips [T, 3, H, W] in [0, 1] as the VAE gives them back."""
    decoded = []
    with torch.no_grad():
        for start in range(0, len(clips), 25):
            batch = torch.from_numpy(np.stack(clips[start : start + 25])).transpose(1, 2) * 2 - 1
            # The mode and not a sample: the thresholds must not depend on random draws.
            pixels = vae.decode(vae.encode(batch).latent_dist.mode()).sample
            decoded += list(((pixels + 1) / 2).clamp(0, 1).transpose(1, 2).numpy())
    return decoded


def _measure_decoded(vae: AutoencoderKLWan, tracks: list[simulate.Track], limits: dict, note: str) -> list[Measured]:
    measured = []
    for start in progress(range(0, len(tracks), 100), note):
        chunk = tracks[start : start + 100]
        videos = through_vae(vae, [simulate.render(track) for track in chunk])
        for video, track in zip(videos, chunk, strict=True):
            measured.append(measure(video, Prompt.of(track.scene), limits))
    return measured


def valid_clips(seed: int, purpose: str, count: int, kind: str | None = None) -> list[simulate.Track]:
    """Valid clips of the training distribution, or of one kind of scene in it."""
    return [simulate.track(scenes.sample_scene(numpy_rng(seed, purpose, index), kind=kind)) for index in range(count)]


def broken_clips(seed: int, kind: str, count: int) -> list[simulate.Track]:
    """Clips broken in one way."""
    clips = []
    index = 0
    while len(clips) < count:
        rng = numpy_rng(seed, f"broken {kind}", index)
        index += 1
        clip = corrupt.corrupt(scenes.sample_scene(rng), rng, kind)
        # Not every scene can be broken in every way: balls swap only behind a block, for example.
        if clip is not None:
            clips.append(clip)
    return clips


def fingerprint(vae: AutoencoderKLWan) -> str:
    """SHA-256 over the VAE's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def calibrate_thresholds(vae: AutoencoderKLWan) -> dict:
    """The content of thresholds.json, with its own check on other clips."""
    thresholds = {}
    least_path = {}
    # One set for each kind of scene: where nothing collides, for example, there is no impact error to allow for.
    for kind in SCENE_KINDS:
        tracks = valid_clips(0, f"thresholds {kind}", CALIBRATION_CLIPS, kind)
        measured = _measure_decoded(vae, tracks, {}, f"thresholds: {kind}")
        thresholds[kind] = {metric: float(np.quantile(_values(measured, metric), QUANTILE)) for metric in EXACT_METRICS}
        least_path[kind] = float(np.quantile([track.path_length for track in tracks], 0.01))
    # measure() takes half of the least path as the limit below which a clip is still.
    limits = {"thresholds": thresholds, "least_path": least_path}

    # Seed 1: clips that the thresholds were not taken from.
    checked = valid_clips(1, "thresholds", CHECKED)
    rows = {
        "ground truth": [measure(simulate.render(track), Prompt.of(track.scene), limits) for track in checked],
        "through the VAE": _measure_decoded(vae, checked, limits, "false alarms"),
    }
    for kind in VIOLATIONS:
        rows[kind] = _measure_decoded(vae, broken_clips(1, kind, BROKEN), limits, kind)
    strict = {name: float(np.mean([bool(clip.violations) for clip in measured])) for name, measured in rows.items()}
    visible = {name: float(np.mean([bool(clip.visible) for clip in measured])) for name, measured in rows.items()}
    table = {}
    for name, measured in rows.items():
        table[name] = {
            "visible_violation_rate": visible[name],
            "violation_rate": strict[name],
            **_means(measured),
        }
    return {
        **limits,
        "clips": CALIBRATION_CLIPS,
        "quantile": QUANTILE,
        "vae": fingerprint(vae),
        "false_alarms": {"visible": visible["through the VAE"], "strict": strict["through the VAE"]},
        "detected": {kind: {"visible": visible[kind], "strict": strict[kind]} for kind in VIOLATIONS},
        "table": table,
    }


def _values(measured: list[Measured], metric: str) -> list[float]:
    return [getattr(clip, metric) for clip in measured]


def _means(measured: list[Measured]) -> dict[str, float]:
    return {metric: round(float(np.mean(_values(measured, metric))), 4) for metric in EXACT_METRICS}
