"""Where metrics can be watched while a run trains: TensorBoard, Weights & Biases, trackio.

A logger takes the metrics of one stage, step by step. The run never depends on one: a logger that fails says so once
and is left out from then on, while the stage's JSON lines (``ldo/core/step_log.py``) continue. A run has one name in
W&B and trackio for as long as its folder exists, so a resumed run continues in the same place; steps repeated after a
kill carry the same numbers.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ldo.core.config import Recipe, to_plain
from ldo.core.errors import RecipeError
from ldo.core.files import write_text

log = logging.getLogger(__name__)


class Logger(Protocol):
    """Metrics of one stage, from the step it was opened at."""

    def scalars(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Events in ``<run>/tensorboard/<stage>``; those from ``step`` on are dropped when a run resumes."""

    def __init__(self, recipe: Recipe, run: Path, stage: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.stage, self.writer = stage, SummaryWriter(str(run / "tensorboard" / stage), purge_step=step)

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(f"{self.stage}/{key}", value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of W&B. Its own step counter only grows, so every stage has an axis of its own, ``<stage>/step``."""

    def __init__(self, recipe: Recipe, run: Path, stage: str, step: int):
        import wandb

        self.stage = stage
        self.run = wandb.init(
            project=recipe.log_project,
            id=run_identity(run),
            name=recipe.name,
            resume="allow",
            reinit="create_new",
            dir=str(run),
            config=to_plain(recipe),
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric(f"{stage}/step")
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({f"{self.stage}/step": step, **{f"{self.stage}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine or in the Space that its own environment variables name."""

    def __init__(self, recipe: Recipe, run: Path, stage: str, step: int):
        import trackio

        self.stage = stage
        self.run = trackio.init(
            project=recipe.log_project,
            name=run_identity(run),
            resume="allow",
            config=to_plain(recipe),
            embed=False,
        )

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({f"{self.stage}/{name}": value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def run_identity(run: Path) -> str:
    """The run's name elsewhere, kept in its folder: a run begun anew in a folder of the same name is another."""
    path = run / "log-id"
    if not path.exists():
        write_text(path, f"{run.name}-{uuid.uuid4().hex[:8]}")
    return path.read_text()


def check_loggers(names: Sequence[str]) -> None:
    """RecipeError where a logger is unknown or not installed."""
    for name in names:
        if name not in LOGGERS:
            raise RecipeError(f"log is {list(names)}; choose from {', '.join(LOGGERS)}, or [] for only JSON lines")
        found = importlib.util.find_spec(name)
        # a mere folder of that name has no origin: wandb leaves one where it was started
        if found is None or found.origin is None:
            raise RecipeError(
                f"log names {name}, which is not installed; pip install 'ldo[{name}]', or take it out of log"
            )


class Loggers:
    """Several loggers as one that cannot fail: a logger that does is reported once and left out."""

    def __init__(self, recipe: Recipe, run: Path, stage: str, step: int = 0):
        self.live: dict[str, Logger] = {}
        for name in recipe.log:
            try:
                self.live[name] = LOGGERS[name](recipe, run, stage, step)
            # Whatever a logging service raises, from a full disk to a lost network: training continues.
            except Exception as error:
                self._lose(name, error)

    def _lose(self, name: str, error: Exception) -> None:
        self.live.pop(name, None)
        log.warning(
            "log: %s failed (%s); the run continues without it",
            name,
            " ".join(str(error).split()) or type(error).__name__,
        )

    def _each(self, call: str, *values) -> None:
        for name, logger in list(self.live.items()):
            try:
                getattr(logger, call)(*values)
            except Exception as error:
                self._lose(name, error)

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        self._each("scalars", step, metrics)

    def close(self) -> None:
        self._each("close")
