"""The clipped GRPO surrogate with its divergence penalty, over N samples and S stochastic steps.

    r_ns   = exp(logp_ns - logp_old_ns)
    l_ns   = max(-A_n r_ns, -A_n clip(r_ns, 1 - c, 1 + c))
    total  = mean_ns w_s l_ns + kl mean_ns D_ns

The gradient in logp is w_s (-A_n r_ns) / (N S) where the second form is not the larger one, else 0. Under GRPO-Guard the guarded
log-ratio takes the place of logp, and 0 that of logp_old. D is the transition's exact divergence from the reference
(``ldo.flow.divergence``), a function of the means and not of logp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldo.ops import extension, native
from ldo.ops.dispatch import choose


@dataclass(frozen=True)
class Surrogate:
    """Scalars ``total``, ``policy`` (mean of l, without weights), ``divergence`` (mean of D) and ``clipped`` (share), and ``ratio`` [N, S]."""

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
    """``logp_NS``: [N] or [N, S], fp32 or fp64; ``logp_old_NS``, ``divergence_NS`` alike, None for zero. ``weight``: of the policy part, one
    number or one of each step [S].

    Differentiable in ``logp_NS`` and ``divergence_NS``. ``impl``: "cuda", "cpp" or "reference". auto is "cuda" for CUDA tensors where the
    extension has it, else the reference: on the CPU a call costs next to nothing beside the model's step, and so a run's numbers
    do not depend on whether a compiler was there. ValueError on shapes that do not fit and on 16-bit log-probs, which cannot tell
    a ratio from 1.
    """
    shape = logp_NS.shape
    if logp_NS.ndim not in (1, 2) or not logp_NS.numel() or advantage_N.shape != shape[:1]:
        raise ValueError(f"grpo_surrogate: logp [N, S] and advantage [N] expected, got {tuple(shape)} and {tuple(advantage_N.shape)}")
    for name, other in (("logp_old", logp_old_NS), ("divergence", divergence_NS)):
        if other is not None and other.shape != shape:
            raise ValueError(f"grpo_surrogate: {name} must have the shape of logp, {tuple(shape)}, got {tuple(other.shape)}")
    if isinstance(weight, Tensor) and weight.shape not in ((), shape[1:]):
        raise ValueError(f"grpo_surrogate: one weight or one of each step, {tuple(shape[1:])}, expected, got {tuple(weight.shape)}")
    if logp_NS.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"grpo_surrogate: log-probs must be float32 or float64, got {logp_NS.dtype}")
    names, why = extension.forms(logp_NS)
    default = names[0] if names[0] != "cpp" else "reference"
    impl = choose("grpo_surrogate", impl, names, default, why if default != "reference" or len(names) == 1 else "plain PyTorch, on the CPU")
    if impl == "reference":
        return _reference(logp_NS, logp_old_NS, advantage_N.detach(), divergence_NS, clip, weight, kl)

    direct = native.direct(logp_NS)
    logp = _prepared(logp_NS, logp_NS, direct)
    old = None if logp_old_NS is None else _prepared(_constant(logp_old_NS), logp, direct)
    away = None if divergence_NS is None else _prepared(divergence_NS, logp, direct)
    advantage = _prepared(_constant(advantage_N), logp, True)
    steps = _constant(weight).to(logp).expand(shape[1] if len(shape) == 2 else 1).contiguous() if isinstance(weight, Tensor) else None
    given = (logp, old, advantage, away, steps, clip, 1.0 if steps is not None else weight, kl)
    if direct:
        total, policy, divergence, clipped, ratio = native.surrogate(*given)
        return Surrogate(total, policy, divergence, ratio, clipped)
    scalars, ratio, _ = native.surrogate_op(*given)
    total, policy, divergence, clipped = scalars.unbind()
    return Surrogate(total, policy, divergence, ratio.view(shape), clipped.detach())


def _constant(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _prepared(x: Tensor, like: Tensor, keep_shape: bool) -> Tensor:
    """As a kernel reads it, and for the custom op always [N, S]."""
    x = x.to(like) if x.dtype != like.dtype or x.device != like.device else x
    return (x if keep_shape or x.ndim == 2 else x[:, None]).contiguous()


def _reference(logp: Tensor, old: Tensor | None, advantage: Tensor, away: Tensor | None, clip: float, weight: float | Tensor, kl: float) -> Surrogate:
    ratio = (logp if old is None else logp - old.detach()).exp()
    a = advantage.view(-1, *[1] * (logp.ndim - 1))
    free, held = -a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)
    each = torch.maximum(free, held)
    policy, clipped = each.mean(), (held > free).to(logp.dtype).mean()
    weighted = (weight * each).mean() if isinstance(weight, Tensor) and weight.ndim else weight * policy
    divergence = away.mean() if away is not None else logp.new_zeros(())
    return Surrogate(weighted + kl * divergence, policy, divergence, ratio, clipped)
