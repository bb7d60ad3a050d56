"""Where the relation loss spends its time: each of its kernels and products between two marks of the device's clock.

The operation itself is unchanged; its launches are wrapped. Calls follow each other without a wait, so that the GPU is
kept busy and a mark shows its time and not the host's. What lies between the stages (padding, casts, gaps) is the whole
operation less their sum.
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

# the stage of each kernel
KERNELS = {
    "prepare_kernel": "before",
    "pair_kernel": "pairs",
    "loss_kernel": "after",
    "project_kernel": "after",
}
STAGES = ("before", "pairs", "product", "after")


@dataclass(frozen=True)
class Split:
    """``ms``: of each stage, the median over the calls.

    ``usage``: registers, spills and shared memory of the pair kernel, where Triton compiles it.
    """

    ms: dict[str, float]
    usage: dict[str, int]


def split(work: Callable[..., Any], inputs: Sequence[tuple], device: torch.device, repeat: int) -> Split:
    """Run ``work``, which calls the relation loss, ``repeat`` times on ``inputs`` in turn, after a warm-up on each."""
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
        for index in range(len(inputs) + repeat):
            calls.append([])
            work(*inputs[index % len(inputs)])
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    def elapsed(start: Any, end: Any) -> float:
        return start.elapsed_time(end) if device.type == "cuda" else 1e3 * (end - start)

    def stage_ms(call: list[tuple[str, Any, Any]], stage: str) -> float:
        return sum(elapsed(start, end) for name, start, end in call if name == stage)

    # the first call on each input set is the warm-up
    measured = calls[len(inputs) :]
    medians = {stage: statistics.median(stage_ms(call, stage) for call in measured) for stage in STAGES}
    kernel = compiled.get("pairs")
    # the interpreter compiles nothing
    if not hasattr(kernel, "n_regs"):
        return Split(medians, {})
    return Split(medians, {"registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared})


@contextmanager
def _patched(marked: Callable[..., None], compiled: dict[str, Any]) -> Iterator[None]:
    """Every launch and product goes through ``marked``; ``compiled`` gets what Triton compiled for a stage."""
    launch = support.Launch.__call__
    product = relation._add_product

    def launched(self: support.Launch, *arguments: Any) -> None:
        marked(KERNELS[self.name], partial(launch, self), *arguments)
        # after the launch, which is when Triton compiles
        compiled[KERNELS[self.name]] = self.compiled

    support.Launch.__call__ = launched
    relation._add_product = partial(marked, "product", product)
    try:
        yield
    finally:
        support.Launch.__call__ = launch
        relation._add_product = product


def pair_flops(n: int, ds: int, dt: int, config: relation_plan.Config, b: int = 1) -> float:
    """Operations of the pair kernel's tiles, which compute the squares on the diagonal whole.

    That is the forward's floor by symmetry plus some 3% at 8k tokens.
    """
    squares = -(-n // config.square)
    return b * squares * (squares + 1) / 2 * config.square**2 * 2 * (ds + dt)
