"""The study: which runs it starts, what it reads from each, and its table."""

import json

import pytest

from ldo.core.errors import TrainingError
from ldo.sandbox.study.__main__ import main
from ldo.stages import study
from ldo.stages.study import STUDY_ARMS, run_arms, study_table
from tests.helpers import recipes


def record(prompt, seed, violates):
    """One video's metrics, as an evaluation writes them."""
    return {
        "prompt": prompt,
        "seed": seed,
        "visible": ["missing"] if violates else [],
        "violations": ["missing"],
        "severity": 1.0 if violates else 0.0,
        "appearance_error": 0.1,
        "reward_skill": 0.2,
        "reward_plain": -0.1,
        "text": "x",
        "existence": 1.0,
        "law_residual": 0.1,
        "teleport_rate": 0.0,
        "path_length": 1.0,
        "path_true": 1.0,
    }


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The recipes that were started; in place of training, the files that a run leaves are written."""
    recipes_started = []

    def train(validated):
        recipe = validated.recipe
        recipes_started.append(recipe)
        # Only the full method's runs are without violations, so that this arm must differ from the base.
        violates = "ldo" not in recipe.name
        moving = [record(prompt, seed, violates) for prompt in range(4) for seed in range(2)]
        for arm in ("base", "sft", "aligned", "ldo"):
            path = recipe.run / "eval" / f"{arm}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"moving": moving, "rest": []}))

    monkeypatch.setattr(study, "run_recipe", train)
    return recipes_started


def test_arms_differ_in_what_their_names_say(started, tmp_path, wan_folder, vjepa_folder):
    path = recipes.write(tmp_path, wan_folder, vjepa_folder)
    results = run_arms(str(path), [], 2)
    # Six arms with two seeds each.
    assert len(started) == 12
    assert {recipe.seed for recipe in started} == {0, 1}
    runs = {}
    for recipe in started:
        if recipe.seed == 0:
            arm = recipe.name.removeprefix("small-study-").rsplit("-", 1)[0]
            runs[arm] = recipe
    assert set(runs) == set(STUDY_ARMS)
    assert runs["trd-encode"].teacher.mode == "encode"
    assert runs["trd-encode"].teacher.geometry == "full"
    assert runs["pda-forecast"].teacher.mode == "forecast"
    assert runs["pda-forecast"].stages == ("align", "evaluate")
    assert runs["grpo-plain"].critic.reward == "plain"
    assert runs["grpo-plain"].critic.direction == "forward"
    assert runs["grpo-skill"].stages == ("reinforce", "evaluate")
    assert runs["ldo"].stages == ("align", "reinforce", "evaluate")
    # Four prompts with two videos each, from both runs of an arm.
    assert results["n_videos"] == dict.fromkeys(["base", *STUDY_ARMS], 16)
    assert results["visible_violation_rate_by_seed"]["ldo"] == [0, 0]
    assert results["visible_violation_rate_by_seed"]["base"] == [1, 1]
    assert results["minus_base"]["ldo"]["visible_violation_rate"]["mean"] == -1
    table = study_table(results)
    # Two lines of header, the base and six arms.
    assert len(table.splitlines()) == 2 + 7
    assert "| ldo | 0.000 | -1.000 [-1.000, -1.000] |" in table


def test_an_arm_that_fails_ends_the_study(monkeypatch, tmp_path, wan_folder, vjepa_folder, capsys):
    def fail(_):
        raise TrainingError("the gradient is not finite")

    monkeypatch.setattr(study, "run_recipe", fail)
    assert main([str(recipes.write(tmp_path, wan_folder, vjepa_folder))]) == 2
    assert "arm sft did not finish: the gradient is not finite" in capsys.readouterr().err
