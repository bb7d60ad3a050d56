"""The study: which runs it starts, what it takes from each, and its table."""

import json

import pytest

import recipes
from ldo.config import read
from ldo.sandbox import study


def record(prompt, seed, bad):
    fixed = {"text": "x", "existence": 1.0, "law_residual": 0.1, "teleport_rate": 0.0, "path_length": 1.0, "path_true": 1.0}
    return {"prompt": prompt, "seed": seed, "violations": ["missing"] * bad, "reward_skill": 0.2, "reward_plain": -0.1, **fixed}


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Stands in for training: notes the recipes and leaves what a run would."""
    begun = []

    def train(words):
        recipe = read(words[0], words[1:])
        begun.append(recipe)
        bad = "ldo" not in recipe.name
        for arm in ("base", "sft", "aligned", "ldo"):
            path = recipe.run / "eval" / f"{arm}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"moving": [record(p, s, bad) for p in range(4) for s in range(2)], "rest": []}))
        return 0

    monkeypatch.setattr(study, "train", train)
    return begun


def test_arms_differ_in_what_their_names_say(started, tmp_path, wan_folder, vjepa_folder):
    path = recipes.write(tmp_path, wan_folder, vjepa_folder)
    found = study.run_arms(str(path), [], 2)
    assert len(started) == 12 and {r.seed for r in started} == {0, 1}
    runs = {r.name.removeprefix("small-study-").rsplit("-", 1)[0]: r for r in started if r.seed == 0}
    assert set(runs) == set(study.ARMS)
    assert runs["trd-encode"].teacher.mode == "encode" and runs["trd-encode"].teacher.geometry == "full"
    assert runs["pda-forecast"].teacher.mode == "forecast" and runs["pda-forecast"].stages == ("align", "evaluate")
    assert runs["grpo-plain"].critic.reward == "plain" and runs["grpo-plain"].critic.direction == "forward"
    assert runs["grpo-skill"].stages == ("reinforce", "evaluate") and runs["ldo"].stages == ("align", "reinforce", "evaluate")
    assert found["n_videos"] == dict.fromkeys(["base", *study.ARMS], 16)
    assert found["violation_rate_by_seed"]["ldo"] == [0, 0] and found["violation_rate_by_seed"]["base"] == [1, 1]
    assert found["minus_base"]["ldo"]["violation_rate"]["mean"] == -1
    table = study.table(found)
    assert len(table.splitlines()) == 2 + 7 and "| ldo | 0.000 | -1.000 [-1.000, -1.000] |" in table


def test_an_arm_that_fails_ends_the_study(monkeypatch, tmp_path, wan_folder, vjepa_folder, capsys):
    monkeypatch.setattr(study, "train", lambda _: 2)
    assert study.main([str(recipes.write(tmp_path, wan_folder, vjepa_folder))]) == 2
    assert "arm sft did not finish" in capsys.readouterr().err
