"""Recipes on the tiny models, and their memory plans."""

import pytest

from ldo.core.recipe_file import read_recipe
from ldo.memory.plan import plan_memory
from tests.helpers import recipes


@pytest.fixture
def recipe(tmp_path, wan_folder, vjepa_folder):
    """Write a recipe with all stages: ``recipe(rl__updates=2)`` is its path."""
    stages = ["gate", "sft", "align", "reinforce", "evaluate"]

    def write(**changes):
        return recipes.write(tmp_path, wan_folder, vjepa_folder, **({"stages": stages} | changes))

    return write


@pytest.fixture
def plan(recipe):
    """The plan of such a recipe: ``plan(gpus=2, rl__updates=2)``."""

    def make(gpus=1, **changes):
        loaded = read_recipe(recipe(**changes))
        return plan_memory(loaded, loaded.model.path, loaded.world_model.path, gpus)

    return make
