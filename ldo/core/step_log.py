"""Where metrics go while a run trains: one JSON line for each step, and the recipe's loggers next to it."""

from __future__ import annotations

import json
from pathlib import Path

from ldo.core.config import Recipe
from ldo.core.files import read_json_lines, write_json_lines
from ldo.core.loggers import Loggers


class StepLog:
    """Metrics of one stage: ``<run>/<stage>.jsonl`` and what ``recipe.log`` names. Only where ``active``.

    Opened at ``step``, it drops every line from that step on, so a resumed run leaves the log of an undisturbed one.
    """

    def __init__(self, run: Path, stage: str, step: int = 0, active: bool = True, recipe: Recipe | None = None):
        self.path, self.active = run / f"{stage}.jsonl", active
        if not active:
            return
        # A killed run may have logged steps after its last checkpoint; it will log them again.
        kept = [row for row in read_json_lines(self.path) if row["step"] < step]
        write_json_lines(self.path, kept)
        self._file = open(self.path, "a")  # noqa: SIM115 - open for as long as the stage runs
        self._loggers = Loggers(recipe or Recipe(), run, stage, step)

    def write(self, step: int, **metrics: float) -> None:
        """Log the metrics of one step."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        # At once, so that a report made during the run sees the last step.
        self._file.flush()
        self._loggers.scalars(step, metrics)

    def close(self) -> None:
        """Close the file and the loggers."""
        if self.active:
            self._file.close()
            self._loggers.close()
