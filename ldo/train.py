"""Train: ``torchrun -m ldo.train [RECIPE] [a.b=c ...]``, or ``python -m ldo.train`` for one process.

Stages, in order, each skipped where the run's folder shows it done:

    gate       the critic is qualified; a run with a critic that fails stops here
    sft        control: stage 1 without its teacher
    align      stage 1: Predictive Dynamics Alignment
    reinforce  stage 2: GRPO under the critic
    evaluate   every arm sampled by the stock pipeline and measured
    report     report.html and report.json

Killed at any point and started again with the same words, a run goes on from its last checkpoint and ends with the
same numbers.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from ldo.check import Checked, check, check_processes
from ldo.checkpoint import write_text
from ldo.config import Recipe, RecipeError, flat, read, to_dict
from ldo.distributed import World, barrier, join, leave
from ldo.update import TrainingError

HERE = Path(__file__).resolve().parent
# inside the package in a wheel, beside it in a checkout
DEFAULT = (HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes") / "sandbox.yaml"
FREE = ("log", "log_project")  # what a run may change when it is resumed


def claim(recipe: Recipe, world: World) -> None:
    """Claim the run's folder, or find in it the run to resume. RecipeError if it was begun with another recipe."""
    path = recipe.run / "recipe.yaml"
    now = yaml.safe_dump(to_dict(recipe), sort_keys=False)
    if path.exists():
        then, now = yaml.safe_load(path.read_text()), yaml.safe_load(now)
        changed = [k for k, v in flat(now) if dict(flat(then)).get(k) != v and k not in FREE]
        if changed:
            was = dict(flat(then)).get(changed[0], "unset")
            raise RecipeError(f"{recipe.run} was begun with {changed[0]}={was}; give this run its own name=..., or remove that folder")
    elif world.first:
        write_text(path, now)
    barrier(world)


def run_stages(checked: Checked, world: World) -> None:
    """Run the recipe's stages. TrainingError where one cannot go on."""
    # imported once the recipe is known to be sound: the model libraries take seconds
    from ldo import align, evaluate, figure, qualify, reinforce, report
    from ldo.run import load

    recipe = checked.recipe
    run = None
    for stage in recipe.stages:
        began = time.monotonic()
        if stage != "report":
            run = run or load(checked, world)
        if stage == "gate":
            qualify.enforce(run)
        elif stage in ("sft", "align"):
            align.train(run, stage)
        elif stage == "reinforce":
            reinforce.train(run)
        elif stage == "evaluate":
            if world.first:
                figure.write(run)
            run = None  # the stock pipelines need the memory
            gc.collect()
            evaluate.evaluate(recipe, checked.model, checked.world_model, world)
        elif world.first:
            print(f"report: {report.write(recipe.run)}")
        barrier(world)
        if world.first:
            print(f"{stage}: done in {time.monotonic() - began:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.train", description="Run the stages of a recipe.")
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT), help="YAML recipe (default: the sandbox)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the recipe's")
    args = parser.parse_intermixed_args(argv)
    if "=" in args.recipe and not Path(args.recipe).exists():  # overrides alone: the default recipe
        args.recipe, args.overrides = str(DEFAULT), [args.recipe, *args.overrides]
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    try:
        checked = check(read(args.recipe, args.overrides))
        recipe = checked.recipe
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        world = join(recipe.device)
        check_processes(recipe, world.size)
        claim(recipe, world)
        if world.first:
            print(f"run: {recipe.run}  ({', '.join(recipe.stages)}) on {world.size} x {world.device.type}", flush=True)
        run_stages(checked, world)
    except (RecipeError, TrainingError) as error:
        if rank == 0:
            print(f"ldo: {error}", file=sys.stderr)
        return 2
    finally:
        leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
