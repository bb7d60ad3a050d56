"""Check a recipe before anything loads: ``python -m ldo.check RECIPE [a.b=c ...] [--gpus N --memory 80G]``.

``ldo.train`` runs the same checks first. They take a second; the memory table, which this command adds, takes tens
of seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldo.core.config import DEFAULT_RECIPE
from ldo.core.errors import RecipeError
from ldo.core.recipe_file import read_recipe
from ldo.run.rules import check_processes
from ldo.run.validate import ValidatedRecipe, validate


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    table, verdict, fits = "", "", True
    try:
        validated = validate(read_recipe(arguments.recipe, arguments.overrides))
        # Data parallelism is the one thing that the number of GPUs changes in a recipe's meaning.
        check_processes(validated.recipe, arguments.gpus)
        if not arguments.no_models:
            table, verdict, fits = _memory(validated, arguments.gpus, arguments.memory)
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    print(*_summary(validated), sep="\n")
    print(*filter(None, (table, verdict)), sep="\n")
    print("The recipe is sound." if fits else "The recipe is sound, but too large.")
    return 0 if fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ldo.check",
        description="Check a recipe without loading a model, and print how much memory it needs.",
        epilog="Exit code: 0 sound (and fits, where the memory is known), 1 does not fit, 2 a mistake in the recipe.",
    )
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT_RECIPE))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share the work (default 1)")
    parser.add_argument("--memory", metavar="80G", help="memory of one GPU; default: that of the GPU here, if any")
    parser.add_argument("--no-models", action="store_true", help="leave the memory table out: a second instead of tens")
    return parser


def _memory(validated: ValidatedRecipe, gpus: int, memory: str | None) -> tuple[str, str, bool]:
    """The memory table, whether the recipe fits in words, and whether it does (True where the memory is not known)."""
    # these import the model libraries
    from ldo.memory.advice import memory_table, memory_verdict, parse_memory
    from ldo.memory.plan import gpu_memory_here, plan_memory

    limit = parse_memory(memory) if memory else gpu_memory_here()
    clips = None if validated.clips is None else len(validated.clips)
    memory_plan = plan_memory(validated.recipe, validated.model, validated.world_model, gpus, clips)
    if memory_plan is None:
        unknown = "memory       unknown: these models' configurations are neither here nor shipped; give a folder"
        return unknown, "", True
    table = memory_table(memory_plan)
    if limit is None:
        return table, "", True
    fits, verdict = memory_verdict(memory_plan, limit)
    return table, verdict, fits


def _summary(validated: ValidatedRecipe) -> list[str]:
    """What the recipe will work on, a line each."""
    recipe, geometry = validated.recipe, validated.geometry
    data = recipe.data
    lines = [f"generator    {validated.model}"]
    if geometry:
        latent = geometry.latents(data.frames, data.height, data.width)
        pixels = f"{data.frames} x {data.height} x {data.width} pixels"
        lines.append(f"             {pixels} -> latents {latent} -> {geometry.tokens(latent)} tokens")
        lines.append(f"             {geometry.blocks} blocks of width {geometry.width}")
    lines.append(f"world model  {validated.world_model}")
    for name, items in (("clips", validated.clips), ("prompts", validated.prompts)):
        lines.append(f"{name:12} {'made when the run starts' if items is None else len(items)}")
    attention = recipe.model.attention, recipe.world_model.attention
    chosen = " (auto: chosen on the device, tested and logged)" if "auto" in attention else ""
    lines.append(f"attention    generator {attention[0]}, world model {attention[1]}{chosen}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
