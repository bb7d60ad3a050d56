"""Large sets of rendered clips, rendered once and memory-mapped.

``mix``    what the base generator and its VAE learn from: training scenes, a share of which break physics.
``valid``  what the world model learns from: valid clips of every split, with walls of restitution 1 and 0.6.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track as progress

from ldo.core.rng import numpy_rng
from ldo.sandbox import corrupt, scenes, simulate

SIZE = 32  # pixels of a side
# Clips that a worker renders at a time: enough that sending them back costs little, few enough for a moving bar.
_CHUNK = 500


def mix_clip(seed: int, index: int) -> simulate.Track:
    """Clip ``index`` of the mix that the base generator is pretrained on."""
    return corrupt.mixed(numpy_rng(seed, "mix", index))


def valid_clip(seed: int, index: int) -> simulate.Track:
    """Clip ``index`` of what the world model is trained on."""
    rng = numpy_rng(seed, "valid", index)
    split = str(rng.choice(["train", "ood", "combination"], p=[0.6, 0.25, 0.15]))
    scene = scenes.sample_scene(rng, split)
    # Softer walls are valid physics too, and the world model must not take them for a violation. Where balls would
    # meet after the softer bounce, the scene stays as it was drawn.
    if scene.kind == "bounce" and rng.random() < 0.5:
        scene = scenes.with_restitution(scene, 0.6) or scene
    return simulate.track(scene)


def _render_chunk(
    make: Callable[[int, int], simulate.Track], seed: int, start: int, stop: int
) -> tuple[np.ndarray, list[str]]:
    clips = [make(seed, index) for index in range(start, stop)]
    rendered = [np.round(simulate.render(clip, SIZE) * 255).astype(np.uint8) for clip in clips]
    return np.stack(rendered), [clip.scene.caption for clip in clips]


def pool(folder: Path, name: str, count: int, seed: int = 0, workers: int = 2) -> tuple[np.ndarray, list[str]]:
    """Frames [count, T, 3, H, W] uint8 (memory-mapped) and captions of the set ``name``.

    Rendered on first use. The same arguments give the same clips, whatever the number of ``workers``.
    """
    make_clip = {"mix": mix_clip, "valid": valid_clip}[name]
    path = folder / f"pool-{name}-{scenes.WORLD_VERSION}-{count}-{seed}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        # Written straight to the file: 100,000 clips are 5 GB.
        frames = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, simulate.FRAMES, 3, SIZE, SIZE))
        captions: list[str] = []
        starts = list(range(0, count, _CHUNK))
        stops = [min(start + _CHUNK, count) for start in starts]
        with ProcessPoolExecutor(workers) as executor:
            chunks = executor.map(partial(_render_chunk, make_clip, seed), starts, stops)
            rendered_chunks = zip(starts, stops, chunks, strict=True)
            for start, stop, (pixels, chunk_captions) in progress(rendered_chunks, f"clips: {name}", len(starts)):
                frames[start:stop] = pixels
                captions += chunk_captions
        frames.flush()
        # The captions come before the rename: where the frames have their final name, the set is complete.
        path.with_suffix(".json").write_text(json.dumps(captions))
        temporary.rename(path)
    return np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())
