"""Group advantages: every reward against the mean and spread of its own group.

    a_kr = (r_kr - mean_g r) / (std_g r + eps)     population std, per reward r and group g
    A_k  = clip(sum_r weight_r a_kr)

A group of one, or one whose samples all earn the same, has advantage 0 and is counted. Shapes: N samples, R rewards,
G groups in ascending id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.distributed import World, gather
from ldo.ops import extension, native
from ldo.ops.dispatch import choose

SCALES = native.SCALES


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
    world: World | None = None,
) -> tuple[Tensor, GroupStats]:
    """Advantages [N] in fp32 (fp64 for fp64 rewards), clipped to [-clip, clip], and the groups' statistics.

    ``rewards_NR``: [N] or [N, R]. ``groups_N``: integer ids, in any order, groups of any size. ``weights_R``: the
    weight of each reward, applied after normalisation; None weighs each 1. ``scale``: divide by the group's std, by
    the std of all rewards ("global"), or not at all ("none"). ``impl``: "cuda" or "cpp" (the extension), "reference" (the
    specification) or "auto". ``world``: the samples are this rank's part, and groups may span ranks; rewards are gathered once,
    advantages are this rank's, statistics those of all groups, and the bits depend neither on how many ranks there are nor on
    which sample lies where (no gradient). ValueError on bad shapes and on a NaN or infinite reward, naming the sample (on every rank alike).
    """
    shape = rewards_NR.shape
    kinds = shape[1] if len(shape) > 1 else 1
    if len(shape) not in (1, 2) or groups_N.shape != shape[:1] or not (rewards_NR.numel() or (world and kinds)):
        raise ValueError(f"group_advantage: rewards [N, R] and groups [N] expected, got {tuple(shape)} and {tuple(groups_N.shape)}")
    if groups_N.is_floating_point() or groups_N.is_complex():
        raise ValueError(f"group_advantage: groups must be integers, got {groups_N.dtype}")
    if groups_N.device != rewards_NR.device:
        raise ValueError(f"group_advantage: rewards are on {rewards_NR.device}, groups on {groups_N.device}")
    if scale not in SCALES:
        raise ValueError(f"group_advantage: unknown scale {scale!r}; one of {', '.join(SCALES)}")
    names, why = extension.forms(rewards_NR)
    most = 0 if names[0] == "reference" else extension.load()[0].MAX_REWARDS
    if kinds > most > 0:
        names, why = ("reference",), f"plain PyTorch; the extension takes up to {most} rewards, these are {kinds}"
    impl = choose("group_advantage", impl, names, names[0], why)
    if weights_R is not None and weights_R.shape != (kinds,):
        raise ValueError(f"group_advantage: {kinds} weights expected, got {tuple(weights_R.shape)}")
    if world is not None:
        return _over_ranks(_columns(rewards_NR), groups_N, world, lambda r, g: _advantage(r, g, weights_R, scale, clip, eps, impl))
    return _advantage(rewards_NR, groups_N, weights_R, scale, clip, eps, impl)


def _columns(rewards: Tensor) -> Tensor:
    return rewards[:, None] if rewards.ndim == 1 else rewards


def _advantage(r: Tensor, groups: Tensor, weights: Tensor | None, scale: str, clip: float, eps: float, impl: str) -> tuple[Tensor, GroupStats]:
    """``r``: [N] or [N, R]."""
    if impl == "reference":
        return _reference(_columns(r), groups, weights, scale, clip, eps)
    wide = r.dtype == torch.float64
    r = r if r.dtype in extension.DTYPES else r.double()
    if weights is not None:
        weights = weights.detach() if weights.requires_grad else weights
        weights = weights.to(r.device, weights.dtype if weights.dtype in extension.DTYPES else torch.float64).contiguous()
    if native.direct(r) and not (r.requires_grad and torch.is_grad_enabled()):
        call = native.advantage
    else:
        call, r = native.advantage_op, _columns(r)
    advantage, mean, std, zero = call(r.contiguous(), groups.long().contiguous(), weights, SCALES.index(scale), clip, eps, wide)
    return advantage, GroupStats(mean, std, zero)


def _over_ranks(
    rewards: Tensor, groups: Tensor, world: World, advantage: Callable[[Tensor, Tensor], tuple[Tensor, GroupStats]]
) -> tuple[Tensor, GroupStats]:
    """The advantages of this rank's samples among those of all ranks.

    Samples are ordered by group and then by their rewards: sums then have one order, however the samples are spread.
    """
    rank = torch.full_like(groups, world.rank)
    bits = rewards.detach().double().contiguous().view(torch.int64)  # one gathering for ids and rewards, exact for both
    everyone = gather(torch.cat([torch.stack([groups.long(), rank.long()], 1), bits], 1), world)
    ids, ranks, r = everyone[:, 0], everyone[:, 1], everyone[:, 2:].contiguous().view(torch.float64)
    if not torch.isfinite(r).all():
        k, j = (~torch.isfinite(r)).nonzero()[0].tolist()
        local = k - int((ranks[:k] != ranks[k]).sum())
        raise ValueError(f"group_advantage: reward {j} of sample {local} of rank {int(ranks[k])} is {float(r[k, j])}; a reward must be finite")
    order = torch.arange(len(ids), device=ids.device)
    for column in (*reversed(r.unbind(1)), ids):  # stable sorts, the least significant key first
        order = order[column[order].argsort(stable=True)]
    there, stats = advantage(r[order].to(rewards.dtype), ids[order])
    found = torch.empty_like(there)
    found[order] = there
    return found[ranks == world.rank], stats


def _reference(rewards: Tensor, groups: Tensor, weights: Tensor | None, scale: str, clip: float, eps: float) -> tuple[Tensor, GroupStats]:
    r = rewards.double()  # sums over large groups lose too much in fp32
    if not torch.isfinite(r).all():
        k, j = (~torch.isfinite(r)).nonzero()[0].tolist()
        raise ValueError(f"group_advantage: reward {j} of sample {k} is {float(r[k, j])}; a reward must be finite")
    ids, index = torch.unique(groups, return_inverse=True)
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
    total = a.sum(1) if weights is None else a @ weights.to(a)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return total.clamp(-clip, clip).to(dtype), GroupStats(mean.to(dtype), std.to(dtype), zero)
