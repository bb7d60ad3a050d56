"""The gate: the shipped V-JEPA passes with the shipped recipe's critic, a random one fails, and the verdict says why."""

import numpy as np
import pytest

from ldo import gate
from ldo.config import Critic, Gate, read
from ldo.sandbox.dataset import WORLD_MODEL
from ldo.train import DEFAULT
from ldo.world_model import WorldModel

FOUND = {
    "kinds": {k: 0.95 for k in gate.KINDS},
    "all_kinds": 0.95,
    "controls": {k: 1.0 for k in gate.CONTROLS},
    "restitution_preference": 0.52,
    "spearman": 0.45,
}


def test_shipped_world_model_passes():
    critic = read(DEFAULT).critic
    found = gate.matched_pairs(WorldModel.load(WORLD_MODEL), critic, 80, seed=3)
    result = gate.verdict(found, Gate(pairs=80))
    assert result["passed"], gate.table(result)
    assert set(found["kinds"]) == set(gate.KINDS) and set(found["controls"]) == set(gate.CONTROLS)


def test_random_world_model_fails(judge):
    result = gate.verdict(gate.matched_pairs(judge, read(DEFAULT).critic, 20), Gate(pairs=20))
    assert not result["passed"] and len(result["failures"]) > 2
    assert gate.table(result).count("FAILS") >= 3


def test_forward_reward_is_also_asked_about_the_arrow_of_time(judge):
    found = gate.matched_pairs(judge, Critic(direction="forward"), 2)
    assert 0 <= found["time_reversal"] <= 1


def test_pairs_are_the_same_for_the_same_seed(judge):
    critic = Critic(reward="plain")
    assert gate.matched_pairs(judge, critic, 3, seed=1) == gate.matched_pairs(judge, critic, 3, seed=1)


def test_accuracy_counts_a_tie_as_half():
    assert gate._accuracy(np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])) == 0.5


def test_spearman_is_taken_within_prompts():
    severity = np.array([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    assert gate.within_prompt(-severity, severity) == pytest.approx(1)
    assert gate.within_prompt(severity, severity) == pytest.approx(-1)
    # better between prompts, worse within: only the latter counts
    assert gate.within_prompt(np.array([[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]]), severity) == pytest.approx(-1)
    assert gate.within_prompt(np.ones((2, 3)), severity) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"all_kinds": 0.89}, "over all kinds 89.0%"),
        ({"kinds": {**FOUND["kinds"], "swap": 0.74}}, "swap: 74.0% of pairs"),
        ({"controls": {**FOUND["controls"], "static": 0.5}}, "control static"),
        ({"restitution_preference": 0.61}, "restitution 1.0 is preferred to 0.6 in 61.0%"),
        ({"spearman": 0.29}, "correlate by 0.29; 0.30 is needed"),
    ],
)
def test_every_bar_stops(change, words):
    result = gate.verdict({**FOUND, **change}, Gate())
    assert not result["passed"] and len(result["failures"]) == 1 and words in result["failures"][0]
    assert gate.table(result).count("FAILS") == 1


def test_a_critic_above_all_bars_passes():
    result = gate.verdict(FOUND, Gate())
    assert result["passed"] is True and result["failures"] == [] and "FAILS" not in gate.table(result)
