"""Variants made from plain functions: one pass of them, compiled, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Unavailable(Exception):
    """A variant that this machine cannot run; its message says why."""


def passes(function: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    """``function(x, *rest)`` as a variant: its value without autograd, or the gradient of its sum in x."""

    def forward(x: Tensor, *rest: Any) -> Tensor:
        with torch.no_grad():
            return function(x, *rest)

    def both(x: Tensor, *rest: Any) -> Tensor:
        # a fresh leaf: repeated calls on one would keep its autograd graph alive
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, *rest).sum(), leaf)[0]

    return {"fwd": forward, "fwd+bwd": both}[kind]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the one shape at hand. ``Bench.measure`` forgets earlier shapes first."""
    # Code for any shape would be slower; a baseline should be as fast as torch.compile can make it.
    return torch.compile(function, dynamic=False)


def graphed(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``work`` as a variant whose launches cost the host nothing: one CUDA graph for each input set, replayed."""
    captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def replay(first: Tensor, *rest: Any) -> Tensor:
        if not first.is_cuda:
            raise Unavailable("CUDA graphs need a GPU")
        # A graph has the addresses of its inputs built in, so that an input set is known by its first tensor's.
        address = first.data_ptr()
        if address not in captured:
            # First calls compile and allocate workspaces, neither of which a capture allows.
            for _ in range(2):
                work(first, *rest)
            torch.cuda.synchronize(first.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = work(first, *rest)
            captured[address] = graph, result
        graph, result = captured[address]
        graph.replay()
        return result

    return replay
