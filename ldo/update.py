"""One optimizer step, the same in every stage: average over ranks, clip, refuse what is not finite, step."""

from __future__ import annotations

import torch
from torch import nn

from ldo.distributed import World, average_gradients


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


def apply(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], world: World, max_norm: float, lr: float, where: str) -> float:
    """Step on the accumulated gradients and clear them; returns the gradient's norm before clipping.

    TrainingError, with no weight touched, if the gradient is not finite; ``where`` says step and batch.
    """
    average_gradients(parameters, world)
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    if norm != norm or norm in (float("inf"), float("-inf")):
        raise TrainingError(f"the gradient is not finite at {where}; the last checkpoint is intact. Lower the learning rate, or look at these clips")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; on a GPU in its fused form, which makes no intermediate copies of all weights."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=all(p.is_cuda for p in parameters) or None)


def warm(lr: float, step: int, warmup: int) -> float:
    """Linear warm-up to a constant rate."""
    return lr * min(1.0, (step + 1) / max(warmup, 1))
