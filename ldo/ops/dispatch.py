"""Which implementation serves a call, and in what precision it computes. Each choice is logged once."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

log = logging.getLogger("ldo.ops")


def choose_form(op: str, impl: str, available: Collection[str], default: str, why: str) -> str:
    """The form that ``impl`` stands for: "auto" gives ``default``, and the log says ``why``.

    ValueError if ``op`` does not have that form here.
    """
    # a tracer cannot follow the log
    if impl == "auto":
        if not torch.compiler.is_compiling():
            _say(op, default, why)
        return default
    if impl not in available:
        raise ValueError(f"{op}: impl={impl!r} is not available; choose auto or one of {', '.join(available)} ({why})")
    return impl


def choose_triton(
    op: str, impl: str, device: torch.device, missing: str | None, forms: tuple[str, ...], what: str
) -> str:
    """``choose_form`` for an operation with Triton kernels.

    "auto" takes the kernels on a GPU, else the last of the PyTorch ``forms``; ``what`` describes that one in the log.
    ``missing``: why the kernels cannot serve this call, or None. "auto" does not take kernels that Triton would only
    interpret.
    """
    available = forms if missing else (*forms, "triton")
    if missing is None and device.type == "cuda":
        return choose_form(op, impl, available, "triton", "fused kernels")
    why_not = missing or "Triton only interprets here"
    return choose_form(op, impl, available, forms[-1], f"{what}; {why_not}")


# Devices that have autocast. torch's own question cannot be traced by torch.compile of torch 2.11.
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def as_given(device: torch.device) -> AbstractContextManager:
    """A context without autocast on ``device``, so that a form computes in the dtypes that it chose.

    It costs next to nothing if autocast is off.
    """
    kind = device.type
    if kind not in AUTOCAST:
        return nullcontext()
    # A backward is compiled together with its forward, so what is on then says nothing about where it will run.
    if torch.is_autocast_enabled(kind) or torch.compiler.is_compiling():
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@cache
def _say(op: str, impl: str, why: str) -> None:
    log.info("%s: %s (%s)", op, impl, why)
