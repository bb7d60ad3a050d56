"""Peak extra memory of one call: what the allocator had live at worst, beyond what was live before.

The result of the call counts, the inputs do not. On a GPU this is the caching allocator's own record. On a CPU the
profiler reports every allocation and release of PyTorch's allocator, whether an operator, autograd's backward or
compiled code asked for it; scratch that a maths library takes for itself is not in it.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def baseline(device: torch.device) -> int:
    """Bytes live now. Take it before a variant's first call: what the variant then keeps between calls is billed to it."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_extra(work: Callable[[], Any], device: torch.device, before: int) -> float:
    """MiB at the worst moment of ``work()`` above ``before`` (which only a GPU needs)."""
    gc.collect()
    if device.type != "cuda":
        return _cpu_peak(work) / MIB
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    top = torch.cuda.max_memory_allocated(device)
    del result
    return (top - before) / MIB


def _cpu_peak(work: Callable[[], Any]) -> int:
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as found:
        result = work()
    del result
    changes = sorted((e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]" and e.device_type() == _CPU)
    live = top = 0
    for _, size in changes:
        live += size
        top = max(top, live)
    return top


_CPU = torch.autograd.DeviceType.CPU


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the profiler's C++ side writes to standard error at every start and stop; exceptions still come through."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
