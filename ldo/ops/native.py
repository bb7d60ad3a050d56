"""The two operations of csrc/: every pointer is checked here before it is passed.

Called as they are, they cost the host a few microseconds (``direct``). For torch.compile and other tracers they are also custom ops,
which those take as opaque: shapes come from ``register_fake`` and gradients from ``register_autograd``. A kernel is launched on the
current stream of its tensors' device.

Shapes: N samples, R rewards, G groups, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldo.ops import extension

SCALES = ("group", "global", "none")  # as csrc/arithmetic.h numbers them
LARGE = 2**16  # samples of which no buffer is kept for a few rows of statistics
FLOATS = (torch.float32, torch.float64)
IDS = (torch.int64,)
REWARDS = tuple(extension.DTYPES)


def _module() -> Any:
    module, why = extension.load()
    if module is None:
        raise RuntimeError(f"ldo._C is needed here: {why}")
    return module


def direct(tensor: Tensor) -> bool:
    """May the extension be called as it is, not through a custom op? Not where something traces or transforms the call."""
    return not (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)  # make_fx
    )


def _index(op: str, module: Any, device: torch.device) -> int:
    """The number of a GPU, or that of the CPU; ValueError for a device that the extension cannot serve."""
    if device.type == "cpu":
        return module.CPU
    if device.type != "cuda" or not module.CUDA:
        raise ValueError(f"{op}: the extension as built here takes no {device.type} tensors")
    return device.index


def _stream_of(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)  # the first makes no object


def _check(op: str, name: str, tensor: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> int:
    """The address of a tensor that is as a kernel reads it; ValueError if it is not."""
    if tensor.dtype in dtypes and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
        return tensor.data_ptr()
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the first argument on {device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


# ---------------------------------------------------------------------------------------------- group advantage


def launch_advantage(
    rewards: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float, wide: bool, wait: bool = False
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int] | None]:
    """One call of the C++ form or one kernel launch on rewards [N] or [N, R]: advantages [N], a buffer, the zero-variance mask [N, R], info.

    The buffer begins with mean and std [2, N, R]; of them and of the mask the first G rows are written. ``info``, None without ``wait``
    on a GPU: how many groups there are; 1 if ids fall somewhere; the flat index of the first reward that is not finite, or -1. In the
    last two cases nothing else is written. ``wide``: fp64 results.
    """
    op, module, shape, device = "group_advantage", _module(), rewards.shape, rewards.device
    gpu = _index(op, module, device)
    n, r = shape if len(shape) == 2 else (shape[0], 1)
    if not 0 < r <= module.MAX_REWARDS or n < 1:
        raise ValueError(f"{op}: at least one sample and 1 to {module.MAX_REWARDS} rewards, got {tuple(shape)}")
    rewards_at = _check(op, "rewards", rewards, device, REWARDS, shape)
    ids = _check(op, "groups", ids_N, device, IDS, (n,))
    weights = 0 if weights_R is None else _check(op, "weights", weights_R, device, REWARDS, (r,))
    out, size = (torch.float64, 8) if wide else (torch.float32, 4)
    # one buffer: mean, std, info and the GPU's scratch memory, in bytes from its begin
    std = n * r * size
    info = (2 * std + 15) // 16 * 16
    work = info + 32
    end = work if gpu < 0 else work + module.advantage_workspace(n, r)
    advantage = torch.empty(n, dtype=out, device=device)
    zero = torch.empty((n, r), dtype=torch.bool, device=device)  # torch.save takes no two types in one storage
    buffer = torch.empty((end + size - 1) // size, dtype=out, device=device)
    at = buffer.data_ptr()
    found = module.group_advantage(
        rewards=rewards_at,
        rewards_type=extension.DTYPES[rewards.dtype],
        ids=ids,
        weights=weights,
        weights_type=0 if weights_R is None else extension.DTYPES[weights_R.dtype],
        samples=n,
        kinds=r,
        scale=scale,
        clip=clip,
        eps=eps,
        out_type=extension.DTYPES[out],
        advantage=advantage.data_ptr(),
        mean=at,
        deviation=at + std,
        zero=zero.data_ptr(),
        info=at + info,
        workspace=at + work,
        device=gpu,
        stream=0 if gpu < 0 else _stream(gpu),
        wait=wait,
    )
    return advantage, buffer, zero, found


def advantage(
    rewards: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages [N], and mean, std and zero-variance mask [G, R], for ids in any order; no gradient. ``rewards``: [N] or [N, R].

    The launch assumes that ids do not fall and says if they did; then they are sorted and it is repeated. Reading ``info``
    is the one wait for the device: G is needed on the host, and so is the sample of a bad reward (ValueError).
    """
    n, r = rewards.shape if rewards.ndim == 2 else (rewards.shape[0], 1)
    out, buffer, zero, (groups, unordered, bad) = launch_advantage(rewards, ids_N, weights_R, scale, clip, eps, wide, True)
    if bad >= 0:
        k, j = divmod(bad, r)
        raise ValueError(f"group_advantage: reward {j} of sample {k} is {float(rewards.view(-1)[bad])}; a reward must be finite")
    if unordered:
        ids, order = torch.sort(ids_N, stable=True)
        there, buffer, zero, (groups, _, _) = launch_advantage(rewards[order], ids, weights_R, scale, clip, eps, wide, True)
        out[order] = there
    rows, strides = (groups, r), (r, 1)
    stats = buffer.as_strided(rows, strides, 0), buffer.as_strided(rows, strides, n * r), zero[:groups]
    return out, *(stats if n <= LARGE else (x.clone() for x in stats))


@torch.library.custom_op("ldo::group_advantage", mutates_args=())
def advantage_op(
    rewards_NR: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``advantage`` for tracers, and with a gradient in the rewards; no two results share memory."""
    out, *stats = advantage(rewards_NR, ids_N, weights_R, scale, clip, eps, wide)
    return out, *(stats if len(ids_N) > LARGE else (x.clone() for x in stats))


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


def launch_surrogate(
    logp: Tensor,
    logp_old: Tensor | None,
    advantage_N: Tensor,
    divergence: Tensor | None,
    weight_S: Tensor | None,
    clip: float,
    weight: float,
    kl: float,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One launch on log-probs [N] or [N, S]: total, policy, divergence and clipped share [4]; the ratios; with ``differentiable`` the
    gradient of each element's loss in its log-prob.
    """
    op, module, shape, device, dtype = "grpo_surrogate", _module(), logp.shape, logp.device, logp.dtype
    gpu = _index(op, module, device)
    n, s = shape if len(shape) == 2 else (shape[0], 1)
    if n < 1 or s < 1:
        raise ValueError(f"{op}: at least one sample and one step are needed, got {tuple(shape)}")
    dtypes = (dtype,) if dtype in FLOATS else FLOATS
    logp_at = _check(op, "logp", logp, device, dtypes, shape)
    old = 0 if logp_old is None else _check(op, "logp_old", logp_old, device, dtypes, shape)
    advantage_at = _check(op, "advantage", advantage_N, device, dtypes, (n,))
    away = 0 if divergence is None else _check(op, "divergence", divergence, device, dtypes, shape)
    weights = 0 if weight_S is None else _check(op, "weight", weight_S, device, dtypes, (s,))
    scalars, ratio = torch.empty(4, dtype=dtype, device=device), torch.empty_like(logp)
    slope = torch.empty_like(logp) if differentiable else None
    need = 0 if gpu < 0 else module.surrogate_workspace(n, s)
    memory = torch.empty(need, dtype=torch.uint8, device=device) if need else None
    module.grpo_surrogate(
        type=extension.DTYPES[dtype],
        logp=logp_at,
        logp_old=old,
        advantage=advantage_at,
        divergence=away,
        weights=weights,
        samples=n,
        steps=s,
        clip=clip,
        weight=weight,
        kl=kl,
        scalars=scalars.data_ptr(),
        ratio=ratio.data_ptr(),
        slope=0 if slope is None else slope.data_ptr(),
        workspace=0 if memory is None else memory.data_ptr(),
        device=gpu,
        stream=0 if gpu < 0 else _stream(gpu),
    )
    return scalars, ratio, slope


class _Surrogate(torch.autograd.Function):
    """``launch_surrogate`` with its gradient. Gradients that do not come in are None, not zeros, and cost nothing."""

    @staticmethod
    def forward(ctx, logp, logp_old, advantage, divergence, weights, clip, weight, kl):
        scalars, ratio, slope = launch_surrogate(logp, logp_old, advantage, divergence, weights, clip, weight, kl, True)
        found = *scalars.unbind(), ratio
        ctx.weight, ctx.kl = weight, kl
        ctx.save_for_backward(ratio, slope, weights)
        ctx.mark_non_differentiable(found[3])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx, total, policy, divergence, _, grad_ratio):
        logp, away = _surrogate_gradients(ctx, total, policy, divergence, grad_ratio, ctx.needs_input_grad[0], ctx.needs_input_grad[3])
        return logp, None, None, away, None, None, None, None


def _surrogate_gradients(
    ctx, total: Tensor | None, policy: Tensor | None, divergence: Tensor | None, grad_ratio: Tensor | None, of_logp: bool, of_divergence: bool
) -> tuple[Tensor | None, Tensor | None]:
    """In the log-probs and in the divergences, where they are wanted, from what comes in for the scalars and the ratios; None is no gradient."""
    ratio, slope, weights = ctx.saved_tensors
    count, logp, away = slope.numel(), None, None
    total, policy, divergence = (None if g is None else g / count for g in (total, policy, divergence))
    if of_logp:
        if total is not None:
            weighted = total if ctx.weight == 1 else total * ctx.weight
            weighted = weighted if weights is None else weighted * weights
            policy = weighted if policy is None else weighted + policy
        logp = None if policy is None else slope * policy
        if grad_ratio is not None:
            logp = grad_ratio * ratio if logp is None else logp + grad_ratio * ratio
    if of_divergence:
        away = None if total is None else total * ctx.kl
        if divergence is not None:
            away = divergence if away is None else away + divergence
        away = None if away is None else away.expand(slope.shape)
    return logp, away


def surrogate(
    logp: Tensor,
    logp_old: Tensor | None,
    advantage_N: Tensor,
    divergence: Tensor | None,
    weight_S: Tensor | None,
    clip: float,
    weight: float,
    kl: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total, policy, divergence and clipped share, and the ratios in the shape of ``logp``: [N] or [N, S]."""
    given = (logp, logp_old, advantage_N, divergence, weight_S, clip, weight, kl)
    if torch.is_grad_enabled() and (logp.requires_grad or (divergence is not None and divergence.requires_grad)):
        return _Surrogate.apply(*given)
    scalars, ratio, _ = launch_surrogate(*given, False)
    return *scalars.unbind(), ratio


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
    """``launch_surrogate`` for tracers: the scalars [4], the ratios and the slopes."""
    return launch_surrogate(logp_NS, logp_old_NS, advantage_N, divergence_NS, weight_S, clip, weight, kl, True)


@surrogate_op.register_fake
def _(logp_NS, logp_old_NS, advantage_N, divergence_NS, weight_S, clip, weight, kl):
    return logp_NS.new_empty(4), torch.empty_like(logp_NS), torch.empty_like(logp_NS)


def _surrogate_context(ctx, inputs, output) -> None:
    _, _, _, divergence, weights, _, ctx.weight, ctx.kl = inputs
    ctx.has_divergence = divergence is not None
    ctx.save_for_backward(output[1], output[2], weights)
    ctx.mark_non_differentiable(output[2])


def _surrogate_backward(ctx, grad_scalars, grad_ratio, _):
    total, policy, divergence, _ = grad_scalars.unbind()
    logp, away = _surrogate_gradients(ctx, total, policy, divergence, grad_ratio, True, ctx.has_divergence)
    return logp, None, None, away, None, None, None, None


surrogate_op.register_autograd(_surrogate_backward, setup_context=_surrogate_context)
