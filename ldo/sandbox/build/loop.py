"""The training loop that all parts of the build share: resumable at any point, in slices of so many minutes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


class OutOfTime(Exception):
    """The slice's minutes are over; what was trained is saved."""


def cosine(step: int, total: int, warmup: int = 200, floor: float = 0.02) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def fit(
    path: Path,
    modules: dict[str, torch.nn.Module],
    optimizers: list[torch.optim.Optimizer],
    step: Callable[[int], dict[str, float]],
    total: int,
    deadline: float,
    save_every: float = 120.0,
    log_every: int = 100,
) -> None:
    """Run ``step(i)`` for i < total, each learning rate on a cosine; continue from ``path`` where it exists.

    ``step`` does forward, backward and optimizer steps, and returns figures to log. Raises OutOfTime past ``deadline``.
    """
    start = 0
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        start = state["step"]

    def save(done: int) -> None:
        part = path.with_suffix(".part")
        state = {n: m.state_dict() for n, m in modules.items()}
        torch.save({"modules": state, "optimizers": [o.state_dict() for o in optimizers], "step": done}, part)
        os.replace(part, path)

    saved = began = time.monotonic()
    sums: dict[str, float] = {}
    for i in range(start, total):
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * cosine(i, total)
        for key, value in step(i).items():
            sums[key] = sums.get(key, 0.0) + float(value)
        if (i + 1) % log_every == 0 or i + 1 == total:
            n = min(log_every, i + 1 - start)
            left = (time.monotonic() - began) / (i + 1 - start) * (total - i - 1)
            figures = "  ".join(f"{k} {v / n:.4f}" for k, v in sums.items())
            print(f"{path.stem} {i + 1}/{total}  {figures}  {left / 60:.0f} min left", flush=True)
            sums = {}
        now = time.monotonic()
        if now > deadline and i + 1 < total:
            save(i + 1)
            raise OutOfTime
        if now - saved > save_every or i + 1 == total:
            save(i + 1)
            saved = now
