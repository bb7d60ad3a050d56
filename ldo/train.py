"""Train: ``torchrun -m ldo.train [RECIPE] [a.b=c ...]``, or ``python -m ldo.train`` for one process.

Stages, in order, each skipped where the run's folder shows it done:

    gate       the critic is qualified; a run whose critic fails stops here
    sft        control: stage 1 without its teacher
    align      stage 1: Predictive Dynamics Alignment
    reinforce  stage 2: GRPO under the critic
    evaluate   every arm is sampled by the stock pipeline and measured
    report     report.html and report.json

If it is killed, the same command continues from the last checkpoint and ends with the same numbers.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldo.core.config import DEFAULT_RECIPE
from ldo.core.errors import RecipeError, TrainingError
from ldo.core.recipe_file import read_recipe
from ldo.run.validate import validate


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.train", description="Run the stages of a recipe.")
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT_RECIPE), help="YAML recipe (default: the sandbox)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    if "=" in arguments.recipe and not Path(arguments.recipe).exists():  # only overrides: the default recipe is meant
        arguments.recipe, arguments.overrides = str(DEFAULT_RECIPE), [arguments.recipe, *arguments.overrides]
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    try:
        validated = validate(read_recipe(arguments.recipe, arguments.overrides))
        # PyTorch and the model libraries take seconds to import, so a mistake in the recipe is reported before them
        from ldo.stages.sequence import run_recipe

        run_recipe(validated)
    except (RecipeError, TrainingError) as error:
        if rank == 0:
            print(f"ldo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
