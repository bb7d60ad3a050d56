"""Stage 1's material: every clip encoded by the VAE and forecast by the world model, once.

A *row* is one window of one clip. The shipped models' rows are made in batches and kept in memory. Those of real models lie
in the cache: each is encoded alone, so that it does not depend on its neighbours, the ranks share the work, and training
reads the rows of a step when it comes to them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldo import cache, data
from ldo.buckets import Size, bucket_batch
from ldo.checkpoint import write_text
from ldo.distributed import barrier, gather_objects
from ldo.progress import Bar
from ldo.run import Run, in_batches, sandbox_clips
from ldo.selfmode import own_clips
from ldo.teacher import Target, make_target
from ldo.update import TrainingError

log = logging.getLogger(__name__)
CODE = {"latents": 1, "teacher": 1}  # versions of the code that makes rows: raise one, and its entries are made anew
LOST = "clips-lost.jsonl"
TEACHER = ("mode", "window", "context", "stride", "weights")  # what a target depends on


@dataclass(frozen=True)
class Clips:
    """Rows of encoded clips: captions, sizes, files, and ``read``, which gives some rows of one size.

    These are tensors by name: latents [B, C, T, H, W], y [B, N, E], weight [B, N], and grid [B, 4], the target's (t, h, w, skip).
    """

    prompts: list[str]
    sizes: list[Size]
    files: list[Path]
    read: Callable[[Tensor], dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Tensor) -> tuple[Tensor, Target]:
        """Latents and teacher targets of some rows of one size."""
        found = self.read(rows)
        t, h, w, skip = found["grid"][0].tolist()
        return found["latents"], Target(found["y"].float(), found["weight"], (t, h, w), skip)

    def split(self) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to train on and rows held out, by size: of each the last eighth, at most 32.

        A file is not on both sides, unless it makes up half of its bucket.
        """
        train, held = [], []
        for rows in self.buckets():
            cut = max(len(rows) - min(32, len(rows) // 8), 1)
            between = [c for c in range(len(rows) // 2 + 1, cut + 1) if c == len(rows) or self.files[rows[c - 1]] != self.files[rows[c]]]
            cut = between[-1] if between else cut
            train.append(rows[:cut])
            held.append(rows[cut:])
        return train, held

    def buckets(self) -> list[list[int]]:
        """All rows by size."""
        return [[i for i, s in enumerate(self.sizes) if s == size] for size in dict.fromkeys(self.sizes)]


def batch(rows: list[list[int]], seed: int, purpose: str, step: int, size: int) -> Tensor:
    """Which of ``rows`` (by bucket) a step takes [size]: a function of (seed, step) alone, all from one bucket."""
    bucket, index = bucket_batch(seed, purpose, step, size, [len(r) for r in rows])
    return torch.from_numpy(np.array(rows[bucket])[index])


def prepare(run: Run) -> Clips:
    """All rows of the run's clips, encoded. TrainingError where a clip can no longer be read and none may be missing."""
    if run.prepared is None:
        clips = own_clips(run) if run.recipe.data.source == "self" else run.clips
        if clips is None:
            clips = sandbox_clips(run)
        elif run.clips is not None:
            _same_as_before(run, clips)
        run.prepared = _on_disk(run, clips) if run.recipe.on_disk else _in_memory(run, clips)
    return run.prepared


def _same_as_before(run: Run, clips: list[data.Clip]) -> None:
    """A resumed run must find the clips it began with, or its numbers are no run's."""
    path, words = run.folder / "clips.sha256", [[c.text, c.content, c.size, c.windows] for c in clips]
    now = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    if path.exists() and path.read_text().strip() != now:
        raise TrainingError(
            f"the clips of data.videos are not those that {run.folder} began with; bring them back, or give this run its own name=..."
        )
    if run.world.first:
        write_text(path, now + "\n")


def _in_memory(run: Run, clips: list[data.Clip]) -> Clips:
    latents, targets = [], []
    for rows in in_batches(run, "encode", len(clips)):
        frames = run.frames_of(clips[rows]).to(run.world.device)
        latents.append(run.generator.encode_video(frames).cpu())
        targets.append(make_target(run.judge, frames, run.recipe.teacher).to(torch.device("cpu")))
    grid = torch.tensor([*targets[0].grid, targets[0].skip]).expand(len(clips), 4)
    whole = {"latents": torch.cat(latents), "y": torch.cat([t.y_BNE for t in targets]), "weight": torch.cat([t.weight_BN for t in targets])}
    whole["grid"] = grid
    return Clips([c.text for c in clips], [c.size for c in clips], [c.path for c in clips], lambda rows: {k: v[rows] for k, v in whole.items()})


# ---------------------------------------------------------------------------------------------- on disk


def _entries(run: Run, clip: data.Clip, window: int) -> dict[str, Path]:
    """Where the row's two entries lie."""
    recipe, size = run.recipe, clip.size
    piece = {"content": clip.content, "window": window, "size": list(size), "fps": recipe.data.fps, "decoder": recipe.data.decoder}
    keys: dict[str, dict[str, Any]] = {
        "latents": {"model": run.identity("vae"), "family": recipe.model.family, "dtype": recipe.model.dtype},
        "teacher": {"model": run.identity("world"), "dtype": recipe.world_model.dtype, **{k: getattr(recipe.teacher, k) for k in TEACHER}},
    }
    return {kind: cache.entry(recipe.cache, kind, {**piece, **key, "code": CODE[kind], **run.versions}) for kind, key in keys.items()}


def _encode(run: Run, frames: Tensor, entries: dict[str, Path]) -> None:
    """Write those of a row's entries that are not there. Targets are kept in half precision: features are of order 1."""
    frames = frames[None].to(run.world.device)
    for kind, path in entries.items():
        if cache.present(path):
            continue
        if kind == "latents":
            cache.write(path, {"latents": run.generator.encode_video(frames)[0]})
        else:
            target = make_target(run.judge, frames, run.recipe.teacher)
            grid = torch.tensor([*target.grid, target.skip])
            cache.write(path, {"y": target.y_BNE[0].half(), "weight": target.weight_BN[0], "grid": grid})


def _on_disk(run: Run, clips: list[data.Clip]) -> Clips:
    world = run.world
    if world.first:
        cache.tidy(run.recipe.cache)
    prompts = sorted({c.text for c in clips})
    run.texts.store(prompts[world.rank :: world.size])
    before = _left_out(run)
    failed = {k: before[str(clip.path)] for k, clip in enumerate(clips) if str(clip.path) in before}
    mine = [k for k in range(world.rank, len(clips), world.size) if k not in failed]  # dealt out, so that a killed run's rest is even too
    for frames, entries in _ahead(_missing(run, clips, mine, failed)):
        _encode(run, frames, entries)
    failed = {k: reason for part in gather_objects(failed, world) for k, reason in part.items()}  # the same on every rank
    if failed:
        _refuse(run, clips, failed)
    rows = [(clip, w) for k, clip in enumerate(clips) if k not in failed for w in range(clip.windows)]
    if not rows:
        raise TrainingError("no clip is left to train on")
    barrier(world)

    def read(index: Tensor) -> dict[str, Tensor]:
        found = [_row(run, *rows[i]) for i in index.tolist()]
        return {k: torch.stack([f[k] for f in found]) for k in found[0]}

    return Clips([c.text for c, _ in rows], [c.size for c, _ in rows], [c.path for c, _ in rows], read)


def _missing(run: Run, clips: list[data.Clip], mine: list[int], failed: dict[int, str]) -> Iterator[tuple[Tensor, dict[str, Path]]]:
    """Frames and entries of the rows of clips ``mine`` that lack an entry; clips that cannot be read are put into ``failed``."""
    with Bar("encode", len(mine), active=run.world.first) as bar:
        for k in mine:
            entries = [_entries(run, clips[k], w) for w in range(clips[k].windows)]
            wanted = {w for w, paths in enumerate(entries) if not all(map(cache.present, paths.values()))}
            try:
                for w, frames in _windows(run, clips[k], wanted):
                    yield frames, entries[w]
            except ValueError as error:
                failed[k] = str(error)
            bar.advance()


def _windows(run: Run, clip: data.Clip, wanted: set[int]) -> Iterator[tuple[int, Tensor]]:
    return data.load_windows(clip.path, wanted, clip.size, run.recipe.data.fps, run.recipe.data.decoder) if wanted else iter(())


def _row(run: Run, clip: data.Clip, window: int) -> dict[str, Tensor]:
    """A row from the cache; entries lost or damaged since they were made are made again."""
    entries, store = _entries(run, clip, window), run.recipe.cache
    found = {path: cache.read(path) for path in entries.values()}
    bad = [path for path, tensors in found.items() if tensors is None]
    if bad:
        for path in bad:
            path.unlink(missing_ok=True)
        try:
            frames = next(_windows(run, clip, {window}))[1]
        except ValueError as error:
            raise TrainingError(f"{clip.path}: {error}; it is needed again, for its entry in {store} is lost: bring it back") from None
        _encode(run, frames, entries)
        found |= {path: cache.read(path) for path in bad}
    if any(tensors is None for tensors in found.values()):
        raise TrainingError(f"{store} does not keep what is written there; set data.cache to a sound disk")
    return {k: v for tensors in found.values() for k, v in tensors.items()}


def _refuse(run: Run, clips: list[data.Clip], failed: dict[int, str]) -> None:
    """Clips that passed the probe and could not be decoded later: stop, or say that they are left out."""
    k = min(failed)
    words = f"{len(failed)} of {len(clips)} clips can no longer be read, first {clips[k].path}: {failed[k]}"
    if run.recipe.data.bad_clips == "error":
        raise TrainingError(f"{words}; mend them, or go on without by data.bad_clips=skip")
    log.warning("clips: %s; they are left out", words)
    if run.world.first:
        rows = [{"file": str(clips[k].path), "bad": reason} for k, reason in sorted(failed.items())]
        write_text(run.folder / LOST, "".join(json.dumps(row) + "\n" for row in rows))


def _left_out(run: Run) -> dict[str, str]:
    """Clips that this run went on without before, and why: a resumed run does so again, even where a disk has recovered."""
    path = run.folder / LOST
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["file"]: row["bad"] for row in rows}


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made by a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
