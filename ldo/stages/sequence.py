"""The stages of a run in order, each skipped where the run's folder shows it done."""

from __future__ import annotations

import gc
import time

import torch

from ldo.core.distributed import Processes, barrier, join_processes, leave_processes
from ldo.report.run_report import write_report
from ldo.run.claim import claim_run
from ldo.run.load import load_run
from ldo.run.rules import check_processes
from ldo.run.validate import ValidatedRecipe
from ldo.stages.align import train_align
from ldo.stages.evaluate import evaluate_arms
from ldo.stages.feature_paths import write_feature_paths
from ldo.stages.gate import enforce_gate
from ldo.stages.reinforce import train_reinforce


def run_recipe(validated: ValidatedRecipe) -> None:
    """Join the other processes, claim the run's folder and run the recipe's stages.

    RecipeError where the processes cannot share the work or the folder belongs to another recipe; TrainingError where a
    stage cannot continue.
    """
    recipe = validated.recipe
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    processes = join_processes(recipe.device)
    try:
        check_processes(recipe, processes.size)
        claim_run(recipe, processes)
        if processes.first:
            where = f"{processes.size} x {processes.device.type}"
            print(f"run: {recipe.run}  ({', '.join(recipe.stages)}) on {where}", flush=True)
        run_stages(validated, processes)
    finally:
        leave_processes()


def run_stages(validated: ValidatedRecipe, processes: Processes) -> None:
    """Run the recipe's stages. TrainingError where one cannot continue."""
    recipe = validated.recipe
    run = None
    for stage in recipe.stages:
        began = time.monotonic()
        if stage != "report":
            # Loaded when the first stage asks: a run that only reports needs no model.
            run = run or load_run(validated, processes)
        if stage == "gate":
            enforce_gate(run)
        elif stage in ("sft", "align"):
            train_align(run, stage)
        elif stage == "reinforce":
            train_reinforce(run)
        elif stage == "evaluate":
            if processes.first:
                write_feature_paths(run)
            run = None  # the stock pipelines need the memory
            gc.collect()
            evaluate_arms(recipe, validated.model, validated.world_model, processes)
        elif processes.first:
            print(f"report: {write_report(recipe.run)}")
        barrier(processes)
        if processes.first:
            print(f"{stage}: done in {time.monotonic() - began:.0f} s", flush=True)
