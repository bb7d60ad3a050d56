"""Evaluation: the bootstrap's intervals, paired over prompts and seeds; what each arm samples, with which adapter."""

import json

import numpy as np
import pytest
import torch

from ldo import evaluate
from ldo.core.errors import RecipeError
from ldo.models import lora
from ldo.stages.arm_statistics import arm_statistics
from ldo.stages.evaluate import evaluate_arms, prompt_lines


def records(violates, path=0.9, reward=0.1):
    """Two seeds a prompt."""
    return [
        {
            "prompt": index // 2,
            "seed": index % 2,
            "text": "a red ball",
            "kind": "uniform",
            "reward_skill": reward + 0.01 * index,
            "reward_plain": -0.2,
            "existence": 1 - 0.1 * bad,
            "law_residual": 0.2 + bad,
            "teleport_rate": 0.0,
            "violations": ["missing"] if bad else [],
            "path_length": path,
            "path_true": 1.0,
        }
        for index, bad in enumerate(violates)
    ]


def test_means_and_intervals():
    bad = np.tile([1, 0, 0, 0], 50)
    metrics, paired = arm_statistics({"base": records(bad)}, 2, 0)
    rate = metrics["base"]["violation_rate"]
    assert rate["mean"] == 0.25 and rate["low"] < 0.25 < rate["high"]
    # a quarter of 100 prompts' two seeds: each pair is (1, 0) or (0, 0), so the seeds drawn decide
    assert rate["low"] > 0.15 and rate["high"] < 0.36
    assert metrics["base"]["motion_ratio"]["mean"] == pytest.approx(0.9)
    assert paired == {}


def test_difference_is_paired():
    """Prompts differ far more than arms do: a paired interval must not see it."""
    bad = np.repeat([1, 0], 60)
    arms = {"base": records(bad, reward=0.0), "ldo": records(bad, reward=0.05)}
    _, paired = arm_statistics(arms, 2, 0)
    change = paired["ldo"]["reward_skill"]
    assert change["mean"] == pytest.approx(0.05) and change["high"] - change["low"] < 1e-9
    assert paired["ldo"]["violation_rate"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_motion_ratio_is_a_ratio_of_sums():
    arm = records([0, 0])
    arm[0] |= {"path_length": 0.0, "path_true": 0.1}
    arm[1] |= {"path_length": 1.0, "path_true": 0.9}
    assert arm_statistics({"base": arm}, 2, 0)[0]["base"]["motion_ratio"]["mean"] == pytest.approx(1.0)


def test_users_own_prompts_have_only_rewards():
    arm = [{"prompt": 0, "seed": seed, "text": "x", "reward_skill": 0.1, "reward_plain": -0.1} for seed in range(2)]
    metrics, _ = arm_statistics({"base": arm}, 2, 0)
    assert set(metrics["base"]) == {"reward_skill", "reward_plain"}


def test_every_arm_sees_the_same_prompts_and_seeds_and_its_own_adapter(open_run):
    run = open_run()
    start = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.5
        for name, value in run.fresh.items()
    }
    run.export("sft", lora.zeros(run.parameters))
    run.export("ldo", start)
    result = evaluate_arms(run.recipe, run.model_path, run.recipe.world_model.path, run.processes)
    read = {arm: json.loads((run.folder / "eval" / f"{arm}.json").read_text()) for arm in ("base", "sft", "ldo")}
    # an adapter of zeros is the base, to the last digit
    assert read["base"] == read["sft"]
    jobs = {arm: [(row["prompt"], row["seed"], row["text"]) for row in found["moving"]] for arm, found in read.items()}
    assert jobs["base"] == jobs["ldo"]
    assert read["base"]["moving"] != read["ldo"]["moving"]
    assert result["n_videos"] == {"base": 8, "sft": 8, "ldo": 8} and set(result["at_rest"]) == {"base", "sft", "ldo"}
    assert len(list((run.folder / "eval" / "ldo").glob("*.mp4"))) == 8


def test_test_prompts_are_not_training_prompts(open_run):
    recipe = open_run(evaluate__count=64).recipe
    train = {json.dumps(line.extra) for line in open_run().prompts}
    assert not train & {json.dumps(line.extra) for line in prompt_lines(recipe)}


def test_command_wants_a_run(tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_too_few_prompts(open_run, tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("a red ball\n")
    with pytest.raises(RecipeError, match=r"evaluate.count is 4, but .* holds 1 prompts"):
        prompt_lines(open_run(evaluate__prompts=str(path)).recipe)
