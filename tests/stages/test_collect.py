"""What critic and guards say of a rollout, joined over groups and gathered over ranks."""

from types import SimpleNamespace

import torch

from ldo.core.distributed import Processes
from ldo.stages.collect import Judged


def judged(rewards, violations):
    count = len(rewards)
    reward = torch.tensor(rewards)
    return Judged(
        reward=reward,
        penalties=torch.stack([reward - 1, reward - 2], 1),
        skill=reward + 1,
        plain=reward + 2,
        motion=reward + 3,
        reference_motion=reward + 4,
        weights=torch.tensor([0.5, 0.25]),
        names=("motion", "sharpness"),
        violations=[bool(value) for value in violations][:count],
    )


def test_groups_are_joined_and_their_weights_are_not():
    both = Judged.join([judged([1.0, 2.0], [0, 1]), judged([3.0], [1])])
    assert both.reward.tolist() == [1, 2, 3] and both.penalties.shape == (3, 2)
    assert both.weights.tolist() == [0.5, 0.25] and both.names == ("motion", "sharpness")
    assert both.violations == [False, True, True]


def test_gathered_videos_are_ordered_by_group_and_keep_their_columns():
    own = judged([5.0, 6.0, 7.0, 8.0], [])
    groups, everyone = own.gathered(torch.tensor([3, 3, 1, 1]), SimpleNamespace(processes=Processes()))
    assert groups.tolist() == [1, 1, 3, 3]
    order = torch.tensor([2, 3, 0, 1])
    for name in ("reward", "skill", "plain", "motion", "reference_motion", "penalties"):
        assert torch.equal(getattr(everyone, name), getattr(own, name)[order]), name
    assert everyone.names == own.names and torch.equal(everyone.weights, own.weights)
