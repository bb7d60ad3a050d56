"""Sample every arm of a run with the stock pipeline and measure it: ``python -m ldo.evaluate RUN``.

Arms: base, sft, aligned, ldo. Metrics come with 95% intervals from a paired bootstrap over prompts and seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldo.core.errors import RecipeError
from ldo.core.recipe_file import read_recipe
from ldo.run.validate import validate


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ldo.evaluate", description="Sample and measure every arm of a run."
    )
    parser.add_argument("run", help="folder of a run, e.g. runs/sandbox")
    arguments = parser.parse_args(argv)
    try:
        path = Path(arguments.run) / "recipe.yaml"
        if not path.is_file():
            raise RecipeError(f"{arguments.run} is not the folder of a run: it has no recipe.yaml")
        validated = validate(read_recipe(path))
        from ldo.core.distributed import join_processes
        from ldo.stages.evaluate import evaluate_arms

        recipe = validated.recipe
        result = evaluate_arms(recipe, validated.model, validated.world_model, join_processes(recipe.device))
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    for arm, metrics in result["metrics"].items():
        values = (
            f"{name} {found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" for name, found in metrics.items()
        )
        print(f"{arm:8}", "  ".join(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
