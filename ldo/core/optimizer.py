"""One optimizer step, the same in every stage: average over ranks, clip, refuse what is not finite, step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ldo.core.distributed import Processes, average_gradients
from ldo.core.errors import TrainingError


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    processes: Processes,
    max_norm: float,
    lr: float,
    where: str,
) -> float:
    """Step on the accumulated gradients and clear them; returns the gradient's norm before clipping.

    TrainingError, with no weight touched, if the gradient is not finite; ``where`` says step and batch.
    """
    average_gradients(parameters, processes)
    gradient_norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    # Before the step, so that no weight is touched: the checkpoint on disk and the values in memory are both still
    # good.
    if not math.isfinite(gradient_norm):
        raise TrainingError(
            f"the gradient is not finite at {where}; the last checkpoint is intact. "
            "Lower the learning rate, or look at these clips"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    # To None, so that a parameter that gets no gradient next time is skipped by the optimizer rather than decayed.
    optimizer.zero_grad(set_to_none=True)
    return gradient_norm


def make_adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; on a GPU in its fused form, which makes no intermediate copies of all weights."""
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=on_gpu or None)


def warmup_rate(lr: float, step: int, warmup: int) -> float:
    """Linear warm-up to a constant rate."""
    return lr * min(1.0, (step + 1) / max(warmup, 1))


def average_keep(keep: float, step: int) -> float:
    """Share that an exponential average keeps at ``step``: 0.1 at first, ``keep`` once there are enough to average.

    The warm-up that implementations share: a constant share would hold the start in the average for 1 / (1 - keep)
    steps and more.
    """
    return min(keep, (1 + step) / (10 + step))
