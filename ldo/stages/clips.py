"""Stage 1's material: every clip encoded by the VAE and forecast by the world model, once.

A *row* is one window of one clip. The shipped models' rows are made in batches and kept in memory. Those of real models
lie in the cache (``ldo/stages/cached_clips.py``).
"""

from __future__ import annotations

import hashlib
import json

import torch

from ldo.core.errors import TrainingError
from ldo.core.files import write_text
from ldo.data.folder import Clip
from ldo.method.teacher import make_target
from ldo.run.load import sandbox_clips
from ldo.run.state import Run, in_batches
from ldo.stages.cached_clips import cached_clips
from ldo.stages.encoded_clips import EncodedClips
from ldo.stages.self_clips import sample_own_clips


def prepare_clips(run: Run) -> EncodedClips:
    """All rows of the run's clips, encoded.

    TrainingError where a clip can no longer be read and none may be missing.
    """
    if run.prepared is None:
        clips = _clips(run)
        run.prepared = cached_clips(run, clips) if run.recipe.on_disk else _in_memory(run, clips)
    return run.prepared


def _clips(run: Run) -> list[Clip]:
    """The base model's own samples, the user's videos, or the sandbox's."""
    if run.recipe.data.source == "self":
        return sample_own_clips(run)
    if run.clips is None:
        return sandbox_clips(run)
    _same_as_before(run, run.clips)
    return run.clips


def _same_as_before(run: Run, clips: list[Clip]) -> None:
    """A resumed run must find the clips it began with, or its numbers are those of no run."""
    path = run.folder / "clips.sha256"
    words = [[clip.text, clip.content, clip.size, clip.windows] for clip in clips]
    # The content's hash, not the path: a folder may move, but a clip that was encoded again is another clip.
    now = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    if path.exists() and path.read_text().strip() != now:
        raise TrainingError(
            f"the clips of data.videos are not those that {run.folder} began with; bring them back, or give this run "
            "its own name=..."
        )
    if run.processes.first:
        write_text(path, now + "\n")


def _in_memory(run: Run, clips: list[Clip]) -> EncodedClips:
    latents, targets = [], []
    for rows in in_batches(run, "encode", len(clips)):
        frames = run.frames_of(clips[rows]).to(run.processes.device)
        latents.append(run.generator.encode_video(frames).cpu())
        # On the CPU: latents and targets of all clips together are larger than the sandbox's models.
        targets.append(make_target(run.world_model, frames, run.recipe.teacher).to(torch.device("cpu")))
    whole = {
        "latents": torch.cat(latents),
        "y": torch.cat([target.y_BNE for target in targets]),
        "weight": torch.cat([target.weight_BN for target in targets]),
        "grid": torch.tensor([*targets[0].grid, targets[0].skip]).expand(len(clips), 4),
    }
    return EncodedClips(
        prompts=[clip.text for clip in clips],
        sizes=[clip.size for clip in clips],
        files=[clip.path for clip in clips],
        read=lambda rows: {name: tensor[rows] for name, tensor in whole.items()},
    )
