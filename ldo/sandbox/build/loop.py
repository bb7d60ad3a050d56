"""The training loop that all parts of the build share: resumable at any point, in slices of a given time."""

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
    """Run ``step(index)`` for each index below ``total``, each learning rate on a cosine; resume from ``path``.

    ``step`` does forward, backward and optimizer steps, and returns metrics to log. Raises OutOfTime past ``deadline``
    (of time.monotonic); at least one step is taken before.
    """
    start = _restore(path, modules, optimizers) if path.exists() else 0
    # Only now, since loading an optimizer's state replaces its groups.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group.setdefault("initial_lr", group["lr"])

    started = time.monotonic()
    last_saved = started
    sums: dict[str, float] = {}
    for index in range(start, total):
        for group in groups:
            group["lr"] = group["initial_lr"] * cosine(index, total)
        for name, value in step(index).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        done = index + 1
        if done % log_every == 0 or done == total:
            # After a resume the first stretch between log lines may be shorter.
            steps_summed = min(log_every, done - start)
            minutes_left = (time.monotonic() - started) / (done - start) * (total - done) / 60
            metrics = "  ".join(f"{name} {value / steps_summed:.4f}" for name, value in sums.items())
            print(f"{path.stem} {done}/{total}  {metrics}  {minutes_left:.0f} min left", flush=True)
            sums = {}
        current_time = time.monotonic()
        if current_time > deadline and done < total:
            _save(path, modules, optimizers, done)
            raise OutOfTime
        if current_time - last_saved > save_every or done == total:
            _save(path, modules, optimizers, done)
            last_saved = current_time


def _save(path: Path, modules: dict[str, torch.nn.Module], optimizers: list[torch.optim.Optimizer], done: int) -> None:
    """Write weights and optimizers after ``done`` steps, in one move: a slice that is killed leaves the old file."""
    checkpoint = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": done,
    }
    temporary = path.with_suffix(".part")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def _restore(path: Path, modules: dict[str, torch.nn.Module], optimizers: list[torch.optim.Optimizer]) -> int:
    """Load what ``_save`` wrote, and return the number of steps done."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(checkpoint["modules"][name])
    for optimizer, saved_state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(saved_state)
    return checkpoint["step"]
