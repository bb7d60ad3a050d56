"""The clipped GRPO surrogate with its divergence penalty, over N samples and S stochastic steps.

    r_ns   = exp(logp_ns - logp_old_ns)
    l_ns   = max(-A_n r_ns, -A_n clip(r_ns, 1 - c, 1 + c))
    total  = mean_ns w_s l_ns + kl mean_ns D_ns

The gradient in logp is w_s (-A_n r_ns) / (N S) where the first form is the larger one or both are equal, else 0. Under
GRPO-Guard, the guarded log-ratio is passed as logp, and 0 as logp_old. D is the exact divergence of a transition from
the reference model's (``ldo.models.flow.divergence``). It is a function of the means and not of logp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.ops import custom_ops, extension, native
from ldo.ops.dispatch import choose_form


@dataclass(frozen=True)
class Surrogate:
    """The surrogate's scalars and ratios.

    ``total``; ``policy``, the mean of l without weights; ``divergence``, the mean of D; ``clipped``, the share of
    elements that were clipped; ``ratio`` in the shape of the log-probs.
    """

    total: Tensor
    policy: Tensor
    divergence: Tensor
    ratio: Tensor
    clipped: Tensor


def grpo_surrogate(
    logp_NS: Tensor,
    logp_old_NS: Tensor | None,
    advantage_N: Tensor,
    divergence_NS: Tensor | None = None,
    *,
    clip: float,
    weight: float | Tensor = 1.0,
    kl: float = 0.0,
    impl: str = "auto",
) -> Surrogate:
    """The clipped surrogate of all samples and steps; differentiable in ``logp_NS`` and ``divergence_NS``.

    ``logp_NS``: [N] or [N, S], fp32 or fp64. ``logp_old_NS`` and ``divergence_NS`` have the same shape; None stands for
    zero. ``weight``: the weight of the policy part, one number or one for each step [S].

    ``impl``: "cuda", "cpp", "reference" or "auto". auto is "cuda" for CUDA tensors if the extension has it, else the
    reference. On the CPU a call costs next to nothing compared with the model's step, and so a run's numbers do not
    depend on whether a compiler was available.

    ValueError on shapes that do not fit, and on 16-bit log-probs, which cannot tell a ratio from 1.
    """
    shape = logp_NS.shape
    _check(logp_NS, logp_old_NS, advantage_N, divergence_NS, weight)
    names, why = extension.forms(logp_NS)
    default = names[0]
    if default == "cpp":
        default, why = "reference", "plain PyTorch, on the CPU"
    impl = choose_form("grpo_surrogate", impl, names, default, why)
    if impl == "reference":
        return _reference(logp_NS, logp_old_NS, advantage_N.detach(), divergence_NS, clip, weight, kl)

    direct = native.direct(logp_NS)
    logp = _prepared(logp_NS, logp_NS, direct)
    old = None if logp_old_NS is None else _prepared(_constant(logp_old_NS), logp, direct)
    divergence = None if divergence_NS is None else _prepared(divergence_NS, logp, direct)
    advantage = _prepared(_constant(advantage_N), logp, True)
    step_weights = None
    if isinstance(weight, Tensor):
        steps = shape[1] if len(shape) == 2 else 1
        step_weights = _constant(weight).to(logp).expand(steps).contiguous()
        weight = 1.0
    given = (logp, old, advantage, divergence, step_weights, clip, weight, kl)
    if direct:
        total, policy, mean_divergence, clipped, ratio = native.surrogate(*given)
        return Surrogate(total, policy, mean_divergence, ratio, clipped)
    scalars, ratio, _ = custom_ops.surrogate_op(*given)
    total, policy, mean_divergence, clipped = scalars.unbind()
    return Surrogate(total, policy, mean_divergence, ratio.view(shape), clipped.detach())


def _check(
    logp: Tensor, old: Tensor | None, advantage: Tensor, divergence: Tensor | None, weight: float | Tensor
) -> None:
    shape = logp.shape
    if logp.ndim not in (1, 2) or not logp.numel() or advantage.shape != shape[:1]:
        raise ValueError(
            f"grpo_surrogate: logp [N, S] and advantage [N] expected, got {tuple(shape)} and {tuple(advantage.shape)}"
        )
    for name, other in (("logp_old", old), ("divergence", divergence)):
        if other is not None and other.shape != shape:
            raise ValueError(
                f"grpo_surrogate: {name} must have the shape of logp, {tuple(shape)}, got {tuple(other.shape)}"
            )
    if isinstance(weight, Tensor) and weight.shape not in ((), shape[1:]):
        raise ValueError(
            f"grpo_surrogate: one weight or one of each step, {tuple(shape[1:])}, expected, got {tuple(weight.shape)}"
        )
    if logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"grpo_surrogate: log-probs must be float32 or float64, got {logp.dtype}")


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _prepared(tensor: Tensor, like: Tensor, keep_shape: bool) -> Tensor:
    """``tensor`` contiguous, with the dtype and device of ``like``, and as [N, S] unless ``keep_shape``.

    The custom op takes only [N, S]. A direct call takes [N] too, which saves the host the views.
    """
    # asked first, since even a conversion that does nothing costs the host time
    if tensor.dtype != like.dtype or tensor.device != like.device:
        tensor = tensor.to(like)
    if tensor.ndim != 2 and not keep_shape:
        tensor = tensor[:, None]
    return tensor.contiguous()


def _reference(
    logp: Tensor,
    old: Tensor | None,
    advantage: Tensor,
    divergence: Tensor | None,
    clip: float,
    weight: float | Tensor,
    kl: float,
) -> Surrogate:
    ratio = (logp if old is None else logp - old.detach()).exp()
    if logp.ndim == 2:
        advantage = advantage[:, None]
    unclipped = -advantage * ratio
    at_bound = -advantage * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(unclipped, at_bound)
    policy = losses.mean()
    clipped = (at_bound > unclipped).to(logp.dtype).mean()
    # a single weight multiplies the mean, where each element would be rounded once more
    has_step_weights = isinstance(weight, Tensor) and weight.ndim > 0
    weighted = (weight * losses).mean() if has_step_weights else weight * policy
    mean_divergence = logp.new_zeros(()) if divergence is None else divergence.mean()
    return Surrogate(weighted + kl * mean_divergence, policy, mean_divergence, ratio, clipped)
