"""Group advantages of every form against NumPy, group by group, and what must hold for any rewards and ids."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ldo.ops import GroupStats, group_advantage
from tests.helpers import forms

IDS = [70, -3, 5, 70, 5, 70, 8, -3, 70]  # unordered; groups of 2, 2, 1 and 4


def rewards(kinds=1, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(2.0, 3.0, (len(IDS), kinds)).astype(dtype)


def by_group(values, ids, weights=None, scale="group", clip=5.0, eps=1e-4):
    """The formula for one group and one reward after the other."""
    out = np.zeros(len(ids))
    for group in set(ids):
        members = [sample for sample, other in enumerate(ids) if other == group]
        for kind in range(values.shape[1]):
            column = values[members, kind].astype(np.float64)
            # equal rewards give 0 even where rounding leaves a spread
            if len(column) == 1 or np.all(column == column[0]):
                continue
            spread = {
                "group": column.std() + eps,
                "global": values[:, kind].astype(np.float64).std() + eps,
                "none": 1.0,
            }[scale]
            out[members] += (1.0 if weights is None else weights[kind]) * (column - column.mean()) / spread
    return np.clip(out, -clip, clip)


@pytest.fixture(scope="module", params=forms.ALL)
def advantage(request):
    """``group_advantage`` of one form, from and to NumPy."""
    device = forms.device_of(request.param)

    def call(values, ids=IDS, weights=None, **options):
        tensor = None if weights is None else torch.tensor(weights, device=device)
        values, ids = (torch.as_tensor(given).to(device) for given in (values, ids))
        found, stats = group_advantage(values, ids, tensor, **{"impl": request.param} | options)
        on_cpu = GroupStats(stats.mean.cpu(), stats.std.cpu(), stats.zero_variance.cpu())
        return found.cpu().numpy(), on_cpu

    return call


@pytest.mark.parametrize("scale", ["group", "global", "none"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, -2.0]])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_value_is_the_formula(advantage, scale, weights, dtype, tolerance):
    values = rewards(3, dtype=dtype)
    found, _ = advantage(values, weights=weights, scale=scale)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, by_group(values, IDS, weights, scale), rtol=tolerance, atol=tolerance)


def test_one_reward_may_be_flat(advantage):
    values = rewards()
    np.testing.assert_array_equal(advantage(values[:, 0])[0], advantage(values)[0])


def test_stats_are_in_ascending_id(advantage):
    values = rewards(2)
    _, stats = advantage(values)
    for row, group in enumerate(sorted(set(IDS))):
        members = values[[other == group for other in IDS]]
        np.testing.assert_allclose(stats.mean[row], members.mean(0))
        np.testing.assert_allclose(stats.std[row], members.std(0), atol=1e-12)
    assert stats.zero_variance.tolist() == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize("scale", ["group", "global", "none"])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -100.1])
def test_equal_rewards_teach_nothing(advantage, scale, count, value):
    values = torch.cat([torch.full((count,), value), torch.tensor([1.0, 2.0])])
    found, stats = advantage(values, torch.tensor([0] * count + [1, 1]), scale=scale)
    assert not found[:count].any() and found[count] < 0 < found[-1]
    assert stats.zero_variance.flatten().tolist() == [True, False]


def test_rewards_are_normalised_before_they_are_weighted(advantage):
    values = rewards(2)
    found, _ = advantage(values * [1.0, 1000.0], weights=[0.5, 0.5], eps=0.0)
    np.testing.assert_allclose(found, advantage(values, weights=[0.5, 0.5], eps=0.0)[0], rtol=1e-9)


def test_zero_variance_is_reported_for_each_reward(advantage):
    values = rewards(2)
    values[:, 1] = 4.0
    found, stats = advantage(values)
    assert stats.zero_variance[:, 1].all() and stats.zero_variance[:, 0].sum() == 1
    np.testing.assert_allclose(found, advantage(values[:, :1])[0])


def test_clip_bounds_the_sum(advantage):
    # one sample in twenty stands out in both rewards: its mean is 0.05, the variance 0.05 * 0.95 = 0.0475
    values = np.zeros((20, 2))
    values[7] = 1.0
    found, _ = advantage(values, ids=[0] * 20, clip=3.0)
    assert found.max() == 3.0 and found[7] == 3.0
    assert advantage(values, ids=[0] * 20, clip=100.0)[0][7] == pytest.approx(2 * 0.95 / (np.sqrt(0.0475) + 1e-4))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_autocast_changes_no_bit(advantage, dtype):
    values, weights = rewards(3, dtype=dtype), [1.0, 0.25, -2.0]
    expected, stats = advantage(values, weights=weights)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()),
    ):
        found, inside = advantage(values, weights=weights)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert torch.equal(inside.mean, stats.mean) and torch.equal(inside.std, stats.std)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_reward_that_is_not_finite_names_its_sample(advantage, value):
    values = rewards(2)
    values[4, 1] = value
    with pytest.raises(ValueError, match=f"reward 1 of sample 4 is {value}"):
        advantage(values)


@pytest.mark.parametrize(
    "values, ids, options, message",
    [
        (np.ones((4, 2, 1)), [0] * 4, {}, r"\[N, R\] and groups \[N\] expected, got \(4, 2, 1\)"),
        (np.ones(4), [0] * 3, {}, r"got \(4,\) and \(3,\)"),
        (np.ones((0, 1)), np.zeros(0, int), {}, "expected"),
        (np.ones(4), [0] * 4, {"scale": "batch"}, "unknown scale 'batch'; one of group, global, none"),
        (np.ones((4, 2)), [0] * 4, {"weights": [1.0]}, r"2 weights expected, got \(1,\)"),
        (np.ones(4), [0] * 4, {"impl": "triton"}, "impl='triton' is not available"),
    ],
)
def test_bad_input_is_named(advantage, values, ids, options, message):
    with pytest.raises(ValueError, match=message):
        advantage(values, ids, **options)


@st.composite
def batches(draw):
    count = draw(st.integers(1, 12))
    # whole numbers, so that rewards of a group are often equal
    values = draw(arrays.arrays(np.float64, (count, 2), elements=st.integers(-20, 20).map(float)))
    return values, np.array(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches(), st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(advantage, batch, random):
    values, ids = batch
    order = random.sample(range(len(ids)), len(ids))
    np.testing.assert_allclose(advantage(values[order], ids[order])[0], advantage(values, ids)[0][order], atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches(), st.integers(-50, 50), st.sampled_from(["group", "none"]))
def test_constant_added_to_one_group_changes_nothing(advantage, batch, constant, scale):
    values, ids = batch
    moved = values + constant * (ids == ids[0])[:, None]
    np.testing.assert_allclose(advantage(moved, ids, scale=scale)[0], advantage(values, ids, scale=scale)[0], atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batches(), st.permutations([-(2**40), -1, 17, 2**40]))
def test_names_of_groups_do_not_matter(advantage, batch, names):
    values, ids = batch
    found, stats = advantage(values, np.array(names)[ids])
    expected, old = advantage(values, ids)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert len(stats.mean) == len(set(ids)) and int(stats.zero_variance.sum()) == int(old.zero_variance.sum())
