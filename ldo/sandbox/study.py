"""The seven-arm study: ``python -m ldo.sandbox.study [RECIPE] [a.b=c ...] [--seeds 3]``.

Every arm is a run of the same recipe, differing in what its name says; all are sampled on the same prompts and seeds
and compared with the base. Runs resume; the table is written to ``<out>/<name>-study.json`` and printed.

    base         the pretrained generator
    sft          stage 1 without its teacher
    trd-encode   token relation distillation: all pairs alike, the clip's own encoding as target
    pda-forecast stage 1 as LDO does it
    grpo-plain   stage 2 alone, reward minus forward surprise
    grpo-skill   stage 2 alone, skill in both directions of time
    ldo          stage 1, then stage 2 with skill
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ldo.checkpoint import write_text
from ldo.config import RecipeError, read
from ldo.evaluate import statistics
from ldo.train import DEFAULT
from ldo.train import main as train

TRD = ("teacher.mode=encode", "teacher.geometry=full", "teacher.weights=uniform")
PLAIN = ("critic.reward=plain", "critic.direction=forward", "critic.motion_weight=0", "critic.sharpness_weight=0")
# name: (stages, overrides, the exported arm that is its result)
ARMS = {
    "sft": ("sft", (), "sft"),
    "trd-encode": ("align", TRD, "aligned"),
    "pda-forecast": ("align", (), "aligned"),
    "grpo-plain": ("reinforce", PLAIN, "ldo"),
    "grpo-skill": ("reinforce", (), "ldo"),
    "ldo": ("align,reinforce", (), "ldo"),
}


def run_arms(recipe: str, overrides: list[str], seeds: int) -> dict:
    """Train and sample every arm for every seed; pooled statistics, and each seed's violation rates."""
    base = read(recipe, overrides)
    pooled: dict[str, list[dict]] = {"base": []}
    each: dict[str, list[float]] = {}
    for seed in range(base.seed, base.seed + seeds):
        for name, (stages, changes, arm) in ARMS.items():
            run = f"{base.name}-study-{name}-{seed}"
            # a reward that fails the gate is what the plain arm is there to show
            words = [*overrides, *changes, f"name={run}", f"seed={seed}", f"stages=[{stages},evaluate]", "gate.override=true"]
            if train([recipe, *words]) != 0:
                raise RecipeError(f"arm {name} did not finish")
            for label, source in ((name, arm), ("base", "base")) if name == "sft" else ((name, arm),):
                records = json.loads((Path(base.out) / run / "eval" / f"{source}.json").read_text())["moving"]
                pooled.setdefault(label, []).extend(records)
                each.setdefault(label, []).append(sum(bool(r["violations"]) for r in records) / len(records))
    metrics, paired = statistics(pooled, base.evaluate.seeds, base.seed)
    return {"metrics": metrics, "minus_base": paired, "violation_rate_by_seed": each, "n_videos": {k: len(v) for k, v in pooled.items()}}


def table(found: dict) -> str:
    """The study as a Markdown table."""
    lines = ["| arm | violation rate | minus base | law residual | motion ratio | skill |", "| --- | --- | --- | --- | --- | --- |"]
    for name, m in found["metrics"].items():
        change = found["minus_base"].get(name, {}).get("violation_rate")
        words = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]" if change else ""
        cells = [f"{m[k]['mean']:.3f}" for k in ("violation_rate", "law_residual", "motion_ratio", "reward_skill")]
        lines.append(f"| {name} | {cells[0]} | {words} | {cells[1]} | {cells[2]} | {cells[3]} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldo.sandbox.study", description="Train and compare all arms.")
    parser.add_argument("recipe", nargs="?", default=str(DEFAULT))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_intermixed_args(argv)
    try:
        found = run_arms(args.recipe, args.overrides, args.seeds)
    except RecipeError as error:
        print(f"ldo: {error}", file=sys.stderr)
        return 2
    base = read(args.recipe, args.overrides)
    write_text(Path(base.out) / f"{base.name}-study.json", json.dumps(found, indent=1))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
