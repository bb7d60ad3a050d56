"""The extension's operations as custom ops of PyTorch, for torch.compile and other tracers.

Tracers take a custom op as opaque: its shapes come from ``register_fake`` and its gradient from ``register_autograd``.
A direct call (``ldo.ops.native``) costs the host less.

Shapes: N samples, R rewards, G groups, S steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldo.ops.native import LARGE, SCALES, advantage, launch_surrogate, surrogate_gradients

# ---------------------------------------------------------------------------------------------- group advantage


@torch.library.custom_op("ldo::group_advantage", mutates_args=())
def advantage_op(
    rewards_NR: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``native.advantage`` for tracers, and with a gradient in the rewards; no two results share memory."""
    advantage_N, mean, std, zero = advantage(rewards_NR, ids_N, weights_R, scale, clip, eps, wide)
    # for many samples the direct call has cloned them already
    if len(ids_N) <= LARGE:
        mean, std, zero = mean.clone(), std.clone(), zero.clone()
    return advantage_N, mean, std, zero


@advantage_op.register_fake
def _(rewards_NR, ids_N, weights_R, scale, clip, eps, wide):
    dtype = torch.float64 if wide else torch.float32
    # how many groups there are is known only when the op runs
    groups = torch.library.get_ctx().new_dynamic_size()
    mean = rewards_NR.new_empty((groups, rewards_NR.shape[1]), dtype=dtype)
    return (
        rewards_NR.new_empty(rewards_NR.shape[0], dtype=dtype),
        mean,
        torch.empty_like(mean),
        torch.empty_like(mean, dtype=torch.bool),
    )


@torch.library.custom_op("ldo::group_advantage_backward", mutates_args=())
def advantage_backward_op(
    grad_N: Tensor,
    advantage_N: Tensor,
    rewards_NR: Tensor,
    ids_N: Tensor,
    weights_R: Tensor | None,
    scale: int,
    clip: float,
    eps: float,
) -> Tensor:
    """The gradient in the rewards, in plain PyTorch: training treats advantages as constants, so speed does not matter.

    With c = r - mean, s = the divisor's spread and g = the gradient, 0 where clipped or without variance:

        dr = (g - mean g) / (s + eps) - c mean(g c) / (s (s + eps)^2)

    The means are over the group; with scale "global", s and the last term are over all samples.
    """
    r = rewards_NR.double()
    unclipped_N = torch.where(advantage_N.abs() < clip, grad_N, 0).double()
    index = torch.unique(ids_N, return_inverse=True)[1]
    count = torch.bincount(index)[:, None]

    def group_mean(values_NR: Tensor) -> Tensor:
        sums = torch.zeros_like(count * values_NR[:1]).index_add(0, index, values_NR)
        return (sums / count)[index]

    def group_extreme(reduction: str) -> Tensor:
        empty = torch.empty_like(count * r[:1])
        return empty.scatter_reduce(0, index[:, None].expand_as(r), r, reduction, include_self=False)[index]

    c = r - group_mean(r)
    live = group_extreme("amax") != group_extreme("amin")
    weighted = unclipped_N[:, None] if weights_R is None else unclipped_N[:, None] * weights_R.double()
    g = torch.where(live, weighted, 0)
    if scale == SCALES.index("none"):
        out = g - group_mean(g)
    elif scale == SCALES.index("group"):
        s = group_mean(c.square()).sqrt()
        out = (g - group_mean(g)) / (s + eps) - c * group_mean(g * c) / (s * (s + eps) ** 2)
    else:
        s = r.std(0, correction=0)
        centred = r - r.mean(0)
        out = (g - group_mean(g)) / (s + eps) - centred * (g * c).mean(0) / (s * (s + eps) ** 2)
        # the overall spread depends on every reward, also on those of groups without variance
        live = live | (s > 0)
    return torch.where(live, out, 0).to(rewards_NR.dtype)


@advantage_backward_op.register_fake
def _(grad_N, advantage_N, rewards_NR, ids_N, weights_R, scale, clip, eps):
    return torch.empty_like(rewards_NR)


def _advantage_context(ctx, inputs, output) -> None:
    rewards, ids, weights, ctx.scale, ctx.clip, ctx.eps, _ = inputs
    advantage_N, *statistics = output
    ctx.save_for_backward(advantage_N, rewards, ids, weights)
    ctx.mark_non_differentiable(*statistics)


def _advantage_backward(ctx, grad, *_):
    advantage_N, rewards, ids, weights = ctx.saved_tensors
    found = advantage_backward_op(grad.contiguous(), advantage_N, rewards, ids, weights, ctx.scale, ctx.clip, ctx.eps)
    return found, None, None, None, None, None, None


advantage_op.register_autograd(_advantage_backward, setup_context=_advantage_context)


# ---------------------------------------------------------------------------------------------- clipped surrogate


@torch.library.custom_op("ldo::grpo_surrogate", mutates_args=())
def surrogate_op(
    logp_NS: Tensor,
    logp_old_NS: Tensor | None,
    advantage_N: Tensor,
    divergence_NS: Tensor | None,
    weight_S: Tensor | None,
    clip: float,
    weight: float,
    kl: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``native.launch_surrogate`` for tracers: the scalars [4], the ratios and the slopes."""
    # with slopes at every call, since the outputs of an op cannot depend on whether a gradient is wanted
    return launch_surrogate(logp_NS, logp_old_NS, advantage_N, divergence_NS, weight_S, clip, weight, kl, True)


@surrogate_op.register_fake
def _(logp_NS, logp_old_NS, advantage_N, divergence_NS, weight_S, clip, weight, kl):
    return logp_NS.new_empty(4), torch.empty_like(logp_NS), torch.empty_like(logp_NS)


def _surrogate_context(ctx, inputs, output) -> None:
    _, _, _, divergence, weights, _, ctx.weight, ctx.kl = inputs
    _, ratio, slope = output
    ctx.has_divergence = divergence is not None
    ctx.save_for_backward(ratio, slope, weights)
    ctx.mark_non_differentiable(slope)


def _surrogate_backward(ctx, grad_scalars, grad_ratio, _):
    total, policy, divergence, _ = grad_scalars.unbind()
    logp_gradient, divergence_gradient = surrogate_gradients(
        ctx, total, policy, divergence, grad_ratio, True, ctx.has_divergence
    )
    return logp_gradient, None, None, divergence_gradient, None, None, None, None


surrogate_op.register_autograd(_surrogate_backward, setup_context=_surrogate_context)
