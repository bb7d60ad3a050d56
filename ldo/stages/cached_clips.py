"""Rows of real models' clips in the cache on disk, where every later run finds them.

Each row is encoded on its own, so that it does not depend on its neighbours; the ranks share the work, and training
reads the rows of a step when it comes to them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldo.core.distributed import barrier, gather_objects
from ldo.core.errors import TrainingError
from ldo.core.files import read_json_lines, write_json_lines
from ldo.core.progress import Bar
from ldo.data.cache import entry_path, has_entry, read_entry, remove_leftovers, write_entry
from ldo.data.folder import Clip
from ldo.data.frames import load_windows
from ldo.method.teacher import make_target
from ldo.run.state import Run
from ldo.stages.encoded_clips import EncodedClips

log = logging.getLogger(__name__)
# versions of the code that makes rows: raise one, and its entries are made anew
CODE_VERSIONS = {"latents": 1, "teacher": 1}
LOST_CLIPS = "clips-lost.jsonl"
TARGET_KEYS = ("mode", "window", "context", "stride", "weights")  # what a target depends on


@dataclass(frozen=True)
class Row:
    """One window of one clip."""

    clip: Clip
    window: int


def cached_clips(run: Run, clips: list[Clip]) -> EncodedClips:
    """All rows of the clips, those missing from the cache encoded now.

    TrainingError where a clip can no longer be read and none may be missing, and where none is left.
    """
    processes = run.processes
    if processes.first:
        remove_leftovers(run.recipe.cache)
    prompts = sorted({clip.text for clip in clips})
    # Prompts before clips: they are few, and a text encoder that does not fit fails at once.
    run.texts.store(prompts[processes.rank :: processes.size])
    failed = _encode_missing(run, clips)
    if failed:
        _report_failed(run, clips, failed)
    rows = [
        Row(clip, window) for index, clip in enumerate(clips) if index not in failed for window in range(clip.windows)
    ]
    if not rows:
        raise TrainingError("no clip is left to train on")
    barrier(processes)

    def read(index: Tensor) -> dict[str, Tensor]:
        found = [_read_row(run, rows[number]) for number in index.tolist()]
        return {name: torch.stack([tensors[name] for tensors in found]) for name in found[0]}

    return EncodedClips(
        prompts=[row.clip.text for row in rows],
        sizes=[row.clip.size for row in rows],
        files=[row.clip.path for row in rows],
        read=read,
    )


# ---------------------------------------------------------------------------------------------- rows


def _entries(run: Run, row: Row) -> dict[str, Path]:
    """Where the row's two entries lie: their names say everything that their values depend on."""
    recipe, clip = run.recipe, row.clip
    piece = {
        "content": clip.content,
        "window": row.window,
        "size": list(clip.size),
        "fps": recipe.data.fps,
        "decoder": "pyav",  # kept in the key, so that entries of older versions stay valid
    }
    keys: dict[str, dict[str, Any]] = {
        "latents": {"model": run.identity("vae"), "family": recipe.model.family, "dtype": recipe.model.dtype},
        "teacher": {
            "model": run.identity("world"),
            "dtype": recipe.world_model.dtype,
            **{key: getattr(recipe.teacher, key) for key in TARGET_KEYS},
        },
    }
    entries = {}
    for kind, key in keys.items():
        whole = {**piece, **key, "code": CODE_VERSIONS[kind], **run.versions}
        entries[kind] = entry_path(recipe.cache, kind, whole)
    return entries


def _encode_row(run: Run, frames: Tensor, entries: dict[str, Path]) -> None:
    """Write those of a row's entries that are not there.

    Targets are kept in half precision: features are of order 1.
    """
    frames = frames[None].to(run.processes.device)
    if not has_entry(entries["latents"]):
        write_entry(entries["latents"], {"latents": run.generator.encode_video(frames)[0]})
    if not has_entry(entries["teacher"]):
        target = make_target(run.world_model, frames, run.recipe.teacher)
        grid = torch.tensor([*target.grid, target.skip])
        write_entry(entries["teacher"], {"y": target.y_BNE[0].half(), "weight": target.weight_BN[0], "grid": grid})


def _read_row(run: Run, row: Row) -> dict[str, Tensor]:
    """A row from the cache; entries lost or damaged since they were made are made again."""
    entries, store = _entries(run, row), run.recipe.cache
    found = {path: read_entry(path) for path in entries.values()}
    damaged = [path for path, tensors in found.items() if tensors is None]
    if damaged:
        for path in damaged:
            # A damaged entry must go first: has_entry looks at names and lengths only and would keep it.
            path.unlink(missing_ok=True)
        try:
            _, frames = next(_window_frames(run, row.clip, {row.window}))
        except ValueError as error:
            raise TrainingError(
                f"{row.clip.path}: {error}; it is needed again, for its entry in {store} is lost: bring it back"
            ) from None
        _encode_row(run, frames, entries)
        found |= {path: read_entry(path) for path in damaged}
    if any(tensors is None for tensors in found.values()):
        raise TrainingError(f"{store} does not keep what is written there; set data.cache to a sound disk")
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()}


def _window_frames(run: Run, clip: Clip, wanted: set[int]) -> Iterator[tuple[int, Tensor]]:
    return load_windows(clip.path, wanted, clip.size, run.recipe.data.fps) if wanted else iter(())


# -------------------------------------------------------------------------------- encoding what is missing


def _encode_missing(run: Run, clips: list[Clip]) -> dict[int, str]:
    """Encode this rank's share of the clips; returns which clips of all ranks cannot be read, and why."""
    processes = run.processes
    before = _lost_before(run)
    failed = {index: before[str(clip.path)] for index, clip in enumerate(clips) if str(clip.path) in before}
    # dealt out like cards, so that the rest of a killed run is even too
    dealt = range(processes.rank, len(clips), processes.size)
    own = [index for index in dealt if index not in failed]
    for frames, entries in _ahead(_missing(run, clips, own, failed)):
        _encode_row(run, frames, entries)
    together: dict[int, str] = {}
    for of_rank in gather_objects(failed, processes):
        together |= of_rank
    return together


def _missing(
    run: Run, clips: list[Clip], own: list[int], failed: dict[int, str]
) -> Iterator[tuple[Tensor, dict[str, Path]]]:
    """Frames and entries of the rows of clips ``own`` that lack an entry.

    Clips that cannot be read are put into ``failed``.
    """
    with Bar("encode", len(own), active=run.processes.first) as progress_bar:
        for index in own:
            clip = clips[index]
            entries = [_entries(run, Row(clip, window)) for window in range(clip.windows)]
            wanted = {window for window, paths in enumerate(entries) if not all(map(has_entry, paths.values()))}
            try:
                # One pass through the file for all windows that are missing: seeking is slow and, in some formats,
                # inexact.
                for window, frames in _window_frames(run, clip, wanted):
                    yield frames, entries[window]
            except ValueError as error:
                failed[index] = str(error)
            progress_bar.advance()


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made by a thread while the one before is in use: decoding hides behind encoding."""
    with ThreadPoolExecutor(1) as pool:
        # Submitted before the present item is handed out, so that the next is decoded while this one is encoded.
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


# ---------------------------------------------------------------------------------------------- clips that were lost


def _report_failed(run: Run, clips: list[Clip], failed: dict[int, str]) -> None:
    """Clips that passed the probe and could not be decoded later: stop, or say that they are left out."""
    first = min(failed)
    words = f"{len(failed)} of {len(clips)} clips can no longer be read, first {clips[first].path}: {failed[first]}"
    if run.recipe.data.bad_clips == "error":
        raise TrainingError(f"{words}; fix them, or continue without them by data.bad_clips=skip")
    log.warning("clips: %s; they are left out", words)
    if run.processes.first:
        rows = [{"file": str(clips[index].path), "bad": reason} for index, reason in sorted(failed.items())]
        write_json_lines(run.folder / LOST_CLIPS, rows)


def _lost_before(run: Run) -> dict[str, str]:
    """Clips that this run continued without before, and why.

    A resumed run does so again, even where a disk has recovered: its numbers are those of the clips it began with.
    """
    return {row["file"]: row["bad"] for row in read_json_lines(run.folder / LOST_CLIPS)}
