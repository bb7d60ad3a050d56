"""Direct calls into the extension (csrc/). Every tensor is checked here before its address is passed.

A direct call costs the host a few microseconds. Where something traces or transforms the call, use the custom ops of
``ldo.ops.custom_ops`` instead; ``direct`` says which. A kernel is launched on the current stream of its tensors'
device.

Shapes: N samples, R rewards, G groups, S steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldo.ops import extension
from ldo.ops.extension import EXTENSION_DTYPES

# As csrc/arithmetic.h numbers them.
SCALES = ("group", "global", "none")

# Above this many samples, statistics are copied out of the launch's buffer: a few rows would keep all of it alive.
LARGE = 2**16

FLOATS = (torch.float32, torch.float64)
IDS = (torch.int64,)
REWARDS = tuple(EXTENSION_DTYPES)


def _module() -> Any:
    module, why = extension.load()
    if module is None:
        raise RuntimeError(f"ldo._C is needed here: {why}")
    return module


def direct(tensor: Tensor) -> bool:
    """Whether the extension may be called directly: not if something traces or transforms the call."""
    return not (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        # make_fx
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    )


def _index(op: str, module: Any, device: torch.device) -> int:
    """The number of a GPU, or the extension's number for the CPU; ValueError if it was built without that device."""
    if device.type == "cpu":
        return module.CPU
    if device.type != "cuda" or not module.CUDA:
        raise ValueError(f"{op}: the extension as built here takes no {device.type} tensors")
    return device.index


def _stream_of(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# torch's own raw lookup creates no stream object, which saves host time.
_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)


def _check(
    op: str, name: str, tensor: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> int:
    """The address of ``tensor``; ValueError unless it has the device, dtype, shape and layout that a kernel reads."""
    # one test for the usual case; what is wrong is found out only if it fails
    if tensor.dtype in dtypes and tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
        return tensor.data_ptr()
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the first argument on {device}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} must be {allowed}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _two_sizes(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a matrix; a vector has one column."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


# ---------------------------------------------------------------------------------------------- group advantage


def launch_advantage(
    rewards: Tensor,
    ids_N: Tensor,
    weights_R: Tensor | None,
    scale: int,
    clip: float,
    eps: float,
    wide: bool,
    wait: bool = False,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int] | None]:
    """One call of the C++ form, or one kernel launch, on rewards [N] or [N, R].

    Returns advantages [N], a buffer, the zero-variance mask [N, R] and ``info``. The buffer begins with mean and std
    [2, N, R]; of these and of the mask the first G rows are written. ``info`` is the number of groups, 1 if ids fall
    somewhere (else 0), and the flat index of the first reward that is not finite (else -1). If ids fall or a reward is
    not finite, nothing else is written. ``info`` is None on a GPU without ``wait``. ``wide``: results in fp64.
    """
    op = "group_advantage"
    module = _module()
    shape, device = rewards.shape, rewards.device
    gpu = _index(op, module, device)
    samples, kinds = _two_sizes(shape)
    if not 0 < kinds <= module.MAX_REWARDS or samples < 1:
        raise ValueError(f"{op}: at least one sample and 1 to {module.MAX_REWARDS} rewards, got {tuple(shape)}")
    rewards_address = _check(op, "rewards", rewards, device, REWARDS, shape)
    ids_address = _check(op, "groups", ids_N, device, IDS, (samples,))
    weights_address, weights_type = 0, 0
    if weights_R is not None:
        weights_address = _check(op, "weights", weights_R, device, REWARDS, (kinds,))
        weights_type = EXTENSION_DTYPES[weights_R.dtype]
    dtype, item = (torch.float64, 8) if wide else (torch.float32, 4)
    # One buffer for mean, std, info (24 bytes) and the GPU's scratch memory; these are their offsets in bytes, aligned.
    std = samples * kinds * item
    info = (2 * std + 15) // 16 * 16
    workspace = info + 32
    end = workspace if gpu < 0 else workspace + module.advantage_workspace(samples, kinds)
    advantage_N = torch.empty(samples, dtype=dtype, device=device)
    # not part of the buffer, since torch.save takes no two dtypes in one storage
    zero = torch.empty((samples, kinds), dtype=torch.bool, device=device)
    buffer = torch.empty((end + item - 1) // item, dtype=dtype, device=device)
    base = buffer.data_ptr()
    result = module.group_advantage(
        rewards=rewards_address,
        rewards_type=EXTENSION_DTYPES[rewards.dtype],
        ids=ids_address,
        weights=weights_address,
        weights_type=weights_type,
        samples=samples,
        kinds=kinds,
        scale=scale,
        clip=clip,
        eps=eps,
        out_type=EXTENSION_DTYPES[dtype],
        advantage=advantage_N.data_ptr(),
        mean=base,
        deviation=base + std,
        zero=zero.data_ptr(),
        info=base + info,
        workspace=base + workspace,
        device=gpu,
        stream=0 if gpu < 0 else _stream(gpu),
        wait=wait,
    )
    return advantage_N, buffer, zero, result


def advantage(
    rewards: Tensor, ids_N: Tensor, weights_R: Tensor | None, scale: int, clip: float, eps: float, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages [N], and mean, std and zero-variance mask [G, R], for ids in any order; no gradient.

    ``rewards``: [N] or [N, R]. ValueError for a reward that is not finite.
    """
    samples, kinds = _two_sizes(rewards.shape)
    options = (weights_R, scale, clip, eps, wide)
    # Waiting for info is the one wait for the device: the host needs to know G, and the sample of a bad reward.
    advantage_N, buffer, zero, info = launch_advantage(rewards, ids_N, *options, wait=True)
    groups, unordered, bad = info
    if bad >= 0:
        sample, kind = divmod(bad, kinds)
        value = float(rewards.view(-1)[bad])
        raise ValueError(f"group_advantage: reward {kind} of sample {sample} is {value}; a reward must be finite")
    # The first launch assumed that ids do not fall, which is the usual case. If they do, sort and repeat it.
    if unordered:
        ids, order = torch.sort(ids_N, stable=True)
        in_order, buffer, zero, info = launch_advantage(rewards[order], ids, *options, wait=True)
        groups = info[0]
        advantage_N[order] = in_order
    mean = buffer.as_strided((groups, kinds), (kinds, 1), 0)
    std = buffer.as_strided((groups, kinds), (kinds, 1), samples * kinds)
    zero = zero[:groups]
    if samples > LARGE:
        return advantage_N, mean.clone(), std.clone(), zero.clone()
    return advantage_N, mean, std, zero


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
    """One launch on log-probs [N] or [N, S].

    Returns total, policy, divergence and clipped share [4], the ratios, and the slopes: the gradient of each element's
    loss in its log-prob, or None unless ``differentiable``.
    """
    op = "grpo_surrogate"
    module = _module()
    shape, device, dtype = logp.shape, logp.device, logp.dtype
    gpu = _index(op, module, device)
    samples, steps = _two_sizes(shape)
    if samples < 1 or steps < 1:
        raise ValueError(f"{op}: at least one sample and one step are needed, got {tuple(shape)}")
    # all tensors have the dtype of logp; if logp itself has a wrong one, the error names the right ones
    dtypes = (dtype,) if dtype in FLOATS else FLOATS
    logp_address = _check(op, "logp", logp, device, dtypes, shape)
    old_address = 0 if logp_old is None else _check(op, "logp_old", logp_old, device, dtypes, shape)
    advantage_address = _check(op, "advantage", advantage_N, device, dtypes, (samples,))
    divergence_address = 0 if divergence is None else _check(op, "divergence", divergence, device, dtypes, shape)
    weights_address = 0 if weight_S is None else _check(op, "weight", weight_S, device, dtypes, (steps,))
    scalars = torch.empty(4, dtype=dtype, device=device)
    ratio = torch.empty_like(logp)
    slope = torch.empty_like(logp) if differentiable else None
    scratch_bytes = 0 if gpu < 0 else module.surrogate_workspace(samples, steps)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device) if scratch_bytes else None
    module.grpo_surrogate(
        type=EXTENSION_DTYPES[dtype],
        logp=logp_address,
        logp_old=old_address,
        advantage=advantage_address,
        divergence=divergence_address,
        weights=weights_address,
        samples=samples,
        steps=steps,
        clip=clip,
        weight=weight,
        kl=kl,
        scalars=scalars.data_ptr(),
        ratio=ratio.data_ptr(),
        slope=_address(slope),
        workspace=_address(scratch),
        device=gpu,
        stream=0 if gpu < 0 else _stream(gpu),
    )
    return scalars, ratio, slope


class _Surrogate(torch.autograd.Function):
    """``launch_surrogate`` with its gradient."""

    @staticmethod
    def forward(ctx, logp, logp_old, advantage, divergence, weights, clip, weight, kl):
        scalars, ratio, slope = launch_surrogate(logp, logp_old, advantage, divergence, weights, clip, weight, kl, True)
        total, policy, mean_divergence, clipped = scalars.unbind()
        ctx.weight = weight
        ctx.kl = kl
        ctx.save_for_backward(ratio, slope, weights)
        ctx.mark_non_differentiable(clipped)
        # gradients that do not come in are None, not zeros, and cost nothing
        ctx.set_materialize_grads(False)
        return total, policy, mean_divergence, clipped, ratio

    @staticmethod
    def backward(ctx, total, policy, divergence, _, grad_ratio):
        of_logp, of_divergence = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        logp_gradient, divergence_gradient = surrogate_gradients(
            ctx, total, policy, divergence, grad_ratio, of_logp, of_divergence
        )
        return logp_gradient, None, None, divergence_gradient, None, None, None, None


def surrogate_gradients(
    ctx: Any,
    total: Tensor | None,
    policy: Tensor | None,
    divergence: Tensor | None,
    grad_ratio: Tensor | None,
    of_logp: bool,
    of_divergence: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients in the log-probs and in the divergences, each if it is wanted.

    ``total``, ``policy``, ``divergence`` and ``grad_ratio`` are the gradients that come in for the scalars and the
    ratios. None stands for no gradient, in and out.
    """
    ratio, slope, weights = ctx.saved_tensors
    count = slope.numel()
    total = None if total is None else total / count
    policy = None if policy is None else policy / count
    divergence = None if divergence is None else divergence / count
    logp_gradient = divergence_gradient = None
    if of_logp:
        per_slope = policy
        if total is not None:
            # each operation that changes nothing is left out, since it costs the host time
            weighted = total if ctx.weight == 1 else total * ctx.weight
            weighted = weighted if weights is None else weighted * weights
            per_slope = weighted if policy is None else weighted + policy
        if per_slope is not None:
            logp_gradient = slope * per_slope
        if grad_ratio is not None:
            # d ratio / d logp is the ratio itself
            of_ratio = grad_ratio * ratio
            logp_gradient = of_ratio if logp_gradient is None else logp_gradient + of_ratio
    if of_divergence:
        if total is not None:
            divergence_gradient = total * ctx.kl
        if divergence is not None:
            divergence_gradient = divergence if divergence_gradient is None else divergence_gradient + divergence
        if divergence_gradient is not None:
            divergence_gradient = divergence_gradient.expand(slope.shape)
    return logp_gradient, divergence_gradient


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
    differentiable = logp.requires_grad or (divergence is not None and divergence.requires_grad)
    if differentiable and torch.is_grad_enabled():
        return _Surrogate.apply(*given)
    # without a gradient the slopes need not be computed
    scalars, ratio, _ = launch_surrogate(*given, False)
    total, policy, mean_divergence, clipped = scalars.unbind()
    return total, policy, mean_divergence, clipped, ratio
