"""What the kernels and those who call them share. Importing this needs no Triton."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
"""Triton runs kernels as Python on the host. It decides when a kernel is defined, so set TRITON_INTERPRET before importing one."""

INSTALLED: bool = importlib.util.find_spec("triton") is not None
EPS = 1e-12
"""Norms up to this are those of zero vectors, in every form of every operation."""

HUBER = 0.1
"""Where the relation loss's Huber penalty turns from a parabola into a line."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the Triton kernels cannot serve tensors of ``dtype`` on ``device``, in a few words; None if they can.

    On a CPU they can only where Triton interprets: right for tests, thousands of times too slow for work.
    """
    if not INSTALLED:
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRET):
        return f"no Triton on {device.type}"
    if dtype is not None and dtype not in DTYPES:
        return f"Triton kernels take fp32, bf16, fp16, not {str(dtype).removeprefix('torch.')}"
    return None


def architecture(device: torch.device) -> int:
    """Whose cuts an NVIDIA GPU takes: 80, 90 or 100."""
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def written(dtype: torch.dtype) -> torch.dtype:
    """In what a kernel writes results of ``dtype``, to be cast by torch: the interpreter cuts bf16 off where it should round."""
    return torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype


def csr(op: str, offsets: Tensor, rows: int) -> Tensor:
    """``offsets`` of non-empty segments of ``rows`` rows, as int64 on the CPU; from a GPU that waits for it once.

    ValueError, in the name of ``op``, unless they are at least two integers that rise strictly from 0 to ``rows``.
    """
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.is_floating_point():
        raise ValueError(f"{op}: segments must be at least two integer offsets, got {offsets.dtype} {tuple(offsets.shape)}")
    offsets = offsets.to("cpu", torch.int64)
    if offsets[0] != 0 or offsets[-1] != rows or bool((offsets[1:] <= offsets[:-1]).any()):
        raise ValueError(f"{op}: segments must rise strictly from 0 to {rows}, got {offsets.tolist()[:8]}")
    return offsets


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """total = beta total + a b, in place, for batches of matrices: a rounded to the precision of b, and added up in that of ``total``."""
    if total.is_cuda and b.dtype in (torch.bfloat16, torch.float16):
        torch.baddbmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.baddbmm_(a.to(b.dtype).to(total.dtype), b.to(total.dtype), beta=beta)


class Launch:
    """A Triton kernel on a grid, with its options: the first call compiles it, later ones go straight to the driver.

    Arguments are all of the kernel's, constants included, in order. Whatever Triton would specialise on (types, None,
    constants, divisibility of integers and addresses by 16) must be the same at every call; who keeps a Launch keeps
    it for one shape, and passes addresses that are multiples of 16. It saves half of what a launch costs the host.
    """

    def __init__(self, kernel: Any, *grid: int, **options: Any):
        self.kernel, self.options = kernel, options
        self.grid = (*grid, 1, 1)[:3]
        self.compiled: Any = None  # Triton's own account of the kernel: registers, shared memory
        self._ready: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self._ready is not None:
            self._ready(*arguments)
            return
        self.compiled = self.kernel[self.grid](*arguments, **self.options)
        if not INTERPRET:  # the interpreter compiles nothing
            self._ready = self.compiled[self.grid]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.fn.__name__
