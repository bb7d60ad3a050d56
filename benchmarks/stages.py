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
from typing import Any

import torch

from ldo.kernels import relation

KERNELS = {
    "prepare_kernel": "before",
    "class_sums_kernel": "before",
    "factor_kernel": "before",
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


class _Wrapped:
    """A Triton kernel of which every launch is marked."""

    def __init__(self, kernel: Any, mark: Callable[..., Any]):
        self.kernel, self.mark = kernel, mark

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self.mark(self.kernel[grid])


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

    def marked(stage: str) -> Callable[..., Any]:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **keywords: Any) -> Any:
                start = now()
                compiled[stage] = function(*arguments, **keywords)
                calls[-1].append((stage, start, now()))

            return run

        return wrap

    with _patched(marked):
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
def _patched(marked: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    code = relation.device_code
    kernels, product = {name: getattr(code, name) for name in KERNELS}, relation._add_product
    for name, stage in KERNELS.items():
        setattr(code, name, _Wrapped(kernels[name], marked(stage)))
    relation._add_product = marked("product")(product)
    try:
        yield
    finally:
        relation._add_product = product
        for name, kernel in kernels.items():
            setattr(code, name, kernel)


def pair_flops(n: int, ds: int, dt: int, config: relation.Config, b: int = 1) -> float:
    """What the pair kernel's tiles multiply, the diagonal's squares whole: the forward's floor by symmetry and some 3% at 8k."""
    squares = -(-n // config.super)
    return b * squares * (squares + 1) / 2 * config.super**2 * 2 * (ds + dt)
