"""Group advantages: every reward against the mean and spread of its own group.

    a_kr = (r_kr - mean_g r) / (std_g r + eps)     population std, per reward r and group g
    A_k  = clip(sum_r weight_r a_kr)

A group of one, or one whose samples all earn the same, has advantage 0 and is reported. Shapes: N samples, R rewards,
G groups in ascending id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.core.distributed import Processes, gather_rows
from ldo.ops import custom_ops, extension, native
from ldo.ops.dispatch import choose_form
from ldo.ops.extension import EXTENSION_DTYPES
from ldo.ops.native import SCALES


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
    world: Processes | None = None,
) -> tuple[Tensor, GroupStats]:
    """Advantages [N] in fp32 (fp64 for fp64 rewards), clipped to [-clip, clip], and the groups' statistics.

    ``rewards_NR``: [N] or [N, R]. ``groups_N``: integer ids, in any order; groups may have any size. ``weights_R``: the
    weight of each reward, applied after normalisation; None weighs each 1. ``scale``: divide by the group's std, by the
    std of all rewards ("global"), or not at all ("none"). ``impl``: "cuda" or "cpp" (the extension), "reference" (the
    specification) or "auto".

    ``world``: the samples are this rank's part of a batch whose groups may span ranks. Rewards are gathered once.
    Advantages are those of this rank, statistics those of all groups. The bits depend neither on the number of ranks
    nor on which sample lies on which rank. There is no gradient then.

    ValueError on bad shapes, and on a NaN or infinite reward: it names the sample, on every rank alike.
    """
    shape = rewards_NR.shape
    kinds = shape[1] if len(shape) > 1 else 1
    # with a world, one rank may have no samples
    may_be_empty = world is not None and kinds > 0
    if len(shape) not in (1, 2) or groups_N.shape != shape[:1] or not (rewards_NR.numel() or may_be_empty):
        raise ValueError(
            f"group_advantage: rewards [N, R] and groups [N] expected, got {tuple(shape)} and {tuple(groups_N.shape)}"
        )
    if groups_N.is_floating_point() or groups_N.is_complex():
        raise ValueError(f"group_advantage: groups must be integers, got {groups_N.dtype}")
    if groups_N.device != rewards_NR.device:
        raise ValueError(f"group_advantage: rewards are on {rewards_NR.device}, groups on {groups_N.device}")
    if scale not in SCALES:
        raise ValueError(f"group_advantage: unknown scale {scale!r}; one of {', '.join(SCALES)}")
    # the kernels keep the means of one sample's rewards in fixed arrays, so more rewards go to the reference
    names, why = extension.forms(rewards_NR)
    most = 0 if names[0] == "reference" else extension.load()[0].MAX_REWARDS
    if kinds > most > 0:
        names = ("reference",)
        why = f"plain PyTorch; the extension takes up to {most} rewards, these are {kinds}"
    impl = choose_form("group_advantage", impl, names, names[0], why)
    if weights_R is not None and weights_R.shape != (kinds,):
        raise ValueError(f"group_advantage: {kinds} weights expected, got {tuple(weights_R.shape)}")
    if world is None:
        return _advantage(rewards_NR, groups_N, weights_R, scale, clip, eps, impl)

    def advantage(rewards: Tensor, groups: Tensor) -> tuple[Tensor, GroupStats]:
        return _advantage(rewards, groups, weights_R, scale, clip, eps, impl)

    return _over_ranks(_columns(rewards_NR), groups_N, world, advantage)


def _columns(rewards: Tensor) -> Tensor:
    return rewards[:, None] if rewards.ndim == 1 else rewards


def _advantage(
    rewards: Tensor, groups: Tensor, weights: Tensor | None, scale: str, clip: float, eps: float, impl: str
) -> tuple[Tensor, GroupStats]:
    """``rewards``: [N] or [N, R]."""
    if impl == "reference":
        return _reference(_columns(rewards), groups, weights, scale, clip, eps)
    wide = rewards.dtype == torch.float64
    if rewards.dtype not in EXTENSION_DTYPES:
        rewards = rewards.double()
    if weights is not None:
        weights = _extension_weights(weights, rewards.device)
    # every operation that is not called here saves the host time: a direct call takes [N] as it is
    needs_gradient = rewards.requires_grad and torch.is_grad_enabled()
    if native.direct(rewards) and not needs_gradient:
        call = native.advantage
    else:
        call = custom_ops.advantage_op
        rewards = _columns(rewards)
    ids = groups.long().contiguous()
    advantage, mean, std, zero = call(rewards.contiguous(), ids, weights, SCALES.index(scale), clip, eps, wide)
    return advantage, GroupStats(mean, std, zero)


def _extension_weights(weights: Tensor, device: torch.device) -> Tensor:
    """``weights`` without gradient, in a dtype that the extension reads, contiguous on ``device``."""
    if weights.requires_grad:
        weights = weights.detach()
    dtype = weights.dtype if weights.dtype in EXTENSION_DTYPES else torch.float64
    return weights.to(device, dtype).contiguous()


def _over_ranks(
    rewards: Tensor, groups: Tensor, world: Processes, advantage: Callable[[Tensor, Tensor], tuple[Tensor, GroupStats]]
) -> tuple[Tensor, GroupStats]:
    """The advantages of this rank's samples among those of all ranks.

    Samples are ordered by group and then by their rewards: sums then have one order, however the samples are spread.
    """
    # one gather for ids and rewards: the bits of a double fit an int64 exactly
    ranks = torch.full_like(groups, world.rank)
    bits = rewards.detach().double().contiguous().view(torch.int64)
    labels = torch.stack([groups.long(), ranks.long()], 1)
    everyone = gather_rows(torch.cat([labels, bits], 1), world)
    ids, ranks = everyone[:, 0], everyone[:, 1]
    values = everyone[:, 2:].contiguous().view(torch.float64)
    if not torch.isfinite(values).all():
        sample, kind = _first_not_finite(values)
        rank = ranks[sample]
        on_its_rank = sample - int((ranks[:sample] != rank).sum())
        raise ValueError(
            f"group_advantage: reward {kind} of sample {on_its_rank} of rank {int(rank)} is "
            f"{float(values[sample, kind])}; a reward must be finite"
        )
    order = torch.arange(len(ids), device=ids.device)
    # stable sorts, the least significant key first
    for column in (*reversed(values.unbind(1)), ids):
        order = order[column[order].argsort(stable=True)]
    ordered, stats = advantage(values[order].to(rewards.dtype), ids[order])
    advantages = torch.empty_like(ordered)
    advantages[order] = ordered
    return advantages[ranks == world.rank], stats


def _first_not_finite(values: Tensor) -> tuple[int, int]:
    """Sample and kind of the first reward that is not finite."""
    sample, kind = (~torch.isfinite(values)).nonzero()[0].tolist()
    return sample, kind


def _reference(
    rewards: Tensor, groups: Tensor, weights: Tensor | None, scale: str, clip: float, eps: float
) -> tuple[Tensor, GroupStats]:
    # in fp64, since sums over large groups lose too much in fp32
    values = rewards.double()
    if not torch.isfinite(values).all():
        sample, kind = _first_not_finite(values)
        value = float(values[sample, kind])
        raise ValueError(f"group_advantage: reward {kind} of sample {sample} is {value}; a reward must be finite")
    ids, index = torch.unique(groups, return_inverse=True)
    count = torch.bincount(index, minlength=len(ids))[:, None]
    zeros = values.new_zeros(len(ids), values.shape[1])
    mean = zeros.index_add(0, index, values) / count
    centred = values - mean[index]
    std = (zeros.index_add(0, index, centred.square()) / count).sqrt()
    # compared exactly: equal rewards can leave a rounding error in the spread
    index_NR = index[:, None].expand_as(values)
    highest = zeros.scatter_reduce(0, index_NR, values, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, index_NR, values, "amin", include_self=False)
    zero_variance = highest == lowest
    if scale == "group":
        normalised = centred / (std[index] + eps)
    elif scale == "global":
        normalised = centred / (values.std(0, correction=0) + eps)
    else:
        normalised = centred
    # set to 0, since a rounding error of the mean, divided by eps, would not be exactly 0
    normalised = torch.where(zero_variance[index], 0, normalised)
    total = normalised.sum(1) if weights is None else normalised @ weights.to(normalised)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return total.clamp(-clip, clip).to(dtype), GroupStats(mean.to(dtype), std.to(dtype), zero_variance)
