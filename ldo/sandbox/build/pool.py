"""Large sets of rendered clips, made once and memory-mapped.

``mix``   what the base generator and its VAE learn from: training scenes, a share of which break physics.
``valid`` what the world model learns from: valid clips of every split, walls of restitution 1 and 0.6 alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track as progress

from ldo.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate

SIZE = 32
_CHUNK = 500


def mix_clip(seed: int, index: int) -> simulate.Track:
    """Clip ``index`` of the base generator's pretraining mix."""
    return corrupt.mixed(numpy_rng(seed, "mix", index))


def valid_clip(seed: int, index: int) -> simulate.Track:
    """Clip ``index`` of the world model's diet."""
    rng = numpy_rng(seed, "valid", index)
    scene = scenes.sample_scene(rng, str(rng.choice(["train", "ood", "combination"], p=[0.6, 0.25, 0.15])))
    if scene.kind == "bounce" and rng.random() < 0.5:
        scene = scenes.with_restitution(scene, 0.6) or scene
    return simulate.track(scene)


def _chunk(make: Callable[[int, int], simulate.Track], seed: int, start: int, stop: int) -> tuple[np.ndarray, list[str]]:
    clips = [make(seed, i) for i in range(start, stop)]
    frames = np.stack([np.round(simulate.render(c, SIZE) * 255).astype(np.uint8) for c in clips])
    return frames, [c.scene.caption for c in clips]


def pool(folder: Path, name: str, count: int, seed: int = 0, workers: int = 2) -> tuple[np.ndarray, list[str]]:
    """Frames [count, T, 3, H, W] uint8 (memory-mapped) and captions; made on first use, the same for the same arguments."""
    make = {"mix": mix_clip, "valid": valid_clip}[name]
    path = folder / f"pool-{name}-{count}-{seed}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        frames = np.lib.format.open_memmap(part, "w+", np.uint8, (count, simulate.FRAMES, 3, SIZE, SIZE))
        captions: list[str] = []
        starts = list(range(0, count, _CHUNK))
        stops = [min(s + _CHUNK, count) for s in starts]
        with ProcessPoolExecutor(workers) as workers_pool:
            chunks = workers_pool.map(partial(_chunk, make, seed), starts, stops)
            for start, stop, (pixels, texts) in progress(zip(starts, stops, chunks, strict=True), f"clips: {name}", len(starts)):
                frames[start:stop] = pixels
                captions += texts
        frames.flush()
        path.with_suffix(".json").write_text(json.dumps(captions))
        part.rename(path)
    return np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())
