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
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ldo import align, evaluate, qualify, reinforce, report
from ldo.check import Checked, check
from ldo.config import RecipeError, read
from ldo.distributed import World, barrier, join, leave
from ldo.run import Run, load, start
from ldo.update import TrainingError

DEFAULT = Path(__file__).resolve().parent.parent / "recipes" / "sandbox.yaml"


def run_stages(checked: Checked, world: World) -> None:
    """Run the recipe's stages. TrainingError where one cannot go on."""
    recipe = checked.recipe
    run: Run | None = None
    seconds = {}
    for stage in recipe.stages:
        began = time.monotonic()
        if stage in ("gate", "sft", "align", "reinforce"):
            run = run or load(checked, world)
            if stage == "gate":
                qualify.enforce(run)
            elif stage == "reinforce":
                reinforce.train(run)
            else:
                align.train(run, stage)
        elif world.first:
            if stage == "evaluate":
                evaluate.evaluate(recipe, checked.model, checked.world_model)
            else:
                print(f"report: {report.write(recipe.run)}")
        barrier(world)
        seconds[stage] = time.monotonic() - began
        if world.first:
            print(f"{stage}: done in {seconds[stage]:.0f} s", flush=True)


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
        start(checked, world)
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
