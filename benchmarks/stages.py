"""Where the relation loss spends its time: each of its kernels and products between two marks of the device's clock.

The operation runs as it is; what it launches is wrapped. Calls follow each other without a wait, so that the GPU is kept busy
and a mark is not the host's. What lies between the stages (padding, casts, gaps) is the whole operation less their sum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ldo.kernels import relation, relation_plan, support

KERNELS = {
    "prepare_kernel": "before",
    "pair_kernel": "pairs",
    "loss_kernel": "after",
    "project_kernel": "after",
}
STAGES = ("before", "pairs", "product", "after")


@dataclass(frozen=True)
class Split:
    """``ms`` by stage, medians of a call's sums. ``usage``: registers, spills and shared memory of the pair kernel, where Triton tells."""

    ms: dict[str, float]
    usage: dict[str, int]


def split(work: Callable[..., Any], inputs: Sequence[tuple], device: torch.device, repeat: int) -> Split:
    """Run ``work``, which holds the relation loss, ``repeat`` times on ``inputs`` in turn after one call each that is not counted."""
    calls: list[list[tuple[str, Any, Any]]] = []
    compiled: dict[str, Any] = {}

    def now() -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def marked(stage: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        start = now()
        function(*arguments, **keywords)
        calls[-1].append((stage, start, now()))

    with _patched(marked, compiled):
        for k in range(len(inputs) + repeat):
            calls.append([])
            work(*inputs[k % len(inputs)])
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    def took(start: Any, end: Any) -> float:
        return start.elapsed_time(end) if device.type == "cuda" else 1e3 * (end - start)

    kept = calls[len(inputs) :]
    ms = {stage: statistics.median(sum(took(a, b) for name, a, b in call if name == stage) for call in kept) for stage in STAGES}
    kernel = compiled.get("pairs")
    if not hasattr(kernel, "n_regs"):  # the interpreter compiles nothing
        return Split(ms, {})
    return Split(ms, {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared})


@contextmanager
def _patched(marked: Callable[..., None], compiled: dict[str, Any]) -> Iterator[None]:
    """Every launch and product goes through ``marked``; ``compiled`` gets what Triton tells of a stage's kernel."""
    launch, product = support.Launch.__call__, relation._add_product

    def launched(self: support.Launch, *arguments: Any) -> None:
        marked(KERNELS[self.name], partial(launch, self), *arguments)
        compiled[KERNELS[self.name]] = self.compiled

    support.Launch.__call__, relation._add_product = launched, partial(marked, "product", product)
    try:
        yield
    finally:
        support.Launch.__call__, relation._add_product = launch, product


def pair_flops(n: int, ds: int, dt: int, config: relation_plan.Config, b: int = 1) -> float:
    """What the pair kernel's tiles multiply, the diagonal's squares whole: the forward's floor by symmetry and some 3% at 8k."""
    squares = -(-n // config.square)
    return b * squares * (squares + 1) / 2 * config.square**2 * 2 * (ds + dt)
