"""What the kernels and their callers share. Importing this needs no Triton."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton runs kernels as Python on the host. It reads TRITON_INTERPRET when a kernel is defined, not later."""

INSTALLED: bool = importlib.util.find_spec("triton") is not None

EPS = 1e-12
"""Vectors with a norm up to this count as zero, in every form of every operation."""

HUBER = 0.1
"""Where the relation loss's Huber penalty turns from a parabola into a line."""

WORKSPACE = 256 * 2**20
"""Bytes of the pair matrix A that the relation kernels hold at a time."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the Triton kernels cannot take tensors of ``dtype`` on ``device``, in a few words; None if they can.

    On a CPU they can only if Triton interprets: correct, and good for tests, but thousands of times too slow for work.
    """
    if not INSTALLED:
        return "triton is not installed"
    interpreted = device.type == "cpu" and INTERPRET
    if device.type != "cuda" and not interpreted:
        return f"no Triton on {device.type}"
    if dtype is not None and dtype not in TRITON_DTYPES:
        return f"Triton kernels take fp32, bf16, fp16, not {str(dtype).removeprefix('torch.')}"
    return None


def architecture(device: torch.device) -> int:
    """The architecture whose configurations an NVIDIA GPU takes: 80, 90 or 100."""
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def written(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes results of ``dtype``, which torch then casts.

    The interpreter truncates to bf16 where it should round, so there bf16 results are written as fp32.
    """
    return torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype


def csr(op: str, offsets: Tensor, rows: int) -> Tensor:
    """``offsets`` of non-empty segments of ``rows`` rows, as int64 on the CPU; a copy from a GPU waits for it once.

    ValueError, in the name of ``op``, unless they are at least two integers that rise strictly from 0 to ``rows``.
    """
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.is_floating_point():
        raise ValueError(
            f"{op}: segments must be at least two integer offsets, got {offsets.dtype} {tuple(offsets.shape)}"
        )
    offsets = offsets.to("cpu", torch.int64)
    rises = bool((offsets[1:] > offsets[:-1]).all())
    if offsets[0] != 0 or offsets[-1] != rows or not rises:
        raise ValueError(f"{op}: segments must rise strictly from 0 to {rows}, got {offsets.tolist()[:8]}")
    return offsets


def add_product(total: Tensor, left: Tensor, right: Tensor, beta: int = 1) -> None:
    """total = beta total + left right, in place, for batches of matrices.

    ``left`` is rounded to the precision of ``right``; the products are added up in the precision of ``total``.
    """
    if total.is_cuda and right.dtype in (torch.bfloat16, torch.float16):
        torch.baddbmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        # rounded as above first, since a CPU has no half-precision product that adds up in fp32
        total.baddbmm_(left.to(right.dtype).to(total.dtype), right.to(total.dtype), beta=beta)


class Launch:
    """A Triton kernel on a grid, with its options. The first call compiles it; later ones go straight to the driver.

    Pass all arguments of the kernel in order, constants included. Everything that Triton specialises on (types, None,
    constants, divisibility of integers and addresses by 16) must be the same at every call. So keep a Launch for one
    shape only, and pass addresses that are multiples of 16. This saves half of what a launch costs the host.
    """

    def __init__(self, kernel: Any, *grid: int, **options: Any):
        self.kernel = kernel
        self.options = options
        self.grid = (*grid, 1, 1)[:3]
        self.compiled: Any = None  # Triton's record of the kernel: registers, shared memory
        self._ready: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self._ready is not None:
            self._ready(*arguments)
            return
        self.compiled = self.kernel[self.grid](*arguments, **self.options)
        # the interpreter compiles nothing
        if not INTERPRET:
            self._ready = self.compiled[self.grid]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__
