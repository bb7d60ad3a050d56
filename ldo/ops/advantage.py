"""Group advantages: every reward against the mean and spread of its own group.

    a_kr = (r_kr - mean_g r) / (std_g r + eps)     population std, per reward r and group g
    A_k  = clip(sum_r weight_r a_kr)

A group of one, or one whose samples all earn the same, has advantage 0 and is counted. Shapes: N samples, R rewards,
G groups in ascending id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.ops.dispatch import choose

SCALES = ("group", "global", "none")


@dataclass(frozen=True)
class GroupStats:
    """Per group and reward [G, R]: ``mean``, population ``std``, and ``zero_variance`` where nothing can be learned."""

    mean: Tensor
    std: Tensor
    zero_variance: Tensor


def group_advantage(
    rewards_NR: Tensor,
    groups_N: Tensor,
    weights_R: Tensor | None = None,
    *,
    scale: str = "group",
    clip: float = 5.0,
    eps: float = 1e-4,
    impl: str = "auto",
) -> tuple[Tensor, GroupStats]:
    """Advantages [N] in fp32 (fp64 for fp64 rewards), clipped to [-clip, clip], and the groups' statistics.

    ``rewards_NR``: [N] or [N, R]. ``groups_N``: integer ids, in any order, groups of any size. ``weights_R``: the
    weight of each reward, applied after normalisation; None weighs each 1. ``scale``: divide by the group's std, by
    the std of all rewards ("global"), or not at all ("none"). ValueError on bad shapes and on a NaN or infinite
    reward, naming the sample.
    """
    rewards = rewards_NR[:, None] if rewards_NR.ndim == 1 else rewards_NR
    if rewards.ndim != 2 or groups_N.shape != rewards.shape[:1] or not rewards.numel():
        raise ValueError(f"group_advantage: rewards [N, R] and groups [N] expected, got {tuple(rewards_NR.shape)} and {tuple(groups_N.shape)}")
    if scale not in SCALES:
        raise ValueError(f"group_advantage: unknown scale {scale!r}; one of {', '.join(SCALES)}")
    choose("group_advantage", impl, ("reference",), "reference", "plain PyTorch")
    r = rewards.double()  # sums over large groups lose too much in fp32
    if not torch.isfinite(r).all():
        k, j = (~torch.isfinite(r)).nonzero()[0].tolist()
        raise ValueError(f"group_advantage: reward {j} of sample {k} is {float(r[k, j])}; a reward must be finite")
    if weights_R is not None and weights_R.shape != r.shape[1:]:
        raise ValueError(f"group_advantage: {r.shape[1]} weights expected, got {tuple(weights_R.shape)}")

    ids, index = torch.unique(groups_N, return_inverse=True)
    count = torch.bincount(index, minlength=len(ids))[:, None]
    zeros = r.new_zeros(len(ids), r.shape[1])
    mean = zeros.index_add(0, index, r) / count
    centred = r - mean[index]
    std = (zeros.index_add(0, index, centred.square()) / count).sqrt()
    at = index[:, None].expand_as(r)
    zero = zeros.scatter_reduce(0, at, r, "amax", include_self=False) == zeros.scatter_reduce(0, at, r, "amin", include_self=False)
    if scale == "group":
        a = centred / (std[index] + eps)
    elif scale == "global":
        a = centred / (r.std(0, correction=0) + eps)
    else:
        a = centred
    a = torch.where(zero[index], 0, a)
    total = a.sum(1) if weights_R is None else a @ weights_R.to(a)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return total.clamp(-clip, clip).to(dtype), GroupStats(mean.to(dtype), std.to(dtype), zero)
