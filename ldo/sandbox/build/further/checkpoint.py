"""What a slice of the further training leaves for the next one.

Three files of 7 MiB (weights, average, optimizer) are named after their step, and ``further.json`` names the step that
counts. It is written last, so a slice that is killed while it saves leaves the older files valid.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldo.core.files import write_text
from ldo.sandbox.build.further.settings import Settings
from ldo.sandbox.build.further.step import TrainingState


@dataclass
class TrainingProgress:
    """Where a training stands. ``decay`` is (first step, steps) of the fall to zero, once it is planned."""

    step: int = 0
    decay: tuple[int, int] | None = None
    seconds: float = 0.0  # a step took, in the latest slice

    @property
    def last_step(self) -> int | None:
        """The step that ends the training; None before its decay is planned."""
        return None if self.decay is None else sum(self.decay)

    @property
    def done(self) -> bool:
        return self.last_step is not None and self.step >= self.last_step


def save_training(work: Path, state: TrainingState, progress: TrainingProgress, settings: Settings) -> None:
    """Write the files of ``progress.step``, and delete those of earlier steps."""
    work.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in state.transformer.named_parameters()}
    average = dict(zip(weights, state.average, strict=True))
    files = {
        tensor_file(work, "weights", progress.step): weights,
        tensor_file(work, "average", progress.step): average,
        tensor_file(work, "optimizer", progress.step): state.optimizer.state,
    }
    for path, tensors in files.items():
        save_file(tensors, path)
    record = {"progress": asdict(progress), "settings": asdict(settings)}
    write_text(work / "further.json", json.dumps(record, indent=1))
    for path in work.glob("*.safetensors"):
        if path not in files:
            path.unlink()


def tensor_file(work: Path, part: str, step: int) -> Path:
    """The file of ``part`` (weights, average or optimizer) after ``step`` steps."""
    return work / f"{part}-{step}.safetensors"


def read_training(work: Path) -> tuple[TrainingProgress, Settings] | None:
    """Where the training in ``work`` stands, and its settings; None where there is none."""
    path = work / "further.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    progress = TrainingProgress(**record["progress"])
    # JSON has lists only
    if progress.decay is not None:
        progress.decay = tuple(progress.decay)
    return progress, Settings(**record["settings"])


@torch.no_grad()
def restore_training(work: Path, state: TrainingState, progress: TrainingProgress) -> None:
    """Copy the tensors that ``save_training`` wrote into those of ``state``."""
    weights = _load(work, "weights", progress.step)
    averages = _load(work, "average", progress.step)
    optimizer_state = _load(work, "optimizer", progress.step)
    for (name, parameter), average in zip(state.transformer.named_parameters(), state.average, strict=True):
        parameter.copy_(weights[name])
        average.copy_(averages[name])
    for name, tensor in state.optimizer.state.items():
        tensor.copy_(optimizer_state[name])


def _load(work: Path, part: str, step: int) -> dict[str, Tensor]:
    return load_file(tensor_file(work, part, step))
