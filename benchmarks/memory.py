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
    """Bytes live now.

    Call it before a variant's first call, so that what the variant keeps between calls counts as its memory.
    """
    # what waits for the collector would be freed during a call, and hide part of its peak
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_extra(work: Callable[[], Any], device: torch.device, before: int) -> float:
    """MiB at the worst moment of ``work()`` above ``before`` (which only a GPU needs)."""
    # here too: the warm-up may have left garbage
    gc.collect()
    if device.type != "cuda":
        return _cpu_peak(work) / MIB
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    highest_bytes = torch.cuda.max_memory_allocated(device)
    del result
    return (highest_bytes - before) / MIB


def _cpu_peak(work: Callable[[], Any]) -> int:
    cpu = torch.autograd.DeviceType.CPU
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiled:
        result = work()
    del result
    # The profiler's own summary has totals per operator; only the raw events say what was live at the same time.
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiled.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == cpu
    )
    live_bytes = highest_bytes = 0
    for _, change in changes:
        live_bytes += change
        highest_bytes = max(highest_bytes, live_bytes)
    return highest_bytes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what the profiler's C++ side writes to standard error at every start and stop.

    Exceptions still come through.
    """
    # The C++ side writes to the file descriptor, which replacing sys.stderr does not reach.
    standard_error = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
        os.close(nowhere)
