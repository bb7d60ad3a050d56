"""A run: its folder, its models and its data, loaded once and handed to every stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ldo.core.batch_sizes import PREPARED_CLIPS
from ldo.core.config import Recipe
from ldo.core.distributed import Processes, barrier
from ldo.core.progress import batches
from ldo.data.captions import PromptLine
from ldo.data.file_facts import model_identity
from ldo.data.folder import Clip, read_folder
from ldo.data.frames import load_frames
from ldo.models import lora
from ldo.models.generator.protocol import Generator
from ldo.models.world_model import WorldModel
from ldo.run.prompts import Texts

log = logging.getLogger(__name__)
# files of a model folder that decide what a part of it makes
IDENTITY_FILES = {
    "vae": ("vae/*",),
    "text": ("text_encoder*/*", "tokenizer*/*"),
    "world": ("*.json", "*.safetensors", "*.bin"),
}


@dataclass
class Run:
    """What the stages work on. ``parameters`` are the adapter's, by exported name; ``fresh`` their first values."""

    recipe: Recipe
    processes: Processes
    generator: Generator
    world_model: WorldModel
    parameters: dict[str, nn.Parameter]
    fresh: dict[str, Tensor]
    prompts: list[PromptLine]
    model_path: str
    clips: list[Clip] | None = None
    prepared: Any = None  # stage 1's encoded clips, made on first use
    world_model_path: str = ""
    _identities: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.run

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return self.recipe.seed

    @cached_property
    def texts(self) -> Texts:
        """Prompt embeddings."""

        def source() -> dict[str, str]:
            return {"model": self.identity("text"), **self.versions}

        return Texts(self.generator, self.recipe, self.processes.device, source)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries whose code encodes."""
        return {name: version(name) for name in ("torch", "diffusers", "transformers")}

    def identity(self, part: str) -> str:
        """SHA-256 of the files that a part of the models is made of: "vae", "text" or "world"."""
        if part not in self._identities:
            path = Path(self.world_model_path if part == "world" else self.model_path)
            # a Hub name; its files have been downloaded by now
            if not path.is_dir():
                # By content, not by name: a Hub repository can change under its name, and the cache must not mix two
                # versions.
                path = Path(snapshot_download(str(path), local_files_only=True))
            self._identities[part] = model_identity(path, IDENTITY_FILES[part], self.recipe.cache)
        return self._identities[part]

    def checkpoint(self, stage: str) -> Path:
        """The file that a stage resumes from."""
        return self.folder / "checkpoints" / f"{stage}.pt"

    def lora_folder(self, stage: str) -> Path:
        """The folder that an adapter is exported to."""
        return self.folder / "lora" / stage

    def export(self, stage: str, values: dict[str, Tensor]) -> None:
        """Write an adapter for the stock pipeline and for ComfyUI."""
        if self.processes.first:
            generator, adapter = self.generator, self.recipe.lora
            # ComfyUI reads other names than diffusers, and alphas as tensors: one file cannot serve both.
            comfy = {name: generator.comfy_names(lora.of(values, name)) for name in generator.transformers}
            folder = self.lora_folder(stage)
            lora.export(folder, values, adapter.rank, adapter.alpha, generator.lora_targets, comfy)
        barrier(self.processes)

    def read_own(self, folder: Path) -> list[Clip]:
        """Clips that were written here, in the one size of the recipe; every one must be sound."""
        # The user's choices for a folder of videos do not apply to clips that we made.
        plain = self.recipe.data.changed(buckets=(), caption="", windows="first", bad_clips="error")
        return read_folder(folder, plain, self.recipe.cache)

    def frames_of(self, clips: list[Clip]) -> Tensor:
        """Frames [B, T, 3, H, W] in [0, 1] of clips, in the recipe's size and at its rate."""
        data = self.recipe.data
        return torch.stack([load_frames(clip, data.frames, data.height, data.width, data.fps) for clip in clips])


def in_batches(run: Run, name: str, count: int, size: int = PREPARED_CLIPS) -> Iterator[slice]:
    """Slices of a long preparation, with a bar on the first rank."""
    return batches(name, count, size, active=run.processes.first)
