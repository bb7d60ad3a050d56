"""The seven-arm study: the base and six ways to train it, with the same recipe, prompts and seeds."""

from __future__ import annotations

import json
from pathlib import Path

from ldo.core.errors import RecipeError, TrainingError
from ldo.core.recipe_file import read_recipe
from ldo.run.validate import validate
from ldo.sandbox.records import broken_laws
from ldo.stages.arm_statistics import arm_statistics
from ldo.stages.sequence import run_recipe

# Token relation distillation: the teacher sees the whole clip, and one plain mean is taken over all pairs of tokens.
TRD = ("teacher.mode=encode", "teacher.geometry=full", "teacher.weights=uniform")

# Minus the world model's surprise and nothing else: one direction of time, no guards against still or blurred videos.
PLAIN = ("critic.reward=plain", "critic.direction=forward", "critic.motion_weight=0", "critic.sharpness_weight=0")

# name: (stages, overrides, the exported arm that is its result)
STUDY_ARMS = {
    "sft": ("sft", (), "sft"),
    "trd-encode": ("align", TRD, "aligned"),
    "pda-forecast": ("align", (), "aligned"),
    "grpo-plain": ("reinforce", PLAIN, "ldo"),
    "grpo-skill": ("reinforce", (), "ldo"),
    "ldo": ("align,reinforce", (), "ldo"),
}


def run_arms(recipe: str, overrides: list[str], seeds: int) -> dict:
    """Train and sample every arm for every seed; pooled statistics, and each seed's violation rates."""
    base_recipe = read_recipe(recipe, overrides)
    pooled: dict[str, list[dict]] = {"base": []}
    by_seed: dict[str, list[float]] = {}
    for seed in range(base_recipe.seed, base_recipe.seed + seeds):
        for name, (stages, changes, exported_arm) in STUDY_ARMS.items():
            run_name = f"{base_recipe.name}-study-{name}-{seed}"
            run_overrides = [
                *overrides,
                *changes,
                f"name={run_name}",
                f"seed={seed}",
                f"stages=[{stages},evaluate]",
                # a reward that fails the gate is what the plain arm is there to show
                "gate.override=true",
            ]
            try:
                run_recipe(validate(read_recipe(recipe, run_overrides)))
            except (RecipeError, TrainingError) as error:
                raise RecipeError(f"arm {name} did not finish: {error}") from None
            sources = {name: exported_arm}
            # Every run samples the untrained generator too, and with one seed they all give the same: one is enough.
            if name == "sft":
                sources["base"] = "base"
            for label, source in sources.items():
                measured = Path(base_recipe.out) / run_name / "eval" / f"{source}.json"
                records = json.loads(measured.read_text())["moving"]
                violating = sum(bool(broken_laws(record)) for record in records)
                pooled.setdefault(label, []).extend(records)
                by_seed.setdefault(label, []).append(violating / len(records))
    metrics, minus_base = arm_statistics(pooled, base_recipe.evaluate.seeds, base_recipe.seed)
    return {
        "metrics": metrics,
        "minus_base": minus_base,
        "visible_violation_rate_by_seed": by_seed,
        "n_videos": {label: len(records) for label, records in pooled.items()},
    }


def study_table(found: dict) -> str:
    """The study as a Markdown table."""
    lines = [
        "| arm | visible violation rate | minus base | severity | law residual | motion ratio | skill |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, metrics in found["metrics"].items():
        change = found["minus_base"].get(name, {}).get("visible_violation_rate")
        difference = ""
        if change:
            difference = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        means = {metric: f"{value['mean']:.3f}" for metric, value in metrics.items()}
        cells = [
            name,
            means["visible_violation_rate"],
            difference,
            means["severity"],
            means["law_residual"],
            means["motion_ratio"],
            means["reward_skill"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
