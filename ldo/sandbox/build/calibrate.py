"""The thresholds of the exact metrics: made from the VAE alone, frozen before any other training.

They are the 99th percentile of each metric over valid clips of one kind of scene that went through the VAE: what is
worse than that is not the VAE's doing. Checked on other clips: false alarms on valid ones, detection of every corruption.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from rich.progress import track as progress

from ldo.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate
from ldo.sandbox.measure import METRICS, Measured, measure
from ldo.sandbox.observe import Prompt

CLIPS = 700  # a kind of scene
QUANTILE = 0.99
CHECKED = 1000
BROKEN = 100


def through(vae: AutoencoderKLWan, clips: list[np.ndarray]) -> list[np.ndarray]:
    """Clips as the VAE gives them back."""
    out = []
    with torch.no_grad():
        for i in range(0, len(clips), 25):
            x = torch.from_numpy(np.stack(clips[i : i + 25])).transpose(1, 2) * 2 - 1
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample
            out += list(((y + 1) / 2).clamp(0, 1).transpose(1, 2).numpy())
    return out


def _measured(vae: AutoencoderKLWan, tracks: list[simulate.Track], limits: dict, note: str) -> list[Measured]:
    out = []
    for i in progress(range(0, len(tracks), 100), note):
        part = tracks[i : i + 100]
        frames = through(vae, [simulate.render(t) for t in part])
        out += [measure(f, Prompt.of(t.scene), limits) for f, t in zip(frames, part, strict=True)]
    return out


def valid(seed: int, purpose: str, count: int, kind: str | None = None) -> list[simulate.Track]:
    """Valid clips of the training distribution, or of one kind of scene in it."""
    return [simulate.track(scenes.sample_scene(numpy_rng(seed, purpose, i), kind=kind)) for i in range(count)]


def broken(seed: int, kind: str, count: int) -> list[simulate.Track]:
    """Clips broken in one way."""
    out, index = [], 0
    while len(out) < count:
        rng = numpy_rng(seed, f"broken {kind}", index)
        index += 1
        clip = corrupt.corrupt(scenes.sample_scene(rng), rng, kind)
        out += [clip] if clip is not None else []
    return out


def fingerprint(vae: AutoencoderKLWan) -> str:
    """SHA-256 over the VAE's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode() + value.float().numpy().tobytes())
    return digest.hexdigest()


def thresholds(vae: AutoencoderKLWan) -> dict:
    """The content of thresholds.json, with its own check on other clips."""
    bound, least = {}, {}
    for kind in scenes.KINDS:
        tracks = valid(0, f"thresholds {kind}", CLIPS, kind)
        found = _measured(vae, tracks, {}, f"thresholds: {kind}")
        bound[kind] = {k: float(np.quantile([getattr(m, k) for m in found], QUANTILE)) for k in METRICS}
        least[kind] = float(np.quantile([t.path_length for t in tracks], 0.01))
    limits = {"thresholds": bound, "least_path": least}
    checked = valid(1, "thresholds", CHECKED)
    exact = [measure(simulate.render(t), Prompt.of(t.scene), limits) for t in checked]
    rows = {"ground truth": exact, "through the VAE": _measured(vae, checked, limits, "false alarms")}
    rows |= {kind: _measured(vae, broken(1, kind, BROKEN), limits, kind) for kind in corrupt.KINDS}
    shares = {name: float(np.mean([bool(m.violations) for m in found])) for name, found in rows.items()}
    return {
        **limits,
        "clips": CLIPS,
        "quantile": QUANTILE,
        "vae": fingerprint(vae),
        "false_alarms": shares["through the VAE"],
        "detected": {kind: shares[kind] for kind in corrupt.KINDS},
        "table": {name: {"violation_rate": shares[name], **_means(found)} for name, found in rows.items()},
    }


def _means(found: list[Measured]) -> dict[str, float]:
    return {k: round(float(np.mean([getattr(m, k) for m in found])), 4) for k in METRICS}
