"""The seven-arm study: ``python -m ldo.sandbox.study [RECIPE] [a.b=c ...] [--seeds 3]``.

The results are written to ``<out>/<name>-study.json``, and their table is printed. ``ldo/stages/study.py`` says what
the arms are.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ldo.core.config import DEFAULT_RECIPE
from ldo.core.errors import RecipeError
from ldo.core.files import write_text
from ldo.core.recipe_file import read_recipe


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.study", description="Train and compare all arms.")
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT_RECIPE), help="a YAML file; default: the sandbox's")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="recipe keys to change")
    parser.add_argument("--seeds", type=int, default=1, help="how often each arm is trained, from the recipe's seed on")
    # Overrides may come before, between and after the options.
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        base_recipe = read_recipe(args.recipe, args.overrides)
        # Here and not above: a mistake in the recipe is reported before PyTorch loads.
        from ldo.stages.study import run_arms, study_table

        results = run_arms(args.recipe, args.overrides, args.seeds)
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    write_text(Path(base_recipe.out) / f"{base_recipe.name}-study.json", json.dumps(results, indent=1))
    print(study_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
