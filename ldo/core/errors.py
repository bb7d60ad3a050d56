"""What a user can cause, and what can end a run."""

from __future__ import annotations


class RecipeError(ValueError):
    """A mistake in a recipe, a path or a dataset that the user can fix; its message is one line."""


class TrainingError(RuntimeError):
    """Training cannot continue; the last checkpoint is intact."""
