"""Claiming the folder of a run, so that no run continues with the numbers of another."""

from __future__ import annotations

import yaml

from ldo.core.config import Recipe, flat_items, to_plain
from ldo.core.distributed import Processes, barrier
from ldo.core.errors import RecipeError
from ldo.core.files import write_text

FREE = ("log", "log_project")  # what a run may change when it is resumed


def claim_run(recipe: Recipe, processes: Processes) -> None:
    """Claim the run's folder, or find in it the run to resume. RecipeError if it was begun with another recipe."""
    path = recipe.run / "recipe.yaml"
    now = to_plain(recipe)
    if path.exists():
        # Compared key by key, so that the message can name the first one; the rest of the run's meaning is in its
        # checkpoints.
        before = dict(flat_items(yaml.safe_load(path.read_text())))
        for key, value in flat_items(now):
            if key not in FREE and before.get(key) != value:
                raise RecipeError(
                    f"{recipe.run} was begun with {key}={before.get(key, 'unset')}; give this run its own name=..., "
                    "or remove that folder"
                )
    elif processes.first:
        write_text(path, yaml.safe_dump(now, sort_keys=False))
    barrier(processes)
