"""The clock of the benchmarks: interleaved timing, and the limits of the machine that it measures.

Works run in turn (A B C A B C ...), each turn on the next of several input sets, so that neither a drifting clock nor a
warm cache favours one of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch


def rotation(bytes_per_set: int, device: torch.device) -> int:
    """How many input sets: enough to overflow the L2 four times, within 4 GiB, from 2 to 8; 2 on a CPU."""
    if device.type != "cuda":
        return 2
    cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    enough = math.ceil(4 * cache_bytes / bytes_per_set)
    return max(2, min(enough, 2**32 // bytes_per_set, 8))


def seconds(work: Callable[[], Any], device: torch.device, repeat: int) -> list[float]:
    """Seconds of each repeat, after three unmeasured ones."""
    # compilation, first allocations and a clock that is still rising belong to no measurement
    for _ in range(3):
        work()
    return [elapsed for (elapsed,) in rounds([lambda _: work()], [()], device, repeat)]


def rounds(
    works: Sequence[Callable[[Any], Any]], inputs: Sequence[Any], device: torch.device, repeat: int
) -> list[list[float]]:
    """Seconds [repeat][work], the works in turn and the input sets in turn. A GPU is waited for once, at the end."""
    if device.type != "cuda":
        return _cpu_rounds(works, inputs, repeat)
    marks = []
    torch.cuda.synchronize(device)
    for turn in range(repeat):
        row = []
        for work in works:
            # Events, not the host's clock: a wait after every call would add the time of its launches to each.
            start = torch.cuda.Event(enable_timing=True)
            finish = torch.cuda.Event(enable_timing=True)
            start.record()
            work(inputs[turn % len(inputs)])
            finish.record()
            row.append((start, finish))
        marks.append(row)
    torch.cuda.synchronize(device)
    return [[start.elapsed_time(finish) / 1e3 for start, finish in row] for row in marks]


def _cpu_rounds(works: Sequence[Callable[[Any], Any]], inputs: Sequence[Any], repeat: int) -> list[list[float]]:
    samples = []
    for turn in range(repeat):
        row = []
        for work in works:
            started = time.perf_counter()
            work(inputs[turn % len(inputs)])
            row.append(time.perf_counter() - started)
        samples.append(row)
    return samples


@cache
def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of torch.matmul on random data: 8192^3 on a GPU, 2048^3 on a CPU."""
    size, repeat = (8192, 20) if device.type == "cuda" else (2048, 5)
    # Random data, not zeros: a GPU multiplies zeros with less power and so at a higher clock.
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / statistics.median(seconds(lambda: left @ right, device, repeat)) / 1e12


@cache
def copy_gbps(device: torch.device) -> float:
    """Measured device-to-device copy, bytes read plus bytes written: 2 GiB each way on a GPU, 256 MiB on a CPU."""
    size, repeat = (2**31, 20) if device.type == "cuda" else (2**28, 5)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source), device, repeat)) / 1e9
