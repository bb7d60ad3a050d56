"""The two operations of csrc/ as torch custom ops: every pointer is checked here before it is passed.

Custom ops are opaque to torch.compile, which therefore calls them as they are; shapes come from ``register_fake`` and
gradients from ``register_autograd``. A kernel is launched on the current stream of its tensors' device.

Shapes: N samples, R rewards, G groups, S steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldo.ops import extension

SCALES = ("group", "global", "none")  # as csrc/arithmetic.h numbers them


def _module() -> Any:
    module, why = extension.load()
    if module is None:
        raise RuntimeError(f"ldo._C is needed here: {why}")
    return module


def _on_gpu(op: str, tensor: Tensor) -> bool:
    """Is this a CUDA tensor? ValueError where the extension cannot serve its device."""
    if tensor.device.type == "cpu":
        return False
    if tensor.device.type != "cuda" or not _module().CUDA:
        raise ValueError(f"{op}: the extension as built here takes no {tensor.device.type} tensors")
    return True


def _check(op: str, name: str, tensor: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> int:
    """The address of a tensor that is as a kernel reads it; ValueError if it is not."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the first argument on {like.device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")
    return tensor.data_ptr()


def _place(tensor: Tensor, workspace: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Scratch memory, to be kept alive until after the launch, and its address, the device and the stream."""
    memory = torch.empty(workspace, dtype=torch.uint8, device=tensor.device)
    return memory, (memory.data_ptr(), tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream)


# ---------------------------------------------------------------------------------------------- group advantage


def launch_advantage(
    rewards_NR: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One call of the C++ form or one kernel launch, without waiting for it: advantages [N], mean, std and zero [N, R], info [3].

    ``info``: how many groups there are (the rows of the statistics that hold something); 1 if ids fall somewhere; the flat
    index of the first reward that is not finite, or -1. In the last two cases nothing else is written. ``wide``: fp64 results.
    """
    op, module, (n, r) = "group_advantage", _module(), rewards_NR.shape
    gpu = _on_gpu(op, rewards_NR)
    if not 0 < r <= module.MAX_REWARDS or n < 1:
        raise ValueError(f"{op}: at least one sample and 1 to {module.MAX_REWARDS} rewards, got {tuple(rewards_NR.shape)}")
    dtypes = tuple(extension.DTYPES)
    rewards = _check(op, "rewards", rewards_NR, rewards_NR, dtypes, (n, r))
    ids = _check(op, "groups", ids_N, rewards_NR, (torch.int64,), (n,))
    weights = 0 if weights_R is None else _check(op, "weights", weights_R, rewards_NR, dtypes, (r,))
    out = torch.float64 if wide else torch.float32
    advantage = torch.empty(n, dtype=out, device=rewards_NR.device)
    mean, std = (torch.empty(n, r, dtype=out, device=rewards_NR.device) for _ in range(2))
    zero = torch.empty(n, r, dtype=torch.bool, device=rewards_NR.device)
    info = torch.empty(3, dtype=torch.int64, device=rewards_NR.device)
    weights_code = 0 if weights_R is None else extension.DTYPES[weights_R.dtype]
    given = (rewards, extension.DTYPES[rewards_NR.dtype], ids, weights, weights_code, n, r, scale, clip, eps, extension.DTYPES[out])
    made = (advantage.data_ptr(), mean.data_ptr(), std.data_ptr(), zero.data_ptr(), info.data_ptr())
    if gpu:
        memory, place = _place(rewards_NR, module.advantage_workspace(n, r))
        module.advantage_cuda(*given, *made, *place)
        del memory  # the allocator gives it out again in the order of this stream
    else:
        module.advantage_cpu(*given, *made)
    return advantage, mean, std, zero, info


@torch.library.custom_op("ldo::group_advantage", mutates_args=())
def advantage_op(
    rewards_NR: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages [N], and mean, std and zero-variance mask [G, R], for ids in any order.

    The launch assumes that ids do not fall and says if they did; then they are sorted and it is repeated. Reading ``info``
    is the one wait for the device: G is needed on the host, and so is the sample of a bad reward (ValueError).
    """
    advantage, mean, std, zero, info = launch_advantage(rewards_NR, ids_N, weights_R, scale, clip, eps, wide)
    groups, unordered, bad = info.tolist()
    if bad >= 0:
        k, j = divmod(bad, rewards_NR.shape[1])
        raise ValueError(f"group_advantage: reward {j} of sample {k} is {float(rewards_NR[k, j])}; a reward must be finite")
    if unordered:
        ids, order = torch.sort(ids_N, stable=True)
        there, mean, std, zero, info = launch_advantage(rewards_NR[order], ids, weights_R, scale, clip, eps, wide)
        advantage[order] = there
        groups = int(info[0])
    stats = (x[:groups] for x in (mean, std, zero))
    return advantage, *(x.clone() if len(rewards_NR) > 2**16 else x for x in stats)  # keep no large buffer for a few rows


@advantage_op.register_fake
def _(rewards_NR, ids_N, weights_R, scale, clip, eps, wide):
    out = torch.float64 if wide else torch.float32
    groups = torch.library.get_ctx().new_dynamic_size()
    stats = rewards_NR.new_empty((groups, rewards_NR.shape[1]), dtype=out)
    return rewards_NR.new_empty(rewards_NR.shape[0], dtype=out), stats, torch.empty_like(stats), torch.empty_like(stats, dtype=torch.bool)


@torch.library.custom_op("ldo::group_advantage_backward", mutates_args=())
def advantage_backward_op(
    grad_N: Tensor, advantage_N: Tensor, rewards_NR: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float
) -> Tensor:
    """The gradient in the rewards, in plain PyTorch: training treats advantages as constants, so this is off the fast path.

    With c = r - mean, s the divisor's spread and g the gradient where neither clipped nor without variance:
    (g - mean g) / (s + eps) - c mean(g c) / (s (s + eps)^2), means over the group (over all samples for s if scale is global).
    """
    r = rewards_NR.double()
    g_N = torch.where(advantage_N.abs() < clip, grad_N, 0).double()
    index = torch.unique(ids_N, return_inverse=True)[1]
    count = torch.bincount(index)[:, None]

    def over_group(x_NR: Tensor) -> Tensor:
        return (torch.zeros_like(count * x_NR[:1]).index_add(0, index, x_NR) / count)[index]

    c = r - over_group(r)
    at = index[:, None].expand_as(r)
    ends = [torch.empty_like(count * r[:1]).scatter_reduce(0, at, r, how, include_self=False)[index] for how in ("amax", "amin")]
    live = ends[0] != ends[1]
    g = torch.where(live, g_N[:, None] if weights_R is None else g_N[:, None] * weights_R.double(), 0)
    if scale == SCALES.index("none"):
        out = g - over_group(g)
    elif scale == SCALES.index("group"):
        s = over_group(c.square()).sqrt()
        out = (g - over_group(g)) / (s + eps) - c * over_group(g * c) / (s * (s + eps) ** 2)
    else:
        s, every = r.std(0, correction=0), r - r.mean(0)
        out = (g - over_group(g)) / (s + eps) - every * (g * c).mean(0) / (s * (s + eps) ** 2)
        live = live | (s > 0)  # the overall spread depends on every reward
    return torch.where(live, out, 0).to(rewards_NR.dtype)


@advantage_backward_op.register_fake
def _(grad_N, advantage_N, rewards_NR, ids_N, weights_R, scale, clip, eps):
    return torch.empty_like(rewards_NR)


def _advantage_context(ctx, inputs, output) -> None:
    rewards, ids, weights, ctx.scale, ctx.clip, ctx.eps, _ = inputs
    ctx.save_for_backward(output[0], rewards, ids, weights)
    ctx.mark_non_differentiable(*output[1:])


def _advantage_backward(ctx, grad, *_):
    found = advantage_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.clip, ctx.eps)
    return found, None, None, None, None, None, None


advantage_op.register_autograd(_advantage_backward, setup_context=_advantage_context)


# ---------------------------------------------------------------------------------------------- clipped surrogate


@torch.library.custom_op("ldo::grpo_surrogate", mutates_args=())
def surrogate_op(
    logp_NS: Tensor,
    logp_old_NS: Tensor,
    advantage_N: Tensor,
    divergence_NS: Tensor | None,
    weight_S: Tensor | None,
    clip: float,
    weight: float,
    kl: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch: total, policy, divergence and clipped share [4]; the ratios; the gradient of each element's loss in its log-prob."""
    op, module, (n, s) = "grpo_surrogate", _module(), logp_NS.shape
    gpu = _on_gpu(op, logp_NS)
    dtypes = (logp_NS.dtype,) if logp_NS.dtype in (torch.float32, torch.float64) else (torch.float32, torch.float64)
    logp = _check(op, "logp", logp_NS, logp_NS, dtypes, (n, s))
    old = _check(op, "logp_old", logp_old_NS, logp_NS, dtypes, (n, s))
    advantage = _check(op, "advantage", advantage_N, logp_NS, dtypes, (n,))
    divergence = 0 if divergence_NS is None else _check(op, "divergence", divergence_NS, logp_NS, dtypes, (n, s))
    weights = 0 if weight_S is None else _check(op, "weight", weight_S, logp_NS, dtypes, (s,))
    scalars, ratio, slope = logp_NS.new_empty(4), torch.empty_like(logp_NS), torch.empty_like(logp_NS)
    given = (extension.DTYPES[logp_NS.dtype], logp, old, advantage, divergence, weights, n, s, clip, weight, kl)
    made = (scalars.data_ptr(), ratio.data_ptr(), slope.data_ptr())
    if gpu:
        memory, place = _place(logp_NS, module.surrogate_workspace(n, s))
        module.surrogate_cuda(*given, *made, *place)
        del memory
    else:
        module.surrogate_cpu(*given, *made)
    return scalars, ratio, slope


@surrogate_op.register_fake
def _(logp_NS, logp_old_NS, advantage_N, divergence_NS, weight_S, clip, weight, kl):
    return logp_NS.new_empty(4), torch.empty_like(logp_NS), torch.empty_like(logp_NS)


def _surrogate_context(ctx, inputs, output) -> None:
    _, _, _, divergence, weights, _, ctx.weight, ctx.kl = inputs
    ctx.has_divergence = divergence is not None
    ctx.save_for_backward(output[1], output[2], weights)
    ctx.mark_non_differentiable(output[2])


def _surrogate_backward(ctx, grad_scalars, grad_ratio, _):
    ratio, slope, weights = ctx.saved_tensors
    each = grad_scalars / slope.numel()  # of total, policy, divergence, clipped share
    policy = each[0] * ctx.weight * (1 if weights is None else weights) + each[1]
    logp = slope * policy + grad_ratio * ratio
    away = (each[0] * ctx.kl + each[2]).expand(slope.shape) if ctx.has_divergence else None
    return logp, None, None, away, None, None, None, None


surrogate_op.register_autograd(_surrogate_backward, setup_context=_surrogate_context)
