"""The gate: the shipped V-JEPA passes with the recipe's critic, a random one fails, and the verdict says why."""

import numpy as np
import pytest
from scipy.stats import binom

from ldo.core.config import DEFAULT_RECIPE, CriticConfig, GateConfig
from ldo.core.recipe_file import read_recipe
from ldo.models.world_model import WorldModel
from ldo.sandbox.matched_pairs import CONTROLS, PAIR_KINDS
from ldo.sandbox.shipped import WORLD_MODEL
from ldo.stages import gate
from ldo.stages.gate import gate_table, gate_verdict, rank_matched_pairs

FOUND = {
    "kinds": {kind: 0.95 for kind in PAIR_KINDS},
    "all_kinds": 0.95,
    "controls": {control: 1.0 for control in CONTROLS},
    "restitution_preference": 0.52,
    "spearman": 0.45,
}


@pytest.mark.slow
def test_shipped_world_model_passes():
    """With so few pairs that every share must leave no doubt, at 95%, that the true one is above its bar."""
    critic = read_recipe(DEFAULT_RECIPE).critic
    pairs, bars = 60, GateConfig()
    found = rank_matched_pairs(WorldModel.load(WORLD_MODEL), critic, pairs, seed=3)
    result = gate_verdict(found, bars)
    assert result["passed"], gate_table(result)
    assert set(found["kinds"]) == set(PAIR_KINDS) and set(found["controls"]) == set(CONTROLS)
    for share in (*found["kinds"].values(), *found["controls"].values()):
        assert surely_above(bars.each_kind, share, pairs), gate_table(result)
    assert surely_above(bars.all_kinds, found["all_kinds"], pairs * len(PAIR_KINDS)), gate_table(result)


@pytest.mark.slow
def test_shipped_world_model_does_not_mind_how_high_a_ball_bounces():
    """A preference near one half takes more pairs to tell than the kinds of violations do."""
    critic = read_recipe(DEFAULT_RECIPE).critic
    found = gate._rank_bounces(WorldModel.load(WORLD_MODEL), critic, 80, seed=3, active=False)
    assert abs(found["restitution_preference"] - 0.5) <= gate.FAIR_PREFERENCE


def surely_above(bar: float, share: float, pairs: int) -> bool:
    """Whether a critic that ranks just ``bar`` of all pairs correctly would do so well in fewer than 5% of tests."""
    return binom.sf(round(share * pairs) - 1, pairs, bar) < 0.05


def test_what_is_surely_above_a_bar():
    assert surely_above(0.75, 19 / 20, 20) and not surely_above(0.75, 18 / 20, 20)


def test_random_world_model_fails(judge):
    result = gate_verdict(rank_matched_pairs(judge, read_recipe(DEFAULT_RECIPE).critic, 20), GateConfig(pairs=20))
    assert not result["passed"] and len(result["failures"]) > 2
    assert gate_table(result).count("FAILS") >= 3


def test_forward_reward_is_also_asked_about_the_arrow_of_time(judge):
    found = rank_matched_pairs(judge, CriticConfig(direction="forward"), 2)
    assert 0 <= found["time_reversal"] <= 1


def test_pairs_are_the_same_for_the_same_seed(judge):
    critic = CriticConfig(reward="plain")
    assert rank_matched_pairs(judge, critic, 3, seed=1) == rank_matched_pairs(judge, critic, 3, seed=1)


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
    result = gate_verdict({**FOUND, **change}, GateConfig())
    assert not result["passed"] and len(result["failures"]) == 1 and words in result["failures"][0]
    assert gate_table(result).count("FAILS") == 1


def test_a_critic_above_all_bars_passes():
    result = gate_verdict(FOUND, GateConfig())
    assert result["passed"] is True and result["failures"] == [] and "FAILS" not in gate_table(result)
