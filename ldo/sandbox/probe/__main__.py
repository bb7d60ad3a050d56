"""Where a ball is and how fast it moves, read linearly from features: ``python -m ldo.sandbox.probe``.

The features are V-JEPA's, its forecast's, and those of the aligned block of the base and of each adapter that the run
has exported. The results are written to ``probe.json`` in the run's folder, and their table is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ldo.core.config import DEFAULT_RECIPE
from ldo.core.errors import RecipeError
from ldo.core.files import write_text
from ldo.core.recipe_file import read_recipe


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.probe", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT_RECIPE), help="a YAML file; default: the sandbox's")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="recipe keys to change")
    parser.add_argument("--clips", type=int, default=480, help="clips of one moving ball")
    # Overrides may come before, between and after the options.
    args = parser.parse_intermixed_args(argv)
    try:
        recipe = read_recipe(args.recipe, args.overrides)
        # Here and not above: a mistake in the recipe is reported before PyTorch loads.
        from ldo.core.distributed import Processes
        from ldo.run.load import load_run
        from ldo.run.validate import validate
        from ldo.stages.probe_features import probe_features, probe_table

        run = load_run(validate(recipe), Processes())
        found = probe_features(run, args.clips)
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    write_text(recipe.run / "probe.json", json.dumps(found, indent=1))
    print(probe_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
